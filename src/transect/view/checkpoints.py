"""Folders that hold checkpoints of one training run: which there are, in which order, at which step."""

import re
from pathlib import Path

_TOLD = re.compile(r"(?<![a-z])(?:step|checkpoint|ckpt|iter)[-_=]?([0-9]{1,18})(?=$|[-_][a-z])", re.IGNORECASE)
_SIGNS = ("config.json", "checkpoint.json", "state/model")  # any: a damaged one of a run is not passed over
_BARE = re.compile(r"[0-9]{1,18}")


def step_of(name: str | None) -> int | None:
    """The training step that a checkpoint's or revision's name tells; None where it tells none, or more than one.

    A step follows the word step, checkpoint, ckpt or iter, as in step1000, step_1000, checkpoint-500, iter_0001000 and
    stage1-step1000-tokens4B, or is all of the name, as in 0005. Other numbers (v2, epoch-3) are no steps.
    """
    if name is None:
        return None
    if _BARE.fullmatch(name):
        return int(name)
    told = _TOLD.findall(name)
    return int(told[0]) if len(told) == 1 else None


def in_order(name: str) -> tuple:
    """What names of checkpoints are sorted by: their step; without one, after all others, by name and its numbers."""
    step = step_of(name)
    words = re.split(r"([0-9]+)", name)
    return step is None, step or 0, [int(word) if place % 2 else word for place, word in enumerate(words)]


def checkpoints(path: Path) -> dict[str, Path]:
    """The model folders inside a folder, or inside its `checkpoints` where it has one, by name, in their order.

    Those that are being written, whose names begin with a dot, are none.
    """
    inside = path / "checkpoints"
    inside = inside if inside.is_dir() else path
    if not inside.is_dir():
        return {}
    whole = (entry for entry in inside.iterdir() if not entry.name.startswith("."))
    found = [entry for entry in whole if any((entry / name).exists() for name in _SIGNS)]
    return {entry.name: entry for entry in sorted(found, key=lambda entry: in_order(entry.name))}


def named(names: dict[str, Path], revision: str | int) -> str | None:
    """The checkpoint of this name, or else the only one whose step is that number; None where there is none."""
    if (name := str(revision)) in names:
        return name
    step = int(name) if _BARE.fullmatch(name) else None
    same = [name for name in names if step is not None and step_of(name) == step]
    return same[0] if len(same) == 1 else None


def last(names: dict[str, Path]) -> str:
    """The checkpoint with the highest step; where no name tells a step, the last one."""
    told = [name for name in names if step_of(name) is not None]
    return (told or list(names))[-1]


def home(path: Path) -> tuple[Path, str | None]:
    """The folder that a model folder's name stands for, and the name of the checkpoint it is in there.

    For `runs/a/checkpoint-500` and `runs/a/checkpoints/500` that is `runs/a`; for other folders the folder itself.
    """
    path = path.resolve()
    if step_of(path.name) is None:
        return path, None
    above = path.parent.parent if path.parent.name == "checkpoints" else path.parent
    return (above, path.name) if above.name else (path, None)
