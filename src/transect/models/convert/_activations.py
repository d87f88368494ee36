"""Names of activations in transformers and here."""

from transect.models.convert._attributes import Attributes

_OURS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
    "silu": "silu",
    "swish": "silu",
    "linear": "identity",
}
_THEIRS = {"gelu_tanh": "gelu_pytorch_tanh", "identity": "linear"}


def ours(read: Attributes, name: str) -> str:
    """Our name of the activation in an attribute; raises InputError where there is none."""
    given = read(name)
    if given not in _OURS:
        raise read.misfit(name, given, f"activations are {', '.join(_OURS)}")
    return _OURS[given]


def theirs(name: str) -> str:
    """Their name of an activation of ours."""
    return _THEIRS.get(name, name)
