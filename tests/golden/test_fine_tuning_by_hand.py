"""Fine-tuning and its grades against plain loops, transformers' own schedule and scikit-learn."""

import copy

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.metrics import f1_score
from torch import nn
from transformers import get_linear_schedule_with_warmup

from labelled_texts import items, view
from transect.results import Row
from transect.tasks._classifier import Classifier
from transect.tasks._fine_tune import Settings, fine_tune, restored
from transect.tasks._grading import Grader
from transect.tasks._sequences import Coded

SETTINGS = Settings(
    lr=1e-3, epochs=11, batch_size=17, warmup=0.25, weight_decay=0.1, clip=0.7, dropout=0.0, patience=None
)


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_a_plain_loop_comes_to_the_same_weights(name: str):
    """One batch an epoch, so that the order of items does not matter."""
    v = view(name, torch.float64)
    training = items(v, 17, 1)
    base = copy.deepcopy(v.base)
    head = Classifier(v, 2, dropout=0.0, seed=5)
    with restored(v):
        tuned = fine_tune(v, training, None, SETTINGS, 5)
        found = {n: p.detach().clone() for n, p in v.base.named_parameters()}
    own = dict(base.named_parameters(prefix="model")) | dict(head.named_parameters(prefix="head"))
    spared = [p for n, p in own.items() if p.ndim < 2]
    decayed = [p for n, p in own.items() if p.ndim >= 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": spared, "weight_decay": 0.0}]
    adam = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.999), eps=1e-6)
    schedule = get_linear_schedule_with_warmup(adam, 3, 11)
    for step in range(11):
        # transformers starts at rate 0, we at 1 / warm-up: the step that would be lost is not
        factor = (step + 1) / 3 if step < 3 else schedule.lr_lambdas[0](step)
        for group in adam.param_groups:
            group["lr"] = 1e-3 * factor
        logits = []
        for (tokens,) in training.sequences:
            hidden = base(input_ids=torch.from_numpy(tokens.ids)[None])[0][0]
            vector = hidden[-1] if v.causal else torch.tanh(head.dense(hidden[0]))
            logits.append(head.map(vector))
        loss = nn.functional.cross_entropy(torch.stack(logits), torch.from_numpy(training.labels))
        adam.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_([p for p in own.values() if p.grad is not None], 0.7)
        adam.step()
    for n, p in base.named_parameters():
        assert torch.allclose(found[n], p, rtol=0, atol=1e-8), n
    for p, q in zip(head.parameters(), tuned.classifier.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=0, atol=1e-8)


def test_macro_f1_is_scikit_learns_over_the_classes_of_the_test():
    generator = np.random.default_rng(0)
    labels, predicted = generator.integers(0, 5, 211), generator.integers(0, 7, 211)
    test = Coded([()] * 211, labels, np.arange(211, dtype=np.uint64), 7)
    rows = list(Grader(test, Row(metric="", value=0.0, unit="1"), 0).rows(predicted, variant="x"))
    assert [row.metric for row in rows] == ["accuracy", "macro_f1"]
    assert rows[0].value == pytest.approx((labels == predicted).mean(), abs=1e-12)
    expected = f1_score(labels, predicted, labels=np.arange(5), average="macro", zero_division=0)
    assert rows[1].value == pytest.approx(expected, abs=1e-12)
    share = rows[0].value
    assert rows[0].stderr == pytest.approx((share * (1 - share) / 211) ** 0.5, rel=0.1)
    assert rows[1].low < rows[1].value < rows[1].high
    assert rows[0].n == 211 and rows[0].variant == "x"


def test_the_interval_of_the_mean_is_students():
    labels = np.arange(97) % 3
    test = Coded([()] * 97, labels, np.arange(97, dtype=np.uint64), 3)
    predictions = [np.where(np.arange(97) < wrong, (labels + 1) % 3, labels) for wrong in (13, 29, 31)]
    row = next(iter(Grader(test, Row(metric="", value=0.0, unit="1"), 0).mean_rows(predictions)))
    values = [(predicted == labels).mean() for predicted in predictions]
    assert row.value == pytest.approx(np.mean(values), abs=1e-12)
    low, high = stats.t.interval(0.95, 2, loc=np.mean(values), scale=stats.sem(values))
    assert (row.low, row.high) == (pytest.approx(low), pytest.approx(high))
    alone = next(iter(Grader(test, Row(metric="", value=0.0, unit="1"), 0).mean_rows(predictions[:1])))
    assert alone.stderr is None
