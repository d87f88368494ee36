"""`transect watch`: what it reads of a run that is being written, and what it draws."""

import io
import json
import os
from pathlib import Path

import pytest
from rich.console import Console

from shell import command
from training_rows import evaluated, logged, run_folder
from transect.errors import InputError
from transect.results import to_line
from transect.train.following import Following
from transect.train.sketch import Curve, chart
from transect.train.watch import keep_drawing, picture

PLAIN = "{:.3g}".format


def rows_of(steps: range, run: str = "first") -> list:
    rows = list(evaluated(0, 10.0, run=run))
    for step in steps:
        rows += logged(step, 10 / step, layers=3, run=run)
    return [*rows, *evaluated(steps[-1], 10 / steps[-1], run=run)]


def drawn(*paths: Path, width: int = 80) -> list[str]:
    console = Console(file=io.StringIO(), width=width)
    console.print(picture([Following(path) for path in paths], width))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def dots(lines: list[str]) -> set[tuple[int, int]]:
    """Column and row, from the top left, of every dot of braille text."""
    bits = {
        0x01: (0, 0),
        0x02: (0, 1),
        0x04: (0, 2),
        0x40: (0, 3),
        0x08: (1, 0),
        0x10: (1, 1),
        0x20: (1, 2),
        0x80: (1, 3),
    }
    return {
        (2 * column + x, 4 * row + y)
        for row, line in enumerate(lines)
        for column, letter in enumerate(line)
        for bit, (x, y) in bits.items()
        if 0x2800 <= ord(letter) <= 0x28FF and (ord(letter) - 0x2800) & bit
    }


def test_a_straight_line_is_drawn_as_one():
    width, height = 9 + 10, 5
    lines = [text.plain for text in chart([Curve("up", [(0, 1.0), (19, 20.0)], "cyan")], width, height, PLAIN)]
    assert [lines[0][:9], lines[height - 1][:9]] == ["      20 ", "       1 "]
    assert lines[height] == " " * 9 + "0       19"
    assert dots([line[9:] for line in lines[:height]]) == {(x, 19 - x) for x in range(20)}
    assert all(len(line) <= width for line in lines)


def test_peaks_of_many_points_are_all_drawn():
    points = [(float(x), 1.0) for x in range(10_000)]
    points[5003] = (5003.0, 9.0)
    lines = [text.plain for text in chart([Curve("spike", points, "cyan")], 49, 4, PLAIN)]
    assert lines[0].startswith("       9 ")
    assert [x for x, y in dots([line[9:] for line in lines[:4]]) if y == 0] == [round(5003 / 9999 * 79)]


def test_a_steep_beginning_does_not_flatten_the_rest():
    points = [(float(x), 100.0 if x < 5 else 2 - x / 100) for x in range(101)]
    for cut, top in ((True, "     1.9 "), (False, "     100 ")):
        lines = [text.plain for text in chart([Curve("loss", points, "cyan")], 49, 4, PLAIN, cut=cut)]
        assert lines[0][:9] == top
    few = [text.plain for text in chart([Curve("loss", points[:105:10], "cyan")], 49, 4, PLAIN, cut=True)]
    assert few[0][:9] == "     100 "


def test_equal_values_and_single_points_and_none():
    flat = [text.plain for text in chart([Curve("flat", [(1, 3.0), (9, 3.0)], "cyan")], 20, 3, PLAIN)]
    assert [line[:9].strip() for line in flat[:3]] == ["", "3", ""] and len({y for _, y in dots(flat)}) == 1
    alone = [text.plain for text in chart([Curve("one", [(7, 3.0)], "cyan")], 20, 3, PLAIN)]
    assert len(dots(alone)) == 1 and alone[3].strip() == "7"
    assert chart([Curve("none", [], "cyan")], 20, 3, PLAIN)[0].plain == "nothing yet"


def test_marks_stand_where_curves_end():
    curves = [Curve("low", [(0, 0.0), (1, 1.0)], "cyan", "a"), Curve("high", [(0, 1.0), (1, 0.0)], "red", "b")]
    lines = [text.plain for text in chart(curves, 20, 4, PLAIN)]
    assert lines[0].endswith("a") and lines[3].endswith("b")
    assert not any("a" in line or "b" in line for line in lines[1:3])


@pytest.mark.parametrize("width", [40, 80, 120])
def test_the_picture_fits_and_has_everything(tmp_path: Path, width: int):
    lines = drawn(run_folder(tmp_path / "first", rows_of(range(1, 41))), width=width)
    assert max(map(len, lines)) <= width
    text = "\n".join(lines)
    for word in ("training loss", "validation loss", "learning rate", "tokens/s", "step 40/100 40%", "loss 0.250"):
        assert word in text
    # All of `valid`, by its tokens: domain `books`, a quarter higher, has three of four.
    assert "valid 0.438" in text and "a valid wiki 0.25" in text and "c ood code 0.75" in text
    assert "0:00:30 left" in text and "mfu" not in text  # 60 steps of half a second; no peak is known


