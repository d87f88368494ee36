"""The line of a training run: what it says, that it fits, and that nothing unknown is shown as a number."""

import io

import pytest
from rich.console import Console

from transect.train.display import Display, Pace, span, worded
from transect.train.progress import Progress

ALL: dict[str, float | None] = {
    "loss": 3.4119,
    "valid": 3.5012,
    "tokens_per_second": 12345.4,
    "mfu": 0.3121,
    "peak_memory": 1.5 * 2**30,
}


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)


def terminal(width: int = 80) -> Console:
    return Console(file=io.StringIO(), width=width, force_terminal=True, force_interactive=True, color_system=None)


def plain() -> Console:
    return Console(file=io.StringIO(), width=80)


def said(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def last_line(console: Console) -> str:
    return said(console).replace("\x1b[?25h", "").rstrip().rpartition("\r")[2].rpartition("\x1b[2K")[2]


def ticking(*times: float):
    left = list(times)
    return lambda: left.pop(0)


def test_plain_lines_where_there_is_no_terminal():
    console = plain()
    with Display(2000, console) as display:
        assert display.shows
        display.say("[going] on after step 100 of 2,000")
        display.step(Progress(step=120), ALL)
        display.step(Progress(step=130), ALL | {"valid": None, "mfu": None, "peak_memory": None})
    assert said(console) == (
        "[going] on after step 100 of 2,000\n"
        "step 120/2000  loss 3.412  valid 3.501  12,345 tokens/s  mfu 31.2%  1.5 GiB\n"
        "step 130/2000  loss 3.412  12,345 tokens/s\n"
    )


def test_a_plain_line_is_never_broken():
    console = plain()
    with Display(10, console) as display:
        display.say("x" * 200)
    assert said(console) == "x" * 200 + "\n"


def test_nothing_unknown_is_shown():
    assert worded({"loss": None, "valid": None, "tokens_per_second": None}) == {}
    assert worded({"loss": 0.0}) == {"loss": "loss 0.000"}
    assert worded({"loss": float("nan")}, skipped=3) == {"loss": "loss nan", "skipped": "3 skipped"}


def test_the_line_on_a_terminal_has_everything_that_fits():
    console = terminal()
    with Display(2000, console, clock=ticking(0.0, 60.0)) as display:
        display.step(Progress(step=100), ALL)
        display.step(Progress(step=120), ALL)
    line = last_line(console)
    assert " ".join(line.split()) == "120/2,000 6% loss 3.412 valid 3.501 12.3k tok/s mfu 31% 1:34:00 left"
    assert len(line.rstrip()) <= 80


@pytest.mark.parametrize("width", [20, 40, 60, 80, 100, 200])
def test_the_line_fits_and_leaves_out_the_least_wanted(width: int):
    console = terminal(width)
    huge: dict[str, float | None] = {
        "loss": 12.3456,
        "valid": 12.3456,
        "tokens_per_second": 12_345_678.0,
        "mfu": 0.5,
        "peak_memory": 80 * 2**30,
    }
    with Display(10_000_000, console, clock=ticking(0.0, 3e5)) as display:
        display.step(Progress(step=1), huge)
        display.step(Progress(step=9_999_999, skipped=11), huge)
    line = last_line(console)
    assert len(line.rstrip()) <= width and "\n" not in line
    there = [word in line for word in ("9,999,999/10,000,000", "loss", "left", "valid", "tok/s", "mfu")]
    assert there == sorted(there, reverse=True) or width < 40
    if width == 200:
        assert all(there) and "80.0 GiB" in line and "11 skipped" in line and "━" in line
    assert ("━" in line) == (width == 200)


def test_lines_said_stand_above():
    console = terminal()
    with Display(2000, console) as display:
        display.step(Progress(step=10), ALL)
        display.say("a note")
        display.step(Progress(step=20), ALL)
    text = said(console)
    assert "a note\n" in text
    assert text.index("a note") < text.rindex("20/2,000")


def test_other_processes_of_torchrun_show_nothing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RANK", "1")
    for console in (terminal(), plain()):
        with Display(2000, console) as display:
            assert not display.shows
            display.say("a note")
            display.step(Progress(step=10), ALL)
        assert said(console) == ""
    monkeypatch.setenv("RANK", "0")
    assert Display(2000, plain()).shows


def test_the_terminal_is_given_back_after_a_failure():
    console = terminal()
    with pytest.raises(ZeroDivisionError), Display(2000, console) as display:
        display.step(Progress(step=1 // 0), ALL)
    assert said(console).rstrip().endswith("\x1b[?25h")  # the cursor is shown again


def test_time_left_counts_from_the_first_step_seen():
    pace = Pace(1000)
    assert pace.left(500, 7.0) is None
    assert pace.left(600, 27.0) == pytest.approx(400 * 0.2)
    assert pace.left(1000, 100.0) == 0
    assert span(93784) == "1 day, 2:03:04"
