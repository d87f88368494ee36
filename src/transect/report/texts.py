"""What each probe measures and how to read it, in plain words."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Text:
    """The fixed words of one section."""

    title: str
    measures: str = ""
    how_to_read: str = ""
    caution: str = ""


_TEXTS = {
    "jump": Text(
        "Jump",
        "How far each layer turns the direction of the residual stream, and how much of that turn comes in a jump.",
        "A flat curve means even work; a rise at the end means that the last layers change the stream the most.",
    ),
    "nonlinearity": Text(
        "Non-linearity",
        "How well the best affine map replaces each element of a layer, scored on documents it was not fitted on.",
        "R² of 1 means that the element is affine on this text; 0 means that the map does no better than the mean; "
        "negative values mean that it does worse.",
        "For attention rows the approximator sees only the token's own input: the score mixes “not linear” with "
        "“uses other tokens”.",
    ),
    "similarity": Text(
        "Similarity",
        "How alike the states before, between and after the layers are, and how many directions they use.",
        "Bright blocks on the diagonal are groups of layers that change little; "
        "a low effective rank or a high anisotropy means that few directions carry the states.",
    ),
    "contribution": Text(
        "Contribution",
        "How much attention and FFN each contribute to predicting the token, at every sub-layer.",
        "A share above one half means that this half of the layer contributes more than the other.",
    ),
    "commutativity": Text(
        "Commutativity",
        "How much the model loses when layers change places, are reversed or repeated.",
        "A small change of the loss means that the order of these layers matters little.",
    ),
    "ablation": Text(
        "Ablation",
        "How much the model loses when a part of a layer is removed or replaced.",
        "A small change of the loss means that the model can do without this part.",
    ),
    "routing": Text(
        "Routing",
        "How tokens are spread over the blocks of each sparse FFN.",
        "An even load uses all blocks; dead blocks are never chosen.",
    ),
}


def text_of(probe: str) -> Text:
    """The words for a probe; an unknown one gets its name."""
    return _TEXTS.get(probe, Text(probe))
