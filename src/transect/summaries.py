"""Short tables of the probes whose rows have more to them than a number for each layer."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from transect.results import Row, Table

COST = (("loss_change", "loss change"), ("kl", "KL"), ("agreement", "agreement"), ("state_change", "state change"))
_OF_TASKS = (("accuracy_change", "accuracy change"), ("recovered", "recovered"))
_MOST_PARTS = 6


@dataclass(frozen=True, slots=True)
class Summary:
    """A title, the heads of the columns, and the lines of cells."""

    title: str
    heads: tuple[str, ...]
    lines: list[tuple[str, ...]]


def summaries(probe: str, table: Table) -> list[Summary] | None:
    """The short tables of one probe of one model; None for a probe that is shown layer by layer."""
    made = _SUMMARIES.get(probe)
    return None if made is None else [one for one in made(table) if one.lines]


def number(value: float) -> str:
    """Four significant digits, without an exponent where that is readable."""
    return f"{value:.4g}" if value == 0 or 1e-4 <= abs(value) < 1e6 else f"{value:.2e}"


def _contribution(table: Table) -> Iterable[Summary]:
    lines = []
    for mha in table.where(metric="share_mha"):
        ffn = next(iter(table.where(metric="share_ffn", variant=mha.variant)), None)
        if mha.value is None or ffn is None or ffn.value is None:
            lines.append((str(mha.variant), "-", "-", "-"))
        else:
            error = "-" if mha.stderr is None else number(mha.stderr)
            lines.append((str(mha.variant), number(mha.value), number(ffn.value), error))
    yield Summary(
        "contribution: shares of attention (MHA) and FFN", ("estimator", "MHA", "FFN", "± (one error)"), lines
    )
    steps = table.where(lambda row: str(row.variant).endswith("/increment"))
    columns = list(dict.fromkeys((row.metric, row.variant, row.element) for row in steps))
    kept = [one for one in columns if not str(one[1]).startswith("same")]
    short = {"mutual_information": "MI", "token_prediction": "TP", "lens_loss": "lens", "attn": "MHA", "ffn": "FFN"}
    heads = ("layer", *(f"{short[metric]} {short.get(str(element), element)}" for metric, _, element in kept))
    layers = sorted({row.layer for row in steps if row.layer is not None})
    cells = {(row.metric, row.variant, row.element, row.layer): row for row in steps}
    body = [(str(layer), *(_cell(cells.get((*one, layer))) for one in kept)) for layer in layers]
    yield Summary("what each sub-layer adds (lens: to the loss)", heads, body)


def _commutativity(table: Table) -> Iterable[Summary]:
    for stage, words in (("", ""), ("/continued", ", after training")):
        yield _orders(table, stage, words)
    yield _evaluations(table)


def _orders(table: Table, stage: str, said: str) -> Summary:
    own = table.where(lambda row: row.variant is not None and row.variant.endswith("/continued") == bool(stage))
    table = Table(replace(row, variant=str(row.variant).removesuffix(stage)) for row in own)
    pairs = table.where(lambda row: row.variant in ("pairs", "adjacent", "mirrored"))
    metrics = [(metric, title) for metric, title in (*COST, *_OF_TASKS) if len(table.where(metric=metric))]
    distances = sorted({_distance(row) for row in pairs})
    groups: list[tuple[str, list[Row]]] = [
        (f"swap, {distance} apart", [row for row in pairs if _distance(row) == distance]) for distance in distances
    ]
    names = {"reversal": "reverse three", "repeat": "one layer, L times", "pattern": "pattern"}
    groups += [(words, table.where(variant=kind).rows) for kind, words in names.items()]
    groups += [(edit, table.where(edit=edit).rows) for edit in _edits(table.where(variant="shuffle"))]
    lines = []
    for words, rows in groups:
        if rows:
            lines.append((words, str(len(_edits(rows))), *(_mean(rows, metric) for metric, _ in metrics)))
    heads = ("order of layers", "orders", *(title for _, title in metrics))
    return Summary(f"commutativity: means over orders{said}", heads, lines)


def _ablation(table: Table) -> Iterable[Summary]:
    main = next((metric for metric, _ in COST if len(table.where(metric=metric))), "loss_change")
    for metric in (main, *(name for name, _ in _OF_TASKS)):
        yield from _ablated(table, metric)
    yield _evaluations(table)


def _ablated(table: Table, main: str) -> Iterable[Summary]:
    rows = table.where(lambda row: row.metric == main and row.variant is not None and "/" in row.variant)
    for variant in dict.fromkeys(row.variant for row in rows):
        own = [row for row in rows if row.variant == variant]
        parts = list(dict.fromkeys(row.element for row in own))[:_MOST_PARTS]
        schedule = str(variant).split("/")[1]
        cells: dict[tuple[str | None, int], list[Row]] = {}
        for row in own:
            at = row.layer_to if schedule == "from_below" else row.layer
            cells.setdefault((row.element, at if at is not None else 0), []).append(row)
        places = sorted({at for _, at in cells})
        where = {"single": "layer", "from_below": "up to layer", "from_above": "from layer"}.get(schedule, "layer")
        body = [(str(at), *(_mean(cells.get((part, at), []), main) for part in parts)) for at in places]
        title = f"ablation: {main.replace('_', ' ')}, {str(variant).replace('/', ', ').replace('_', ' ')}"
        yield Summary(title, (where, *(str(part).replace("_", " ") for part in parts)), body)


def _routing(table: Table) -> Iterable[Summary]:
    columns = (
        ("entropy", "entropy", fmean),
        ("dead_fraction", "dead", fmean),
        ("drop_fraction", "dropped", fmean),
        ("load", "highest load", max),
        ("influence", "mean influence", fmean),
        ("r2_heldout", "mean R²", fmean),
        ("removal_cost", "highest cost", max),
    )
    heads = ("layer", *(title for _, title, _ in columns))
    layers = sorted({row.layer for row in table if row.layer is not None})
    body = []
    for layer in layers:
        cells = []
        for metric, _, join in columns:
            values = [row.value for row in table.where(metric=metric, layer=layer) if row.value is not None]
            cells.append(number(join(values)) if values else "-")
        body.append((str(layer), *cells))
    yield Summary("routing: experts of each sparse layer", heads, body)


def _evaluations(table: Table) -> Summary:
    done, saved = (table.where(metric="layer_evaluations", variant=name).rows for name in ("done", "saved"))
    lines = [(number(d.value or 0), number(s.value or 0)) for d, s in zip(done, saved, strict=False)]
    return Summary("layers run for a batch", ("layers done", "layers saved"), lines)


def _distance(row: Row) -> int:
    return (row.layer_to or 0) - (row.layer or 0)


def _edits(rows: Iterable[Row]) -> list[str]:
    return list(dict.fromkeys(str(row.edit) for row in rows))


def _mean(rows: Sequence[Row], metric: str) -> str:
    values = [row.value for row in rows if row.metric == metric and row.value is not None]
    return number(fmean(values)) if values else "-"


def _cell(row: Row | None) -> str:
    return "" if row is None else "-" if row.value is None else number(row.value)


_SUMMARIES: dict[str, Callable[[Table], Iterable[Summary]]] = {
    "contribution": _contribution,
    "commutativity": _commutativity,
    "ablation": _ablation,
    "routing": _routing,
}
