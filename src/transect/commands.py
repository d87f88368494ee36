"""What the commands `measure` and `inspect` do, for a terminal."""

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from transect import registry, terminal
from transect.data import Dataset, builtin_text, from_text, load_tokens
from transect.errors import InputError
from transect.foretell import foretold_seconds, readable_time
from transect.joint import check_folder, withdraw, write_joint
from transect.measure import notes_of, run
from transect.models.memory import choice
from transect.options import configured
from transect.plan import make
from transect.probes.base import Probe
from transect.progress import Bar
from transect.results import Table
from transect.runs import RunFolder
from transect.series import Member, Series, series_of
from transect.view.view import View

BUILTIN_LIMIT = 32_768


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """The command line of `measure`."""

    models: tuple[str, ...]
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


class Speaker:
    """Says a line once, however many models it holds for."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._said: set[str] = set()

    def say(self, line: str, again: bool = False) -> None:
        """Print a line, unless it was printed before and is not wanted again."""
        if again or line not in self._said:
            self.console.print(line, highlight=False, soft_wrap=True)
        self._said.add(line)

    def head(self, line: str) -> None:
        """Print the line that the next ones belong to."""
        self.console.print(line, highlight=False, soft_wrap=True, style="bold")


def measure_all(request: Request) -> Table:
    """Measure every model and checkpoint asked for, print the numbers, and write the rows of all into one folder."""
    probes = configured(_names(request.probes), request.options)
    if request.text and request.tokens is not None:
        raise InputError("both --text and --tokens were given; give one of them")
    if request.tokens is not None and request.limit_tokens is not None:
        raise InputError("--limit-tokens is for text; with --tokens, put fewer ids into the file")
    if request.resume and request.output is None:
        raise InputError("--resume needs --output, the folder of the stopped run")
    series = series_of(request.models, request.revisions)
    speaker = Speaker(Console())
    if not series.joint:
        return _measure_one(request, series.members[0], request.output, probes, speaker)
    return _measure_several(request, series, probes, speaker)


def _measure_several(request: Request, series: Series, probes: list[Probe], speaker: Speaker) -> Table:
    """One member after the other, each with a run folder of its own, then all side by side."""
    series.check(request.trust_remote_code)
    output = None if request.dry_run else request.output
    if output is not None:
        check_folder(output, series, request.resume)
    tables, count = [], len(series.members)
    for number, member in enumerate(series.members, 1):
        own = None if output is None else output / member.folder
        speaker.head(f"{number} of {count}  {member}" + (" (finished)" if own and RunFolder(own).finished() else ""))
        try:
            tables.append(_measure_one(request, member, own, probes, speaker, alone=output is None))
        except InputError as error:
            kept = ""
            if output is not None:
                withdraw(output, series)
                kept = "; what is finished is kept, go on with --resume" if tables else ""
            raise InputError(f"{number} of {count}, {member}: {error}{kept}") from error
    table = Table(row for table in tables for row in table)
    if len(table):
        terminal.print_comparison(table, speaker.console)
    if output is not None:
        write_joint(output, series, table)
        speaker.say(f"rows of all {count}, and a run record for each, are in {output}")
        speaker.say("`transect report` on that folder shows them side by side, layer by layer")
    return table


def _names(asked: tuple[str, ...]) -> list[str]:
    """The probes asked for; by default those that do not run the model many times."""
    known = registry.available("transect.probes")
    if not asked:
        return [name for name in known if not registry.load("transect.probes", name, Probe).costly]
    return list(dict.fromkeys(name for one in asked for name in (known if one == "all" else [one])))


def _suits(probe: Probe, view: View, speaker: Speaker) -> bool:
    """Whether a probe that nobody named can measure this model; says so when not."""
    reason = probe.refusal(view)
    if reason is not None:
        speaker.say(f"note    {probe.name} is left out: {reason}")
    return reason is None


def _measure_one(
    request: Request, member: Member, output: Path | None, probes: list[Probe], speaker: Speaker, alone: bool = True
) -> Table:
    """Measure one model; `alone` says that nothing else will show its numbers."""
    view = quiet_load(member.source, member.revision, request.dtype, request.device, request.trust_remote_code)
    view.name = member.model
    if not request.probes or "all" in request.probes:
        probes = [probe for probe in probes if _suits(probe, view, speaker)]
    plan = make(view, probes, _data(request, view), request.batch_size, request.seed)
    for line in plan.lines()[: None if request.dry_run else 2]:
        speaker.say(line, again=request.dry_run)
    for note in notes_of(plan):
        speaker.say(f"note    {note}")
    if request.dry_run:
        speaker.say(
            f"time    about {readable_time(foretold_seconds(plan))}, from one batch and one matrix product", again=True
        )
        return Table()
    with Bar(plan.tokens) as bar:
        table = run(plan, None if output is None else str(output), request.resume, bar.advance)
    for line in choice.lines(view.model):
        speaker.say(f"note    {line}")
    if alone:
        terminal.print_table(table, speaker.console)
    if alone and output is not None:
        speaker.say(f"rows and run record are in {output}")
    return table


def quiet_load(model: str, revision: str | None, dtype: str, device: str, trust_remote_code: bool) -> View:
    """The view of a model, without the library's own bars and warnings."""
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
    terminal.print_view(quiet_load(model, revision, dtype, device, trust_remote_code), Console())


__all__ = ["Request", "inspect_model", "measure_all"]
