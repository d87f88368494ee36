"""The loss over the vocabulary in pieces, without the logits of all positions, and how losses of a step are cut."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from transect.models.memory.memory import product_type

if TYPE_CHECKING:
    from transect.models.heads import VocabularyHead

IGNORED = -100
"""The label of a position that is not counted."""
LOGIT_BYTES = {"cpu": 1 << 26}
"""Logits made at a time: 64 MiB on a CPU, 333 rows of 50,304 in float32. With 48 to 200 MiB the time is the same."""
LOGIT_BYTES_ELSEWHERE = 1 << 29
"""On an accelerator 512 MiB, where few and large steps are what counts; not measured."""


@dataclass(frozen=True, slots=True)
class LossRule:
    """How the losses of one forward pass are a part of those of a whole training step; parts add up by `+`.

    tokens: predicted positions of the step, over all micro-batches and processes; None: this pass is the step. share:
    this pass's part of the step's tokens that are not padding. chunk: rows of logits in memory at once, 0 for all, None
    for as many as `LOGIT_BYTES` says. z_loss: weight of the mean squared log-partition, in training.

    Exact, so that a step may be cut as one likes: main, z_loss, next_sentence, and penalties of means over tokens. Not
    exact: a selector's losses, which are means of each pass weighted by `share`, as a product of two means over tokens
    does not add up; and a penalty with `hinge`, which compares means of each pass.
    """

    tokens: int | None = None
    share: float = 1.0
    chunk: int | None = None
    z_loss: float = 0.0


class VocabularyLoss(NamedTuple):
    """In nats, float32 or better. `main` has the gradient of main + z_loss; `z_loss` has none of its own.

    main: sum of -log p(label) / tokens; z_loss: weight * sum of (log sum exp logits)^2 / tokens. each [n]: -log
    p(label) of every row that counts, without a gradient.
    """

    main: Tensor
    z_loss: Tensor
    each: Tensor


def vocabulary_loss(hidden: Tensor, head: "VocabularyHead", labels: Tensor, rule: LossRule) -> VocabularyLoss:
    """The loss of hidden [..., width] against labels [...]; rows whose label is -100 do not reach the head.

    Not-a-number where nothing counts and the rule does not say how many tokens the step has; 0 where it does. The map
    runs inside the head's forward pass, where its weights are whole even if they are sharded.
    """
    counted = labels != IGNORED
    return head(hidden[counted], labels[counted], rule)


def mapped_loss(x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, rule: LossRule) -> VocabularyLoss:
    """The losses of logits x W^T + b, of which `rule.chunk` rows exist at a time; x [n, width], labels [n].

    Logits are in the type of x, or autocast's, what follows in float32 or better. Each chunk gives its part of the
    gradients at once: the products are those of the plain way, three of each row, and no logits are made again. Kept
    for the backward pass: the gradients of x, W and b, which are multiplied with that of the loss; a second derivative
    is not defined. Equal to `plain_mapped_loss`. Source: Liger Kernel, arXiv 2410.10989, 3.2. Differences: the squared
    log-partition, rows that count only, a gradient of W in float32.
    Cost: 6 n width V FLOPs forward, none backward; memory rows V and, for the gradient of W, V width numbers.
    """
    rows = _rows(x, len(weight), rule.chunk)
    tokens = len(labels) if rule.tokens is None else rule.tokens
    factor = 1 / tokens if tokens else float("nan")
    plan = _Plan(rows, factor, rule.z_loss, product_type(x), torch.is_grad_enabled())
    return VocabularyLoss(*_Mapped.apply(x, weight, bias, labels, plan))  # pyright: ignore[reportGeneralTypeIssues]


def plain_mapped_loss(x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, rule: LossRule) -> VocabularyLoss:
    """The twin of `mapped_loss`: all logits, differentiated by autograd; `z_loss` has its own gradient."""
    logits = F.linear(x, weight, bias)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    tokens = len(labels) if rule.tokens is None else rule.tokens
    each = F.cross_entropy(logits, labels, reduction="none")
    z_loss = rule.z_loss * logits.logsumexp(1).square().sum() / tokens
    return VocabularyLoss(each.sum() / tokens, z_loss, each.detach())


class _Plan(NamedTuple):
    """rows of a chunk; factor 1 / tokens; z, the weight; dtype of the products; whether gradients are wanted."""

    rows: int
    factor: float
    z: float
    dtype: torch.dtype
    wanted: bool


class _Mapped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, plan: _Plan) -> Any:
        wanted = [plan.wanted and need for need in ctx.needs_input_grad[:3]]
        found = _Gradients(x, weight, bias, wanted, plan.factor)
        rows, table = x.to(plan.dtype), weight.to(plan.dtype)
        offset = None if bias is None else bias.to(plan.dtype)
        room = rows.new_empty(min(plan.rows, len(x)), len(table))
        square = torch.zeros((), dtype=found.wide, device=x.device)
        each = torch.empty(len(x), dtype=found.wide, device=x.device)
        for start in range(0, len(x), plan.rows):
            part = slice(start, min(start + plan.rows, len(x)))
            place = room[: part.stop - start]
            if offset is None:
                logits = torch.mm(rows[part], table.T, out=place)
            else:
                logits = torch.addmm(offset, rows[part], table.T, out=place)
            chances = logits.to(found.wide)  # the same memory where the type is
            picked, log_partition = _softmax(chances, labels[part, None])
            each[part] = (log_partition - picked)[:, 0]
            if plan.z:
                square += log_partition.square().sum()
            if any(wanted):
                if plan.z:
                    chances *= 1 + 2 * plan.z * log_partition
                chances.scatter_add_(1, labels[part, None], chances.new_full((), -1.0).expand(len(chances), 1))
                found.add(part, logits.copy_(chances), rows[part], table)
        ctx.save_for_backward(*found.tables)
        square *= plan.z * plan.factor
        ctx.mark_non_differentiable(square, each)
        return each.sum() * plan.factor, square, each

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        above = gradients[0]
        # On a CPU it is known at once that the loss was differentiated as it is, and no large table is copied.
        whole = above.device.type == "cpu" and above.item() == 1
        return *(one if one is None or whole else above * one for one in ctx.saved_tensors), None, None


class _Gradients:
    """Gradients of x, W and b, added up chunk by chunk: those of W and b in float32 or better."""

    def __init__(self, x: Tensor, weight: Tensor, bias: Tensor | None, wanted: list[bool], factor: float) -> None:
        self.wide = torch.promote_types(x.dtype, torch.float32)
        self.factor = factor
        self.x = torch.empty_like(x) if wanted[0] else None
        self.weight = torch.empty_like(weight, dtype=self.wide) if wanted[1] else None
        self.bias = torch.zeros_like(bias, dtype=self.wide) if bias is not None and wanted[2] else None
        if self.weight is not None and not len(x):
            self.weight.zero_()

    @property
    def tables(self) -> tuple[Tensor | None, ...]:
        return self.x, self.weight, self.bias

    def add(self, part: slice, slope: Tensor, rows: Tensor, table: Tensor) -> None:
        """slope [rows of the part, V] is the gradient of the logits, before division by the tokens."""
        if self.x is not None:
            self.x[part] = torch.mm(slope, table).mul_(self.factor)
        if self.bias is not None:
            self.bias.add_(slope.sum(0, dtype=self.wide), alpha=self.factor)
        if self.weight is None:
            return
        again = int(part.start > 0)
        if slope.dtype == self.wide:
            self.weight.addmm_(slope.T, rows, beta=again, alpha=self.factor)
        elif again:
            self.weight.add_(torch.mm(slope.T, rows), alpha=self.factor)
        else:
            torch.mul(torch.mm(slope.T, rows), self.factor, out=self.weight)


def _softmax(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax of each row in place; the label's logit and log sum exp before it, both [rows, 1]."""
    top = logits.amax(1, keepdim=True)
    picked = logits.gather(1, labels)
    total = logits.sub_(top).exp_().sum(1, keepdim=True)
    logits.div_(total)
    return picked, total.log_().add_(top)


def _rows(x: Tensor, vocabulary: int, chunk: int | None) -> int:
    """Rows of a chunk, at least 1."""
    if chunk is not None:
        return max(1, chunk or len(x))
    limit = LOGIT_BYTES.get(x.device.type, LOGIT_BYTES_ELSEWHERE)
    wide = torch.promote_types(x.dtype, torch.float32)
    return max(1, limit // (vocabulary * wide.itemsize))
