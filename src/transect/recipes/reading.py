"""Recipe files as they stand: names, grids and where a recipe goes on from another; nothing heavy is imported."""

import difflib
import itertools
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from transect.config import read_mapping
from transect.errors import InputError

FOLDER = Path(__file__).parent
SUFFIXES = (".yaml", ".yml", ".json")
WORDS = ("name", "description", "source", "extends")
"""Keys whose text may hold the labels of a grid."""
Document = dict[str, Any]


@cache
def shipped() -> Mapping[str, Document]:
    """Every recipe of the package by name, grids expanded, as its file has it."""
    found: dict[str, Document] = {}
    for path in sorted(FOLDER.glob("*.yaml")):
        for document in documents(path):
            if document["name"] in found:
                raise ValueError(f"{path.name}: there is another recipe called {document['name']}")
            found[document["name"]] = document
    return dict(sorted(found.items()))


def chain(source: str | Path) -> list[Document]:
    """The documents that make a recipe, what it extends first.

    `source` is a shipped name or a path; so is `extends`, a path relative to the file it stands in. Raises InputError
    for an unknown name, a missing file, a file that is a grid, and recipes that extend each other.
    """
    made: list[Document] = []
    seen: list[str] = []
    here: Path | None = None
    wanted: str | None = str(source)
    while wanted is not None:
        path = _path(wanted, here)
        label = wanted if path is None else str(path.resolve())
        if label in seen:
            raise InputError(f"{source}: recipes extend each other: {' -> '.join([*seen, label])}")
        seen.append(label)
        document = _shipped(wanted) if path is None else _only(path)
        here = None if path is None else path.parent
        made.insert(0, document)
        wanted = document.get("extends")
        if wanted is not None and not isinstance(wanted, str):
            raise InputError(f"{label}: extends is {wanted!r}; it must be the name or the file of one recipe")
    return made


def documents(path: Path) -> list[Document]:
    """The recipes of one file: one, named as the file unless it says otherwise, or one for each point of its `grid`.

    grid: lists of values, or values by label. `{key}` stands for the label in name, description, source and extends,
    and for the value where it is the whole of a text elsewhere.
    """
    document = {"name": path.stem} | read_mapping(path)
    grid = document.pop("grid", None)
    if grid is None:
        return [document]
    if not isinstance(grid, dict) or not all(isinstance(values, (list, dict)) and values for values in grid.values()):
        raise InputError(f"{path}: grid is {grid!r}; it must give each key a list, or values by label")
    axes = [values.items() if isinstance(values, dict) else [(str(v), v) for v in values] for values in grid.values()]
    return [_filled(document, dict(zip(grid, point, strict=True))) for point in itertools.product(*axes)]


def _path(source: str, folder: Path | None) -> Path | None:
    """The file that a source means; None where it is a name."""
    if not source.endswith(SUFFIXES) and "/" not in source:
        return None
    path = (folder or Path()) / Path(source).expanduser()
    if not path.is_file():
        raise InputError(f"no recipe file {path}; give a YAML file or a name that `transect list recipes` shows")
    return path


def _shipped(name: str) -> Document:
    known = shipped()
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise InputError(f"no recipe is called {name!r}{hint}; `transect list recipes` lists them")
    return known[name]


def _only(path: Path) -> Document:
    found = documents(path)
    if len(found) != 1:
        raise InputError(f"{path} is a grid of {len(found)} recipes; write one recipe for each, without grid")
    return found[0]


def _filled(document: Document, point: dict[str, tuple[str, Any]]) -> Document:
    def labelled(text: Any) -> Any:
        for key, (label, _) in point.items():
            text = text.replace(f"{{{key}}}", label) if isinstance(text, str) else text
        return text

    def valued(tree: Any) -> Any:
        if isinstance(tree, dict):
            return {key: valued(value) for key, value in tree.items()}
        if isinstance(tree, list):
            return [valued(value) for value in tree]
        if isinstance(tree, str) and tree.startswith("{") and tree.endswith("}") and tree[1:-1] in point:
            return point[tree[1:-1]][1]
        return tree

    return {key: labelled(value) if key in WORDS else valued(value) for key, value in document.items()}
