"""The time a plan foretells: finite for every probe, made of passes, edits and operations, in step with the text."""

import math
from collections.abc import Callable

import numpy as np
import pytest

import transect as tx
from families import FIRST_TEXT_ID, VOCAB
from plants import view_of
from transect import foretell, registry
from transect.data import Dataset, from_tokens
from transect.foretell import foretold_seconds
from transect.plan import Plan, load_probe
from transect.probes.base import Probe
from transect.view.variants import planned_evaluations

NAMES = registry.available("transect.probes")
MODELS = {"routing": "mixtral"}
LAYERS, LENGTH, BATCH = 3, 19, 7
CALL = 1 / 64  # seconds that anything timed takes, where the clock is held still


def equal_rows(documents: int) -> Dataset:
    """Documents of one length, so that every batch but the last is the same work."""
    return from_tokens(np.random.default_rng(0).integers(FIRST_TEXT_ID, VOCAB, (documents, LENGTH)))


def planned(*probes: str | Probe, documents: int = 10 * BATCH, model: str = "gpt2") -> Plan:
    return tx.plan(view_of(model, layers=LAYERS), probes, equal_rows(documents), batch_size=BATCH)


@pytest.fixture
def still(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[], object]]:
    """Everything timed is run once and takes as long; gives what was timed."""
    ran = []

    def timed(run: Callable[[], object]) -> float:
        run()
        ran.append(run)
        return CALL

    monkeypatch.setattr(foretell, "_timed", timed)
    return ran


def work_seconds(plan: Plan) -> float:
    """Operations at the speed of one product of 1,024 states with 2,000 others in CALL seconds."""
    speed = 2 * 1024 * plan.view.width * 2000 / CALL
    return sum(
        probe.work(setting) / speed
        for item in plan.passes
        for probe, setting in zip(item.probes, item.settings, strict=True)
    )


@pytest.mark.parametrize("name", NAMES)
def test_every_probe_takes_some_time(name: str):
    if load_probe(name).refusal(view_of(MODELS.get(name, "gpt2"), layers=LAYERS)) is not None:
        pytest.skip(f"{name} does not measure this model")
    found = foretold_seconds(planned(name, model=MODELS.get(name, "gpt2")))
    assert math.isfinite(found) and 0 < found < 600


def test_one_pass_is_the_batches_it_has(still: list):
    plan = planned("jump")
    assert foretold_seconds(plan) == pytest.approx(10 * CALL + work_seconds(plan), rel=1e-9)


def test_two_rounds_are_twice_the_batches(still: list):
    plan = planned("contribution")
    assert work_seconds(plan) > 0
    assert foretold_seconds(plan) == pytest.approx(2 * 10 * CALL + work_seconds(plan), rel=1e-9)


def test_probes_that_share_a_pass_share_its_time(still: list):
    together, plan = foretold_seconds(planned("contribution", "jump", "similarity")), planned("contribution")
    alone = foretold_seconds(plan)
    added = work_seconds(planned("contribution", "jump", "similarity")) - work_seconds(plan)
    assert together - alone == pytest.approx(added, abs=1e-12)


def test_training_epochs_are_passes_of_their_own(still: list):
    few, many = (planned(tx.probes.Nonlinearity(trained="cosine_adam", train_epochs=n)) for n in (1, 4))
    added = foretold_seconds(many) - work_seconds(many) - foretold_seconds(few) + work_seconds(few)
    seen = [sum(map(len, (s.sequences for s in p.passes[0].stages if s.phase == "train"))) for p in (few, many)]
    assert seen[1] == 4 * seen[0] > 0
    assert added == pytest.approx(3 * seen[0] / BATCH * CALL, rel=1e-9)


