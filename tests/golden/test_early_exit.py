"""Early exit: at the last layer it is the model's own loss, at each other what the lens says of its states."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from labelled_texts import marked, subject, view
from plants import only
from transect.results import Table
from transect.tasks.early_exit import EarlyExit
from transect.tasks.language_modelling import LanguageModelling
from transect.view import edits
from transect.view.lens import Lens
from transect.view.view import View

NAMES = ("gpt2", "gpt_neox", "bert", "own/standard", "own/standard/masked")


@pytest.fixture
def text(tmp_path) -> str:
    path = tmp_path / "made.jsonl"
    records = [{"text": " ".join(record["text"] for record in marked(5, seed))} for seed in range(7)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def judged(v: View, text: str, batch_size: int = 3, **options) -> Table:
    task, one = EarlyExit(data=text, **options), subject(v, batch_size=batch_size)
    task.check(one)
    return Table(task.rows(one))


@pytest.mark.parametrize("name", NAMES)
def test_the_last_layer_has_the_ordinary_loss(name: str, text: str):
    v = view(name, torch.float64)
    table = judged(v, text, length=23)
    ordinary = only(Table(LanguageModelling(data=text, length=23).rows(subject(v))), metric="nats_per_token")
    last = only(table, metric="nats_per_token", layer=v.num_layers)
    for column in ("value", "stderr", "low", "high"):
        assert getattr(last, column) == pytest.approx(getattr(ordinary, column), rel=1e-9)
    assert (last.n, last.documents, last.domain, last.split) == (
        ordinary.n, ordinary.documents, ordinary.domain, ordinary.split,
    )  # fmt: skip
    assert (last.site, last.unit) == ("resid", "nats/token")
    agreement = only(table, metric="agreement", layer=v.num_layers)
    assert agreement.value == 1.0 and agreement.unit == "1"
    assert sorted({row.layer for row in table}) == list(range(v.num_layers + 1))
    assert len(table) == 2 * (v.num_layers + 1)


def test_each_layer_is_read_through_the_lens(text: str):
    v = view("gpt2", torch.float64)
    table, lens = judged(v, text), Lens(v)
    nats, agree = np.zeros(v.num_layers + 1), np.zeros(v.num_layers + 1)
    count = 0
    for line in Path(text).read_text(encoding="utf-8").splitlines():
        ids = [1, *v.tokenizer(json.loads(line)["text"])["input_ids"]]
        with torch.no_grad(), v.capture(["resid", "resid_next"]) as seen:
            final = v.run(torch.tensor([ids[:-1]]), head=True)[0].argmax(-1)
        states = [seen["resid", layer][0] for layer in range(v.num_layers)] + [seen["resid_next", v.num_layers - 1][0]]
        for layer, state in enumerate(states):
            logits = lens(state)
            nats[layer] -= float(logits.log_softmax(-1)[torch.arange(len(ids) - 1), torch.tensor(ids[1:])].sum())
            agree[layer] += int((logits.argmax(-1) == final).sum())
        count += len(ids) - 1
    for layer in range(v.num_layers + 1):
        row = only(table, metric="nats_per_token", layer=layer)
        assert row.value == pytest.approx(nats[layer] / count, rel=1e-10) and row.n == count
        assert row.low < row.value < row.high
        assert only(table, metric="agreement", layer=layer).value == pytest.approx(agree[layer] / count, rel=1e-12)
    assert agree[0] < count and abs(nats[0] - nats[-1]) > 0.01 * nats[-1]


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_rows_do_not_depend_on_the_batch(name: str, text: str):
    v = view(name, torch.float64)
    for row, same in zip(judged(v, text, 1), judged(v, text, 7), strict=True):
        assert row.layer == same.layer and row.value == pytest.approx(same.value, rel=1e-10)
        assert row.stderr == pytest.approx(same.stderr, rel=1e-8, abs=1e-12)


def test_an_edited_model_is_read_at_the_layers_that_run(text: str):
    v = view("gpt2", torch.float64, layers=3)
    whole = judged(v, text)
    with edits.remove(v, "layer", 2):
        table = judged(v, text)
    assert max(row.layer for row in table) == 2
    for layer in range(3):
        cut, same = (only(one, metric="nats_per_token", layer=layer).value for one in (table, whole))
        assert cut == pytest.approx(same, rel=1e-10)


def test_progress_ends_at_the_end(text: str):
    ticks = []
    v = view("gpt2")
    list(EarlyExit(data=text, length=11).rows(subject(v, tick=lambda *given: ticks.append(given), batch_size=5)))
    assert ticks[-1][0] == ticks[-1][1] > 7
