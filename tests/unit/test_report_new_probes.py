"""Figures of contribution, commutativity, ablation and routing, with the rows that each of them may show."""

import pytest

from report_rows import (
    PARTS,
    SHARES,
    ablation,
    about,
    axis_of,
    commutativity,
    contribution,
    drawn,
    figures_by_name,
    pick_of,
    routing,
    values,
)
from transect.report import write_report
from transect.report.figures import key_numbers_of
from transect.report.page import sections_of
from transect.report.records import to_records
from transect.results import Row, Table


def several_probes() -> list[Row]:
    found = []
    for layers, model in ((3, "org/small"), (5, "org/large")):
        found += [*contribution(layers, model=model), *commutativity(layers, model=model)]
        found += [*ablation(layers, model=model), *routing(layers, 4, model=model)]
    return found


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    """One model, among rows of other probes that no figure may pick up."""
    found = [*contribution(12), *commutativity(5), *ablation(5), *routing(4, 7)]
    other = [Row(metric=row.metric, value=77.0, unit=row.unit, probe="other", layer=row.layer) for row in found[:9]]
    return [*found, *other]


def test_contribution_level_runs_through_both_sites(rows):
    figure = figures_by_name("contribution", rows)["lens_loss_levels"]
    points = values(drawn(figure, rows, "point"), "position", "value")
    assert [place for place, _ in points] == [half / 2 for half in range(25)]
    levels = {
        row.layer + 0.5 * (row.site == "resid_mid"): row.value
        for row in rows
        if row.probe == "contribution" and row.metric == "lens_loss" and row.variant == "causal"
    }
    assert points == [(place, pytest.approx(levels[place], rel=1e-3)) for place in sorted(levels)]
    assert "Lower is better" in figure.note
    lines = [mark for mark in drawn(figure, rows, "line mark")]
    assert len(lines) == 1


def test_contribution_halves_follow_the_main_convention(rows):
    named = figures_by_name("contribution", rows)
    for kind, mark in (("cumulative", "point"), ("increments", "bar")):
        marks = drawn(named[f"mutual_information_{kind}"], rows, mark)
        assert {one["variant"] for one in marks} == {f"normalised/{kind.removesuffix('s')}"}
        assert sorted((one["half"], int(one["layer"])) for one in marks) == sorted(
            (half, layer) for half in ("attention", "FFN") for layer in range(12)
        )
    marks = drawn(named["mutual_information_increments"], rows, "bar")
    assert [float(one["value"].replace("−", "-")) < 0 for one in marks if one["layer"] == "1"] == [True, False]


def test_contribution_of_parallel_layers_is_of_both_halves():
    found = [
        Row(probe="contribution", metric="lens_loss", value=-0.1, unit="nats", layer=layer, element="both",
            variant="causal/increment")
        for layer in range(3)
    ]  # fmt: skip
    marks = drawn(figures_by_name("contribution", found)["lens_loss_increments"], found, "bar")
    assert [one["half"] for one in marks] == ["both at once"] * 3


def test_contribution_shares_side_by_side_and_absent_ones_told(rows):
    figure = figures_by_name("contribution", rows)["shares"]
    shown = {one["variant"]: float(one["value"]) for one in drawn(figure, rows, "point")}
    assert shown == {name: share for name, share in SHARES.items() if name != "TP/split_half"}
    assert "1 without a value" in figure.note
    ends = values([one for one in drawn(figure, rows, "rule mark") if "low" in one], "low", "high")
    assert (0.3, 0.54) in ends and len(ends) == len(shown)
    numbers = key_numbers_of("contribution", pick_of("contribution", rows))
    assert numbers == {
        "attention share, MI": "0.42 ± 0.02",
        "attention share, TP/same": "0.31 ± 0.02",
        "attention share, lens": "0.12 ± 0.02",
        "FFN share, MI": "0.58 ± 0.02",
        "FFN share, TP/same": "0.69 ± 0.02",
        "FFN share, lens": "0.88 ± 0.02",
    }


def test_shares_outside_zero_to_one_stay_on_the_axis():
    found = [about("share_mha", 1.3, "1", 0.1, probe="contribution", variant="lens")]
    low, high = axis_of(figures_by_name("contribution", found)["shares"], "x")["scale"]["domain"]
    assert low == 0 and high > 1.5


