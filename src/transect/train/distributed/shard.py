"""Weights cut over processes (FSDP2), layer by layer."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

from transect.models.transformer import TransectPreTrainedModel
from transect.train.distributed.expert import SpreadMemory
from transect.train.distributed.mesh import Meshes


def shard(model: TransectPreTrainedModel, meshes: Meshes) -> set[nn.Parameter]:
    """Cut every weight by its first dimension; a layer's are whole only while it is computed. Returns what is not cut.

    Each layer is a group that travels together; embeddings, final norm and head, which may be tied, are one more.
    Numbers without a dimension stay whole, and so do expert tables that already have as many parts as there are
    processes. Parameters and sums of gradients are float32 (or float64): products in bfloat16 are autocast's business,
    so there is no mixed-precision policy. Gradients are added up over processes, not averaged.
    """
    layout = meshes.layout
    kept = {parameter for parameter in model.parameters() if parameter.ndim == 0}
    spread = [module for module in model.modules() if isinstance(module, SpreadMemory)]
    for memory in spread:
        if layout.shard == 1:
            kept |= set(memory.parameters())
        else:
            fully_shard(memory, mesh=meshes.table_shards, ignored_params=kept)
            register_fsdp_forward_method(memory, "of_blocks")
    for layer in model.trunk.layers:
        fully_shard(layer, mesh=meshes.shards, ignored_params=kept)
    fully_shard(model, mesh=meshes.shards, ignored_params=kept)
    model.register_forward_hook(_cut_again)
    for module in sharded(model):
        module.set_force_sum_reduction_for_comms(True)
        module.set_gradient_divide_factor(1.0)
    return kept


def _cut_again(model: nn.Module, args: Any, output: Any) -> None:
    """After a pass without gradients what stayed whole for the backward pass is cut again, so that it can be saved."""
    if not torch.is_grad_enabled() and isinstance(model, FSDPModule):
        model.reshard()


def sharded(model: nn.Module) -> Iterable[FSDPModule]:
    """The modules whose weights travel together, the model itself among them; none where nothing was cut."""
    return (module for module in model.modules() if isinstance(module, FSDPModule))
