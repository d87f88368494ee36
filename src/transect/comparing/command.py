"""What the command `compare` does, for a terminal."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from transect.compare import Comparison, compare
from transect.comparing.printing import print_comparison
from transect.comparing.sentences import sentences


def compare_runs(runs: Sequence[Path], at_loss: str, by: str, baseline: str | None, output: Path | None) -> Comparison:
    """Compare, print tables, sentences of the main alignments and notes, and write the rows where a folder is given."""
    console = Console()
    named = tuple(word.strip() for word in by.split(",") if word.strip())
    found = compare(runs, at_loss, named, baseline, output)
    print_comparison(found.table, found.alignments, found.findings, console)
    for sentence in sentences(one for one in found.findings if one.alignment.main and one.quantity.headline):
        console.print(sentence, highlight=False, markup=False)
    for note in found.notes:
        console.print(f"note    {note}", highlight=False, markup=False)
    if output is not None:
        console.print(f"rows, run record and compare.md are in {output}", highlight=False, markup=False, soft_wrap=True)
    return found
