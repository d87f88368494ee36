"""What kind of thing a module or a call is, told by its parameters and its values."""

import torch
from torch import Tensor, nn

from transect.view.tensors import by_position
from transect.view.trace import Call


def holds(tensor: Tensor, value: Tensor, like: Tensor) -> bool:
    """Whether a tensor is the value [batch, positions, width], in the form of `like` or flattened."""
    here = by_position(tensor, *like.shape[:2]) if tensor.is_floating_point() else None
    return here is not None and here.shape == value.shape and torch.equal(here.double(), value)


def is_norm(module: nn.Module) -> bool:
    """A module without children that owns vectors only, or nothing: LayerNorm, RMSNorm and their kin."""
    leaf = not any(True for _ in module.children())
    return leaf and not isinstance(module, (nn.Dropout, nn.Identity)) and all(p.ndim == 1 for p in module.parameters())


def is_linear(module: nn.Module) -> bool:
    """A module that owns one matrix and perhaps a bias: Linear, Conv1D and their quantised kin."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.ndim == 2 and not isinstance(module, nn.Embedding)


def below(path: str, root: str | None) -> bool:
    """Whether a module path is the root or inside it."""
    return root is not None and (path == root or path.startswith(f"{root}."))


def is_elementwise(call: Call) -> bool:
    """A module without parameters that changes each number by itself: an activation."""
    module, received, returned = call.module, call.inputs.get(0), call.outputs.get(None)
    if received is None or returned is None or received.shape != returned.shape or torch.equal(received, returned):
        return False
    if any(True for _ in module.parameters()):
        return False
    nudged = received.clone()
    nudged[..., 0] += 1
    with torch.no_grad():
        before, after = module(received), module(nudged)
    return torch.equal(after[..., 1:], before[..., 1:]) and not torch.equal(after[..., 0], before[..., 0])


def is_experts(module: nn.Module) -> bool:
    """A module that owns a stack of matrices: the fused experts of a sparse FFN."""
    return any(parameter.ndim >= 3 for parameter in module.parameters(recurse=False))


def routes(call: Call) -> bool:
    """A call that returns both scores and whole numbers: a router."""
    return any(not item.is_floating_point() for item in call.outputs.values()) and any(
        item.is_floating_point() for item in call.outputs.values()
    )