def test_commutativity_draws_each_pair_on_both_sides(rows):
    named = figures_by_name("commutativity", rows)
    cells = drawn(named["loss_change_pairs"], rows, "rect mark")
    # Both edges are called "layer", so a cell is known by its edit.
    assert sorted(one["edit"] for one in cells) == sorted(
        2 * [f"swap {i},{j}" for i in range(5) for j in range(i + 1, 5)]
    )
    assert {one["variant"] for one in cells} == {"pairs"}
    points = drawn(named["loss_change_distance"], rows, "point")
    assert all(int(one["distance"]) == int(one["layer_to"]) - int(one["layer"]) for one in points) and len(points) == 10
    ends = {(one["layer"], one["layer_to"]): one["ends"] for one in points}
    assert ends["0", "4"] == "with the first layer" and ends["1", "4"] == "with the last layer"
    assert ends["1", "3"] == "any other pair"


def test_commutativity_neighbours_come_from_pairs_where_they_were_not_asked_for(rows):
    bars = drawn(figures_by_name("commutativity", rows)["loss_change_neighbours"], rows, "bar")
    assert [(one["layer"], one["layer_to"], one["variant"]) for one in bars] == [
        (str(i), str(i + 1), "pairs") for i in range(4)
    ]
    own = [Row(probe="commutativity", metric="loss_change", value=0.5, unit="nats", layer=i, layer_to=i + 1,
               variant="adjacent") for i in range(4)]  # fmt: skip
    bars = drawn(figures_by_name("commutativity", [*rows, *own])["loss_change_neighbours"], [*rows, *own], "bar")
    assert {one["variant"] for one in bars} == {"adjacent"} and len(bars) == 4


def test_commutativity_shuffles_repeats_reversals_and_patterns(rows):
    named = figures_by_name("commutativity", rows)
    fixed = values(drawn(named["loss_change_shuffle"], rows, "point"), "fixed", "value")
    assert fixed == [(number, pytest.approx(8 * (1 - number / 5), rel=1e-3)) for number in range(4)]
    assert [place for (place,) in values(drawn(named["loss_change_repeat"], rows, "bar"), "layer")] == [*range(5)]
    assert [place for (place,) in values(drawn(named["loss_change_reversal"], rows, "bar"), "layer")] == [0, 1, 2]
    assert [one["pattern"] for one in drawn(named["loss_change_pattern"], rows, "bar")] == ["0,1,2,3"]


def test_commutativity_reversals_of_several_lengths_are_a_map():
    found = [Row(probe="commutativity", metric="kl", value=float(j - i), unit="nats", layer=i, layer_to=j,
                 variant="reversal") for i in range(4) for j in range(i + 1, 4)]  # fmt: skip
    assert len(drawn(figures_by_name("commutativity", found)["kl_reversal"], found, "rect mark")) == 6


def test_commutativity_key_numbers():
    def row(value: float, i: int, j: int, variant: str) -> Row:
        place = {"layer": i, "layer_to": j, "variant": variant, "probe": "commutativity"}
        return Row(metric="loss_change", value=value, unit="nats", **place)

    found = [row(0.5, 0, 1, "pairs"), row(3.0, 0, 2, "pairs"), row(0.1, 1, 2, "pairs"), row(9.0, 0, 2, "mirrored")]
    found += [Row(metric="loss", value=2.5, unit="nats", variant="intact", probe="commutativity")]
    found += [Row(metric="layer_evaluations", value=1500, unit="layers", variant="done", probe="commutativity")]
    assert key_numbers_of("commutativity", pick_of("commutativity", found)) == {
        "loss, intact": "2.5 nats",
        "layer evaluations done": "1,500",
        "mean loss change, neighbours swapped": "0.3 nats",
        "mean loss change, any pair swapped": "1.2 nats",
        "worst pair": "3 nats (layers 0 and 2)",
    }


