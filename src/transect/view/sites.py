"""The closed list of sites and elements: the same word means the same tensor in every model."""

from dataclasses import dataclass

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
    NEXT: "stream leaving the layer, before any final norm",
}
"""Every site of a layer, in the order in which a pre-norm layer computes them."""

MODEL_SITES = {"final_in": "before the final norm", "logits": "model output"}


@dataclass(frozen=True, slots=True)
class Element:
    """A function between two sites of one layer.

    `add_resid` says that the stream named in it is added to the output site: `attn_residual` is
    resid -> resid + attn_out, the residual without the norm after it.
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

PAPER_ELEMENTS: tuple[str, ...] = tuple(name for name, element in ELEMENTS.items() if element.code_flag)
