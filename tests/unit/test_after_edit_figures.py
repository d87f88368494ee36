"""What accuracies and costs after training look like in figures and short tables."""

import pytest

from report_rows import about, drawn, figures_by_name
from transect.results import Row, Table
from transect.summaries import summaries

METRICS = {"loss_change": "nats", "accuracy_change": "1", "recovered": "1"}


def rows(probe: str) -> list[Row]:
    found = []
    for metric, unit in METRICS.items():
        for stage in ("",) if metric != "recovered" else ():
            found += _of(probe, metric, unit, stage)
        found += _of(probe, metric, unit, "/continued")
    return found


def _of(probe: str, metric: str, unit: str, stage: str) -> list[Row]:
    made = []
    for layer in range(4):
        place = {"probe": probe, "model": "m", "layer": layer}
        if probe == "ablation":
            place |= {"variant": f"zero/single{stage}", "element": "ffn", "edit": f"zero ffn {layer}"}
        else:
            place |= {"variant": f"adjacent{stage}", "layer_to": layer + 1, "edit": f"swap {layer},{layer + 1}"}
        made.append(about(metric, -0.1 * (1 + layer), unit, 0.01, **place))
    return made


@pytest.mark.parametrize("probe", ["ablation", "commutativity"])
def test_each_stage_has_figures_of_its_own(probe: str):
    found = figures_by_name(probe, rows(probe))
    names = list(found)
    assert (
        sum("after training" in figure.title for figure in found.values())
        == sum("continued" in name for name in names)
        == 3
    )
    for metric in METRICS:
        assert any(name.startswith(metric) and name.endswith("continued") for name in names)
    assert not any(name.startswith("recovered") and not name.endswith("continued") for name in names)
    kind = "point" if probe == "ablation" else "bar"
    assert all(len(drawn(figure, rows(probe), kind)) == 4 for figure in found.values())


@pytest.mark.parametrize("probe", ["ablation", "commutativity"])
def test_each_stage_has_a_table_of_its_own(probe: str):
    titles = [one.title for one in summaries(probe, Table(rows(probe))) or []]
    assert len(set(titles)) == len(titles)
    assert [title for title in titles if "continued" in title or "after training" in title]
