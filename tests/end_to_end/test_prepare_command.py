"""The commands as a user has them: one line after a mistake, a killed preparation that goes on, a table that fits."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from prepared import jsonl, texts
from shell import ENVIRONMENT, command, contents, process
from transect.data.corpus import WORK, Corpus


def test_one_command_without_any_file(tmp_path: Path):
    done = process("data", "prepare", "builtin", "-o", tmp_path / "c", "--vocab-size", 1000)
    assert done.code == 0 and done.err == "", done.err
    assert all(name in done.out for name in ("train", "valid", "ood", "sotu_1950", "1,000"))
    assert max(map(len, done.out.splitlines())) <= 80
    again = command("data", "prepare", "builtin", "-o", tmp_path / "c", "--vocab-size", 1000)
    assert again.code == 0 and "nothing was done" in again.out
    other = command("data", "prepare", "builtin", "-o", tmp_path / "c")
    assert other.code == 2 and len(other.err.splitlines()) == 1 and "vocab_size = 1000, now it is 8192" in other.err


def test_show(tmp_path: Path):
    long = texts(5, seed=1)
    jsonl(tmp_path / "a.jsonl", [*texts(30), long[0], "x"], kind=["short", "l" * 70] * 16)
    (tmp_path / "bad.jsonl").write_text("{")
    sources = (
        f"train+valid/a={tmp_path / 'a.jsonl'}",
        tmp_path / "bad.jsonl",
        f"ood/o={jsonl(tmp_path / 'o.jsonl', long)}",
    )
    made = command("data", "prepare", *sources, "-o", tmp_path / "c", "--domain-column", "kind", "--vocab-size", 300)
    assert made.code == 2 and "bad.jsonl" in made.err
    rows = [json.loads(line) | {"kind": "o"} for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    (tmp_path / "o.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = command(
        "data", "prepare", *sources, "-o", tmp_path / "c", "--domain-column", "kind", "--vocab-size", 300,
        "--skip-unreadable",
    )  # fmt: skip
    assert made.code == 0, made.err
    shown = command("data", "show", tmp_path / "c")
    assert shown.code == 0 and max(map(len, shown.out.splitlines())) <= 80
    corpus = Corpus.open(tmp_path / "c")
    part = corpus.card.splits["ood"]["o"]
    cells = f"{part.documents} {part.tokens} {part.bytes / (part.tokens - part.documents):.3f}".split()
    assert all(cell in shown.out.replace(",", "") for cell in cells)
    assert f"ood/o: {long[0][:40]}" in shown.out
    assert "1 train documents left out" in shown.out and "bad.jsonl is not JSON" in " ".join(shown.out.split())
    assert "ood/o:" not in command("data", "show", tmp_path / "c", "--samples", 0).out
    missing = command("data", "show", tmp_path / "nothing")
    assert missing.code == 2 and "not a prepared corpus" in missing.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("test/a=x.txt",), "split train, valid, ood"),
        (("x.txt",), "no file or folder x.txt"),
        (("builtin", "--vocab-size", "7"), "needs at least 259"),
        (("builtin", "--valid-fraction", "2"), "valid_fraction"),
        (("builtin", "--tokenizer-kind", "unigram"), "bpe"),
        (("builtin", "--workers", "-1"), "at least 1"),
        (("hf:x:y:z:w",), "hf:NAME:CONFIG:SPLIT"),
        ((), "SOURCE"),
    ],
)
def test_a_mistake_is_one_line(tmp_path: Path, arguments: tuple[str, ...], words: str):
    done = command("data", "prepare", *arguments, "-o", tmp_path / "c")
    assert done.code == 2 and len(done.err.splitlines()) == 1 and words in done.err, done.err
    assert not (tmp_path / "c" / "card.json").exists()


def _tokens(journal: Path) -> int:
    """Tokens of the train split that are noted down."""
    parts = json.loads(journal.read_text())["parts"] if journal.is_file() else []
    return max((part[3] for part in parts if part[0] == "train"), default=0)


def test_a_killed_preparation_goes_on_and_leaves_no_process(tmp_path: Path):
    some = texts(7, words=397)
    count = 7001
    # 22 MB, so that two processes are used
    file = jsonl(tmp_path / "a.jsonl", [f"{number} {some[number % 7]}" for number in range(count)])
    line = [sys.executable, "-m", "transect", "data", "prepare", str(file), "-o", str(tmp_path / "c")]
    line += ["--workers", "2", "--vocab-size", "400", "--shard-tokens", "500009", "--no-deduplicate"]
    first = subprocess.Popen(line, env=ENVIRONMENT, stdout=subprocess.DEVNULL)
    journal = tmp_path / "c" / WORK / "journal.json"
    deadline = time.monotonic() + 200
    while _tokens(journal) < 500_009 and first.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    children = psutil.Process(first.pid).children(recursive=True)
    os.kill(first.pid, signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL, "it ended before it could be killed"
    assert len(children) >= 2
    assert not psutil.wait_procs(children, timeout=20)[1]
    reached = json.loads(journal.read_text())["documents"]
    assert 0 < reached < count and not (tmp_path / "c" / "card.json").exists()
    assert "half prepared" in command("data", "show", tmp_path / "c").err
    shard = next((tmp_path / "c" / WORK).glob("corpus/train/a/00000.bin"))
    before = shard.stat().st_ino, shard.stat().st_mtime_ns
    second = subprocess.run(line, env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=300)
    assert second.returncode == 0, second.stderr
    assert not (tmp_path / "c" / WORK).exists()
    resumed = Corpus.open(tmp_path / "c")
    resumed.verify()
    kept = resumed.path / "train" / "a" / "00000.bin"
    assert (kept.stat().st_ino, kept.stat().st_mtime_ns) == before
    line[line.index("-o") + 1] = str(tmp_path / "whole" / "c")
    subprocess.run(line, env=ENVIRONMENT, capture_output=True, check=True, timeout=300)
    assert contents(resumed.path) == contents(tmp_path / "whole" / "c")
    for name in contents(resumed.path):
        assert (resumed.path / name).read_bytes() == (tmp_path / "whole" / "c" / name).read_bytes(), name