def test_a_model_without_a_head_is_shown_by_its_last_state():
    found = [*commutativity(4, model="with"), *commutativity(5, cost="state_change", model="without")]
    named = figures_by_name("commutativity", found)
    assert {name.split("_pairs")[0] for name in named if "_pairs" in name} == {"loss_change", "state_change"}
    marks = drawn(named["state_change_neighbours"], found, "bar")
    assert len(marks) == 4 and {one["series"] for one in marks} == {"without"}
    assert {one["series"] for one in drawn(named["loss_change_neighbours"], found, "bar")} == {"with"}


def test_scale_is_log_like_only_where_a_few_dwarf_the_others(rows):
    assert axis_of(figures_by_name("commutativity", rows)["loss_change_repeat"])["scale"].get("type") is None
    found = [Row(probe="commutativity", metric="loss_change", value=value, unit="nats", layer=layer, variant="repeat")
             for layer, value in enumerate((7.0, 0.02, -0.03, 0.01, 0.02))]  # fmt: skip
    axis = axis_of(figures_by_name("commutativity", found)["loss_change_repeat"])
    assert axis["scale"]["type"] == "symlog" and axis["scale"]["constant"] == 0.01
    assert axis["title"] == "loss change (nats), log-like scale"
    assert axis["axis"]["values"] == [-0.03, -0.01, 0, 0.01, 0.03, 0.1, 0.3, 1, 3]


def test_ablation_places_runs_of_layers_at_their_moving_end(rows):
    named = figures_by_name("ablation", rows)
    below = drawn(named["loss_change_parts_from_below"], rows, "point")
    assert {one["variant"] for one in below} == {"zero/from_below"}
    assert sorted((one["element"], int(one["top"])) for one in below) == sorted(
        (element, layer) for element in PARTS for layer in range(5)
    )
    assert all(one["top"] == one["layer_to"] for one in below)
    above = drawn(named["loss_change_ffn_from_above"], rows, "point")
    assert {one["element"] for one in above} == {"ffn"} and len(above) == 5 * len(PARTS["ffn"])
    assert {one["layer"] for one in above} == {str(layer) for layer in range(5)}


def test_ablation_methods_stand_side_by_side(rows):
    named = figures_by_name("ablation", rows)
    marks = drawn(named["loss_change_attn_single"], rows, "point")
    assert sorted((one["method"], int(one["layer"])) for one in marks) == sorted(
        (method, layer) for method in ("zero", "mean") for layer in range(5)
    )
    assert "loss_change_layer_single" not in named  # one method only
    scaled = drawn(named["loss_change_residuals_single"], rows, "point")
    assert {one["variant"] for one in scaled} == {"scale 0/single"} and len(scaled) == 15
    assert len(drawn(named["loss_change_parts_single"], rows, "point")) == 15


def test_ablation_compares_models_by_colour_when_there_is_one_part():
    def row(model: str, layer: int) -> Row:
        place = {"layer": layer, "element": "ffn", "variant": "mean/single", "probe": "ablation"}
        return Row(metric="loss_change", value=0.1 + layer, unit="nats", model=model, **place)

    found = [row(model, layer) for model, layers in (("a", 3), ("b", 5)) for layer in range(layers)]
    named = figures_by_name("ablation", found)
    assert [figure.title for figure in named.values()] == ["Loss change: FFN ablated (mean), one layer at a time"]
    marks = drawn(named["loss_change_parts_single"], found, "point")
    assert sorted(one["series"] for one in marks) == ["a"] * 3 + ["b"] * 5


def test_ablation_heads_are_a_map(rows):
    cells = drawn(figures_by_name("ablation", rows)["loss_change_heads_zero"], rows, "rect mark")
    assert sorted((int(one["layer"]), int(one["head"])) for one in cells) == [
        (i, h) for i in range(5) for h in range(5)
    ]
    numbers = key_numbers_of("ablation", pick_of("ablation", rows))
    assert numbers["costliest head (zero)"].startswith("layer 1, head 3: 0.4")
    assert numbers["costliest FFN (zero)"].startswith("layer 0: 3.")
    assert numbers["loss, intact"] == "3.21 nats" and numbers["layer evaluations done"] == "1,234"


