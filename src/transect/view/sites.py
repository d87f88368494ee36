"""The closed list of sites and elements: the same word means the same tensor in every model."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transect.view.layout import LayerMap

NEXT = "resid_next"
"""resid[l + 1], as one of the tensors of layer l."""


def _sites_of_another(half: str, name: str) -> dict[str, str]:
    """The sites of an FFN that few layers have."""
    routing = "where it is sparse"
    return {
        f"{half}_in": f"what {name} receives",
        f"{half}_pre": f"input of the activation of {name}",
        f"{half}_act": f"output of the activation of {name}",
        f"{half}_hidden": f"input of the last linear map of {name}",
        f"{half}_out": f"what {name} gives" if half == "inner" else f"exactly what {name} adds to the stream",
        f"{half}_router_logits": f"scores of the blocks of {name}, {routing}",
        f"{half}_selected": f"blocks that {name} chose, {routing}",
        f"{half}_selected_weights": f"what their outputs are multiplied with, {routing}",
    }


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
    "resid_mid2": "stream between two FFN sub-layers",
    **_sites_of_another("ffn2", "the second FFN sub-layer"),
    **_sites_of_another("inner", "the FFN inside attention"),
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
    weight: float = 1.0  # of `add`, where the model weights its residual

    @property
    def half(self) -> str | None:
        """The sub-layer it is a part of; None for the whole layer and for the FFN inside attention."""
        first = "ffn" if self.name == "activation" else self.name.partition("_")[0]
        return first if first in ("attn", "ffn", "ffn2") else None

    @property
    def output(self) -> str:
        """The target, and the stream that is added to it with its weight: `attn_out`, `attn_out+resid*0.5`."""
        weight = "" if self.weight == 1 else f"*{self.weight!r}"
        return self.target if self.add is None else f"{self.target}+{self.add}{weight}"

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
        Element("inner_ffn", "inner_in", "inner_out"),
        Element("ffn2", "ffn2_in", "ffn2_out"),
        Element("ffn2_up", "ffn2_in", "ffn2_hidden"),
        Element("ffn2_residual", "resid_mid2", "ffn2_out", add="resid_mid2"),
        Element("ffn2_sublayer", "resid_mid2", NEXT),
        Element("ffn2_norm", "resid_mid2", "ffn2_in"),
    )
}
"""The ten elements of the non-linearity paper under our names, then activation and the two norms; last those of an FFN
inside attention and of a second FFN, which few models have."""

COMMON: tuple[str, ...] = tuple(name for name in ELEMENTS if not name.startswith(("inner", "ffn2")))
"""The elements that a layer of attention and FFN may have."""


def placed(element: Element, known: "LayerMap") -> Element | str:
    """The element between the streams that its sub-layer really stands between, or the reason why there is none.

    Those are resid and resid_mid for attention, resid_mid and resid_next for the FFN, unless a layer has other
    sub-layers; sub-layers that are added at once share both.
    """
    addition = known.addition(element.half) if element.half else None
    if addition is None:
        return element
    single = len(addition.adds) == 1
    if addition.sum_norm is not None and element.name.endswith(("_sublayer", "_residual")):
        return "the sub-layers' outputs are normed together"
    if element.name.endswith("_sublayer"):
        if not single:
            return known.missing["resid_mid" if "attn" in addition.adds else "resid_mid2"]
        return replace(element, source=addition.source, target=addition.target)
    if element.name.endswith("_residual"):
        add = addition.source if addition.number else None
        return replace(element, source=addition.source, add=add, weight=addition.number or 1.0)
    return replace(element, source=addition.source) if element.name.endswith("_norm") else element


def present(element: Element, known: "LayerMap") -> Element | str:
    """The element as it stands in a layer of this layout, or the reason why the layer has none.

    In a parallel layer the FFN reads `resid`, which takes the place of `resid_mid`. Where a sub-layer reads the stream
    itself its input is `resid` or `resid_mid`; a residual without a norm after it is the whole sub-layer.
    """
    half = element.half
    addition = known.addition(half) if half else None
    if half and addition is None:
        return known.missing[f"{half}_out"]
    found = placed(element, known)
    if isinstance(found, str):
        return found
    if half and addition:
        reads_stream = half not in known.entry_norms and f"{half}_in" in known.taps
        if element.name == f"{half}_norm" and reads_stream:
            return f"{element.target} is the stream itself: no norm stands before this sub-layer"
        if found.source == f"{half}_in" and reads_stream:
            found = replace(found, source=addition.source)
        if element.name == f"{half}_residual" and addition.norm is None and len(addition.adds) == 1:
            found = replace(found, target=addition.target, add=None, weight=1.0)
    for site in found.sites:
        if site not in known.taps:
            return known.missing.get(site, f"this layer has no {site}")
    return found


HALVES: dict[str, str] = {"attn": "attn", "ffn": "ffn", "ffn2": "ffn2", "inner_ffn": "inner"}
"""The parts that add to the stream, or inside attention to its contexts, with the prefix of their sites."""

PAPER_ELEMENTS: tuple[str, ...] = tuple(name for name, element in ELEMENTS.items() if element.code_flag)
