"""Memory blocks spread over processes: tokens travel to them and come back as sums."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from transect.errors import InputError
from transect.models.ffn.sparse import Sparse
from transect.models.memory.backends.tables import wide_type
from transect.models.memory.memory import Memory, product_type


def spread(model: nn.Module, mesh: DeviceMesh) -> tuple[str, ...]:
    """Give each process of the mesh its part of the blocks of all sparse FFNs, in place; the names of what was cut.

    Selectors stay whole in every process. Raises InputError where there is no sparse FFN, where blocks are not so many
    times as there are processes, and for selectors that read every cell (`Selector.reads_cells`).
    """
    parts = mesh.size()
    found = {path: module for path, module in model.named_modules() if isinstance(module, Sparse)}
    if not found:
        raise InputError(f"parallel.expert is {parts}, and the model has no sparse FFN; give expert: 1")
    for path, ffn in found.items():
        if ffn.memory.blocks % parts:
            raise InputError(
                f"parallel.expert is {parts}: {path} has {ffn.memory.blocks} blocks, which {parts} processes cannot "
                "share evenly; give a divisor"
            )
        if ffn.selector.reads_cells():
            raise InputError(
                f"parallel.expert is {parts}: selector {ffn.selector.config.kind} of {path} reads every cell, so its "
                "blocks cannot be spread; give expert: 1"
            )
    for ffn in found.values():
        ffn.memory = SpreadMemory(ffn.memory, mesh)
    spread_out = {path for path, module in model.named_modules() if isinstance(module, SpreadMemory)}
    return tuple(name for name, _ in model.named_parameters() if name.rpartition(".")[0] in spread_out)


class SpreadMemory(Memory):
    """A memory of which this process has the r-th of R equal parts of the blocks; tables are DTensors, cut in blocks.

    Each token travels once to every process that has one of its blocks or more, with the weights and the numbers of
    those blocks; there any back end computes its part, and one partial sum travels back. Gradients travel the same way,
    so that a table's gradient is the sum over the tokens of all R processes. Equal to the whole memory but for the
    order in which a token's blocks are added up. All R processes must call it, also with no token. Cost: at most
    min(b, R) rows of the width sent and as many received per token and direction; the host reads the counts back.
    """

    def __init__(self, whole: Memory, mesh: DeviceMesh) -> None:
        with torch.device("meta"):
            super().__init__(
                whole.width,
                whole.blocks,
                whole.block_size,
                activation=whole.activation.name,
                gated=whole.up is not None,
                bias=whole.key_bias is not None,
                with_keys=whole.keys is not None,
                picker=whole.picker,
            )
        self.group, self.parts = mesh.get_group(), mesh.size()
        for name, table in list(whole.named_parameters()):
            part = table.detach().chunk(self.parts)[mesh.get_local_rank()].clone()
            cut = DTensor.from_local(part, mesh, [Shard(0)], run_check=False)
            setattr(self, name, nn.Parameter(cut, requires_grad=table.requires_grad))
        self.train(whole.training)

    def tables(self) -> tuple[Tensor | None, ...]:
        """This process's part of each."""
        return tuple(table.to_local() if isinstance(table, DTensor) else table for table in super().tables())

    def of_blocks(self, made: Callable[[Tensor, Tensor | None, range], Tensor]) -> Tensor:
        """As for any memory: each process makes the entries of its own blocks, and all are gathered."""
        first = self.blocks // self.parts * dist.get_rank(self.group)
        own = super().of_blocks(lambda keys, bias, _: made(keys, bias, range(first, first + len(keys))))
        return _Gather.apply(own, self.group)  # pyright: ignore[reportReturnType]

    def forward(self, x: Tensor, blocks: Tensor, weights: Tensor, coefficients: Tensor | None = None) -> Tensor:
        """As for any memory. Raises ValueError for coefficients beside keys: their selector reads every cell."""
        if coefficients is not None:
            raise ValueError("a spread memory takes no coefficients beside its keys; give None")
        dtype, each = product_type(x), self.blocks // self.parts
        owner = torch.where(blocks < 0, self.parts, blocks // each)
        asked = torch.zeros(len(blocks), self.parts + 1, dtype=torch.bool, device=x.device).scatter_(1, owner, True)
        process, tokens = asked[:, : self.parts].t().nonzero(as_tuple=True)
        route = _Route.of(process, self.parts, self.group)
        there = torch.where(owner[tokens] == process[:, None], blocks[tokens] - each * process[:, None], -1)
        rows = x.to(dtype)[tokens] if self.keys is not None else x.new_empty(len(tokens), 0, dtype=dtype)
        made = super().forward(route.go(rows), route.go(there), route.go(weights.to(dtype)[tokens]))
        back = route.back(made)
        total = torch.zeros(len(x), self.width, dtype=wide_type(dtype), device=x.device)
        return total.index_add(0, tokens, back.to(total.dtype)).to(dtype)


class _Route:
    """How many rows this process gives to each and takes from each."""

    def __init__(self, given: list[int], taken: list[int], group: ProcessGroup) -> None:
        self.given, self.taken, self.group = given, taken, group

    @classmethod
    def of(cls, process: Tensor, parts: int, group: ProcessGroup) -> "_Route":
        """The route of rows in the order of the process that each goes to."""
        given = torch.bincount(process, minlength=parts)
        taken = torch.empty_like(given)
        dist.all_to_all_single(taken, given, group=group)
        counts = torch.stack([given, taken]).tolist()
        return cls(counts[0], counts[1], group)

    def go(self, rows: Tensor) -> Tensor:
        """The rows that arrive here, by the process that they come from."""
        return _Travel.apply(rows, self.given, self.taken, self.group)  # pyright: ignore[reportReturnType]

    def back(self, rows: Tensor) -> Tensor:
        """What was made of the rows that this process gave, in their order."""
        return _Travel.apply(rows, self.taken, self.given, self.group)  # pyright: ignore[reportReturnType]


class _Travel(torch.autograd.Function):
    """Rows to other processes; their gradients come back."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, given: list[int], taken: list[int], group: ProcessGroup) -> Tensor:
        ctx.given, ctx.taken, ctx.group = given, taken, group
        return _sent(rows, given, taken, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return _sent(gradients[0], ctx.taken, ctx.given, ctx.group), None, None, None


def _sent(rows: Tensor, given: list[int], taken: list[int], group: ProcessGroup) -> Tensor:
    arrived = rows.new_empty(sum(taken), *rows.shape[1:])
    if rows.shape[1:].numel():  # else every row is empty, here and there
        dist.all_to_all_single(arrived, rows.contiguous(), taken, given, group=group)
    return arrived


class _Gather(torch.autograd.Function):
    """Equal parts of all processes, one after the other; the gradient of a part is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group, ctx.count = group, len(own)
        parts = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, own.contiguous(), group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        total = gradients[0].contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        first = ctx.count * dist.get_rank(ctx.group)
        return total[first : first + ctx.count], None
