"""Made-up rows of the probes that a report draws, and what the marks of a drawn figure say of themselves."""

import math
import xml.etree.ElementTree
from collections.abc import Iterator

import altair as alt
import numpy as np
import vl_convert

from transect.report.charts import Figure
from transect.report.figures import figures_of
from transect.report.pick import Pick
from transect.report.records import to_records
from transect.report.stills import VEGA_LITE, with_data
from transect.results import Row

LEVELS = {
    "mutual_information": ("nats", ("normalised", "raw")),
    "token_prediction": ("1", ("same", "split_half")),
    "lens_loss": ("nats", ("causal",)),
}
SHARES = {"MI": 0.42, "MI/over_seeds": 0.42, "TP/same": 0.31, "TP/split_half": 0.36, "lens": 0.12}


def contribution(layers: int, **stamp) -> Iterator[Row]:
    common = {"probe": "contribution", **stamp}
    for metric, (unit, variants) in LEVELS.items():
        for number, variant in enumerate(variants):
            sign, start = (-1, 9.0) if metric == "lens_loss" else (1, 0.3 + 0.1 * number)
            level, total = start, {"attn": 0.0, "ffn": 0.0}
            error = 0.02 if metric != "lens_loss" else 0.05
            for layer in range(layers):
                yield about(metric, level, unit, error, site="resid", layer=layer, variant=variant, **common)
                for element, site in (("attn", "resid_mid"), ("ffn", "resid")):
                    gain = sign * 2 / layers * (0.4 if element == "attn" else 0.6) * (1.4 - layer / layers)
                    gain -= sign * 0.1 * (layer == 1 and element == "attn")
                    level, total[element] = level + gain, total[element] + gain
                    place = {"element": element, "layer": layer, **common}
                    yield about(metric, gain, unit, error / 2, variant=f"{variant}/increment", **place)
                    yield about(metric, total[element], unit, error, variant=f"{variant}/cumulative", **place)
                    if site == "resid_mid":
                        yield about(metric, level, unit, error, site=site, layer=layer, variant=variant, **common)
            yield about(metric, level, unit, error, site="resid", layer=layers, variant=variant, **common)
    for variant, share in SHARES.items():
        if variant == "TP/split_half" and layers == 12:
            for metric in ("share_mha", "share_ffn"):
                reason = "the whole gain is within two errors of zero"
                yield Row(metric=metric, value=None, reason=reason, unit="1", variant=variant, **common)
            continue
        error = 0.06 if variant == "MI/over_seeds" else 0.02
        yield about("share_mha", share, "1", error, variant=variant, **common)
        yield about("share_ffn", 1 - share, "1", error, variant=variant, **common)