def test_ablation_copes_with_absent_parts():
    common = {"probe": "ablation", "metric": "loss_change", "unit": "nats", "element": "ffn"}
    absent = [Row(value=None, reason="the layer has no FFN", layer=0, **common)]
    assert figures_by_name("ablation", absent) == {}
    assert key_numbers_of("ablation", pick_of("ablation", absent)) == {}
    found = [*absent, Row(value=0.5, layer=1, variant="zero/single", **common)]
    assert len(drawn(figures_by_name("ablation", found)["loss_change_parts_single"], found, "point")) == 1


def test_routing_maps_have_every_expert_and_mark_absent_ones(rows):
    named = figures_by_name("routing", rows)
    for metric in ("load", "influence", "removal_cost", "type_preference"):
        cells = drawn(named[f"expert_{metric}"], rows, "rect mark")
        assert sorted((int(one["layer"]), int(one["expert"])) for one in cells) == [
            (layer, expert) for layer in range(4) for expert in range(7)
        ]
    linear = named["expert_r2_heldout"]
    assert len(drawn(linear, rows, "rect mark")) == 27 and len(drawn(linear, rows, "text mark")) == 1
    assert "even: 0.143" in named["expert_load"].note
    assert values(drawn(named["type_preference"], rows, "point"), "layer", "value")[3] == (3, 0.25)
    assert len(drawn(named["unused"], rows, "point")) == 8


def test_routing_pairs_are_maps_of_each_layer(rows):
    cells = drawn(figures_by_name("routing", rows)["co_selection"], rows, "rect mark")
    corners = [(int(one["layer"]), one["part"]) for one in cells]
    assert sorted(corners) == sorted(
        2 * [(layer, f"{i},{j}") for layer in range(4) for i in range(7) for j in range(i + 1, 7)]
    )
    many = list(routing(5, 64))
    figure = figures_by_name("routing", many)["co_selection"]
    assert "3 of 5 layers" in figure.note
    assert {one["layer"] for one in drawn(figure, many, "rect mark")} == {"0", "2", "4"}


def test_routing_with_very_many_experts_shows_the_strongest_pairs():
    found = list(routing(2, 70))
    bars = drawn(figures_by_name("routing", found)["co_selection"], found, "bar")
    strongest = sorted((row.value for row in found if row.metric == "co_selection"), reverse=True)[:20]
    assert sorted((float(one["value"]) for one in bars), reverse=True) == pytest.approx(strongest, rel=1e-3)


def test_routing_key_numbers():
    def row(metric: str, value: float, expert: int | None, layer: int) -> Row:
        part = None if expert is None else f"expert {expert}"
        return Row(probe="routing", metric=metric, value=value, unit="1", part=part, layer=layer)

    found = [row("entropy", 0.5, None, 0), row("entropy", 0.7, None, 1), row("dead_fraction", 0.25, None, 0)]
    found += [
        row("load", 0.9, 1, 0),
        row("load", 0.1, 0, 0),
        row("r2_heldout", 0.4, 5, 1),
        row("r2_heldout", 0.8, 4, 1),
    ]
    assert key_numbers_of("routing", pick_of("routing", found)) == {
        "mean entropy": "0.6",
        "mean dead fraction": "0.25",
        "highest load": "0.9 (layer 0, expert 1)",
        "least linear expert": "0.4 (layer 1, expert 5)",
    }


@pytest.mark.parametrize("probe", ["contribution", "commutativity", "ablation", "routing"])
def test_figures_of_absent_values_alone_are_none(probe):
    metrics = ("share_mha", "loss_change", "entropy", "load", "co_selection", "mutual_information")
    found = [Row(probe=probe, metric=metric, value=None, reason="nothing there", unit="1") for metric in metrics]
    assert figures_by_name(probe, found) == {}
    assert key_numbers_of(probe, pick_of(probe, found)) == {}


def test_two_models_of_different_depth_make_a_whole_page(tmp_path):
    found = several_probes()
    paths = write_report(Table(found), tmp_path / "page.html")
    sections = sections_of(to_records(found))
    assert [section.probe for section in sections] == ["contribution", "commutativity", "ablation", "routing"]
    assert len(paths) == 1 + 2 * sum(len(section.figures) for section in sections)
    assert len(set(paths)) == len(paths)
    assert all([series for series, _ in section.key_rows] == ["small", "large"] for section in sections)
    assert all(section.text.caution for section in sections)
