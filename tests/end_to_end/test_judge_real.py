"""The real decoder is judged as plain transformers says: bits per byte by domain, minimal pairs, options."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import MATERIAL, require_material
from judged import causal_nats
from transect.tasks._documents import documents
from transect.tasks._items import limited
from transect.tasks._sets import data_set
from transect.tasks.base import Subject
from transect.tasks.language_modelling import LanguageModelling
from transect.tasks.minimal_pairs import MinimalPairs
from transect.tasks.options import Options
from transect.view.view import View

DATA = Path(__file__).parents[3] / "shared" / "data"
FOLDERS = tuple(folder for folder in (MATERIAL, DATA) if folder.is_dir())
DOMAINS = (
    "builtin:speeches_1950", "builtin:python_docs", "builtin:python_source", "brown.jsonl.gz", "bible.jsonl.gz",
    "moby_dick.jsonl.gz", "licences.jsonl.gz", "aws_docs.jsonl.gz", "us-code-1925.jsonl.gz", "recipes.jsonl.gz",
)  # fmt: skip
pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def plain():
    """The model and tokenizer as transformers loads them."""
    folder = require_material("smollm2")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def subject(plain) -> Subject:
    model, tokenizer = plain
    return Subject(view=View(model, tokenizer), folders=FOLDERS)


@torch.no_grad()
def _nats(model, before: list[int], asked: list[int]) -> float:
    """The log-probability of ids behind others, by one pass over one sequence."""
    ids = torch.tensor([[*before, *asked]])
    found = model(input_ids=ids).logits[0, len(before) - 1 : -1].double().log_softmax(-1)
    return float(found.gather(1, torch.tensor(asked)[:, None]).sum())


@pytest.mark.parametrize("domain", DOMAINS)
def test_bits_per_byte_of_a_domain(plain, subject: Subject, domain: str):
    model, tokenizer = plain
    if not domain.startswith("builtin:") and not any(list(folder.rglob(domain)) for folder in FOLDERS):
        pytest.skip(f"{domain} is not at hand")
    task = LanguageModelling(data=domain, limit_bytes=800, document_bytes=300, length=61, stride=37)
    found = {row.metric: row.value for row in task.rows(subject)}
    (text,) = documents(subject, domain, "ood", 800, 300)
    nats = 0.0
    for row in text.ids:
        ids, begin, done = row.tolist(), 0, 0
        assert tokenizer.decode(ids)  # the ids are those of a text
        while done < len(ids):
            end = min(begin + 61, len(ids))
            lead = [tokenizer.bos_token_id] if begin == 0 else [ids[begin - 1]]
            nats -= _nats(model, [*lead, *ids[begin:done]], ids[done:end])
            done, begin = end, begin + 37
    tokens = sum(len(row) for row in text.ids)
    assert found["nats_per_token"] == pytest.approx(nats / tokens, abs=1e-4)
    assert found["bits_per_byte"] == pytest.approx(nats / text.bytes.sum() / math.log(2), abs=1e-4)
    assert 0.3 < found["bits_per_byte"] < 3  # what such a model gives on English text and code


def test_minimal_pairs(plain, subject: Subject):
    model, tokenizer = plain
    records = data_set("word_order", "minimal_pairs").records("test", ())
    right = []
    for _, record in limited(records, 11):
        totals = [
            _nats(model, [tokenizer.bos_token_id], tokenizer(record[key])["input_ids"]) for key in ("good", "bad")
        ]
        right.append(totals[0] > totals[1])
    (row, _) = MinimalPairs(data="word_order", limit=11).rows(subject)
    assert row.value == pytest.approx(np.mean(right)) and row.value > 0.7


def test_options(plain, subject: Subject):
    model, tokenizer = plain
    records = data_set("continuation", "options").records("test", ())
    right, gold = [], []
    for _, record in limited(records, 7):
        before = tokenizer(record["context"])["input_ids"]
        totals = []
        for option in record["options"]:
            whole = tokenizer(f"{record['context']} {option}")["input_ids"]
            totals.append(_nats(model, before, whole[len(before) :]))
        right.append(int(np.argmax(totals)) == record["gold"])
        powers = np.exp(np.array(totals) - max(totals))
        gold.append(powers[record["gold"]] / powers.sum())
    rows = {(row.metric, row.variant): row.value for row in Options(data="continuation", limit=7).rows(subject)}
    assert rows["accuracy", "0-shot: option"] == pytest.approx(np.mean(right))
    assert rows["gold_probability", "0-shot"] == pytest.approx(np.mean(gold), abs=1e-4)


def test_one_pass_is_as_many_short_ones(plain):
    model, tokenizer = plain
    before, asked = (
        tokenizer("The Eiffel Tower is located in the city of")["input_ids"],
        tokenizer(" Paris")["input_ids"],
    )
    assert sum(causal_nats(model, before, asked)) == pytest.approx(_nats(model, before, asked), abs=1e-4)
