"""Write an edit as a Hugging Face checkpoint that gives the logits of the temporary edit, to the last bit."""

import json
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel

from transect.errors import InputError
from transect.results import make_folder
from transect.view import edits
from transect.view.discover import no_cache
from transect.view.load import align
from transect.view.own import dropped_penalties
from transect.view.surgery import InexpressibleError, Values, rebuilt, refuse_shared, silenced
from transect.view.tensors import logits_of

if TYPE_CHECKING:
    from transect.view.view import View

PARTS = ("attn", "ffn", "head", "expert", "layer", "ffn2", "inner_ffn")

LENGTHS = (1, 7, 43)
"""Positions of the rows on which the checkpoint is compared, as far as the model takes them."""


@dataclass(frozen=True, slots=True)
class Removal:
    """One part that is taken out: one of `PARTS`, of a `head` or an `expert` the one numbered."""

    part: str
    layer: int
    head: int | None = None
    expert: int | None = None

    @property
    def index(self) -> int | None:
        """Which head or expert."""
        return self.expert if self.part == "expert" else self.head

    def __str__(self) -> str:
        whole = f"removed {self.part} {self.layer}"
        return whole if self.index is None else f"removed {self.part} {self.index} of {self.layer}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Changes:
    """A lasting edit. Every number names a layer of the model as it was loaded, wherever other changes have moved it.

    The layers run in `order` (default: as they are); then each of `swapped` exchanges two layers, each (layer, times)
    of `repeated` runs a layer so many times in a row, and removed layers are left out. Removed parts move with theirs.
    """

    removed: tuple[Removal, ...] = ()
    order: tuple[int, ...] | None = None
    swapped: tuple[tuple[int, int], ...] = ()
    repeated: tuple[tuple[int, int], ...] = ()

    def executed(self, count: int) -> tuple[int, ...]:
        """The order in which the layers of a model with `count` layers run; raises InputError when there is none."""
        self._check(count)
        layers = list(range(count) if self.order is None else self.order)
        for first, second in self.swapped:
            exchange = {first: second, second: first}
            layers = [exchange.get(layer, layer) for layer in layers]
        for repeated, times in self.repeated:
            _check_runs(repeated, layers)
            layers = [other for layer in layers for other in [layer] * (times if layer == repeated else 1)]
        for removal in self.removed:
            if removal.part == "layer":
                _check_runs(removal.layer, layers)
                layers = [layer for layer in layers if layer != removal.layer]
        if not layers:
            raise InputError(f"no layer of 0 to {count - 1} is left to run; keep at least one")
        for removal in self.removed:
            if removal.part != "layer":
                _check_runs(removal.layer, layers)
        return tuple(layers)

    def _check(self, count: int) -> None:
        for removal in self.removed:
            if removal.part not in PARTS:
                raise InputError(f"unknown part {removal.part!r}; parts are {', '.join(PARTS)}")
        for _, times in self.repeated:
            if times < 0:
                raise InputError(f"times is {times}; a layer can be run 0 or more times")
        numbers = [*(self.order or ()), *(number for pair in self.swapped for number in pair)]
        numbers += [*(layer for layer, _ in self.repeated), *(removal.layer for removal in self.removed)]
        for number in numbers:
            if not 0 <= number < count:
                raise InputError(f"layer {number} does not exist; the model has layers 0 to {count - 1}")

    def words(self, count: int) -> str:
        """The changes in words, as in `removed ffn 3; swapped 4 and 5; layers run 0 1 2 3 5 4`."""
        words = [str(removal) for removal in self.removed]
        words += [f"swapped {first} and {second}" for first, second in self.swapped]
        words += [f"repeated {layer} to run {times} times" for layer, times in self.repeated]
        order = self.executed(count)
        if order != tuple(range(count)):
            words.append(f"layers run {' '.join(map(str, order))}")
        return "; ".join(words)


@dataclass(frozen=True, slots=True)
class Committed:
    """What was written: the folder, the note in it, the order of layers, the changed weights, the tokens compared."""

    folder: Path
    note: str
    order: tuple[int, ...]
    weights: tuple[str, ...]
    tokens: int