def test_a_line_that_is_half_written_is_read_when_it_is_whole(tmp_path: Path):
    folder = run_folder(tmp_path / "first", rows_of(range(1, 5)))
    run = Following(folder)
    whole = "".join(map(to_line, logged(5, 1.25)))
    cut = whole.index('"metric": "loss"') + 10
    with (folder / "rows.jsonl").open("a") as handle:
        handle.write(whole[:cut])
        handle.flush()
        run.read()
        assert run.step == 4 and run.last("loss") == 2.5
        handle.write(whole[cut:])
    run.read()
    assert run.step == 5 and run.last("loss") == 1.25
    assert [step for points in run.curves["loss"].values() for step, _ in points] == [1, 2, 3, 4, 5]


def test_a_run_that_goes_on_from_an_earlier_checkpoint_is_read_again(tmp_path: Path):
    folder = run_folder(tmp_path / "first", rows_of(range(1, 9)))
    run = Following(folder)
    run.read()
    again = folder / "rows.new"
    again.write_text("".join(map(to_line, [*rows_of(range(1, 4)), *logged(4, 7.5), *logged(5, 7.0)])))
    os.replace(again, folder / "rows.jsonl")
    run.read()
    assert run.step == 5
    assert [points[-2:] for points in run.curves["loss"].values()] == [[(4, 7.5), (5, 7.0)]]


def test_before_the_first_row(tmp_path: Path):
    folder = run_folder(tmp_path / "first", [])
    (folder / "rows.jsonl").unlink()
    lines = drawn(folder)
    assert lines[0].rstrip() == "first  step 0/100 0%" and sum(line.count("nothing yet") for line in lines) == 4


def test_length_may_be_given_in_tokens_or_not_be_known(tmp_path: Path):
    assert Following(run_folder(tmp_path / "tokens", [], steps=None)).steps == 100
    folder = run_folder(tmp_path / "old", rows_of(range(1, 5)))
    (folder / "config.json").write_text(json.dumps({"kind": "training"}))
    assert drawn(folder)[0].startswith("old  step 4  loss 2.500") and "left" not in "".join(drawn(folder))


def test_several_runs_are_overlaid_by_their_mark(tmp_path: Path):
    paths = [run_folder(tmp_path / name, rows_of(range(1, end), name)) for name, end in (("low", 61), ("high", 21))]
    lines = drawn(*paths)
    assert lines[0].startswith("a low  step 60/100 60%") and "b high  step 20/100 20%" in "\n".join(lines[:4])
    charts = [line for line in lines if dots([line])]
    assert any(line.rstrip().endswith("a") for line in charts) and any(line.rstrip().endswith("b") for line in charts)


def test_learning_rates_of_one_run_are_told_apart(tmp_path: Path):
    rows = [row for step in (1, 2, 3) for row in logged(step, 1.0)]
    parts = [row for row in rows if row.metric == "learning_rate"]
    muon = [type(row)(**{**json.loads(to_line(row)), "part": "muon", "value": 0.02}) for row in parts]
    text = "\n".join(drawn(run_folder(tmp_path / "two", [*rows, *muon])))
    assert "a adamw 0.00033" in text and "b muon 0.02" in text


def test_drawing_ends_when_all_runs_are_done(tmp_path: Path):
    folder = run_folder(tmp_path / "first", rows_of(range(1, 4)))
    runs, times = [Following(folder)], []

    def wait() -> None:
        if len(times) == 2:
            run_folder(folder, rows_of(range(1, 5)), done=True)

    keep_drawing(runs, lambda: times.append(runs[0].read()), wait)
    assert len(times) == 3 and runs[0].step == 4
    assert "done" in drawn(folder)[0] + drawn(folder)[1]


def test_ctrl_c_is_an_ordinary_end(tmp_path: Path):
    runs = [Following(run_folder(tmp_path / "first", rows_of(range(1, 4))))]

    def interrupted() -> None:
        raise KeyboardInterrupt

    keep_drawing(runs, runs[0].read, interrupted)
    assert runs[0].step == 3


def test_the_command(tmp_path: Path):
    folder = run_folder(tmp_path / "first", rows_of(range(1, 41)))
    for arguments in ([folder, "--once"], [folder]):  # no terminal: once
        done = command("watch", *arguments)
        assert (done.code, done.err) == (0, "") and "training loss" in done.out
        assert max(map(len, done.out.splitlines())) <= 80


@pytest.mark.parametrize("kind", ["missing", "empty", "measured", "damaged"])
def test_a_folder_of_something_else_is_one_line(tmp_path: Path, kind: str):
    folder = tmp_path / "other"
    if kind != "missing":
        folder.mkdir()
    if kind == "measured":
        (folder / "config.json").write_text(json.dumps({"model": "x", "probes": {}}))
    if kind == "damaged":
        (folder / "config.json").write_text('{"kind": "trai')
    done = command("watch", folder)
    assert done.code == 2 and done.out == ""
    assert done.err == (
        f"transect: {folder} is not the folder of a training run; give the -o folder of `transect train`\n"
    )


def test_too_many_runs_are_one_line(tmp_path: Path):
    folder = run_folder(tmp_path / "first", [])
    done = command("watch", *[folder] * 9)
    assert done.code == 2 and done.err == "transect: 9 runs are too many to tell apart; give at most 8\n"
    with pytest.raises(InputError):
        Following(tmp_path)
