"""What `transect evaluate` prints: every score that is not a piece of another, at 80 columns."""

import io

from rich.console import Console

from report_rows import about
from transect.results import Row, Table
from transect.scoreboard import print_scores


def _printed(rows: list[Row]) -> str:
    out = io.StringIO()
    print_scores(Table(rows), Console(file=out, width=80))
    assert all(len(line) <= 80 for line in out.getvalue().splitlines())
    return " ".join(out.getvalue().split())


def test_what_a_task_chose_for_a_model_hides_no_score():
    own = {"model": "m", "domain": "era", "n": 7}
    rows = [
        about("accuracy", 0.625, "1", 0.01, task="linear_probe", layer=3, part="ridge 0.1", **own),
        about("accuracy", 0.5, "1", 0.01, task="linear_probe", variant="majority", **own),
        about("accuracy", 0.75, "1", 0.01, task="fine_tuning", variant="mean", part="lr 5e-05", **own),
        about("accuracy", 0.875, "1", 0.01, task="fine_tuning", variant="seed 0", part="lr 5e-05, epoch 2", **own),
    ]
    said = _printed(rows)
    assert "era layer 3 0.625 ± 0.010" in said and "era mean 0.750 ± 0.010" in said and "majority 0.500" in said
    assert "0.875" not in said  # a seed's is part of the mean


def test_kinds_of_pairs_are_pieces_and_models_stand_side_by_side():
    rows = []
    for number, model in enumerate(("first", "second")):
        own = {"model": model, "task": "minimal_pairs", "domain": "blimp", "variant": "whole", "n": 7}
        rows += [about("accuracy", 0.3, "1", 0.1, part="island", **own)]
        rows += [about("accuracy", 0.6 + number / 10, "1", 0.1, **own)]
    said = _printed(rows)
    assert "first second" in said and "blimp whole 0.600 ± 0.100 0.700 ± 0.100" in said and "0.300" not in said
