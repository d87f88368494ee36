"""What a checkpoint holds, by name: parameters, persistent buffers, and the optimizers' state of each parameter."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from transect.models.shards import Form


def model_state(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers themselves; one that stands at several places has its first name only.

    Sharded ones are DTensors, as asking for the state makes FSDP2 give up what it had gathered.
    """
    state: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            state[name] = tensor
    return state


def optimizer_state(model: nn.Module, parts: Sequence[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """The state of every parameter that has one, as `layers.0.ffn.up.weight.exp_avg`; the tensors themselves.

    Settings such as learning rates are not in it: a run has them from its recipe. torch's own helper for this
    (`get_optimizer_state_dict`) would take a step of every optimizer to learn what state it has.
    """
    state: dict[str, Tensor] = {}
    for name, part, parameter in _owned(model, parts):
        for key, value in part.state.get(parameter, {}).items():
            _check(f"{name}.{key}", key, value, parameter)
            state[f"{name}.{key}"] = value
    return state


def room_for(model: nn.Module, parts: Sequence[torch.optim.Optimizer], saved: Mapping[str, Form]) -> dict[str, Tensor]:
    """Tensors to read a saved optimizer state into: placed as the parameter where they have its shape.

    Raises KeyError with its name for one whose parameter no optimizer has.
    """
    parameters = {name: parameter for name, _, parameter in _owned(model, parts)}
    room = {}
    for name, (shape, dtype) in saved.items():
        parameter = parameters[name.rpartition(".")[0]].detach()
        like = shape == tuple(parameter.shape)
        room[name] = torch.empty_like(parameter, dtype=dtype) if like else torch.empty(shape, dtype=dtype)
    return room


def restore(model: nn.Module, parts: Sequence[torch.optim.Optimizer], state: Mapping[str, Tensor]) -> None:
    """Make a state the optimizers' own, in place of all they had; their settings stay."""
    by_parameter: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        owner, _, key = name.rpartition(".")
        by_parameter.setdefault(owner, {})[key] = tensor
    names = {id(parameter): name for name, _, parameter in _owned(model, parts)}
    for part in parts:
        order = [names[id(parameter)] for group in part.param_groups for parameter in group["params"]]
        kept = {place: by_parameter[name] for place, name in enumerate(order) if name in by_parameter}
        part.load_state_dict({**part.state_dict(), "state": kept})


def _owned(
    model: nn.Module, parts: Sequence[torch.optim.Optimizer]
) -> Iterator[tuple[str, torch.optim.Optimizer, Tensor]]:
    names = {id(tensor): name for name, tensor in model_state(model).items()}
    for part in parts:
        for group in part.param_groups:
            for parameter in group["params"]:
                yield names[id(parameter)], part, parameter


def _check(name: str, key: str, value: Any, parameter: Tensor) -> None:
    """Raise TypeError for a state that would not come back as it was."""
    if not isinstance(value, Tensor):
        raise TypeError(f"optimizer state {name} is a {type(value).__name__}; keep it as a tensor")
    if value.is_floating_point() and key != "step" and value.dtype != parameter.dtype:
        # Optimizer.load_state_dict gives all but `step` the type of the parameter
        raise TypeError(f"optimizer state {name} is {value.dtype}; it must be {parameter.dtype}, as the parameter")
    alike = isinstance(value, DTensor) and value.shape == parameter.shape
    if isinstance(parameter, DTensor) and value.ndim and not alike:
        raise TypeError(f"optimizer state {name} of a sharded parameter must be sharded like it, or have no dimension")
