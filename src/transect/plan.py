"""What a measurement will do before it does it: passes over the text, layers and probes of each, tokens and memory."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from transect import memory, registry
from transect.data import Dataset, assign, error_units
from transect.data.hashing import keyed
from transect.data.split import FIT, SCORE, TUNE
from transect.errors import InputError
from transect.probes.base import Probe, Setting, SplitRule
from transect.view.view import View

SHARE = 0.6  # of the free memory that states may take; the rest is for activations, solving and saving
TRAIN_BATCH = 64


@dataclass(frozen=True, slots=True, eq=False)
class Stage:
    """One run through some sequences: their phase, in which order, in batches of which size."""

    phase: str
    sequences: np.ndarray
    batch_size: int
    epoch: int = 0  # of a train stage, counted from 0


@dataclass(frozen=True, slots=True, eq=False)
class Pass:
    """One pass over the text: which probes see which layers."""

    probes: tuple[Probe, ...]
    settings: tuple[Setting, ...]
    rule: SplitRule
    stages: tuple[Stage, ...]
    bytes: int
    full_width: bool


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """Everything `run` needs; `lines` tells it to a person."""

    view: View
    data: Dataset
    probes: tuple[Probe, ...]
    passes: tuple[Pass, ...]
    batch_size: int
    seed: int
    free: int

    @property
    def bytes(self) -> int:
        """The largest memory of the probes' states in any pass."""
        return max(item.bytes for item in self.passes)

    @property
    def tokens(self) -> int:
        """Tokens that go through the model in all passes."""
        return sum(int(self.data.lengths[s.sequences].sum()) for item in self.passes for s in item.stages)

    def lines(self) -> list[str]:
        """The plan in words."""
        data, view = self.data, self.view
        lines = [
            f"model   {view.name}: {view.num_layers} layers, width {view.width}, {view.layouts[0]}, {_dtype(view)}",
            f"text    {data.name}: {data.num_tokens:,} tokens, {data.num_documents:,} documents, "
            f"{data.num_sequences:,} sequences of up to {data.seq_len}",
        ]
        for number, item in enumerate(self.passes, 1):
            names = ", ".join(probe.name for probe in item.probes)
            layers = sorted({layer for setting in item.settings for layer in setting.layers})
            parts = ", ".join(f"{s.phase} {int(data.lengths[s.sequences].sum()):,}" for s in item.stages)
            lines.append(f"pass {number}  {names}: layers {layers[0]}-{layers[-1]}, tokens {parts}")
            lines.append(f"        memory for sums {memory.readable(item.bytes)}")
        parts = {"weights": self.weights, "sums": self.bytes, "one batch": self.activations}
        listed = " + ".join(f"{name} {memory.readable(size)}" for name, size in parts.items())
        lines.append(f"memory  {listed} = {memory.readable(sum(parts.values()))}; {memory.readable(self.free)} free")
        return lines

    @property
    def weights(self) -> int:
        """Bytes of the model's parameters, which are loaded already."""
        return sum(parameter.nbytes for parameter in self.view.model.parameters())

    @property
    def activations(self) -> int:
        """Bytes of one batch: the stream of every layer, and the sites of the widest layer with their work space."""
        view = self.view
        layers = [sum(widths.values()) for widths in view.proof.widths]
        tokens = self.batch_size * self.data.seq_len
        return tokens * (2 * max(layers) + (view.num_layers + 1) * view.width) * max(4, view.dtype.itemsize)


def make(
    view: View,
    probes: Iterable[str | Probe],
    data: Dataset,
    batch_size: int = 8,
    seed: int = 0,
    free: int | None = None,
) -> Plan:
    """Plan a measurement, with as many passes over groups of layers as the free memory asks for.

    `free` bytes are looked up when not given. Raises InputError for an unknown probe, token ids or a length the model
    does not take, too little text for the split, or too little memory for a single layer.
    """
    chosen = tuple(probe if isinstance(probe, Probe) else load_probe(probe) for probe in probes)
    if not chosen:
        raise InputError(f"no probe given; known are {', '.join(registry.available('transect.probes'))}")
    if batch_size < 1:
        raise InputError(f"batch size is {batch_size}; it is 1 or more")
    _check_data(view, data)
    free = memory.available(view.device) if free is None else free
    rules = list(dict.fromkeys(rule for probe in chosen if (rule := probe.split_rule()) is not None)) or [SplitRule()]
    passes: list[Pass] = []
    for number, rule in enumerate(rules):
        members = [p for p in chosen if p.split_rule() == rule or (number == 0 and p.split_rule() is None)]
        passes += _passes(view, members, data, rule, batch_size, seed, free)
    return Plan(view, data, chosen, tuple(passes), batch_size, seed, free)


