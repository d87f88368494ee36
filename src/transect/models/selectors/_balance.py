"""How evenly tokens spread over blocks: the losses that ask for it and the numbers that tell."""

import math

import torch
from torch import Tensor

from transect.models.selectors._gates import wide


def counts(blocks: Tensor, total: int, counted: Tensor | None = None) -> Tensor:
    """How often each of `total` blocks stands in blocks [tokens, b]; [total], whole numbers, exact.

    counted [tokens, b] or [tokens, 1] is False where an entry, then possibly -1, is not to be counted.
    """
    if counted is not None:  # the others go to a place of their own
        blocks = blocks.where(counted, blocks.new_full((), total))
    one = torch.ones((), dtype=torch.long, device=blocks.device).expand(blocks.numel())
    return one.new_zeros(total + 1).scatter_add_(0, blocks.flatten(), one)[:total]


def mean_over(values: Tensor, real: Tensor | None) -> Tensor:
    """The mean of [tokens, ...] over the real ones; 0 where there is none."""
    if real is None:
        return values.sum(0) / max(1, len(values))
    real = real.view(-1, *[1] * (values.dim() - 1))
    return values.where(real, values.new_zeros(())).sum(0) / real.sum().clamp_min(1)


def balance_loss(load: Tensor, probability: Tensor) -> Tensor:
    """B sum_i frac_i pbar_i: 1 when either is uniform, B when one block has it all.

    load [B] is how often each block was chosen, before any capacity, counted in pairs of token and slot (ASSUMED 0.6
    for b > 1); probability [B] the mean over tokens. The gradient flows through the probability alone. Source: Switch.
    """
    share = load.to(probability.dtype) / load.sum().clamp_min(1)
    return len(load) * (share * probability).sum()


def z_loss(log_partition: Tensor, real: Tensor | None) -> Tensor:
    """Mean over tokens of (log sum_i exp s_i)^2. Source: ST-MoE."""
    return mean_over(log_partition.square(), real)


def load_statistics(load: Tensor) -> dict[str, Tensor]:
    """What counts per block [B] say; counts may be summed over steps and layers' ranks before.

    pairs: their sum; load: shares [B]; used_share: blocks hit at least once; entropy of the shares / log B (not given
    for a single block); largest_load: B times the largest share, 1 when uniform. With no pairs all are 0.
    """
    total, blocks = load.sum(), len(load)
    share = wide(load) / total.clamp_min(1)
    found = {
        "pairs": total,
        "load": share,
        "used_share": wide(load > 0).mean(),
        "largest_load": share.max() * blocks,
    }
    if blocks > 1:
        found["entropy"] = -torch.special.xlogy(share, share).sum() / math.log(blocks)
    return found


def statistics(chosen: Tensor, kept: Tensor, weights: Tensor, margin: Tensor | None, real: Tensor | None) -> dict:
    """Everything a selector tells about one forward pass: `load_statistics` of what was chosen, and what became of it.

    chosen [B] counts before drops; kept [tokens, b] True where a block is read, with weights [tokens, b]; margin
    [tokens], if any. drop_fraction: share of pairs not read; mean_gate: mean weight of those read; margin: mean
    distance of the last chosen score to the best one left out.
    """
    found = load_statistics(chosen)
    read = kept.sum()
    found["drop_fraction"] = (found["pairs"] - read) / found["pairs"].clamp_min(1)
    found["mean_gate"] = weights.detach().where(kept, weights.new_zeros(())).sum() / read.clamp_min(1)
    if margin is not None:
        known = margin.isfinite() if real is None else margin.isfinite() & real
        found["margin"] = mean_over(margin.where(known, margin.new_zeros(())), known)
    return found
