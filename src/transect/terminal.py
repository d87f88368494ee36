"""Rows and views as tables for a terminal of 80 columns."""

from collections.abc import Iterable

from rich import box
from rich.console import Console
from rich.table import Table as Grid

from transect.results import Row, Table
from transect.summaries import COST, Summary, number, summaries
from transect.view.sites import SITES
from transect.view.view import View

COLUMNS = 8
Moment = tuple[str | None, str | None, int | None]
"""Model, revision and step."""
COSTS = tuple(metric for metric, _ in COST)
_ELEMENTS = ("ffn", "ffn_up", "attn", "attn_heads", "attn_residual", "ffn_residual", "layer")
_CHOICES: dict[str, list[tuple[str, dict[str, str | None]]]] = {
    "jump": [
        (metric, {"metric": metric, "variant": "pre_norm/all"})
        for metric in ("displacement", "update_ratio", "stream_norm", "jump_rate")
    ],
    "nonlinearity": [(name, {"metric": "r2_heldout", "element": name}) for name in _ELEMENTS],
    "similarity": [(m, {"metric": m}) for m in ("effective_rank", "participation_ratio", "anisotropy")],
    "contribution": [
        (f"MHA_{name}", {"metric": "share_mha", "variant": name}) for name in ("MI", "TP/same", "TP/split_half", "lens")
    ],
    "commutativity": [(f"swap_{m}", {"metric": m, "variant": "pairs"}) for m in COSTS],
    "ablation": [
        (f"{part}_{m}", {"metric": m, "variant": "zero/single", "element": part})
        for m in ("loss_change", "state_change")
        for part in ("ffn", "attn", "layer")
    ],
    "routing": [(m, {"metric": m}) for m in ("entropy", "dead_fraction", "influence", "removal_cost")],
}
_HEADINGS = {
    "jump": "jump: how far each layer turns the stream",
    "nonlinearity": "nonlinearity: held-out R² of the best linear map (1 = linear)",
    "similarity": "similarity: directions each stream uses",
    "contribution": "contribution: share of attention (MHA)",
    "commutativity": "commutativity: cost of swapping two layers",
    "ablation": "ablation: cost of a part removed from one layer",
    "routing": "routing: experts of each sparse layer",
}


def print_table(table: Table, console: Console) -> None:
    """One grid for each model and probe: layers down, main numbers across; a missing one has its reason below."""
    for model in dict.fromkeys(row.model for row in table):
        for probe in dict.fromkeys(row.probe for row in table.where(model=model)):
            _print_probe(str(probe), table.where(model=model, probe=probe), console)


def _print_probe(probe: str, table: Table, console: Console) -> None:
    short = summaries(probe, table)
    if short is not None:
        for one in short:
            _print_summary(one, console)
        return
    choices = _CHOICES.get(probe) or _generic(table)
    columns = [
        (title, {row.layer: row for row in table.where(**equal) if row.layer is not None}) for title, equal in choices
    ]
    columns = [(title, cells) for title, cells in columns if cells]
    if not columns:
        return
    grid = Grid(box=box.SIMPLE_HEAD, title=_HEADINGS.get(probe, probe), title_justify="left", padding=(0, 1))
    grid.add_column("layer", justify="right")
    for title, _ in columns:
        grid.add_column(title.replace("_", " "), justify="right")
    for layer in sorted({layer for _, cells in columns for layer in cells}):
        grid.add_row(str(layer), *(_cell(cells.get(layer)) for _, cells in columns))
    console.print(grid)
    reasons = dict.fromkeys(
        f"{row.element or row.metric}: {row.reason}" for _, cells in columns for row in cells.values() if row.reason
    )
    for reason in reasons:
        console.print(f"  - {reason}", highlight=False)


def _print_summary(summary: Summary, console: Console) -> None:
    grid = Grid(box=box.SIMPLE_HEAD, title=summary.title, title_justify="left", padding=(0, 1))
    for place, head in enumerate(summary.heads):
        grid.add_column(head, justify="left" if place == 0 else "right")
    for line in summary.lines:
        grid.add_row(*line)
    console.print(grid)


def print_comparison(table: Table, console: Console) -> None:
    """One grid for each probe: a line for each model and revision, the main numbers as means over layers across."""
    moments = list(dict.fromkeys((row.model, row.revision, row.step) for row in table))
    for probe in dict.fromkeys(row.probe for row in table):
        own = table.where(probe=probe)
        columns = [
            (title, {moment: _mean(_at(own, moment).where(**equal)) for moment in moments})
            for title, equal in _CHOICES.get(str(probe)) or _generic(own)
        ]
        columns = [(title, means) for title, means in columns if any(mean is not None for mean in means.values())]
        if columns:
            _print_means(_HEADINGS.get(str(probe), str(probe)), moments, columns, console)
        else:
            console.print(f"{probe}: several numbers for a layer; compare its rows, or see the report")


