"""Text that language models are judged on: from files, the package, or the run's own corpus; the same text for all."""

import sysconfig
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import numpy as np

from transect.data.evaluation import chosen_documents
from transect.data.material_readers import python_docs, python_source
from transect.data.reading import files, records
from transect.errors import InputError, NotAtHand
from transect.tasks import _builtin, _records
from transect.tasks._encoding import encoded
from transect.tasks.base import Subject, data_label

CORPUS = "corpus"
_LIBRARY = Path(sysconfig.get_path("stdlib"))
SOURCES = (
    "a text, JSONL or Parquet file or a folder of them, also by name in a --data folder; builtin:speeches, "
    "builtin:speeches_1950, builtin:python_docs, builtin:python_source; hf:NAME[:CONFIG[:SPLIT]]; corpus[:DOMAIN], "
    "of the run's own corpus"
)


@dataclass(frozen=True, slots=True, eq=False)
class Documents:
    """Token ids of each document of one domain, with the bytes of its text and a hash of each."""

    domain: str
    split: str
    ids: list[np.ndarray]
    bytes: np.ndarray  # [documents] float64
    keys: np.ndarray  # [documents] uint64


def documents(
    subject: Subject, data: str, split: str, limit_bytes: int | None, document_bytes: int | None = None
) -> list[Documents]:
    """The documents of a source, one domain each; of a corpus those of a split that its run is evaluated on.

    Of other sources documents are taken in the order of a hash of their text, each cut after `document_bytes`, the last
    one where all of them reach `limit_bytes`: the same text for every model, whatever its tokenizer. Raises NotAtHand
    for a source that is not there, InputError for one that cannot be read or has no text.
    """
    if data == CORPUS or data.startswith(f"{CORPUS}:"):
        return _of_corpus(subject, data.partition(":")[2] or None, split)
    texts = _cut(read_texts(subject, data), limit_bytes, document_bytes)
    if not texts:
        raise InputError(f"{data} has no text; give another source")
    kept = [(row, text) for text in texts if len(row := np.array(encoded(subject.tokenizer, text), dtype=np.int64))]
    if not kept:
        raise InputError(f"the tokenizer of {subject.view.name} has no token for the text of {data}")
    sizes = np.array([len(text.encode()) for _, text in kept], dtype=np.float64)
    keys = np.array([text_key(text) for _, text in kept], dtype=np.uint64)
    return [Documents(data_label(data), split, [row for row, _ in kept], sizes, keys)]


def read_texts(subject: Subject, data: str) -> list[str]:
    """The texts of a source that is no corpus, whole."""
    if data.startswith("builtin:"):
        name = data.removeprefix("builtin:")
        made = {
            "speeches": lambda: (text for _, text in _builtin.speeches()),
            "speeches_1950": lambda: (text for year, text in _builtin.speeches() if year >= _builtin.LATER),
            "python_docs": lambda: (record["text"] for record in python_docs(_LIBRARY)),
            "python_source": lambda: (record["text"] for record in python_source(_LIBRARY)),
        }
        if name not in made:
            raise InputError(f"unknown text {data!r}; there are {', '.join(f'builtin:{one}' for one in made)}")
        return list(made[name]())
    if data.startswith("hf:"):
        return [str(record["text"]) for record in _records.hugging_face(data) if record.get("text")]
    path = Path(data)
    if not path.exists():
        path = _records.found([data], subject.folders, f"text {data}")
    return [text for file in files([path]) for text, _ in records(file)]


def check_documents(subject: Subject, data: str, split: str) -> None:
    """Raise now what `documents` would, without encoding anything."""
    if data == CORPUS or data.startswith(f"{CORPUS}:"):
        corpus = _corpus(subject)
        domain = data.partition(":")[2] or None
        if domain is not None:
            corpus.part(split, domain)
        corpus.domains(split)
    elif not data.startswith(("builtin:", "hf:")) and not Path(data).exists():
        _records.found([data], subject.folders, f"text {data}")


def text_key(text: str) -> int:
    """A hash of a text, 64 bits."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little")


def _cut(texts: list[str], limit: int | None, each: int | None) -> list[str]:
    kept, left = [], limit
    for text in sorted(texts, key=lambda text: (text_key(text), text)):
        text = text if each is None else _first_bytes(text, each)
        text = text if left is None else _first_bytes(text, left)
        if text.strip():
            kept.append(text)
        left = None if left is None else left - len(text.encode())
        if left is not None and left <= 0:
            break
    return kept


def _first_bytes(text: str, count: int) -> str:
    """The beginning of a text, up to so many bytes, cut at a blank where there is one."""
    whole = text.encode()
    if len(whole) <= count:
        return text
    start = whole[:count].decode(errors="ignore")
    space = start.rfind(" ")
    return start[:space] if space > len(start) // 2 else start


def _corpus(subject: Subject):
    if subject.corpus is None:
        raise NotAtHand(f"{subject.view.name} is not from a training run whose corpus is at hand")
    return subject.corpus


def _of_corpus(subject: Subject, domain: str | None, split: str) -> list[Documents]:
    corpus, found = _corpus(subject), []
    if split not in corpus.splits:
        raise NotAtHand(f"{corpus.path} has no split {split!r}; it has {', '.join(corpus.splits)}")
    tokens = None if subject.recipe is None else subject.recipe.train.evaluation.tokens
    for name in corpus.domains(split) if domain is None else (domain,):
        part = corpus.part(split, name)
        offsets = np.asarray(part.offsets)
        chosen, keys = chosen_documents(np.diff(offsets) - 1, tokens)
        rows = [part.read(int(offsets[n]), int(offsets[n + 1] - offsets[n] - 1)) for n in chosen]
        if rows:
            found.append(Documents(name, split, rows, np.asarray(part.bytes)[chosen].astype(np.float64), keys))
    if not found:
        raise InputError(f"split {split!r} of {corpus.path} has no text")
    return found