def commutativity(layers: int, cost: str = "loss_change", **stamp) -> Iterator[Row]:
    rng = np.random.default_rng(layers)
    common = {"probe": "commutativity", **stamp}
    unit = "1" if cost == "state_change" else "nats"

    def rows(value: float, **place) -> Iterator[Row]:
        yield about(cost, value, unit, 0.1 * abs(value) + 0.005, **place, **common)
        if cost == "loss_change":
            yield Row(metric="kl", value=abs(value) * 1.1, unit="nats", **place, **common)
            yield Row(metric="agreement", value=math.exp(-abs(value)), unit="1", **place, **common)
            yield Row(metric="state_change", value=0.3 * math.tanh(abs(value)), unit="1", **place, **common)

    if cost == "loss_change":
        yield Row(metric="loss", value=3.21, unit="nats", layer=0, layer_to=layers - 1, variant="intact", **common)
    for i in range(layers):
        yield from rows(9 + i / 7, layer=i, variant="repeat", edit=f"repeat {i}")
        for j in range(i + 1, layers):
            value = 0.02 * (j - i) ** 1.5 + 0.01 * rng.normal() + 6 * (i == 0) + 0.7 * (j == layers - 1)
            yield from rows(value, layer=i, layer_to=j, variant="pairs", edit=f"swap {i},{j}")
            if i + j == layers - 1:
                yield from rows(value, layer=i, layer_to=j, variant="mirrored", edit=f"swap {i},{j}")
        if i + 2 < layers:
            value = 0.1 + 4 * (i == 0) + 0.05 * rng.random()
            yield from rows(value, layer=i, layer_to=i + 2, variant="reversal", edit=f"reverse {i}-{i + 2}")
    for fixed in sorted({round(x) for x in np.linspace(0, layers - 2, 7)}):
        place = {
            "layer": 0,
            "layer_to": layers - 1,
            "variant": "shuffle",
            "edit": f"shuffle, {fixed} of {layers} fixed",
        }
        yield from rows(8 * (1 - fixed / layers), part=f"{fixed} fixed", **place)
    for first in range(0, layers - 4, 4):
        words = ",".join(str(layer) for layer in range(first, first + 4))
        place = {"layer": first, "layer_to": first + 3, "variant": "pattern", "edit": f"pattern {words}"}
        yield from rows(7 + first / 9, **place)
    for variant, number in (("done", (layers - 1) * layers * (layers + 1) // 3 + layers), ("saved", 17)):
        yield Row(metric="layer_evaluations", value=number, unit="layers", variant=variant, **common)


PARTS = {"ffn": ("zero", "mean", "linear", "mse_adam"), "attn": ("zero", "mean"), "layer": ("zero",)}


def ablation(layers: int, heads: int = 5, cost: str = "loss_change", **stamp) -> Iterator[Row]:
    rng = np.random.default_rng(layers)
    common = {"probe": "ablation", **stamp}
    unit = "1" if cost == "state_change" else "nats"
    scale = {"ffn": 1.0, "attn": 0.5, "layer": 1.6}
    weight = {"zero": 1.0, "mean": 0.8, "linear": 0.4, "mse_adam": 0.3}

    def row(value: float, **place) -> Row:
        return about(cost, value, unit, 0.1 * abs(value), **place, **common)

    if cost == "loss_change":
        yield Row(metric="loss", value=3.21, unit="nats", variant="intact", **common)
    for element, methods in PARTS.items():
        for method in methods:
            costs = scale[element] * weight[method] * (0.05 + 0.03 * rng.random(layers))
            costs[0] += 3 * weight[method]
            costs[-1] += 0.3
            for layer in range(layers):
                place = {"element": element, "layer": layer}
                yield row(float(costs[layer]), variant=f"{method}/single", **place)
                below = min(8.0, float(costs[: layer + 1].sum() * 1.6))
                above = min(8.0, float(costs[layer:].sum() * 1.6))
                yield row(below, element=element, layer=0, layer_to=layer, variant=f"{method}/from_below")
                yield row(above, layer_to=layers - 1, variant=f"{method}/from_above", **place)
    for element in ("residual_attn", "residual_ffn", "residual_both"):
        for factor in (0.5, 0):
            for layer in range(layers):
                value = (1 - factor) * (0.4 + 0.1 * rng.random()) * (1 + (element == "residual_both"))
                yield row(value, element=element, layer=layer, variant=f"scale {factor}/single")
    for layer in range(layers):
        for head in range(heads):
            value = 0.02 * rng.random() ** 3 - 0.001 + 0.4 * ((layer, head) == (1, 3))
            yield row(value, element="head", part=f"head {head}", layer=layer, variant="zero/single")
    yield Row(metric="layer_evaluations", value=1234, unit="layers", variant="done", **common)


def routing(layers: int, experts: int, **stamp) -> Iterator[Row]:
    rng = np.random.default_rng(experts)
    common = {"probe": "routing", **stamp}
    for layer in range(layers):
        load = rng.dirichlet(np.full(experts, 3.0))
        entropy = float(-(load * np.log(load)).sum() / math.log(experts))
        for metric, value in (
            ("entropy", entropy),
            ("dead_fraction", 0.125 * (layer == 2)),
            ("drop_fraction", 0.01 * layer),
            ("type_preference", 0.1 + 0.05 * layer),
        ):
            yield about(metric, value, "1", 0.01, layer=layer, **common)
        for expert in range(experts):
            place = {"layer": layer, "part": f"expert {expert}", **common}
            yield Row(metric="load", value=float(load[expert]), unit="1", **place)
            if layer == 1 and expert == 3:
                yield Row(metric="r2_heldout", value=None, reason="too few tokens", unit="1", element="expert", **place)
            else:
                yield Row(metric="r2_heldout", value=0.3 + 0.6 * rng.random(), unit="1", element="expert", **place)
            yield Row(metric="influence", value=float(load[expert] * rng.random()), unit="1", **place)
            yield Row(metric="removal_cost", value=float(load[expert] * rng.random() ** 2), unit="nats", **place)
            yield Row(metric="type_preference", value=float(rng.random()), unit="1", **place)
            for other in range(expert + 1, experts):
                value = float(rng.gamma(2, 0.5))
                yield Row(metric="co_selection", value=value, unit="1", layer=layer, part=f"{expert},{other}", **common)


def about(metric: str, value: float, unit: str, stderr: float, **columns) -> Row:
    error = {"stderr": stderr, "low": value - 2 * stderr, "high": value + 2 * stderr}
    return Row(metric=metric, value=value, unit=unit, **error, **columns)


def figures_by_name(probe: str, rows: list[Row]) -> dict[str, Figure]:
    found = figures_of(probe, pick_of(probe, rows))
    assert len({figure.name for figure in found}) == len(found)
    for figure in found:
        assert_valid(figure)
    return {figure.name: figure for figure in found}


def assert_valid(figure: Figure) -> None:
    """Vega-Lite's schema allows the figure's specification; altair raises where it does not."""
    alt.Chart.from_dict(figure.spec, validate=True)


def pick_of(probe: str, rows: list[Row]) -> Pick:
    records = [record for record in to_records(rows) if record["probe"] == probe]
    return Pick(tuple(records), ({"field": "probe", "equal": probe},))


def drawn(figure: Figure, rows: list[Row], kind: str) -> list[dict[str, str]]:
    """What the marks of one kind say of themselves when the figure is drawn from all rows."""
    assert_valid(figure)
    records = [{name: value for name, value in one.items() if value is not None} for one in to_records(rows)]
    svg = vl_convert.vegalite_to_svg(with_data(figure, records), vl_version=VEGA_LITE)
    marks = [
        node.attrib["aria-label"]
        for node in xml.etree.ElementTree.fromstring(svg).iter()
        if node.attrib.get("aria-roledescription") == kind
    ]
    return [dict(part.rsplit(": ", 1) for part in label.split("; ") if ": " in part) for label in marks]


def values(marks: list[dict[str, str]], *names: str) -> list[tuple[float, ...]]:
    return sorted(tuple(float(mark[name].replace("−", "-")) for name in names) for mark in marks)


def axis_of(figure: Figure, channel: str = "y") -> dict:
    encodings = [layer["encoding"][channel] for layer in figure.spec.get("layer", [figure.spec])]
    return next(one for one in encodings if "scale" in one)
