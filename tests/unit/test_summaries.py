"""The short tables that a terminal shows: each number stands at the layer it belongs to."""

from transect.results import Row, Table
from transect.summaries import Summary, summaries

LAYERS = 5


def cost(schedule: str, layer: int, layer_to: int | None, value: float) -> Row:
    return Row(
        metric="loss_change",
        value=value,
        unit="nats",
        element="ffn",
        variant=f"zero/{schedule}",
        layer=layer,
        layer_to=layer_to,
    )


def ablation() -> dict[str, Summary]:
    """The tables by their titles; a number tells the schedule by its hundreds and the layer by its ones."""
    rows = [cost("single", layer, None, 100 + layer) for layer in range(LAYERS)]
    rows += [cost("from_below", 0, layer, 200 + layer) for layer in range(LAYERS)]
    rows += [cost("from_above", layer, LAYERS - 1, 300 + layer) for layer in range(LAYERS)]
    return {one.title: one for one in summaries("ablation", Table(rows)) or []}


def test_every_ablation_stands_at_the_layer_it_ends_or_begins_with():
    found = ablation()
    assert {title: one.heads for title, one in found.items()} == {
        "ablation: loss change, zero, single": ("layer", "ffn"),
        "ablation: loss change, zero, from below": ("up to layer", "ffn"),
        "ablation: loss change, zero, from above": ("from layer", "ffn"),
    }
    for hundreds, one in zip((100, 200, 300), found.values(), strict=True):
        assert one.lines == [(str(layer), str(hundreds + layer)) for layer in range(LAYERS)]


def test_what_contribution_adds_stands_at_its_layer_and_half():
    rows = [
        Row(metric="lens_loss", value=-(10 * layer + half + 1), unit="nats", layer=layer, element=name, variant=variant)
        for layer in range(3)
        for half, name in enumerate(("attn", "ffn"))
        for variant in ("causal/increment", "causal/cumulative")
    ]
    (one,) = summaries("contribution", Table(rows)) or []
    assert one.heads == ("layer", "lens MHA", "lens FFN")
    assert one.lines == [("0", "-1", "-2"), ("1", "-11", "-12"), ("2", "-21", "-22")]


def test_shares_stand_by_their_estimator():
    def share(metric: str, value: float | None, variant: str) -> Row:
        reason = None if value is not None else "no gain"
        return Row(metric=metric, value=value, reason=reason, unit="1", variant=variant)

    rows = [share("share_mha", 0.25, "MI"), share("share_ffn", 0.75, "MI"), share("share_mha", None, "lens")]
    (one,) = summaries("contribution", Table([*rows, share("share_ffn", None, "lens")])) or []
    assert one.lines == [("MI", "0.25", "0.75", "-"), ("lens", "-", "-", "-")]


def test_swaps_are_told_by_their_distance():
    rows = [
        Row(
            metric="kl",
            value=float(100 * (j - i) + i),
            unit="nats",
            layer=i,
            layer_to=j,
            edit=f"swap {i},{j}",
            variant="pairs",
        )
        for i in range(4)
        for j in range(i + 1, 4)
    ]
    (one,) = summaries("commutativity", Table(rows)) or []
    assert one.heads == ("order of layers", "orders", "KL")
    assert one.lines == [("swap, 1 apart", "3", "101"), ("swap, 2 apart", "2", "200.5"), ("swap, 3 apart", "1", "300")]


def test_other_probes_have_no_short_table():
    assert summaries("jump", Table([])) is None