def commit(view: "View", changes: Changes, folder: str | os.PathLike[str]) -> Committed:
    """Write the edited model and its tokenizer as a new model folder; the view itself stays as it is.

    The folder reloads in the view's dtype to logits (without a head: last hidden states) that equal those of the same
    edit made with `transect.edits`, on seeded random tokens; else nothing is written. A removed `attn` or `ffn` has its
    last linear map and bias at zero, or the weight of the branch's own output norm at the number that silences it; a
    removed head the columns that read it, a removed expert its slice of every stacked weight; repeated layers are
    copies. Another order of layers leaves the penalties of one of our models behind, and the note says so: they were
    set for the layers that were there. Raises InputError for changes that do not fit the model, that its architecture
    cannot express, and for a folder that is not empty or cannot be written to.
    Cost: memory for two models, five to ten short forward passes for each removed part.
    """
    target = check_target(folder)
    order = changes.executed(view.num_layers)
    if not changes.words(view.num_layers):
        raise InputError("nothing to change: name a part to remove, or another order of layers")
    with whole_folder(target) as partial:
        try:
            refuse_shared(view)
            align(view.model)
            batches = _batches(view)
            with _temporary(view, changes, order):
                expected = [_result(view.model, ids) for ids in batches]
            values: Values = {}
            for removal in changes.removed:
                if removal.part != "layer":
                    values = silenced(view, removal.part, removal.layer, removal.index, values)
            note = _note(view, changes, order)
            _save(view, order, values, note, partial)
            _compare(view, partial, batches, expected)
        except InexpressibleError as why:
            kind = view.model.config.model_type
            raise InputError(
                f"{kind} cannot express this edit of {view.name} ({changes.words(view.num_layers)}): {why}; "
                "nothing was written"
            ) from why
    return Committed(target, note, order, tuple(values), sum(ids.numel() for ids in batches))


def check_target(folder: str | os.PathLike[str]) -> Path:
    """The folder, resolved; raises InputError when it is there and not an empty folder."""
    target = Path(folder).resolve()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"{folder} is there and not an empty folder; give a folder that is not there yet")
    return target


def _check_runs(layer: int, layers: list[int]) -> None:
    if layer not in layers:
        raise InputError(f"layer {layer} does not run, so nothing of it can be removed or repeated; drop one change")


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A folder beside the target that takes its name when the block ends well, and is gone when it does not."""
    missing = [parent for parent in target.parents if not parent.exists()]
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        make_folder(target.parent)
        partial.mkdir()
        yield partial
        os.replace(partial, target)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        for parent in missing:
            if parent.is_dir() and not any(parent.iterdir()):
                parent.rmdir()
        if isinstance(error, (OSError, SafetensorError)):
            why = getattr(error, "strerror", None) or str(error).splitlines()[0]
            raise InputError(f"cannot write {target}: {why}; make room or give another folder") from error
        raise


@contextmanager
def _temporary(view: "View", changes: Changes, order: tuple[int, ...]) -> Iterator[None]:
    """The same changes by the context managers of `edits`."""
    with ExitStack() as stack:
        for removal in changes.removed:
            if removal.part != "layer":
                stack.enter_context(edits.remove(view, removal.part, removal.layer, removal.head, removal.expert))
        if order != tuple(range(view.num_layers)):
            stack.enter_context(edits.order(view, order))
        yield


def _batches(view: "View") -> list[Tensor]:
    """Two rows of seeded random tokens for each length."""
    generator = torch.Generator().manual_seed(0)
    lengths = sorted({min(length, view.max_positions or length) for length in LENGTHS})
    return [torch.randint(view.vocab_size, (2, length), generator=generator).to(view.device) for length in lengths]


def _result(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Logits, or the last hidden states of a model without a head."""
    with torch.no_grad():
        output = model(input_ids=ids, **no_cache(model))
    logits = logits_of(output)
    return output[0] if logits is None else logits


def _note(view: "View", changes: Changes, order: tuple[int, ...]) -> str:
    source = view.name if view.revision is None else f"{view.name} ({view.revision})"
    lost = dropped_penalties(view.model) if order != tuple(range(view.num_layers)) else []
    dropped = [f"penalties left behind: {', '.join(lost)}"] if lost else []
    return "; ".join((f"edited from {source}: {changes.words(view.num_layers)}", *dropped, *view.notes))


def _save(view: "View", order: tuple[int, ...], values: Values, note: str, folder: Path) -> None:
    rebuilt(view, order, values).save_pretrained(folder)
    if view.tokenizer is not None:
        view.tokenizer.save_pretrained(folder)
    record = json.dumps({"note": note}, ensure_ascii=False, indent=2)
    (folder / "provenance.json").write_text(record + "\n", encoding="utf-8")


def _compare(view: "View", folder: Path, batches: list[Tensor], expected: list[Tensor]) -> None:
    """Load the folder and compare to the last bit; raises InexpressibleError when it differs."""
    again = _reloaded(view, folder)
    for ids, logits in zip(batches, expected, strict=True):
        found = _result(again, ids)
        if not torch.equal(found, logits):
            apart = float((found.double() - logits.double()).abs().max())
            raise InexpressibleError(f"the checkpoint gives logits that differ by up to {apart:.3g} once reloaded")


def _reloaded(view: "View", folder: Path) -> PreTrainedModel:
    """The checkpoint, computed the way the view's model is: another way for attention or experts rounds otherwise."""
    config = view.model.config
    ways = {f"{kind}_implementation": getattr(config, f"_{kind}_implementation", None) for kind in ("attn", "experts")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", category=DeprecationWarning)
        kind: Any = type(view.model)
        model, report = kind.from_pretrained(
            folder, dtype=view.dtype, output_loading_info=True, **{name: way for name, way in ways.items() if way}
        )
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[problem]:
            raise InexpressibleError(f"once written it has {problem.replace('_', ' ')}: {min(report[problem])}")
    model.to(view.device)
    align(model)
    return model
