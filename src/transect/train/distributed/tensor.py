"""Heads of attention and units of FFNs shared among processes that see the same text."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from transect.errors import InputError
from transect.models.blocks.base import Block
from transect.models.cuts import Cuts
from transect.models.transformer import TransectPreTrainedModel


def cut(model: TransectPreTrainedModel, mesh: DeviceMesh) -> tuple[str, ...]:
    """Share every layer as its parts say (`Block.plan`), in place.

    Returns the names of parameters that are whole in each process but have only its heads' gradients. Embeddings, norms
    and head stay whole. Activations that are drawn (dropout on attention weights) repeat from process to process.
    Raises InputError where a part cannot be cut, or not evenly.
    """
    parts = mesh.size()
    found = [
        (f"{place}.{path}", layer.get_submodule(path), cuts)
        for place, layer in model.named_modules()
        if isinstance(layer, Block)
        for path, cuts in layer.plan().items()
    ]
    for path, _, cuts in found:
        _check(path, cuts, parts)
    partial = []
    for path, module, cuts in found:
        for name in (*cuts.columns, *cuts.rows):
            whole = module.get_submodule(name)
            assert isinstance(whole, nn.Linear)
            made = RowLinear(whole, mesh) if name in cuts.rows else ColumnLinear(whole, mesh, enter=not cuts.together)
            setattr(module, name, made)
        if cuts.together:
            module.register_forward_pre_hook(_Entered(mesh.get_group()))
        partial += [f"{path}.{name}" for name in cuts.partial]
    return tuple(partial)


def _check(path: str, cuts: Cuts, parts: int) -> None:
    if cuts.refused is not None:
        raise InputError(f"parallel.tensor is {parts}: {path} cannot be cut: {cuts.refused}")
    for name, count in cuts.counts.items():
        if count % parts:
            raise InputError(
                f"parallel.tensor is {parts}: {path} has {name} {count}, which {parts} processes cannot share evenly; "
                f"give a tensor that divides it, or another {name}"
            )


class _Cut(nn.Linear):
    """A linear map of which this process has a part; `in_features` and `out_features` are the whole map's."""

    def __init__(self, whole: nn.Linear, mesh: DeviceMesh, dim: int) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = whole.in_features, whole.out_features
        self.group = mesh.get_group()
        self.weight = _part(whole.weight, mesh, dim)
        self.bias: Any = whole.bias if whole.bias is None or dim == 1 else _part(whole.bias, mesh, 0)
        self.train(whole.training)


class ColumnLinear(_Cut):
    """Some outputs of x W^T + b for an x that all processes have; `enter`: nobody summed the gradients of x yet."""

    def __init__(self, whole: nn.Linear, mesh: DeviceMesh, enter: bool) -> None:
        super().__init__(whole, mesh, 0)
        self.enter = enter

    def forward(self, input: Tensor) -> Tensor:
        x: Any = _Enter.apply(input, self.group) if self.enter else input
        return F.linear(x, _local(self.weight), None if self.bias is None else _local(self.bias))


class RowLinear(_Cut):
    """x W^T + b for an x of which each process has some coordinates; all get the sum."""

    def __init__(self, whole: nn.Linear, mesh: DeviceMesh) -> None:
        super().__init__(whole, mesh, 1)

    def forward(self, input: Tensor) -> Tensor:
        total: Any = _Leave.apply(F.linear(input, _local(self.weight)), self.group)
        return total if self.bias is None else total + self.bias.to(total.dtype)


class _Entered:
    """A hook: the first input of a module goes to parts that several processes have, so its gradients are summed."""

    def __init__(self, group: ProcessGroup) -> None:
        self.group = group

    def __call__(self, module: nn.Module, args: tuple) -> tuple:
        return _Enter.apply(args[0], self.group), *args[1:]


class _Enter(torch.autograd.Function):
    """x; its gradient is the sum of those of all processes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        total = gradients[0].contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None


class _Leave(torch.autograd.Function):
    """The sum of the x of all processes; its gradient goes to each."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        total = x.contiguous().clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients[0], None


def _part(whole: Tensor, mesh: DeviceMesh, dim: int) -> nn.Parameter:
    part = whole.detach().chunk(mesh.size(), dim)[mesh.get_local_rank()].clone(memory_format=torch.contiguous_format)
    return nn.Parameter(DTensor.from_local(part, mesh, [Shard(dim)], run_check=False), whole.requires_grad)


def _local(parameter: Tensor) -> Tensor:
    """This process's part, with its gradient."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter
