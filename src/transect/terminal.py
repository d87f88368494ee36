"""Rows and views as tables for a terminal of 80 columns."""

from collections.abc import Iterable

from rich import box
from rich.console import Console
from rich.table import Table as Grid

from transect.results import Row, Table
from transect.view.sites import SITES
from transect.view.view import View

COLUMNS = 8
_ELEMENTS = ("ffn", "ffn_up", "attn", "attn_heads", "attn_residual", "ffn_residual", "layer")
_CHOICES: dict[str, list[tuple[str, dict[str, str | None]]]] = {
    "jump": [
        (metric, {"metric": metric, "variant": "pre_norm/all"})
        for metric in ("displacement", "update_ratio", "stream_norm", "jump_rate")
    ],
    "nonlinearity": [(name, {"metric": "r2_heldout", "element": name}) for name in _ELEMENTS],
    "similarity": [(m, {"metric": m}) for m in ("effective_rank", "participation_ratio", "anisotropy")],
}
_HEADINGS = {
    "jump": "jump: how far each layer turns the stream",
    "nonlinearity": "nonlinearity: held-out R² of the best linear map (1 = linear)",
    "similarity": "similarity: directions each stream uses",
}


def print_table(table: Table, console: Console) -> None:
    """One grid for each model and probe: layers down, main numbers across; a missing one has its reason below."""
    for model in dict.fromkeys(row.model for row in table):
        for probe in dict.fromkeys(row.probe for row in table.where(model=model)):
            _print_probe(str(probe), table.where(model=model, probe=probe), console)


def _print_probe(probe: str, table: Table, console: Console) -> None:
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


def _generic(table: Table) -> list[tuple[str, dict[str, str | None]]]:
    metrics = dict.fromkeys(row.metric for row in table if row.layer is not None and row.layer_to is None)
    return [(metric, {"metric": metric}) for metric in list(metrics)[:COLUMNS]]


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    return "-" if row.value is None else number(row.value)


def number(value: float) -> str:
    """Four significant digits, without an exponent where that is readable."""
    return f"{value:.4g}" if value == 0 or 1e-4 <= abs(value) < 1e6 else f"{value:.2e}"


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
