"""The closed list of sites and elements: the same word means the same tensor in every model."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transect.view.layout import LayerMap

NEXT = "resid_next"
"""resid[l + 1], as one of the tensors of layer l."""

SITES: dict[str, str] = {
    "resid": "stream entering the layer",
    "attn_in": "what the attention sub-layer receives, after its norm in a pre-norm model",
    "heads_out": "heads concatenated, before the output projection",
    "attn_out": "exactly what attention adds to the stream; its own output norm belongs to it",
    "resid_mid": "stream between the two sub-layers; absent in parallel layers",
    "ffn_in": "what the FFN sub-layer receives, after its norm in a pre-norm model",
    "ffn_pre": "input of the activation",
    "ffn_act": "output of the activation",
    "ffn_hidden": "input of the FFN's last linear map (gated: act(gate) * up)",
    "ffn_out": "exactly what the FFN adds to the stream; its own output norm belongs to it",
    "router_logits": "scores of a sparse FFN's blocks",
    "selected": "blocks that a sparse FFN chose",
    "selected_weights": "what their outputs are multiplied with: one for each choice, or one for each block",
    NEXT: "stream leaving the layer, before any final norm",
}
"""Every site of a layer, in the order in which a pre-norm layer computes them."""

MODEL_SITES = {"final_in": "before the final norm", "logits": "model output"}


@dataclass(frozen=True, slots=True)
class Element:
    """A function between two sites of one layer.

    `add` names a stream that is added to the target: `attn_residual` is resid -> resid + attn_out, the residual
    without the norm after it. `code_flag` is the element's name in the code of arXiv 2101.04547.
    """

    name: str
    source: str
    target: str
    add: str | None = None
    code_flag: str | None = None
    elementwise: bool = False

    @property
    def sites(self) -> tuple[str, ...]:
        """The sites that must be captured to see this element."""
        return tuple(dict.fromkeys(site for site in (self.source, self.target, self.add) if site))


ELEMENTS: dict[str, Element] = {
    element.name: element
    for element in (
        Element("ffn", "ffn_in", "ffn_out", code_flag="mlp"),
        Element("ffn_up", "ffn_in", "ffn_hidden", code_flag="ffgelu"),
        Element("attn_heads", "attn_in", "heads_out", code_flag="self_attention"),
        Element("attn", "attn_in", "attn_out", code_flag="self_attention_ff"),
        Element("attn_proj", "heads_out", "attn_out", code_flag="ff_after_self_attention"),
        Element("attn_residual", "resid", "attn_out", add="resid", code_flag="attention_before_ln"),
        Element("attn_sublayer", "resid", "resid_mid", code_flag="attention"),
        Element("ffn_residual", "resid_mid", "ffn_out", add="resid_mid", code_flag="ffn_before_ln"),
        Element("ffn_sublayer", "resid_mid", NEXT, code_flag="ffn"),
        Element("layer", "resid", NEXT, code_flag="encoder"),
        Element("activation", "ffn_pre", "ffn_act", elementwise=True),
        Element("attn_norm", "resid", "attn_in"),
        Element("ffn_norm", "resid_mid", "ffn_in"),
    )
}
"""The ten elements of the non-linearity paper under our names, then activation and the two norms."""


def present(element: Element, known: "LayerMap") -> Element | str:
    """The element as it stands in a layer of this layout, or the reason why the layer has none.

    In a parallel layer the FFN reads `resid`, which takes the place of `resid_mid`. Where a sub-layer reads the stream
    itself its input is `resid` or `resid_mid`; a residual without a norm after it is the whole sub-layer.
    """
    if known.parallel and element.name in ("attn_sublayer", "ffn_sublayer"):
        return "a parallel layer has no stream between its sub-layers"
    swaps = {"resid_mid": "resid"} if known.parallel or "attn" not in known.sublayers else {}
    if element.name in ("attn_norm", "ffn_norm"):
        if getattr(known, element.name) is None and element.target in known.taps:
            return f"{element.target} is the stream itself: no norm stands before this sub-layer"
    else:
        if known.attn_norm is None and "attn_in" in known.taps:
            swaps["attn_in"] = "resid"
        if known.ffn_norm is None and "ffn_in" in known.taps:
            swaps["ffn_in"] = swaps.get("resid_mid", "resid_mid")
    source = swaps.get(element.source, element.source)
    target, add = element.target, element.add and swaps.get(element.add, element.add)
    if element.name == "attn_residual" and known.mid_norm is None and "resid_mid" in known.taps:
        target, add = "resid_mid", None
    if element.name == "ffn_residual" and known.next_norm is None and not known.parallel:
        target, add = NEXT, None
    for site in (source, target, add):
        if site is not None and site not in known.taps:
            return known.missing.get(site, f"this layer has no {site}")
    return replace(element, source=source, target=target, add=add)


PAPER_ELEMENTS: tuple[str, ...] = tuple(name for name, element in ELEMENTS.items() if element.code_flag)
