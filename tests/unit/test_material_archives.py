import gzip
import hashlib
import io
import sys
import tarfile
import threading
import zipfile
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest

from transect.data import archives
from transect.data.archives import Archive, members, obtain
from transect.errors import InputError

DATA = b"the source archive"


def pin(kind, file, data=DATA):
    return Archive("Some.Package", "1.2.3", hashlib.sha256(data).hexdigest(), file, kind)


SDIST, NPM = pin("sdist", "Some.Package-1.2.3.tar.gz"), pin("npm", "some-package-1.2.3.tgz")


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A package index on this machine, which pip is set to; the folder of its files."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    root = tmp_path / "index"
    (root / "simple" / "some-package").mkdir(parents=True)
    (root / "files").mkdir()
    page = (
        '<a href="../../files/Some.Package-1.2.2.tar.gz">old</a>\n'
        '<a href="../../files/Some.Package-1.2.3.tar.gz.asc">signature</a>\n'
        "<a data-requires-python='&gt;=3' href='../../files/Some.Package&#45;1.2.3.tar.gz#sha256=0'>new</a>\n"
    )
    (root / "simple" / "some-package" / "index.html").write_text(page)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(root)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    for name in ("http_proxy", "HTTP_PROXY", "PIP_NO_INDEX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.server_port}/simple/")
    yield root / "files"
    server.shutdown()
    thread.join()
    server.server_close()


def refused(archive, scratch, match, given=None):
    with pytest.raises(InputError, match=match) as error:
        obtain(archive, scratch, given)
    assert "\n" not in str(error.value) and archive.file in str(error.value)


def test_a_source_archive_comes_from_the_index_that_pip_uses(tmp_path, index):
    (index / SDIST.file).write_bytes(DATA)
    (index / "Some.Package-1.2.2.tar.gz").write_bytes(b"old")
    (index / f"{SDIST.file}.asc").write_bytes(b"signature")
    assert obtain(SDIST, tmp_path).read_bytes() == DATA


def test_the_public_index_is_used_where_pip_is_set_to_none(monkeypatch):
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    for name in ("PIP_INDEX_URL", "PIP_NO_INDEX"):
        monkeypatch.delenv(name, raising=False)
    assert archives._index(SDIST) == archives.PUBLIC_INDEX


def test_an_index_without_the_file(tmp_path, index):
    refused(SDIST, tmp_path, r"cannot download Some.Package==1.2.3 from PyPI \(File not found\); give the file")
    (index.parent / "simple" / "some-package" / "index.html").write_text("no links")
    refused(SDIST, tmp_path, r"^cannot download .* \(the index has no Some.Package-1.2.3.tar.gz\); give")


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("http://127.0.0.1:9/simple", "refused"),
        ("http://me:secret@127.0.0.1/simple", "port"),
        ("nonsense", "unknown url type"),
    ],
)
def test_an_index_that_cannot_be_reached(tmp_path, monkeypatch, address, reason):
    for name in ("http_proxy", "HTTP_PROXY", "PIP_NO_INDEX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_INDEX_URL", address)
    refused(SDIST, tmp_path, rf"cannot download Some.Package==1.2.3 from PyPI \(.*{reason}.*\); give the file")


def test_no_index_is_asked_where_pip_may_use_none(tmp_path, index, monkeypatch):
    (index / SDIST.file).write_bytes(DATA)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    refused(SDIST, tmp_path, "pip is set to use no index")


@pytest.fixture
def npm(tmp_path, monkeypatch):
    """A function that puts a program named npm, with the body given, on an otherwise empty PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))

    def put(body):
        (folder / "npm").write_text(f"#!{sys.executable}\nimport sys\n{body}\n")
        (folder / "npm").chmod(0o755)

    return put


def test_npm_packs_the_pinned_version_in_the_scratch_folder(tmp_path, npm):
    npm(
        "assert sys.argv[1:] == ['pack', '--ignore-scripts', '--fetch-retries=1', 'Some.Package@1.2.3'], sys.argv\n"
        f"open('some-package-1.2.3.tgz', 'wb').write({DATA!r})"
    )
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    assert obtain(NPM, scratch) == scratch / NPM.file


def test_npm_that_fails_or_is_not_there(tmp_path, npm):
    refused(NPM, tmp_path, r"cannot download Some.Package@1.2.3 from npm \(there is no npm on the PATH\); give")
    npm("sys.exit('npm warn old\\nnpm error code ENOTFOUND\\nnpm error network more')")
    refused(NPM, tmp_path, r"\(npm error code ENOTFOUND\)")
    npm("sys.exit(3)")
    refused(NPM, tmp_path, r"\(npm gave no reason\)")


def test_an_archive_at_hand_is_checked_and_nothing_downloaded(tmp_path, npm):
    good, bad = tmp_path / "mine.tgz", tmp_path / "other.tgz"
    good.write_bytes(DATA)
    bad.write_bytes(DATA + b"!")
    assert obtain(NPM, tmp_path, good) == good
    refused(NPM, tmp_path, r"other.tgz is not Some.Package@1.2.3: SHA-256 \w{16}… is not \w{16}…", bad)
    refused(NPM, tmp_path, "cannot read .*absent.tgz: No such file", tmp_path / "absent.tgz")


def tar(entries):
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w:gz") as content:
        for name, data in entries.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            content.addfile(info, io.BytesIO(data))
        link = tarfile.TarInfo("a/link.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        content.addfile(link)
    return raw.getvalue()


ENTRIES = {"b/2.txt": b"two", "a/1.txt": b"one", "a/1.md": b"no"}


def test_members_fit_a_pattern_in_order_of_their_names(tmp_path):
    file, wheel = tmp_path / "x.tgz", tmp_path / "x.whl"
    file.write_bytes(tar(ENTRIES))
    with zipfile.ZipFile(wheel, "w") as content:
        for name, data in ENTRIES.items():
            content.writestr(name, data)
    for source in (file, wheel, io.BytesIO(file.read_bytes())):
        assert list(members(source, "*.txt").items()) == [("a/1.txt", b"one"), ("b/2.txt", b"two")]
    with pytest.raises(InputError, match=r"^x\.tgz has no \*\.rst; give the archive of the pinned version$"):
        members(file, "*.rst")


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-30], lambda data: b"no archive", lambda data: gzip.compress(b"x")]
)
def test_a_damaged_archive(tmp_path, damage):
    file = tmp_path / "x.tgz"
    file.write_bytes(damage(tar({**ENTRIES, "c/3.txt": bytes(hashlib.sha256(b"3").digest() * 99)})))
    with pytest.raises(InputError, match=r"^x\.tgz is damaged \(.*\); fetch it again$") as error:
        members(file, "*.txt")
    assert "\n" not in str(error.value)


def test_a_damaged_wheel(tmp_path):
    file = tmp_path / "x.whl"
    with zipfile.ZipFile(file, "w") as content:
        content.writestr("a.txt", b"one two three")
    file.write_bytes(file.read_bytes().replace(b"two", b"owt"))
    with pytest.raises(InputError, match=r"^x\.whl is damaged \(Bad CRC"):
        members(file, "*.txt")
