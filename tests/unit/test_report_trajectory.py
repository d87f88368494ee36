"""Models followed over training: figures over the steps, the last step elsewhere, and what tells series apart."""

from dataclasses import replace

import pytest

from report_rows import SHARES, ablation, axis_of, commutativity, contribution, drawn, figures_by_name, routing
from transect.report.page import sections_of
from transect.report.records import to_records
from transect.results import Row


def over_steps(make, steps: tuple[int, ...], layers: int, **stamp) -> list[Row]:
    """Rows of a probe at every step, each value growing with the step's number."""
    found = []
    for number, step in enumerate(steps):
        for row in make(layers, step=step, **stamp):
            grown = None if row.value is None else row.value * (number + 1)
            found.append(replace(row, value=grown, low=None, high=None, stderr=None))
    return found


STEPS = (0, 1, 100, 10_000)


def test_ordinary_figures_of_a_trajectory_show_its_last_step():
    found = over_steps(commutativity, STEPS, 4, model="net")
    named = figures_by_name("commutativity", found)
    figure = named["loss_change_neighbours"]
    assert figure.note == "Step 10,000, the last of 4."
    marks = drawn(figure, found, "bar")
    assert {one["series"] for one in marks} == {"net step 10000"} and len(marks) == 3
    section = sections_of(to_records(found))[0]
    assert [series for series, _ in section.key_rows] == ["net step 0", "net step 10000"]


def test_trajectory_of_few_layers_is_lines():
    found = over_steps(commutativity, STEPS, 4, model="net")
    figure = figures_by_name("commutativity", found)["training_loss change, one layer repeated"]
    assert figure.title == "Loss change, one layer repeated over training"
    marks = drawn(figure, found, "point")
    assert sorted((int(one["after"]) - 1, int(one["layer"]), float(one["value"])) for one in marks) == [
        (step, layer, pytest.approx((9 + layer / 7) * (number + 1), rel=1e-3))
        for number, step in enumerate(STEPS)
        for layer in range(4)
    ]
    assert len(drawn(figure, found, "line mark")) == 4
    assert axis_of(figure, "x")["scale"]["type"] == "log"  # steps are spread over powers of ten


def test_trajectory_of_many_layers_is_a_map():
    found = over_steps(commutativity, (10, 20, 30), 11, model="net")
    figure = figures_by_name("commutativity", found)["training_loss change, one layer repeated"]
    cells = drawn(figure, found, "rect mark")
    assert sorted((int(one["training step"]), int(one["layer"])) for one in cells) == [
        (step, layer) for step in (10, 20, 30) for layer in range(11)
    ]


def test_trajectory_of_shares_has_a_line_for_each_estimator():
    found = over_steps(contribution, (100, 200, 300), 3, model="net")
    figure = figures_by_name("contribution", found)["training_attention share"]
    marks = drawn(figure, found, "point")
    assert sorted((one["variant"], int(one["training step"])) for one in marks) == sorted(
        (variant, step) for variant in SHARES if variant != "MI/over_seeds" for step in (100, 200, 300)
    )
    assert axis_of(figure, "x")["scale"].get("type") is None
    two = [*found, *over_steps(contribution, (100, 400), 3, model="other")]
    marks = drawn(figures_by_name("contribution", two)["training_attention share"], two, "point")
    assert len(marks) == 4 * (3 + 2)
    notes = [figure.note for figure in figures_by_name("contribution", two).values()]
    assert any("Step 300, the last of 3." in note for note in notes)


def test_two_moments_are_both_shown_everywhere():
    found = over_steps(commutativity, (5, 6), 4, model="net")
    marks = drawn(figures_by_name("commutativity", found)["loss_change_neighbours"], found, "bar")
    assert {one["series"] for one in marks} == {"net step 5", "net step 6"}


def test_revisions_stand_in_for_steps_in_their_own_order():
    revisions = ("step1000", "step64", "step512")
    found = [
        Row(probe="mine", metric="turn", value=float(layer), unit="1", layer=layer, model="net", revision=revision)
        for revision in revisions
        for layer in range(3)
    ]
    named = figures_by_name("mine", found)
    assert named["turn"].note == "Revision step1000, the last of 3."
    figure = named["revisions_turn"]
    assert figure.title == "Turn over revisions"
    assert axis_of(figure, "x")["scale"]["domain"] == ["step64", "step512", "step1000"]
    assert len(drawn(figure, found, "point")) == 9


def test_every_probe_can_be_followed():
    stamp = {"model": "net"}
    found = [*over_steps(ablation, (1, 2, 3), 3, **stamp), *over_steps(contribution, (1, 2, 3), 3, **stamp)]
    for number, step in enumerate((1, 2, 3)):
        found += [replace(row, step=step) for row in routing(3, 4, **stamp)]
        for element in ("ffn", "attn"):
            found += [Row(probe="nonlinearity", metric="r2_heldout", value=0.5 + 0.1 * number, unit="1", layer=layer,
                          element=element, step=step, **stamp) for layer in range(3)]  # fmt: skip
        found += [Row(probe="jump", metric="displacement", value=0.1 * number, unit="1", layer=layer, step=step,
                      variant=variant, **stamp)
                  for layer in range(3) for variant in ("post_norm/all", "pre_norm/all")]  # fmt: skip
    followed = {
        section.probe: [figure.title for figure in section.figures if "over training" in figure.title]
        for section in sections_of(to_records(found))
    }
    assert followed["jump"] == ["Displacement over training"]
    assert followed["nonlinearity"] == ["R² held out, ffn over training", "R² held out, attn over training"]
    assert followed["routing"] == [f"{name} over training" for name in ("Entropy", "Dead fraction", "Drop fraction")]
    assert "Loss change, FFN ablated (zero) over training" in followed["ablation"]
    assert followed["contribution"][0] == "Attention share over training" and len(followed["contribution"]) == 4
    jump = figures_by_name("jump", found)["training_displacement"]
    assert {one["variant"] for one in drawn(jump, found, "point")} == {"pre_norm/all"}


def test_followed_runs_of_one_model_are_told_apart_and_revisions_not_twice():
    def row(step: int, run: str) -> Row:
        return Row(metric="m", value=1.0, unit="1", model="net", step=step, revision=f"step{step}", run=run)

    one_run_each = to_records([row(1, "a"), row(2, "b")])
    assert [record["series"] for record in one_run_each] == ["net step 1", "net step 2"]
    assert {record["subject"] for record in one_run_each} == {"net"}
    two_runs = to_records([row(step, run) for step in (1, 2) for run in ("a", "b")])
    assert [record["series"] for record in two_runs] == ["net step 1 a", "net step 1 b", "net step 2 a", "net step 2 b"]
    assert [record["subject"] for record in two_runs] == ["net a", "net b"] * 2
