"""`compare` on planted curves: the planted difference comes back, and what cannot be compared is refused by name."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import transect as tx
from compared_runs import STEPS, T13, curve_rows, language_rows, planted_run, study
from training_rows import stamp
from transect.errors import InputError
from transect.results import Row, Table


def pair(folder: Path, first: dict, second: dict, **others) -> list[Path]:
    """Two runs of one seed each: `plain` with the first curves, `other` with the second."""
    return [
        planted_run(folder / name, curve_rows(curves, run=name, **others), name)
        for name, curves in (("plain", first), ("other", second))
    ]


def headline(table: Table, part: str, model: str, variant: str = "equal loss") -> Row:
    (row,) = table.where(part=part, model=model, split="ood", domain=None, metric="nats_per_token", variant=variant)
    return row


SLOW = {"valid": (3.9, 3.6, 3.3), "ood": (4.9, 4.7, 4.55)}


def test_the_papers_example(tmp_path: Path):
    table = tx.compare(pair(tmp_path, T13, SLOW)).table
    (matched,) = table.where(metric="matched_loss", model="plain", variant="equal loss")
    assert matched.value == pytest.approx(3.3, abs=1e-12)
    assert headline(table, "seed", "plain").value == pytest.approx(4.30, abs=1e-12)
    assert headline(table, "seed", "other").value == pytest.approx(4.55, abs=1e-12)
    assert headline(table, "difference", "other").value == pytest.approx(0.25, abs=1e-12)
    with pytest.raises(InputError, match=r"--at-loss 3.1: plain only gets down to 3.2, other only gets down to 3.3"):
        tx.compare([tmp_path / "plain", tmp_path / "other"], at_loss=3.1)


def test_the_place_of_the_match_is_between_two_evaluations(tmp_path: Path):
    table = tx.compare(pair(tmp_path, T13, SLOW)).table
    (row,) = table.where(metric="matched_loss", model="plain", variant="equal loss")
    assert (row.step, row.tokens, row.seconds, row.flops) == (25, 4096 * 25, pytest.approx(12.5), pytest.approx(25e12))
    for metric, amount in (("steps", 25), ("tokens", 4096 * 25), ("seconds", 12.5), ("flops", 25e12)):
        (mean,) = table.where(metric=metric, model="plain", part="mean", variant="equal loss")
        assert mean.value == pytest.approx(amount)


def test_a_loss_of_ones_own_and_its_range(tmp_path: Path):
    runs = pair(tmp_path, T13, SLOW)
    assert headline(tx.compare(runs, at_loss=3.5).table, "seed", "plain").value == pytest.approx(4.425)
    with pytest.raises(InputError, match=r"3.7: plain starts at 3.6; all runs pass the losses from 3.3 to 3.6$"):
        tx.compare(runs, at_loss=3.7)


def test_looser_losses_are_told_where_all_runs_pass_them(tmp_path: Path):
    fast = {"valid": (3.38, 3.3, 3.2), "ood": (4.5, 4.4, 4.25)}
    comparison = tx.compare(pair(tmp_path, fast, SLOW))
    table = comparison.table
    assert headline(table, "seed", "plain", "equal loss +0.05").value == pytest.approx(4.4 + 0.1 * 5 / 8)
    (missing,) = table.where(metric="matched_loss", variant="equal loss +0.10")
    assert missing.value is None and missing.reason == "plain starts below 3.4 nats"
    assert any("plain starts below 3.4 nats" in note for note in comparison.notes)


def test_ranges_without_a_common_loss_are_refused_by_name(tmp_path: Path):
    better = {split: tuple(value - 1 for value in values) for split, values in T13.items()}
    with pytest.raises(InputError, match=r"no in-distribution loss is common.*: plain never get.*other start"):
        tx.compare(pair(tmp_path, T13, better))


def test_one_wild_evaluation_is_smoothed_away(tmp_path: Path):
    steps = tuple(range(10, 80, 10))
    valid, ood = (4.0, 3.8, 3.6, 3.4, 3.2, 3.0, 2.8), (5.0, 4.8, 4.6, 4.4, 4.2, 4.0, 3.8)
    wild = (*valid[:3], 1.0, *valid[4:])
    runs = [
        planted_run(tmp_path / name, curve_rows({"valid": curve, "ood": ood}, steps, run=name), name)
        for name, curve in (("calm", valid), ("wild", wild))
    ]
    table = tx.compare(runs).table
    (row,) = table.where(metric="matched_loss", model="calm", variant="equal loss")
    assert row.value == pytest.approx(2.8)
    curve = [row.value for row in table.where(part="curve", model="wild", split="valid")]
    assert curve == pytest.approx([4.0, 3.8, 3.6, 3.2, 3.0, 3.0, 2.8])


def test_the_first_tenth_of_a_run_is_left_out(tmp_path: Path):
    curves = {"valid": (9.0, 3.6, 3.4, 3.2), "ood": (9.9, 4.5, 4.35, 4.25)}
    runs = [
        planted_run(tmp_path / name, curve_rows(curves, (2, 10, 20, 30), run=name), name)
        for name in ("first", "second")
    ]
    assert {row.step for row in tx.compare(runs).table.where(part="curve")} == {10, 20, 30}


def test_the_loss_of_several_texts_is_over_tokens_and_the_mean_out_of_distribution_is_plain(tmp_path: Path):
    texts = {"valid": (("wiki", 1000), ("books", 3000)), "ood": (("code", 503), ("mail", 211))}
    runs = []
    for name in ("first", "second"):
        rows = [
            row
            for step, loss in zip(STEPS, (4, 3, 2), strict=True)
            for row in language_rows(step, {"valid": loss, "ood": loss + 1}, texts, run=name)
        ]
        runs.append(planted_run(tmp_path / name, rows, name))
    table = tx.compare(runs).table
    (first, *_) = table.where(part="curve", model="first", split="valid")
    assert first.value == pytest.approx(4 + (-0.1 * 1000 + 0.1 * 3000) / 4000)
    assert headline(table, "seed", "first").value == pytest.approx(3.0)
    seeds = table.where(part="seed", model="first", metric="nats_per_token", variant="equal loss")
    assert {(row.split, row.domain) for row in seeds} == {
        ("ood", None),
        ("ood", "code"),
        ("ood", "mail"),
        ("valid", "wiki"),
        ("valid", "books"),
    }  # fmt: skip - the loss of `valid` as a whole is what is matched


def test_a_planted_difference_comes_back(tmp_path: Path):
    offsets = {0: -0.02, 1: -0.03, 2: -0.07}
    runs = study(tmp_path, {"plain": lambda _: 0.0, "cea": offsets.__getitem__})
    comparison = tx.compare(runs)
    row = headline(comparison.table, "difference", "cea")
    assert row.value == pytest.approx(-0.04, abs=1e-9)
    stderr = np.std([*offsets.values()], ddof=1) / math.sqrt(3)
    half = 4.302652729911275 * stderr  # t quantile for two degrees of freedom, from a table
    assert (row.low, row.high) == (pytest.approx(-0.04 - half, abs=1e-9), pytest.approx(-0.04 + half, abs=1e-9))
    assert row.n == 3
    said = next(text for text in comparison.sentences if "cea has an out-of-distribution loss lower by 0.04 [" in text)
    assert said.endswith("no difference shown.") and "(3 seeds, p = " in said and "than plain" in said


@pytest.mark.parametrize(("sign", "word"), [(-1, "better"), (1, "worse")])
def test_words_follow_the_direction_of_the_metric(tmp_path: Path, sign: int, word: str):
    runs = study(tmp_path, {"plain": lambda _: 0.0, "cea": lambda seed: sign * (0.04 + 0.001 * seed)})
    assert [text for text in tx.compare(runs).sentences if text.endswith(f": {word}.")]


def test_the_order_of_runs_does_not_matter(tmp_path: Path):
    runs = study(
        tmp_path, {"plain": lambda s: 0.01 * s, "cea": lambda s: 0.03 * s * s, "wide": lambda s: -0.05 / (s + 1)}
    )
    here, there = (tx.compare(order, by=("loss", "steps"), baseline="plain") for order in (runs, runs[::-1]))
    assert here.table.rows == there.table.rows and here.sentences == there.sentences and here.notes == there.notes
    assert tx.compare(runs[::-1]).arms[0].name == "wide"


def test_equal_steps_compare_the_in_distribution_loss_too(tmp_path: Path):
    table = tx.compare(pair(tmp_path, T13, SLOW), by=("steps", "seconds")).table
    (row,) = table.where(part="difference", split="valid", domain=None, metric="nats_per_token", variant="equal steps")
    assert row.value == pytest.approx(0.1)
    assert not len(table.where(metric="matched_loss"))
    runs = [tmp_path / "plain", planted_run(tmp_path / "long", curve_rows(T13, (10, 20, 40), run="long"), "long")]
    table = tx.compare(runs, by=("steps",)).table
    assert headline(table, "seed", "long", "equal steps").value == pytest.approx(4.30)
    assert {row.value for row in table.where(metric="matched_steps")} == {30}


def test_runs_without_a_common_number_of_steps_are_refused(tmp_path: Path):
    runs = [
        planted_run(tmp_path / name, curve_rows(T13, steps, run=name), name)
        for name, steps in (("short", (1, 2, 3)), ("long", (100, 200, 300)))
    ]
    with pytest.raises(InputError, match="short ends at 3, where long is not a tenth into the run"):
        tx.compare(runs, by=("steps",))


def accuracy(steps: tuple[int, ...], values: tuple[float, ...], **others) -> list[Row]:
    place = {"task": "fine_tuning", "domain": "sentiment", "split": "test", "variant": "mean", "unit": "1"}
    return [
        Row(metric="accuracy", value=value, n=97, part=f"lr {step}", **place, **stamp(step, **others))
        for step, value in zip(steps, values, strict=True)
    ]


def evaluated(run: Path, rows: list[Row]) -> None:
    for step in {row.step for row in rows}:
        Table(row for row in rows if row.step == step).write(run / "evaluations" / "base" / f"step-{step}")


def test_evaluations_of_checkpoints_are_read_off_between_them(tmp_path: Path):
    runs = pair(tmp_path, T13, SLOW)
    evaluated(runs[0], accuracy((10, 30), (0.5, 0.7), run="plain"))
    evaluated(runs[1], accuracy((10, 20), (0.4, 0.6), run="other"))
    table = tx.compare(runs).table
    (row,) = table.where(part="seed", metric="accuracy", model="plain", variant="mean, equal loss")
    assert row.value == pytest.approx(0.5 + 0.2 * (3.6 - 3.3) / (3.6 - 3.2))
    (row,) = table.where(part="seed", metric="accuracy", model="other", variant="mean, equal loss")
    assert row.value is None and "no measurements of other" in str(row.reason)
    (row,) = table.where(part="difference", metric="accuracy", variant="mean, equal loss")
    assert row.value is None and row.reason == "other has no value"


def test_language_modelling_of_checkpoints_does_not_mix_with_that_of_the_run(tmp_path: Path):
    runs = pair(tmp_path, T13, SLOW)
    for run in runs:
        evaluated(run, [row for row in language_rows(30, {"ood": 1.0}, run=run.name) if row.domain == "code"])
    table = tx.compare(runs).table
    assert headline(table, "seed", "plain").value == pytest.approx(4.30)
    (row,) = table.where(
        part="seed", model="other", metric="nats_per_token", variant="evaluated, equal loss", domain="code"
    )
    assert row.value == pytest.approx(0.9)


def test_scalar_probes_of_the_run_are_compared_and_its_own_numbers_are_not(tmp_path: Path):
    runs = []
    for name, size in (("plain", 0.1), ("other", 0.3)):
        rows = curve_rows(T13, run=name)
        for step in STEPS:
            place = {"probe": "contribution", "metric": "share_mha", "unit": "1", **stamp(step, run=name)}
            rows += [Row(value=size, variant="lens", **place), Row(value=9.0, layer=1, **place)]
        runs.append(planted_run(tmp_path / name, rows, name))
    comparison = tx.compare(runs)
    (row,) = comparison.table.where(part="difference", metric="share_mha", variant="contribution, lens, equal loss")
    assert row.value == pytest.approx(0.2)
    assert {row.metric for row in comparison.table.where(part="mean")} == {
        "nats_per_token", "bits_per_byte", "share_mha", "steps", "tokens", "seconds", "flops"
    }  # fmt: skip


def test_a_run_at_work_and_one_that_was_never_measured(tmp_path: Path):
    rows = curve_rows(T13, run="plain")
    plain = planted_run(tmp_path / "plain", rows, done=False)
    with (plain / "rows.jsonl").open("a") as handle:
        handle.write('{"metric": "nats_per_token", "val')
    gone = [
        row if row.split != "ood" else replace(row, value=None, reason="NaN") for row in curve_rows(SLOW, run="other")
    ]
    table = tx.compare([plain, planted_run(tmp_path / "other", gone, "other")]).table
    row = headline(table, "mean", "other")
    assert row.value is None and row.reason == "other was not measured"
    assert headline(table, "mean", "plain").value == pytest.approx(4.30)
    row = headline(table, "difference", "other")
    assert row.value is None and row.reason == "other has no value"


def test_one_seed_is_no_verdict(tmp_path: Path):
    comparison = tx.compare(pair(tmp_path, T13, SLOW))
    row = headline(comparison.table, "difference", "other")
    assert row.value is not None and (row.stderr, row.low, row.high) == (None, None, None)
    for part in ("p", "p_holm", "seeds_needed", "seeds_needed_for_0.01"):
        row = headline(comparison.table, part, "other")
        assert row.value is None and row.reason == "one seed is a demonstration, no verdict"
    assert comparison.sentences[0].endswith("(1 seed; one seed is a demonstration, no verdict).")
    assert "few different draws" in str(headline(comparison.table, "mean_bootstrap", "other").reason)


def test_seeds_that_are_not_common(tmp_path: Path):
    effects = {"plain": lambda s: 0.01 * s * s, "cea": lambda s: 0.1 + 0.02 * s}
    runs = study(tmp_path, effects, seeds=range(5))
    some = tx.compare([*runs[:4], *runs[6:]])  # plain 0 .. 3, cea 1 .. 4
    row = headline(some.table, "difference", "cea")
    assert row.n == 3 and row.value == pytest.approx(np.mean([0.1 + 0.02 * s - 0.01 * s * s for s in (1, 2, 3)]))
    assert any("differences are of the common ones only" in note for note in some.notes)
    none = tx.compare([*runs[:2], *runs[7:]])  # plain 0, 1; cea 2, 3, 4
    row = headline(none.table, "difference", "cea")
    assert row.low is not None and row.low < row.value < row.high
    assert any("no seed in common: unpaired, Welch's interval" in note for note in none.notes)


def test_bootstrap_from_five_seeds_on(tmp_path: Path):
    table = tx.compare(study(tmp_path, {"plain": lambda _: 0.0, "cea": lambda s: 0.01 * s}, seeds=range(5))).table
    row = headline(table, "difference_bootstrap", "cea")
    assert row.value == pytest.approx(0.02)
    assert 0 <= row.low < 0.015 and 0.025 < row.high <= 0.04 + 1e-9


def test_arms_of_one_name_are_told_apart_by_what_differs(tmp_path: Path):
    rows = curve_rows(T13)
    names = {"a": ["model.width=24"], "b": ["model.width=32"], "c": ["model.width=32", "train.max_minutes=3"]}
    runs = [planted_run(tmp_path / key, rows, seed=key == "c", settings=names[key]) for key in names]
    comparison = tx.compare(runs)
    assert [arm.name for arm in comparison.arms] == ["plain model.width=24", "plain model.width=32"]
    assert [len(arm.runs) for arm in comparison.arms] == [1, 2]
    parameters = comparison.table.where(metric="parameters").rows
    assert parameters[0].value < parameters[1].value
    assert comparison.table.where(metric="peak_memory").rows[0].value == 2**30


def test_a_decayed_learning_rate_is_noted(tmp_path: Path):
    decay = ["train.schedule.kind=wsd", "train.schedule.warmup=2", "train.schedule.decay=0.5"]
    runs = [
        planted_run(tmp_path / "a", curve_rows(T13, run="a"), "a", settings=decay),
        planted_run(tmp_path / "b", curve_rows(SLOW, run="b"), "b"),
    ]
    (note,) = (note for note in tx.compare(runs).notes if "learning rate" in note)
    assert note.startswith("the learning rate of a had decayed before equal loss")
    assert not [note for note in tx.compare(runs, at_loss=3.59).notes if "learning rate" in note]


def test_repeated_quantities_are_counted_once(tmp_path: Path):
    runs = study(tmp_path, {"plain": lambda _: 0.0, "cea": lambda s: 0.01 * s + 0.01})
    comparison = tx.compare(runs)
    table = comparison.table
    assert not [text for text in comparison.sentences if "bits per byte" in text]
    bits = table.where(part="p_holm", metric="bits_per_byte", domain=None, variant="equal loss").rows[0]
    assert bits.value is None and bits.reason == "counted once, as out-of-distribution loss"
    p, corrected = headline(table, "p", "cea").value, headline(table, "p_holm", "cea").value
    assert p is not None and corrected == pytest.approx(min(1, 3 * p))  # the mean and two domains


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"data": "4567"}, "were trained on other data"),
        ({"name": "plain"}, "are of one recipe and one seed, 0"),
    ],
)
def test_runs_that_do_not_belong_together(tmp_path: Path, change: dict, said: str):
    first = planted_run(tmp_path / "a", curve_rows(T13))
    second = planted_run(tmp_path / "b", curve_rows(T13), **{"name": "other", **change})
    with pytest.raises(InputError, match=said):
        tx.compare([first, second])


def test_other_validation_text_is_refused(tmp_path: Path):
    first = planted_run(tmp_path / "a", curve_rows(T13))
    rows = [replace(row, n=17) if row.split == "valid" else row for row in curve_rows(T13)]
    with pytest.raises(InputError, match="evaluated on other parts of `valid`"):
        tx.compare([first, planted_run(tmp_path / "b", rows, "b")])
    rows = [row for row in curve_rows(T13) if row.split != "valid"]
    with pytest.raises(InputError, match="has no evaluation on `valid`"):
        tx.compare([first, planted_run(tmp_path / "c", rows, "c")])