def _print_means(
    heading: str,
    moments: list[Moment],
    columns: list[tuple[str, dict[Moment, float | None]]],
    console: Console,
) -> None:
    title = f"{heading}; means over layers"
    grid = Grid(box=box.SIMPLE_HEAD, title=title, title_justify="left", padding=(0, 0, 0, 1))
    told = _told(moments)
    for name in told:
        grid.add_column(name, overflow="fold", justify="right" if name == "step" else "left")
    written = [[_written(means[moment]) for moment in moments] for _, means in columns]
    for (name, _), cells in zip(columns, written, strict=True):
        words = name.split("_")
        grid.add_column(" ".join(words), justify="right", width=max(map(len, [*words, *cells])))
    for cells in zip(*told.values(), *written, strict=True):
        grid.add_row(*cells)
    console.print(grid)


def _written(value: float | None) -> str:
    return "-" if value is None else number(value)


def _told(moments: list[Moment]) -> dict[str, list[str]]:
    """What tells the moments apart, in columns: the model, and the step or, where it is not known, the revision."""
    models, revisions, steps = zip(*moments, strict=True)
    last = {model: str(model).split("/")[-1] for model in models}
    short = len(set(last.values())) == len(last)
    found = {"model": [last[model] if short else str(model) for model in models]}
    if all(step is not None for step, revision in zip(steps, revisions, strict=True) if revision is not None):
        found["step"] = ["" if step is None else str(step) for step in steps]
    if len(set(zip(models, steps, strict=True))) < len(moments) or "step" not in found:
        found["revision"] = [revision or "" for revision in revisions]
    return {name: cells for name, cells in found.items() if len(set(cells)) > 1}


def _at(table: Table, moment: Moment) -> Table:
    return table.where(model=moment[0], revision=moment[1], step=moment[2])


def _mean(table: Table) -> float | None:
    """The mean over layers, pairs or parts; None where one of them has more than one row, or none has a value."""
    places = {(row.layer, row.layer_to, row.part) for row in table}
    found = [row.value for row in table if row.value is not None]
    return None if not found or len(places) < len(table) else sum(found) / len(found)


def _generic(table: Table) -> list[tuple[str, dict[str, str | None]]]:
    metrics = dict.fromkeys(row.metric for row in table if row.layer is not None and row.layer_to is None)
    return [(metric, {"metric": metric}) for metric in list(metrics)[:COLUMNS]]


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    return _written(row.value)


def print_view(view: View, console: Console) -> None:
    """A view's layout, sites, parameters and proof."""
    from transect.view.parts import parameters

    def say(text: str) -> None:
        console.print(text, highlight=False)

    counts = parameters(view)
    total = sum(counts.values())
    say(f"{view.name}: {type(view.model).__name__}, {view.num_layers} layers, width {view.width}, {total:,} parameters")
    for note in view.notes:
        say(f"note: {note}")
    shares = Grid(box=box.SIMPLE_HEAD, title="parameters", title_justify="left")
    for title in ("part", "parameters", "share"):
        shares.add_column(title, justify="left" if title == "part" else "right")
    for part, count in counts.items():
        shares.add_row(part, f"{count:,}", f"{count / total:.1%}")
    console.print(shares)
    for layers, index in _alike(view):
        _print_sites(view, layers, index, console)
    proof = view.proof
    worst = proof.worst
    say(
        f"proof: {len(proof.identities)} identities hold within {proof.bound:.0e}; "
        f"worst {worst.residual:.1e} ({worst.text}, layer {worst.layer})"
    )
    say(f"causal check: changing any of {proof.causal} captured sites changes the output")
    if proof.inert:
        say(f"without effect, behind a weight that is zero: {', '.join(proof.inert)}")
    norm = view.final_norm_path
    say(f"final norm: {norm or 'none'}; head: {'yes' if view.has_head else 'none, so no logits'}")


def _alike(view: View) -> Iterable[tuple[list[int], int]]:
    """Layers grouped by equal maps."""
    groups: dict[str, list[int]] = {}
    for layer, known in enumerate(view.maps):
        groups.setdefault(repr((known.layout, known.taps, known.missing)), []).append(layer)
    return [(layers, layers[0]) for layers in groups.values()]


def _print_sites(view: View, layers: list[int], index: int, console: Console) -> None:
    known = view.maps[index]
    names = f"layer {layers[0]}" if len(layers) == 1 else f"layers {_ranges(layers)}"
    grid = Grid(box=box.SIMPLE_HEAD, title=f"{names}: {known.layout}", title_justify="left", padding=(0, 1))
    grid.add_column("site", no_wrap=True)
    grid.add_column("width", justify="right")
    grid.add_column("where in the layer", overflow="fold")
    for site in SITES:
        if site in known.taps:
            grid.add_row(site, str(view.site_width(index, site)), str(known.taps[site]))
        elif site in known.missing:
            grid.add_row(site, "-", f"none: {known.missing[site]}")
    console.print(grid)


def _ranges(layers: list[int]) -> str:
    """0-3, 5 for 0 1 2 3 5."""
    spans: list[list[int]] = []
    for layer in layers:
        if spans and layer == spans[-1][1] + 1:
            spans[-1][1] = layer
        else:
            spans.append([layer, layer])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)
