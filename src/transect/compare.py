"""Which training runs have the better model at equal in-distribution loss, with intervals over seeds."""

import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from transect.comparing import rows, sentences
from transect.comparing.alignment import AUTO, Alignment, alignments
from transect.comparing.arms import Arm, arms_of
from transect.comparing.facts import of_arm
from transect.comparing.findings import Finding, findings
from transect.comparing.printing import markdown
from transect.comparing.reading import read_runs
from transect.results import Row, Table, write_whole
from transect.runs import RunFolder, environment

Given = str | os.PathLike[str]


@dataclass(frozen=True, slots=True)
class Comparison:
    """What was found: rows, a sentence for each quantity and arm, notes, and what the rows were made from.

    arms: the baseline first.
    """

    table: Table
    sentences: tuple[str, ...]
    notes: tuple[str, ...]
    arms: tuple[Arm, ...]
    alignments: tuple[Alignment, ...]
    findings: tuple[Finding, ...]


def compare(
    runs: Iterable[Given],
    at_loss: float | str = AUTO,
    by: Sequence[str] = ("loss",),
    baseline: str | None = None,
    output: Given | None = None,
) -> Comparison:
    """Compare run folders of `transect train` where all of them have the same in-distribution loss.

    L* = max over runs of min over evaluations of the loss on `valid`, in nats per token; every quantity is read off, in
    a line, between the two evaluations around the first one with a loss of L* or less, after a running median of three
    and from a tenth of the run on. `by` adds equal steps, FLOPs or seconds. Runs of one recipe are an arm, paired with
    the baseline's by seed; intervals are 95 % t-intervals over seeds, p values of paired t-tests, Holm-corrected over
    arms and quantities of an alignment. `output`: a new run folder for rows, settings and `compare.md`.
    Raises InputError for runs that do not compare, a loss that not all reach, and names that are not there.
    Source: FFN-Wider 3.8 and 7 (interpolation, Holm and seeds needed ours). Cost: reading the rows.
    """
    started = time.time()
    paths = [Path(run) for run in runs]
    read = read_runs(paths)
    arms = arms_of(read, baseline)
    places = alignments(read, by, at_loss)
    found = [one for place in places if place.reason is None for one in findings(arms, place)]
    comparison = Comparison(
        table=Table(_rows(arms, places, found)).stamped(data=read[0].data),
        sentences=tuple(sentences.sentences(found)),
        notes=tuple(sentences.notes(arms, places, found)),
        arms=tuple(arms),
        alignments=tuple(places),
        findings=tuple(found),
    )
    if output is not None:
        asked = {"runs": [str(path) for path in paths], "at_loss": at_loss, "by": list(by), "baseline": arms[0].name}
        _write(comparison, Path(output), asked, time.time() - started)
    return comparison


def _rows(arms: Sequence[Arm], places: Sequence[Alignment], found: Sequence[Finding]) -> Iterable[Row]:
    for place in places:
        yield from rows.of_match(arms, place)
    for one in found:
        yield from rows.of_finding(one)
    for arm in arms:
        yield from of_arm(arm)
    yield from rows.of_curves(arms)


def _write(comparison: Comparison, path: Path, asked: dict, seconds: float) -> None:
    import torch

    folder = RunFolder.open(path, {"kind": "comparison", **asked}, resume=False)
    write_whole(path / "compare.md", markdown(comparison.sentences, comparison.notes, comparison.findings).encode())
    folder.finish(comparison.table, environment(torch.device("cpu"), list(comparison.notes), seconds))
