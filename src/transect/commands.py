"""What the commands `measure` and `inspect` do, for a terminal."""

from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from transect import registry, terminal
from transect.data import Dataset, builtin_text, from_text, load_tokens
from transect.errors import InputError
from transect.measure import notes_of, run
from transect.options import configured
from transect.plan import make
from transect.probes.base import Probe
from transect.progress import Bar
from transect.results import Table, make_folder
from transect.view.view import View

BUILTIN_LIMIT = 32_768


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """The command line of `measure`."""

    model: str
    probes: tuple[str, ...]
    text: tuple[Path, ...]
    tokens: Path | None
    seq_len: int
    limit_tokens: int | None
    batch_size: int
    dtype: str
    device: str
    revisions: tuple[str, ...]
    options: tuple[str, ...]
    seed: int
    output: Path | None
    resume: bool
    dry_run: bool
    trust_remote_code: bool


def measure_all(request: Request) -> Table:
    """Measure every revision asked for, print the tables, and write the rows of all into one folder."""
    probes = configured(request.probes or registry.available("transect.probes"), request.options)
    if request.text and request.tokens is not None:
        raise InputError("both --text and --tokens were given; give one of them")
    if request.tokens is not None and request.limit_tokens is not None:
        raise InputError("--limit-tokens is for text; with --tokens, put fewer ids into the file")
    if request.resume and request.output is None:
        raise InputError("--resume needs --output, the folder of the stopped run")
    console = Console()
    revisions = request.revisions or (None,)
    several = len(revisions) > 1
    tables = []
    for revision in revisions:
        one = request
        if several and request.output is not None:
            one = replace(request, output=request.output / str(revision).replace("/", "_"))
        tables.append(_measure_one(one, revision, probes, console))
    table = Table([row for table in tables for row in table])
    if several and request.output is not None and not request.dry_run:
        make_folder(request.output)
        table.write(request.output)
    return table


def _measure_one(request: Request, revision: str | None, probes: list[Probe], console: Console) -> Table:
    view = _load(request.model, revision, request.dtype, request.device, request.trust_remote_code)
    plan = make(view, probes, _data(request, view), request.batch_size, request.seed)
    for line in plan.lines()[: None if request.dry_run else 2]:
        console.print(line, highlight=False, soft_wrap=True)
    for note in notes_of(plan):
        console.print(f"note    {note}", highlight=False, soft_wrap=True)
    if request.dry_run:
        return Table()
    with Bar(plan.tokens) as bar:
        table = run(plan, None if request.output is None else str(request.output), request.resume, bar.advance)
    terminal.print_table(table, console)
    if request.output is not None:
        console.print(f"rows and run record are in {request.output}", highlight=False, soft_wrap=True)
    return table


def _load(model: str, revision: str | None, dtype: str, device: str, trust_remote_code: bool) -> View:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return View.load(model, revision, dtype, device, trust_remote_code=trust_remote_code)


def _data(request: Request, view: View) -> Dataset:
    if request.tokens is not None:
        return load_tokens(request.tokens, request.seq_len)
    if request.text:
        return from_text(request.text, view.tokenizer, request.seq_len, request.limit_tokens)
    return builtin_text(view.tokenizer, request.seq_len, request.limit_tokens or BUILTIN_LIMIT)


def inspect_model(model: str, revision: str | None, dtype: str, device: str, trust_remote_code: bool) -> None:
    """Print sites, layout, parameters per part and the proof."""
    terminal.print_view(_load(model, revision, dtype, device, trust_remote_code), Console())


__all__ = ["Request", "inspect_model", "measure_all"]
