"""What the command `edit` does: read the changes off the command line, write the edited model, say what was done."""

import re
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from transect.errors import InputError
from transect.view.commit import PARTS, Changes, Committed, Removal, check_target, commit
from transect.view.view import View


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """The command line of `edit`."""

    model: str
    remove: tuple[str, ...]
    order: str | None
    swap: tuple[str, ...]
    repeat: tuple[str, ...]
    output: Path
    dtype: str
    revision: str | None
    trust_remote_code: bool


def edit_model(request: Request) -> Committed:
    """Load a model, change it, write it as a model folder that was loaded again and compared, and say so."""
    from transformers.utils import logging

    changes = Changes(
        removed=tuple(_removal(word) for word in request.remove),
        order=None if request.order is None else _numbers(request.order, "--order", "0,2,1"),
        swapped=tuple(_swap(word) for word in request.swap),
        repeated=tuple(_pair(word, ":", "--repeat", "3:2 for layer 3 twice in a row") for word in request.repeat),
    )
    if changes == Changes():
        raise InputError("nothing to change; give --remove, --swap, --order or --repeat")
    check_target(request.output)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    view = View.load(request.model, request.revision, request.dtype, "cpu", trust_remote_code=request.trust_remote_code)
    done = commit(view, changes, request.output)
    _say(view, changes, done, Console())
    return done


def _say(view: View, changes: Changes, done: Committed, console: Console) -> None:
    for words in changes.words(view.num_layers).split("; "):
        console.print(words, highlight=False)
    for name in done.weights:
        console.print(f"silenced {name}", highlight=False)
    what = "logits" if view.has_head else "last hidden states"
    same = f"reloaded: {what} are the temporary edit's to the last bit"
    console.print(same, highlight=False)
    console.print(f"the edited model is in {done.folder}", highlight=False, soft_wrap=True)


def _removal(word: str) -> Removal:
    part, _, place = word.partition(":")
    if part not in PARTS:
        raise InputError(f"--remove {word!r}: unknown part {part!r}; parts are {', '.join(PARTS)}, as in ffn:3")
    inner = part in ("head", "expert")
    form, example = (r"(\d+)\.(\d+)", f"{part}:3.0 for {part} 0 of layer 3") if inner else (r"(\d+)", f"{part}:3")
    found = re.fullmatch(form, place, flags=re.ASCII)
    if found is None:
        raise InputError(f"--remove {word!r} is not understood; write {example}")
    layer, *index = map(int, found.groups())
    if part == "expert":
        return Removal(part, layer, expert=index[0])
    return Removal(part, layer, head=index[0] if inner else None)


def _swap(word: str) -> tuple[int, int]:
    first, second = _pair(word, ",", "--swap", "4,5")
    if first == second:
        raise InputError(f"--swap {word!r} names one layer twice; give two layers, as in 4,5")
    return first, second


def _pair(word: str, mark: str, option: str, example: str) -> tuple[int, int]:
    found = re.fullmatch(rf"(\d+){mark}(\d+)", word, flags=re.ASCII)
    if found is None:
        raise InputError(f"{option} {word!r} is not understood; write {example}")
    return int(found[1]), int(found[2])


def _numbers(word: str, option: str, example: str) -> tuple[int, ...]:
    if re.fullmatch(r"\d+(,\d+)*", word, flags=re.ASCII) is None:
        raise InputError(f"{option} {word!r} is not understood; write all layers that run, as in {example}")
    return tuple(map(int, word.split(",")))