def load_probe(name: str) -> Probe:
    """A probe with default options by its public name, or `package.module:Class`."""
    return registry.load("transect.probes", name, Probe)()  # pyright: ignore[reportAbstractUsage]


def _check_data(view: View, data: Dataset) -> None:
    import torch

    view.check_ids(torch.from_numpy(data.ids))
    limit = view.max_positions
    if limit is not None and data.seq_len > limit:
        raise InputError(f"sequences of {data.seq_len} tokens are longer than {view.name} takes; at most {limit}")


def _passes(
    view: View, probes: list[Probe], data: Dataset, rule: SplitRule, batch_size: int, seed: int, free: int
) -> list[Pass]:
    units, keys, unit_name = error_units(data)
    whole = Setting(view, tuple(range(view.num_layers)), data, units, keys, unit_name, seed)
    stages = _stages(probes, data, rule, batch_size, seed)
    fitted = [stage.sequences for stage in stages if stage.phase == "fit"]
    whole = replace(whole, fit_units=len(np.unique(units[fitted[0]])) if fitted else 0)
    fixed = sum(probe.memory(whole) for probe in probes if not probe.by_layer)
    room = int(SHARE * free)
    if fixed > room:
        names = ", ".join(probe.name for probe in probes if not probe.by_layer)
        raise InputError(
            f"not enough memory: {names} on this text takes {memory.readable(fixed)} for sums, "
            f"{memory.readable(room)} may be used; measure less text"
        )
    groups = _layer_groups([probe for probe in probes if probe.by_layer], whole, room - fixed)
    passes = []
    for number, group in enumerate(groups):
        members = tuple(probe for probe in probes if probe.by_layer or number == 0)
        settings = tuple(replace(whole, layers=group) if probe.by_layer else whole for probe in members)
        size = sum(probe.memory(setting) for probe, setting in zip(members, settings, strict=True))
        full = any(probe.wants_padding() for probe in members)
        passes.append(Pass(members, settings, rule, stages, size, full))
    return passes


def _stages(probes: list[Probe], data: Dataset, rule: SplitRule, batch_size: int, seed: int) -> tuple[Stage, ...]:
    """fit, tune, then the training epochs over both, then score; long sequences first."""
    needs_split = any(probe.split_rule() is not None for probe in probes)
    if not needs_split:
        everything = np.argsort(-data.lengths, kind="stable")
        return (Stage("score", everything, batch_size),)
    part = assign(data, rule.score_fraction, rule.tune_fraction, rule.method, seed).part
    stages = []
    for phase, code in (("fit", FIT), ("tune", TUNE)):
        stages.append(Stage(phase, _longest_first(data, part == code), batch_size))
    seen = np.flatnonzero(part != SCORE)
    for epoch in range(max(probe.epochs() for probe in probes)):
        order = np.argsort(keyed(data.sequence_hash[seen], seed + 1 + epoch), kind="stable")
        stages.append(Stage("train", seen[order], TRAIN_BATCH, epoch))
    stages.append(Stage("score", _longest_first(data, part == SCORE), batch_size))
    return tuple(stages)


def _longest_first(data: Dataset, chosen: np.ndarray) -> np.ndarray:
    index = np.flatnonzero(chosen)
    return index[np.argsort(-data.lengths[index], kind="stable")]


def _layer_groups(probes: list[Probe], whole: Setting, room: int) -> list[tuple[int, ...]]:
    if not probes:
        return [whole.layers]
    groups: list[tuple[int, ...]] = []
    current: tuple[int, ...] = ()
    for layer in whole.layers:
        wider = (*current, layer)
        if sum(probe.memory(replace(whole, layers=wider)) for probe in probes) <= room:
            current = wider
            continue
        if not current:
            need = sum(probe.memory(replace(whole, layers=(layer,))) for probe in probes)
            raise InputError(
                f"not enough memory: one layer of {whole.view.name} needs {memory.readable(need)} for its sums, "
                f"{memory.readable(max(room, 0))} may be used; give fewer elements or a projection (`project`)"
            )
        groups.append(current)
        current = (layer,)
        if sum(probe.memory(replace(whole, layers=current)) for probe in probes) > room:
            raise InputError(f"not enough memory for layer {layer} of {whole.view.name}; give fewer elements")
    return [*groups, current]


def _dtype(view: View) -> str:
    return str(view.dtype).removeprefix("torch.")
