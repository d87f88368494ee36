"""Pinned archives from package registries: downloaded, checked by SHA-256 and opened; nothing in them is ever run."""

import ast
import fnmatch
import hashlib
import html
import http.client
import io
import re
import shutil
import subprocess
import sys
import tarfile
import urllib.error
import urllib.parse
import urllib.request
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

from transect.errors import InputError

PUBLIC_INDEX = "https://pypi.org/simple"
TIMEOUT = 60  # seconds without an answer


@dataclass(frozen=True, slots=True)
class Archive:
    """One file of one version of a package: a PyPI wheel, a PyPI source archive or an npm package."""

    name: str
    version: str
    sha256: str
    file: str
    kind: Literal["wheel", "sdist", "npm"] = "wheel"

    @property
    def pinned(self) -> str:
        """The package and version as its registry's own tool writes it."""
        return f"{self.name}@{self.version}" if self.kind == "npm" else f"{self.name}=={self.version}"

    @property
    def advice(self) -> str:
        """What a user can do who cannot download it."""
        return f"give the file {self.file} as the archive, or a folder of your own instead of this material"


def obtain(archive: Archive, scratch: Path, given: Path | None = None) -> Path:
    """The archive's file: `given`, else downloaded into `scratch`, with its SHA-256 checked.

    Raises InputError when it cannot be had or read, or is another file than the pinned one.
    """
    if given is None:
        given = {"wheel": _download_wheel, "sdist": _download_sdist, "npm": _download_npm}[archive.kind](
            archive, scratch
        )
    _check(archive, given)
    return given


def members(file: Path | io.BytesIO, pattern: str) -> dict[str, bytes]:
    """The members of a zip or tar.gz archive whose names fit the shell pattern, by name, in the order of their names.

    Raises InputError when the archive is damaged or has no such member.
    """
    label = file.name if isinstance(file, Path) else "the archive inside the archive"
    try:
        with file.open("rb") if isinstance(file, Path) else file as handle:
            found = _zip_members(handle, pattern) if zipfile.is_zipfile(handle) else _tar_members(handle, pattern)
    except (OSError, EOFError, tarfile.TarError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"{label} is damaged ({_first_line(error)}); fetch it again") from error
    if not found:
        raise InputError(f"{label} has no {pattern}; give the archive of the pinned version")
    return dict(sorted(found.items()))


def _zip_members(handle: IO[bytes], pattern: str) -> dict[str, bytes]:
    with zipfile.ZipFile(handle) as content:
        return {name: content.read(name) for name in content.namelist() if fnmatch.fnmatchcase(name, pattern)}


def _tar_members(handle: IO[bytes], pattern: str) -> dict[str, bytes]:
    handle.seek(0)
    found = {}
    with tarfile.open(fileobj=handle, mode="r:gz") as content:
        for member in content:
            if member.isfile() and fnmatch.fnmatchcase(member.name, pattern):
                found[member.name] = content.extractfile(member).read()  # type: ignore[union-attr]
    return found


def _download_wheel(archive: Archive, scratch: Path) -> Path:
    # Only wheels: pip would run the build script of a source archive.
    options = ["--no-deps", "--quiet", "--only-binary", ":all:", "--retries", "1", "-d", str(scratch)]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "download", *options, archive.pinned], capture_output=True, text=True, check=False
    )
    wheels = list(scratch.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        errors = [line.removeprefix("ERROR: ") for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise _no_download(archive, "PyPI", errors[-1] if errors else "pip gave no reason")
    return wheels[0]


def _download_npm(archive: Archive, scratch: Path) -> Path:
    npm = shutil.which("npm")
    if npm is None:
        raise _no_download(archive, "npm", "there is no npm on the PATH")
    command = [npm, "pack", "--ignore-scripts", "--fetch-retries=1", archive.pinned]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=scratch)
    packed = list(scratch.glob("*.tgz"))
    if done.returncode or len(packed) != 1:
        errors = [line for line in done.stderr.splitlines() if line.lower().startswith("npm err")]
        raise _no_download(archive, "npm", errors[0] if errors else "npm gave no reason")
    return packed[0]


def _download_sdist(archive: Archive, scratch: Path) -> Path:
    """The source archive, found on the project's page of pip's index and read as plain bytes.

    Every way in which pip downloads a source archive runs its build script to learn its metadata, and no option turns
    that off. The page of links (PEP 503) is the documented interface that pip itself reads.
    """
    project = re.sub(r"[-_.]+", "-", archive.name).lower()
    page = f"{_index(archive).rstrip('/')}/{project}/"
    target = scratch / archive.file
    try:
        url = _link(page, archive.file)
        if url is not None:
            with _open(url) as answer, target.open("wb") as copy:
                shutil.copyfileobj(answer, copy)
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise _no_download(archive, "PyPI", _first_line(getattr(error, "reason", error))) from error
    if url is None:
        raise _no_download(archive, "PyPI", f"the index has no {archive.file}")
    return target


def _link(page: str, file: str) -> str | None:
    with _open(page) as answer:
        links = re.findall(r"href\s*=\s*[\"']([^\"']+)", answer.read().decode("utf-8", "replace"))
    urls = [urllib.parse.urljoin(page, html.unescape(link)) for link in links]
    return next((url for url in urls if urllib.parse.urlsplit(url).path.endswith(f"/{file}")), None)


def _open(url: str) -> IO[bytes]:
    try:
        return urllib.request.urlopen(urllib.request.Request(url, headers={"Accept": "text/html"}), timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        error.close()
        raise


def _index(archive: Archive) -> str:
    """The index that pip is set to, by environment or file; raises InputError where pip may use none."""
    done = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=False)
    settings = dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)

    def setting(name: str) -> str | None:
        found = [settings[key] for part in (":env:", "download", "global") if (key := f"{part}.{name}") in settings]
        return ast.literal_eval(found[0]) if found else None

    if (setting("no-index") or "0").lower() in ("1", "true", "yes", "on"):
        raise _no_download(archive, "PyPI", "pip is set to use no index")
    return setting("index-url") or PUBLIC_INDEX


def _no_download(archive: Archive, registry: str, reason: str) -> InputError:
    return InputError(f"cannot download {archive.pinned} from {registry} ({reason[:200]}); {archive.advice}")


def _first_line(error: object) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _check(archive: Archive, file: Path) -> None:
    try:
        with file.open("rb") as handle:
            found = hashlib.file_digest(handle, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror}; {archive.advice}") from error
    if found != archive.sha256:
        raise InputError(
            f"{file.name} is not {archive.pinned}: SHA-256 {found[:16]}… is not {archive.sha256[:16]}…; "
            f"{archive.advice}"
        )
