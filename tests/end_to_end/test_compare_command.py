"""`transect compare` as a user has it: what it prints and leaves, what it refuses, and the page drawn of it."""

import json
import re
from pathlib import Path

import pytest

import transect as tx
from compared_runs import T13, curve_rows, planted_run, study
from report_rows import drawn, figures_by_name, values
from shell import command
from transect.report.page import sections_of
from transect.report.records import to_records
from transect.results import Row, Table

EFFECTS = {"plain": lambda _: 0.0, "cea": lambda seed: -0.02 - 0.001 * seed, "wide": lambda seed: 0.01 * seed}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return study(tmp_path_factory.mktemp("runs"), EFFECTS)


@pytest.fixture(scope="module")
def rows(runs: list[Path]) -> list[Row]:
    return tx.compare(runs, by=("loss", "steps")).table.rows


def test_what_is_printed_and_left(runs: list[Path], tmp_path: Path):
    folder = tmp_path / "compared"
    done = command("compare", *runs, "--by", "loss,steps", "-o", folder)
    assert (done.code, done.err) == (0, "")
    wide = [line for line in done.out.splitlines() if len(line) > 80 and str(folder) not in line]
    assert not wide
    text = " ".join(done.out.split())
    assert "cea has an out-of-distribution loss lower by 0.021 [" in text and ": better." in text
    assert "what it took to get there" in text and "at equal steps (140); differences to plain" in text
    assert {path.name for path in folder.iterdir()} == {
        "rows.jsonl", "rows.parquet", "config.json", "environment.json", "compare.md"
    }  # fmt: skip
    config = json.loads((folder / "config.json").read_text())
    assert (config["kind"], config["by"], config["baseline"]) == ("comparison", ["loss", "steps"], "plain")
    written = (folder / "compare.md").read_text()
    assert "lower by 0.021 [" in written
    losses = [set(re.findall(r"At equal in-distribution loss ([\d.]+) nats, ", told)) for told in (text, written)]
    assert len(losses[0]) == 1 < len(losses[1])  # the neighbouring losses are in the file alone
    assert Table.read(folder).rows == Table.read(folder / "rows.jsonl").rows
    again = command("compare", *runs, "-o", folder)
    assert again.code == 2 and "already holds a run" in again.err

    page = command("report", folder, "-o", tmp_path / "page.html")
    assert page.code == 0
    assert (tmp_path / "page_figures" / "compare_curves.png").is_file()
    assert "Comparison" in (tmp_path / "page.html").read_text()


def test_what_is_refused_in_one_line(runs: list[Path], tmp_path: Path):
    other = planted_run(tmp_path / "other", curve_rows(T13), "other", data="4567")
    better = {split: tuple(value - 2 for value in losses) for split, losses in T13.items()}
    far = planted_run(tmp_path / "far", curve_rows(better, run="far"), "far")
    near = planted_run(tmp_path / "near", curve_rows(T13, run="near"), "near")
    (tmp_path / "empty").mkdir()
    known = "loss, steps, flops, seconds"
    for arguments, said in (
        ([runs[0]], "give at least two run folders"),
        ([runs[0], runs[0]], "is given twice; give each run once"),
        ([runs[0], tmp_path / "empty"], "is not the folder of a training run"),
        ([runs[0], other], "were trained on other data"),
        ([far, near], "no in-distribution loss is common to all runs"),
        ([*runs, "--baseline", "bert"], "no arm is called 'bert'; the baseline may be cea, plain, wide"),
        ([*runs, "--by", "hours"], f"--by is 'hours'; it must be of {known}"),
        ([*runs, "--at-loss", "low"], "--at-loss is 'low'; give nats per token"),
        ([*runs, "--at-loss", "1.5"], "only gets down to"),
        ([*runs, "--at-loss", "3.5", "--by", "steps"], "add loss to --by"),
    ):
        done = command("compare", *arguments)
        assert done.code == 2 and said in done.err and done.err.count("\n") == 1, done


def test_curves_of_the_page(rows: list[Row]):
    figure = figures_by_name("compare", rows)["curves"]
    assert len(drawn(figure, rows, "line mark")) == 9 + 3
    (rule,) = drawn(figure, rows, "rule mark")
    matched = next(row.value for row in rows if row.metric == "matched_loss" and row.variant == "equal loss")
    assert float(rule["value"]) == pytest.approx(matched, rel=1e-3)
    (last, *_) = values(drawn(figure, rows, "point"), "in-distribution loss, nats per token")
    assert last[0] == pytest.approx(2.5 + 4 / 20**0.7 + 0.013, rel=1e-3)


@pytest.mark.parametrize("alignment", ["equal loss", "equal steps"])
def test_values_and_differences_of_the_page(rows: list[Row], alignment: str):
    named = figures_by_name("compare", rows)
    figure = named[f"differences_nats per token, {alignment}"]
    marks = drawn(figure, rows, "point")
    assert {one["quantity"] for one in marks} >= {"ood all", "ood code", "ood mail"}
    found = {one["model"]: one for one in marks if one["quantity"] == "ood all"}
    assert set(found) == {"cea", "wide"}
    assert float(found["cea"]["value"].replace("−", "-")) == pytest.approx(-0.021, rel=1e-2)
    assert len(drawn(named[f"values_out-of-distribution loss, {alignment}"], rows, "point")) == 3
    assert len(drawn(named[f"time_{alignment}"], rows, "point")) == 9 + 3


def test_a_comparison_beside_its_runs(runs: list[Path], rows: list[Row]):
    together = [*rows, *(row for run in runs for row in Table.read(run))]
    figure = figures_by_name("compare", together)["curves"]
    assert len(drawn(figure, together, "line mark")) == 9 + 3
    section = next(one for one in sections_of(to_records(together)) if one.probe == "compare")
    assert {name.split()[0] for name, _ in section.key_rows} == set(EFFECTS)
