"""What the page shows of judged models: each task's figures hold its numbers; chance and majority stand in words."""

import pytest

from report_rows import about, assert_valid, drawn, values
from transect.report.figures import figures_of, key_rows_of
from transect.report.page import write_report
from transect.report.pick import Pick
from transect.report.records import to_records
from transect.results import Row, Table

MODELS = ("one", "two")


def _rows() -> list[Row]:
    rows = []
    for number, model in enumerate(MODELS):
        like = {"model": model, "n": 100, "documents": 100}
        for place, domain in enumerate(("hellaswag", "piqa")):
            own = {**like, "task": "options", "domain": domain, "split": "test"}
            for rule, value in (("option", 0.3), ("option per character", 0.4), ("whole", 0.2)):
                rows.append(
                    about("accuracy", value + 0.1 * place + 0.05 * number, "1", 0.02, variant=f"0-shot: {rule}", **own)
                )
            rows.append(about("accuracy", 0.55, "1", 0.02, variant="0-shot: best (whole)", **own))
            rows.append(Row(metric="accuracy", value=0.25 * (1 + place), unit="1", variant="chance", **own))
        for kind, value in (("island", 0.6), ("agreement", 0.9), (None, 0.75)):
            own = {**like, "task": "minimal_pairs", "domain": "blimp"}
            rows.append(about("accuracy", value + 0.01 * number, "1", 0.01, part=kind, variant="whole", **own))
        own = {**like, "task": "fine_tuning", "domain": "sentiment", "split": "test"}
        for variant, value in (("seed 0", 0.7), ("seed 1", 0.74), ("mean", 0.72), ("majority", 0.5)):
            rows.append(
                about("accuracy", value + 0.1 * number * (variant != "majority"), "1", 0.01, variant=variant, **own)
            )
        own = {**like, "task": "linear_probe", "domain": "era", "split": "test"}
        for layer in range(4):
            place = {"layer": layer, "site": "resid", "part": f"ridge {10.0**-layer:g}"}
            rows.append(about("accuracy", 0.5 + 0.1 * layer + 0.02 * number, "1", 0.01, **place, **own))
        rows.append(about("accuracy", 0.45, "1", 0.01, variant="majority", **own))
    return rows


def _pick(task: str, rows: list[Row]) -> Pick:
    records = tuple(record for record in to_records(rows) if record["task"] == task)
    return Pick(records, ("!isValid(datum.probe)", {"field": "task", "equal": task}))


def _figures(task: str, rows: list[Row]) -> dict:
    found = figures_of(task, _pick(task, rows))
    assert len({figure.name for figure in found}) == len(found)
    for figure in found:
        assert_valid(figure)
    return {figure.title: figure for figure in found}


def test_options_show_the_two_usual_rules_and_chance():
    rows = _rows()
    figures = _figures("options", rows)
    assert set(figures) == {
        "Accuracy by log-probability, 0-shot",
        "Accuracy by log-probability per character, 0-shot",
    }
    bars = drawn(figures["Accuracy by log-probability, 0-shot"], rows, "bar")
    assert values(bars, "value") == [(pytest.approx(v),) for v in (0.3, 0.35, 0.4, 0.45)]
    assert "0.25 on hellaswag, 0.5 on piqa" in figures["Accuracy by log-probability, 0-shot"].note
    assert key_rows_of("options", _pick("options", rows))["two"]["piqa, 0-shot, option"] == "0.45"


def test_minimal_pairs_over_kinds_and_by_kind():
    rows = _rows()
    figures = _figures("minimal_pairs", rows)
    assert values(drawn(figures["Accuracy"], rows, "bar"), "value") == [(pytest.approx(0.75),), (pytest.approx(0.76),)]
    kinds = drawn(figures["Accuracy by kind: one"], rows, "bar")
    assert {one["part"]: float(one["value"]) for one in kinds} == {"island": 0.6, "agreement": 0.9}


def test_fine_tuning_shows_the_mean_beside_the_majority():
    rows = _rows()
    (figure,) = _figures("fine_tuning", rows).values()
    assert values(drawn(figure, rows, "bar"), "value") == [(pytest.approx(0.72),), (pytest.approx(0.82),)]
    assert "0.5 on sentiment" in figure.note
    keys = key_rows_of("fine_tuning", _pick("fine_tuning", rows))
    assert keys["one"] == {"sentiment": "0.72", "sentiment, most frequent label": "0.5"}


def test_linear_probe_is_one_line_a_model_whatever_its_ridges():
    rows = _rows()
    figures = _figures("linear_probe", rows)
    (figure,) = figures.values()
    assert len(drawn(figure, rows, "line mark")) == 2
    assert len(drawn(figure, rows, "point")) == 8 and "0.45" in figure.note
    assert key_rows_of("linear_probe", _pick("linear_probe", rows))["one"]["era: best layer"] == "0.8 (3)"


def test_all_tasks_stand_on_one_page(tmp_path):
    pages = write_report(Table(_rows()), tmp_path / "page.html")
    text = pages[0].read_text()
    for title in ("Choice among options", "Minimal pairs", "Fine-tuning", "Linear probe"):
        assert f"<h2>{title}</h2>" in text
    assert len(pages) > 10
