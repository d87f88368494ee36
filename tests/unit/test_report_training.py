"""The report of training runs: curves over steps, runs overlaid by name, long curves thinned, probes inside runs."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from report_rows import axis_of, drawn, figures_by_name, values
from training_rows import evaluated, logged, run_folder, stamp
from transect.errors import InputError
from transect.report import write_report
from transect.report.page import Section, sections_of
from transect.report.records import section_of, to_records
from transect.report.thinning import MOST_POINTS, thinned
from transect.results import Row, Table

STEPS = (10, 20, 30, 40)


def run(name: str = "first", steps: Any = STEPS, worse: float = 0.0, **others: Any) -> list[Row]:
    kept = {key: others.pop(key) for key in ("layers", "sparse") if key in others}
    rows = list(evaluated(0, 10.0 + worse, run=name, **others))
    for step in steps:
        rows += logged(step, 10 / step**0.5 + worse, run=name, **kept, **others)
        rows += evaluated(step, 11 / step**0.5 + worse, run=name, **others)
    return rows


def sections(rows: list[Row]) -> dict[str, Section]:
    return {section.probe: section for section in sections_of(to_records(rows))}


def of_task(rows: list[Row]) -> dict[str, Any]:
    return {figure.name: figure for figure in sections(rows)["language_modelling"].figures}


def at(marks: list[dict[str, str]], **equal: str) -> list[dict[str, str]]:
    return [one for one in marks if all(one[name] == value for name, value in equal.items())]


def test_training_and_its_texts_come_first():
    jump = [Row(probe="jump", metric="displacement", value=0.5, unit="1", layer=0, **stamp(10))]
    assert list(sections([*jump, *run()])) == ["train", "language_modelling", "jump"]
    titles = [figure.title for figure in sections(run(layers=2, sparse=True))["train"].figures]
    assert titles == [
        "Training loss",
        "Other parts of the loss",
        "Norm of the gradient before clipping",
        "Norm of the gradient by part",
        "Learning rate",
        "Stream norm over training",
        "Speed",
        "Peak memory",
        "Entropy over training",
        "Dead fraction over training",
        "Largest load over training",
    ]  # fmt: skip - no MFU, no dropped choice and no skipped step: nothing to draw


def test_the_loss_of_one_run_and_its_parts():
    rows = run()
    marks = drawn(figures_by_name("train", rows)["loss"], rows, "point")
    for part, size in (("main", 1), ("total", 1.001)):
        found = values(at(marks, part=part), "training step", "value")
        assert found == [(step, pytest.approx(size * 10 / step**0.5, rel=1e-3)) for step in STEPS]
    parts = drawn(figures_by_name("train", rows)["loss_parts"], rows, "point")
    assert {one["part"] for one in parts} == {"z_loss"} and len(parts) == len(STEPS)


def test_a_steep_loss_has_a_logarithmic_axis():
    steep = figures_by_name("train", run(steps=(1, 10, 1000)))["loss"]
    assert axis_of(steep)["scale"]["type"] == "log" and "log scale" in axis_of(steep)["title"]
    assert axis_of(figures_by_name("train", run(steps=(100, 110)))["loss"])["scale"].get("type") is None


def test_runs_are_overlaid_by_their_name():
    rows = [*run("base"), *run("wide", worse=1.0)]
    for name in ("loss", "gradient_norm", "learning_rate", "tokens_per_second", "peak_memory"):
        figure = figures_by_name("train", rows)[name]
        assert Counter(one["subject"] for one in drawn(figure, rows, "point")) == {"base": 4, "wide": 4}, name
        assert len(drawn(figure, rows, "line mark")) == 2
    assert {record["subject"] for record in to_records(rows)} == {"base", "wide"}


def test_runs_logged_at_different_steps_are_still_told_apart():
    rows = [*run("base", (10, 20)), *run("wide", (15, 25))]
    assert {record["subject"] for record in to_records(rows)} == {"base", "wide"}


def test_runs_of_other_cost_are_also_drawn_against_it():
    base, wide = run("base"), [replace(row, flops=3 * row.flops, seconds=2 * row.seconds) for row in run("wide")]
    rows = [*base, *wide]
    named = figures_by_name("train", rows)
    assert {"loss", "loss_time", "loss_flops"} <= set(named) and "loss_tokens" not in named
    assert named["loss_flops"].title == "Training loss against training FLOPs"
    marks = drawn(named["loss_flops"], rows, "point")
    assert values(at(marks, subject="wide"), "training FLOPs") == [(3e12 * step,) for step in STEPS]
    marks = drawn(named["loss_time"], rows, "point")
    assert values(at(marks, subject="wide"), "seconds of training") == [(step,) for step in STEPS]
    assert "loss_time" not in figures_by_name("train", base)
    assert "training_nats_per_token_valid wiki_flops" in of_task(rows)


def test_texts_of_one_run_have_bands():
    rows = run()
    figure = of_task(rows)["training_nats_per_token"]
    marks = drawn(figure, rows, "point")
    assert {one["text"] for one in marks} == {"valid wiki", "valid books", "ood code"}
    found = values(at(marks, text="valid books"), "training step", "value", "low", "high")
    wanted = [(0, 10.25), *((step, 11 / step**0.5 + 0.25) for step in STEPS)]
    assert found == [
        (step, *(pytest.approx(value + error, rel=1e-3) for error in (0, -0.04, 0.04))) for step, value in wanted
    ]
    assert len(drawn(figure, rows, "area mark")) == 3
    bars = drawn(of_task(rows)["bits_per_byte"], rows, "bar")
    assert {one["text"]: float(one["value"]) for one in bars} == {
        text: pytest.approx((11 / 40**0.5 + 0.25 * number) / 3, rel=1e-3)
        for number, text in enumerate(("valid wiki", "valid books", "ood code"))
    }
    assert of_task(rows)["bits_per_byte"].note == "Step 40, the last of 5."


def test_texts_of_several_runs_have_a_figure_each():
    rows = [*run("base"), *run("wide", worse=1.0)]
    named = of_task(rows)
    for text in ("valid wiki", "valid books", "ood code"):
        figure = named[f"training_bits_per_byte_{text}"]
        assert Counter(one["subject"] for one in drawn(figure, rows, "point")) == {"base": 5, "wide": 5}
    same_domain = [replace(row, domain="wiki") for row in run()]
    figure = of_task(same_domain)["nats_per_token"]
    assert {one["text"] for one in drawn(figure, same_domain, "bar")} == {"valid wiki", "ood wiki"}


def test_a_text_that_was_read_once_has_bars_only():
    assert set(of_task(list(evaluated(10, 3.0)))) == {"nats_per_token", "bits_per_byte"}


def test_few_layers_are_lines_and_many_a_map():
    few, many = run(layers=3, sparse=True), run(layers=11, sparse=True)
    marks = drawn(figures_by_name("train", few)["training_stream norm"], few, "point")
    assert sorted((int(one["training step"]), int(one["layer"])) for one in marks) == [
        (step, layer) for step in STEPS for layer in range(4)
    ]
    cells = drawn(figures_by_name("train", many)["training_Entropy"], many, "rect mark")
    assert sorted((int(one["training step"]), int(one["layer"])) for one in cells) == [
        (step, layer) for step in STEPS for layer in range(11)
    ]


def test_gradients_stand_in_the_order_of_the_model():
    rows = run(layers=11)
    figure = figures_by_name("train", rows)["gradient_parts"]
    order = axis_of(figure)["scale"]["domain"]
    assert order[:3] == ["embeddings", "layers.0.attn", "layers.0.ffn"] and order[-1] == "layers.10.ffn"
    assert len(drawn(figure, rows, "rect mark")) == len(STEPS) * 23


def test_figures_of_one_run_among_several_have_its_name():
    rows = [*run("base"), *run("sparse", layers=3, sparse=True)]
    named = figures_by_name("train", rows)
    assert named["training_Entropy_sparse"].title == "Entropy over training: sparse"
    assert named["loss_parts_base"].title == "Other parts of the loss: base"


def test_key_numbers_have_a_line_for_each_run():
    section = sections([*run("base", sparse=True, layers=2), *run("wide", worse=1.0)])["train"]
    found = {name: dict(zip(section.key_names, numbers, strict=True)) for name, numbers in section.key_rows}
    assert found["base"] == {
        "steps": "40", "tokens": "163,840", "time": "0:00:20", "FLOPs": "4.00e+13", "last training loss": "1.58",
        "tokens/s, median": "8,025", "peak memory": "1.50 GiB", "skipped steps": "0",
        "last dead fraction, worst layer": "0.25", "last drop fraction, worst layer": "0",
    }  # fmt: skip
    assert found["wide"]["last training loss"] == "2.58" and found["wide"]["last dead fraction, worst layer"] == "–"
    texts = sections(run())["language_modelling"]
    assert dict(texts.key_rows)["first"][texts.key_names.index("ood code: nats per token")] == "2.24"


def test_what_is_not_known_is_said_and_not_drawn():
    section = sections(run())["train"]
    assert section.missing == [("mfu: the peak of this device is not known", len(STEPS))]
    assert "mfu" not in {figure.name for figure in section.figures}


def test_long_curves_keep_ends_and_peaks():
    rows = [row for step in range(1, 4001) for row in logged(step, 3.0 + (step == 1234) - (step == 2345))]
    kept = [(row, note) for row, note in thinned(rows) if row.metric == "loss" and row.part == "main"]
    steps = [row.step for row, _ in kept]
    assert len(kept) <= MOST_POINTS and steps == sorted(steps) and {1, 1234, 2345, 4000} <= set(steps)
    assert {note for _, note in kept} == {"At most 500 of 4,000 logged steps: the lowest and highest of each stretch."}
    figure = figures_by_name("train", rows)["loss"]
    assert figure.note.startswith("At most 500 of 4,000 logged steps")
    marks = at(drawn(figure, rows, "point"), part="main")
    assert len(marks) == len(kept) and max(float(one["value"]) for one in marks) == 4


def test_many_curves_keep_the_same_steps():
    rows = [row for step in range(5, 3005, 5) for row in logged(step, 3.0, layers=11)]
    kept = [row for row, _ in thinned(rows) if row.metric == "stream_norm"]
    of_layer = {layer: [row.step for row in kept if row.layer == layer] for layer in range(12)}
    assert all(steps == of_layer[0] for steps in of_layer.values())
    gaps = {b - a for a, b in zip(of_layer[0], of_layer[0][1:], strict=False)}
    assert len(of_layer[0]) == 2000 // 12 and of_layer[0][0] == 5 and of_layer[0][-1] == 3000 and gaps <= {15, 20}
    assert "166 of 600 logged steps, evenly spaced." in figures_by_name("train", rows)["training_stream norm"].note


def test_short_runs_and_other_probes_are_not_thinned():
    probe = [Row(probe="jump", metric="m", value=1.0, unit="1", layer=0, **stamp(step)) for step in range(2000)]
    rows = [*(row for step in range(1, 501) for row in logged(step, 3.0)), *probe]
    assert list(thinned(rows)) == [(row, None) for row in rows]


def test_probes_inside_a_run_are_followed():
    rows = run(layers=3)
    for step in (10, 20, 40):
        place = {**stamp(step, dtype="float32"), "data": "sample, valid", "split": "valid", "variant": "pre_norm/all"}
        rows += [
            Row(probe="jump", metric="displacement", value=step * (layer + 1) / 1000, unit="1", layer=layer, **place)
            for layer in range(3)
        ]
    named = figures_by_name("jump", rows)
    assert named["displacement"].note.endswith("Step 40, the last of 3.")
    marks = drawn(named["training_displacement"], rows, "point")
    assert values(marks, "training step", "layer", "value") == [
        (step, layer, pytest.approx(step * (layer + 1) / 1000)) for step in (10, 20, 40) for layer in range(3)
    ]
    assert [name for name, _ in sections(rows)["jump"].key_rows] == ["first step 10", "first step 40"]
    assert {record["subject"] for record in to_records(rows)} == {"first"}


def test_checkpoints_measured_later_are_followed_by_their_revision():
    rows = [
        Row(probe="jump", metric="displacement", value=0.1 * layer + step / 1e3, unit="1", layer=layer, model="first",
            revision=f"step-{step:08d}", variant="pre_norm/all")
        for step in (120, 40, 80) for layer in range(3)
    ]  # fmt: skip
    figure = figures_by_name("jump", rows)["revisions_displacement"]
    assert axis_of(figure, "x")["scale"]["domain"] == ["step-00000040", "step-00000080", "step-00000120"]


def test_the_page_of_a_run_at_work(tmp_path: Path):
    rows = run(steps=range(1, 1501))
    folder = run_folder(tmp_path / "first", rows)
    with (folder / "rows.jsonl").open("a") as handle:
        handle.write('{"metric": "lo')
    written = write_report(folder, tmp_path / "page.html")
    page = written[0].read_text()
    assert "<title>Training: first</title>" in page and "long curves thinned" in page
    assert f"of {len(rows):,}" in page and "step-00000000 … step-00001500" in page
    assert "At most 500 of 1,500 logged steps" in page
    assert {path.stem for path in written[1:]} >= {"train_loss", "language_modelling_training_nats_per_token"}
    assert len(page) < 4_000_000


def test_damage_inside_is_one_line(tmp_path: Path):
    folder = run_folder(tmp_path / "first", run())
    text = (folder / "rows.jsonl").read_text()
    (folder / "rows.jsonl").write_text(text.replace('"metric"', '"metrik"', 3))
    with pytest.raises(InputError, match="is not a table of rows") as caught:
        write_report(folder, tmp_path / "page.html")
    assert "\n" not in str(caught.value)


def test_runs_in_folders_of_one_name_are_told_apart(tmp_path: Path):
    folders = [run_folder(tmp_path / parent / "first", run(worse=worse)) for parent, worse in (("a", 0.0), ("b", 1.0))]
    page = write_report(folders, tmp_path / "page.html")[0].read_text()
    assert "<title>Training: a/first, b/first</title>" in page


def test_each_figure_gets_only_the_rows_it_reads():
    rows = run(layers=3, sparse=True)
    for section in sections(rows).values():
        for figure in section.figures:
            assert figure.reads and drawn(figure, rows, "point") + drawn(figure, rows, "bar") + drawn(
                figure, rows, "rect mark"
            )
    assert json.dumps([figure.reads for figure in sections(rows)["train"].figures])


def test_rows_of_a_task_have_a_section_of_their_own():
    records = to_records([Row(metric="accuracy", value=0.5, unit="1", task="copying", model="net"), *evaluated(0, 1.0)])
    assert {section_of(record) for record in records} == {"copying", "language_modelling"}
    table = Table([Row(metric="accuracy", value=0.5, unit="1", task="copying", model="net")])
    assert list(sections(list(table))) == ["copying"]
