"""What a measurement will do before it does it: passes over the text, layers and probes of each, tokens and memory."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from transect import memory, registry
from transect.data import Dataset, assign, error_units
from transect.data.hashing import keyed
from transect.data.objective import with_targets
from transect.data.split import FIT, SCORE, TUNE
from transect.errors import InputError
from transect.probes.base import Probe, Reading, Setting
from transect.view.variants import Variant, planned_evaluations
from transect.view.view import View

SHARE = 0.6  # of the free memory that states may take; the rest is for activations, solving and saving
TRAIN_BATCH = 64
BATCH_WORK = 1e13  # operations in a batch of edited models


@dataclass(frozen=True, slots=True, eq=False)
class Stage:
    """One run through some sequences: their phase, in which order, in batches of which size."""

    phase: str
    sequences: np.ndarray
    batch_size: int
    epoch: int = 0  # of a train stage, counted from 0
    again: bool = False  # whether these sequences were seen in an earlier stage


@dataclass(frozen=True, slots=True, eq=False)
class Pass:
    """One pass over the text: which probes see which layers."""

    probes: tuple[Probe, ...]
    settings: tuple[Setting, ...]
    data: Dataset
    stages: tuple[Stage, ...]
    bytes: int
    full_width: bool
    trainings: tuple[int, ...] = ()  # of edited models: what each takes, as tokens through the whole model

    @property
    def edits(self) -> int:
        """How many edited models run."""
        return len(self._variants())

    def layers_run(self) -> int:
        """Layers that a batch runs in the edit stage, with what edited models share run once."""
        return planned_evaluations(self._variants(), self.settings[0].view.num_layers)[0]

    def _variants(self) -> tuple[Variant, ...]:
        pairs = zip(self.probes, self.settings, strict=True)
        return tuple(v for probe, own in pairs if len(own.edit_sequences) for v in probe.variants(None, own))

    def watches(self, probe: Probe, stage: Stage) -> bool:
        """Whether a probe looks on in a stage: one without a reading of its own sees every document once."""
        if stage.phase == "train":
            return stage.epoch < probe.epochs()
        guest = probe.reading(self.settings[0].view) == Reading() and len(self.probes) > 1
        return not (guest and stage.again)


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
        """Tokens that go through the whole model in all passes, edited models with the layers they do not share."""
        return sum(sum(item.trainings) for item in self.passes) + sum(
            int(self._stage_tokens(stage) * (item.layers_run() / self.view.num_layers if stage.phase == "edit" else 1))
            for item in self.passes
            for stage in item.stages
        )

    def _stage_tokens(self, stage: Stage) -> int:
        return int(self.data.lengths[stage.sequences].sum())

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
            parts = ", ".join(f"{s.phase} {self._stage_tokens(s):,}" for s in item.stages)
            lines.append(f"pass {number}  {names}: layers {layers[0]}-{layers[-1]}, tokens {parts}")
            if item.edits:
                lines.append(f"        {item.edits:,} edited models, {item.layers_run():,} layers for each batch")
            if item.trainings:
                taken = f"{len(item.trainings):,} trainings of edited models, as long as {sum(item.trainings):,} tokens"
                lines.append(f"        {taken}")
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
        """Bytes of one batch: the stream of every layer, and the sites of the widest layer with their work space.

        With edits also the layers' outputs of two passes, and three times the logits.
        """
        view = self.view
        layers = [sum(widths.values()) for widths in view.proof.widths]
        tokens = self.batch_size * self.data.seq_len
        numbers = 2 * max(layers) + (view.num_layers + 1) * view.width
        if any(item.edits for item in self.passes):
            numbers += 2 * view.num_layers * view.width + 3 * view.vocab_size * view.has_head
        return tokens * numbers * max(4, view.dtype.itemsize)


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
    for probe in chosen:
        if (reason := probe.refusal(view)) is not None:
            raise InputError(f"{probe.name}: {reason}")
    _check_data(view, data)
    free = memory.available(view.device) if free is None else free
    passes: list[Pass] = []
    for reading, members in _companies(chosen, view):
        passes += _passes(view, members, data, reading, batch_size, seed, free)
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


def _companies(probes: tuple[Probe, ...], view: View) -> list[tuple[Reading, list[Probe]]]:
    """Which probes share passes: those with the same reading, and guests that take any pass over the plain text.

    A probe with edits goes alone, so that its layer evaluations are its own.
    """
    companies: list[tuple[Reading, list[Probe]]] = []
    guests = []
    for probe in probes:
        reading = probe.reading(view)
        if reading == Reading():
            guests.append(probe)
            continue
        same = next((members for other, members in companies if other == reading and not reading.edit_tokens), None)
        if same is None:
            companies.append((reading, [probe]))
        else:
            same.append(probe)
    hosts = [members for reading, members in companies if reading.observes and _plain(reading)]
    if guests and hosts:
        hosts[0].extend(guests)
    elif guests:
        companies.insert(0, (Reading(), guests))
    return companies


def _plain(reading: Reading) -> bool:
    return not reading.edit_tokens and (reading.targets is None or not reading.targets.changes_input)


def _passes(
    view: View, probes: list[Probe], data: Dataset, reading: Reading, batch_size: int, seed: int, free: int
) -> list[Pass]:
    units, keys, unit_name = error_units(data)
    shown = data if reading.targets is None else with_targets(data, reading.targets, view.vocab_size, seed)
    stages = _stages(probes, data, reading, batch_size, seed)
    fitted = [stage.sequences for stage in stages if stage.phase == "fit"]
    edited = [stage.sequences for stage in stages if stage.phase == "edit"]
    whole = Setting(view, tuple(range(view.num_layers)), shown, units, keys, unit_name, seed)
    whole = replace(
        whole,
        fit_units=len(np.unique(units[fitted[0]])) if fitted else 0,
        edit_sequences=edited[0] if edited else whole.edit_sequences,
        train_sequences=_canonical(data, _unscored(data, reading, seed), seed),
    )
    fixed = sum(probe.memory(whole) for probe in probes if not probe.by_layer)
    room = int(SHARE * free)
    if fixed > room:
        names = ", ".join(probe.name for probe in probes if not probe.by_layer)
        raise InputError(
            f"not enough memory: {names} on this text takes {memory.readable(fixed)} for sums, "
            f"{memory.readable(room)} may be used; {_savings(probe for probe in probes if not probe.by_layer)}"
        )
    groups = _layer_groups([probe for probe in probes if probe.by_layer], whole, room - fixed)
    passes = []
    for number, group in enumerate(groups):
        members = tuple(probe for probe in probes if probe.by_layer or number == 0)
        settings = tuple(replace(whole, layers=group) if probe.by_layer else whole for probe in members)
        size = sum(probe.memory(setting) for probe, setting in zip(members, settings, strict=True))
        full = any(probe.wants_padding() for probe in members)
        pairs = zip(members, settings, strict=True)
        trainings = tuple(tokens for probe, setting in pairs for tokens in probe.trainings(setting))
        item = Pass(members, settings, shown, stages, size, full, trainings)
        passes.append(replace(item, stages=tuple(_short(stage, item) for stage in stages)))
    return passes


def _short(stage: Stage, item: Pass) -> Stage:
    """An edit stage in batches so small that what a stop loses, one batch, is a minute or so; others as they are."""
    if stage.phase != "edit":
        return stage
    view = item.settings[0].view
    layers = sum(p.numel() for layer in view.layers for p in layer.parameters()) / view.num_layers * item.layers_run()
    heads = view.vocab_size * view.width * (item.edits + 1) * view.has_head
    sequences = int(BATCH_WORK / (2 * (layers + heads) * item.data.seq_len))
    return replace(stage, batch_size=max(1, min(stage.batch_size, sequences)))


def _stages(probes: list[Probe], data: Dataset, reading: Reading, batch_size: int, seed: int) -> tuple[Stage, ...]:
    """fit, tune, then the training epochs over both, then score; then edits on a sample of what was scored."""
    everything = np.arange(data.num_sequences)
    if reading.rounds > 1 or reading.canonical:
        again, canonical = reading.rounds > 1, _canonical(data, everything, seed)
        first = (Stage("fit", canonical, batch_size),) if again else ()
        return *first, Stage("score", canonical, batch_size, again=again)
    stages, scored, rule = [], everything, reading.split
    if rule is not None:
        part = assign(data, rule.score_fraction, rule.tune_fraction, rule.method, seed).part
        scored = np.flatnonzero(part == SCORE)
    if rule is not None and reading.fits:
        for phase, code in (("fit", FIT), ("tune", TUNE)):
            stages.append(Stage(phase, _longest_first(data, np.flatnonzero(part == code)), batch_size))
        seen = _unscored(data, reading, seed)
        for epoch in range(max(probe.epochs() for probe in probes)):
            stages.append(Stage("train", _canonical(data, seen, seed + 1 + epoch), TRAIN_BATCH, epoch))
    if reading.observes:
        stages.append(Stage("score", _longest_first(data, scored), batch_size))
    if reading.edit_tokens:
        stages.append(Stage("edit", _sampled(data, scored, reading.edit_tokens, seed), batch_size))
    return tuple(stages)


def _unscored(data: Dataset, reading: Reading, seed: int) -> np.ndarray:
    """The sequences of fit and tune; none without a split."""
    rule = reading.split
    if rule is None:
        return np.zeros(0, dtype=np.int64)
    return np.flatnonzero(assign(data, rule.score_fraction, rule.tune_fraction, rule.method, seed).part != SCORE)


def _canonical(data: Dataset, sequences: np.ndarray, seed: int) -> np.ndarray:
    """The sequences by a hash of (seed, token ids), equal ones by their documents' hashes and their places in these.

    Equal ones are not the same: each document masks its own places.
    """
    cuts = np.bincount(data.document, minlength=data.num_documents)
    document = data.document[sequences]
    place = sequences - (np.cumsum(cuts) - cuts)[document]
    return sequences[np.lexsort((place, data.document_hash[document], keyed(data.sequence_hash[sequences], seed)))]


def _longest_first(data: Dataset, sequences: np.ndarray) -> np.ndarray:
    return sequences[np.argsort(-data.lengths[sequences], kind="stable")]


def _sampled(data: Dataset, sequences: np.ndarray, tokens: int, seed: int) -> np.ndarray:
    """Whole sequences in their canonical order, up to so many tokens, at least one."""
    order = _canonical(data, sequences, seed)
    within = int(np.searchsorted(np.cumsum(data.lengths[order]), tokens, side="right"))
    return _longest_first(data, order[: max(1, within)])


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
                f"{memory.readable(max(room, 0))} may be used; {_savings(probes)}"
            )
        groups.append(current)
        current = (layer,)
        if sum(probe.memory(replace(whole, layers=current)) for probe in probes) > room:
            raise InputError(f"not enough memory for layer {layer} of {whole.view.name}; {_savings(probes)}")
    return [*groups, current]


def _savings(probes: Iterable[Probe]) -> str:
    """What to do about sums that do not fit."""
    return ", or ".join(dict.fromkeys(probe.saving for probe in probes))


def _dtype(view: View) -> str:
    return str(view.dtype).removeprefix("torch.")