@pytest.mark.parametrize("name", ["commutativity", "ablation"])
def test_edits_are_the_layers_that_their_variants_run(name: str, still: list):
    plan = planned(name)
    (item,) = (one for one in plan.passes if len(one.settings[0].edit_sequences))
    (probe,), (setting,) = item.probes, item.settings
    layers, _ = planned_evaluations(probe.variants(None, setting), LAYERS)
    assert layers > 2 * LAYERS
    edited = len(setting.edit_sequences) / BATCH * layers / LAYERS * CALL
    looked = sum(len(s.sequences) for p in plan.passes for s in p.stages if s.phase != "edit") / BATCH * CALL
    assert foretold_seconds(plan) == pytest.approx(edited + looked + work_seconds(plan), rel=1e-9)


def test_a_head_is_counted_for_every_variant(monkeypatch: pytest.MonkeyPatch):
    """A plain pass takes 2 seconds, the unedited model with its head 3, and once more the head and its scores 3.5."""
    times = iter([2.0, 1.0, 3.0, 3.5])
    monkeypatch.setattr(foretell, "_timed", lambda run: next(times))
    plan = planned("commutativity")
    (item,) = plan.passes
    variants = item.probes[0].variants(None, item.settings[0])
    layers, _ = planned_evaluations(variants, LAYERS)
    batches = len(item.settings[0].edit_sequences) / BATCH
    looked = sum(len(stage.sequences) for stage in item.stages if stage.phase != "edit") / BATCH
    expected = batches * (layers * 2 / LAYERS + 1 + len(variants) * 0.5) + 2 * looked
    work = item.probes[0].work(item.settings[0]) / (2 * 1024 * plan.view.width * 2000)
    assert foretold_seconds(plan) == pytest.approx(expected + work, rel=1e-9)


def test_a_clock_that_stumbles_makes_no_negative_time(monkeypatch: pytest.MonkeyPatch):
    """The second look at the head may be timed as the shorter one."""
    times = iter([2.0, 1.0, 3.0, 2.5])
    monkeypatch.setattr(foretell, "_timed", lambda run: next(times))
    plan = planned("commutativity")
    (item,) = plan.passes
    layers, _ = planned_evaluations(item.probes[0].variants(None, item.settings[0]), LAYERS)
    assert foretold_seconds(plan) >= len(item.settings[0].edit_sequences) / BATCH * layers * 2 / LAYERS


LINEAR = (
    "jump",
    tx.probes.Contribution(mi_clusters=5, tp_min_count=1, lens_tokens=10**6),
    tx.probes.Contribution(estimators=("lens_loss",), lens_tokens=10**6),
    tx.probes.Ablation(objective="causal", sample=10**6),
)


@pytest.mark.parametrize("probe", LINEAR, ids=["jump", "contribution", "lens", "ablation"])
def test_as_much_text_again_takes_as_much_time_again(probe: str | Probe, still: list):
    """What a text of any length costs once, such as the start of k-means, cancels."""
    times = [foretold_seconds(planned(probe, documents=n * BATCH)) for n in (20, 60, 100)]
    assert times[0] > 20 * CALL
    assert times[2] - times[1] == pytest.approx(times[1] - times[0], rel=1e-6)
    assert times[1] - times[0] >= 40 * CALL


def test_more_clusters_take_more_time(still: list):
    one = (tx.probes.Contribution(mi_clusters=k, estimators=("mutual_information",)) for k in (70, 350, 700))
    few, some, many = (work_seconds(planned(probe)) for probe in one)
    assert 0 < few < some < many


def test_edits_on_a_sample_do_not_grow_with_the_text(still: list):
    one = tx.probes.Commutativity(sample=20 * LENGTH)
    short, long = (foretold_seconds(planned(one, documents=n * BATCH)) for n in (20, 100))
    assert long == pytest.approx(short, rel=1e-9)


def test_the_clock_is_that_of_the_faster_of_two_calls():
    calls = []

    def sleeping() -> None:
        calls.append(1)
        if len(calls) == 1:
            sum(range(3_000_000))

    assert 0 <= foretell._timed(sleeping) < 0.01
    assert len(calls) == 2
