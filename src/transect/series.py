"""What a list of models and revisions means: which checkpoints, in which order, what their rows call them."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

from transect.errors import InputError
from transect.view.checkpoints import checkpoints, step_of
from transect.view.load import Where, check_readable, located

ALL = "all"


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One model at one moment: what `View.load` takes, what its rows say, and its run folder within the output."""

    source: str
    where: Where
    revision: str | None
    model: str
    folder: str

    @property
    def label(self) -> str | None:
        """The rows' revision."""
        return self.where.label

    @property
    def step(self) -> int | None:
        """The rows' training step."""
        return step_of(self.label)

    def __str__(self) -> str:
        return self.model if self.label is None else f"{self.model}, {self.label}"


@dataclass(frozen=True, slots=True)
class Series:
    """The members in the order in which they are measured.

    `joint` says that their rows are put together from a run folder for each: always with two members or more, and when
    all checkpoints of a folder are asked for, whose number may grow.
    """

    members: tuple[Member, ...]
    joint: bool

    def check(self, trust_remote_code: bool) -> None:
        """Raise InputError when a configuration cannot be read or weights are missing, before anything is measured."""
        for member in self.members:
            check_readable(member.where, trust_remote_code)


def series_of(models: Sequence[str], revisions: Sequence[str] = ()) -> Series:
    """The members that models and revisions mean; every revision is one of every model.

    A folder of checkpoints means all of them, a run folder the last one, `all` all of either. Members of a model stand
    in order of their steps, those without one behind. Raises InputError for folders and revisions that are not there,
    and for one given twice.
    """
    for source in models:
        located(source, None)
    asked = [(source, revision) for source in models for revision in _expanded(source, revisions)]
    found = [(source, revision, located(source, revision)) for source, revision in asked]
    _refuse_twice(found)
    names = _names({where.home: where.name for _, _, where in found})
    order = list(names)
    found.sort(key=lambda one: (order.index(one[2].home), step_of(one[2].label) is None, step_of(one[2].label) or 0))
    growing = {where.home for source, _, where in found if _all_meant(source, revisions)}
    folders = _folders(names.values())
    labels = {home: _folders(where.label or "" for _, _, where in found if where.home == home) for home in names}
    members = []
    for source, revision, where in found:
        parts = [folders[names[where.home]]] if len(names) > 1 else []
        parts += [labels[where.home][where.label or ""]] if where.home in growing or len(labels[where.home]) > 1 else []
        members.append(
            Member(source=source, where=where, revision=revision, model=names[where.home], folder="/".join(parts))
        )
    return Series(tuple(members), bool(growing) or len(members) > 1)


def _refuse_twice(found: list[tuple[str, str | None, Where]]) -> None:
    times = Counter((where.home, where.label) for _, _, where in found)
    for source, _, where in found:
        if times[where.home, where.label] > 1:
            label = "" if where.label is None else f" at {where.label}"
            raise InputError(f"{source}{label} is given twice; give each model and revision once")


def _all_meant(source: str, revisions: Sequence[str]) -> bool:
    """Whether a source means every checkpoint of a folder."""
    path = Path(source)
    held = path.is_dir() and not (path / "config.json").is_file() and not (path / "checkpoints").is_dir()
    return ALL in revisions or (not revisions and held and not any(path.glob("*.gguf")) and bool(checkpoints(path)))


def _expanded(source: str, revisions: Sequence[str]) -> list[str | None]:
    path = Path(source)
    local = path.exists()
    held = checkpoints(path)
    every: list[str | None] = [name for name, entry in held.items() if not _points_beside(entry)]
    if _all_meant(source, revisions):
        if not held and local:
            raise InputError(f"{source} holds no checkpoints, so --revision {ALL} means nothing; leave it out")
        if not held:
            raise InputError(f"--revision {ALL} is for a folder of checkpoints; name the revisions of {source}")
        return [*every, *(name for name in revisions if name != ALL and name not in every)]
    if local and not held and revisions:
        raise InputError(f"{source} is a single model, so it has no revision {revisions[0]!r}; leave --revision out")
    missing = [name for name in revisions if local and name not in held]
    if missing:
        raise InputError(f"{source} has no checkpoint {missing[0]!r}; it has {', '.join(held)}")
    return list(revisions) or [None]


def _points_beside(entry: Path) -> bool:
    """Whether a checkpoint is another name for one beside it, as `latest` is."""
    return entry.is_symlink() and entry.resolve().parent == entry.parent.resolve()


def _names(given: dict[str, str]) -> dict[str, str]:
    """A name for each home: its own, with folders above it where two would have the same."""
    names, depth = dict(given), 1
    while len(set(names.values())) < len(names):
        depth += 1
        times = Counter(names.values())
        for home, name in names.items():
            if times[name] > 1:
                names[home] = "/".join(PurePath(home).parts[-depth:])
    return names


def _folders(names: Iterable[str]) -> dict[str, str]:
    """The folder of each name, as a file system takes it."""
    folders: dict[str, str] = {}
    for name in dict.fromkeys(names):
        plain, number = name.replace("/", "_") or "model", 1
        folder = plain
        while folder in folders.values():
            number += 1
            folder = f"{plain}-{number}"
        folders[name] = folder
    return folders
