"""The jump penalty of any model that a view can see, in any training loop."""

from contextlib import ExitStack
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor, nn

from transect.errors import InputError
from transect.models.penalties.base import LayerSums
from transect.models.penalties.jump import Jump, summed
from transect.view.capture import Seen, stream
from transect.view.sites import NEXT

if TYPE_CHECKING:
    from transect.view.view import View


class Attached:
    """Follows every forward pass of the view's model inside the block and gives the penalty of the last one.

        with tx.penalties.Jump.attach(view, strength=0.1) as jump:
            loss = model(ids, labels=labels).loss + jump.loss(mask)

    One number per token and layer is kept, until the next pass or the end of the block; the graph behind it holds the
    states that the model's own graph holds, and lets go of them in the same backward pass. A layer that is executed
    several times counts each time. With strength 0 the model is not touched at all.

    Gradient checkpointing is refused: a layer's states are computed anew in the backward pass, outside any forward pass
    that could be followed. Our own models take the penalty inside the region (setting `penalties`).
    """

    def __init__(self, penalty: Jump, view: "View") -> None:
        """Raises InputError for a final norm or a raw embedding that the view does not see."""
        if penalty.reads_final_norm and view.final_norm is None:
            raise InputError(f"final_state post_norm: {view.name} has no final norm; use pre_norm")
        if penalty.reads_raw_embedding and _norms_its_embedding(view):
            raise InputError(
                f"first_state embedding: the view of {view.name} begins after the norm of its embedding; "
                "use after_embedding_norm"
            )
        self.penalty = penalty
        self.view = view
        self._rows: list[Tensor] = []
        self._last: Tensor | None = None
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        if self.penalty.config.strength == 0:
            return self
        sites = {place: ("resid", NEXT) for place in range(self.penalty.layers)}
        self._stack.enter_context(stream(self.view, sites, self._see))
        if self.penalty.reads_final_norm and self.view.final_norm is not None:
            self._stack.callback(self.view.final_norm.register_forward_hook(self._normed).remove)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        self._rows, self._last = [], None

    def loss(self, mask: Tensor | None = None, step: int | None = None, tokens: Tensor | int | None = None) -> Tensor:
        """lambda(step) sum_l w_l Psi_l of the last pass, with its gradient.

        mask [batch, positions]: the positions that count, best those of the main loss (`loss_positions`), None for all;
        the setting `penalty_positions` is for models that know their own.
        tokens: how many tokens all micro-batches and ranks of the step count, see `Penalty.total`. Raises InputError
        before the first pass, for a mask of another shape, and for a schedule without a step.
        """
        if not self.penalty.active(step):
            return torch.zeros((), device=self.view.device)
        return self.penalty.total(self._sums(mask), step, tokens).loss

    def value(self, mask: Tensor | None = None) -> Tensor:
        """sum_l w_l Psi_l of the last pass, without lambda and gradient."""
        return self.stats(mask)["penalty"]

    def stats(self, mask: Tensor | None = None) -> dict[str, Tensor]:
        """displacement, update_ratio, stream_norm, jump_rate and penalty of the last pass, detached."""
        return self.penalty.total(self._sums(mask), 0).stats

    def _sums(self, mask: Tensor | None) -> list[LayerSums]:
        if len(self._rows) != self.penalty.layers:
            idle = self.penalty.config.strength == 0
            why = "strength is 0, so nothing is measured" if idle else "no pass was seen"
            raise InputError(f"penalty jump: {why}; run {self.view.name} inside the block, with a strength")
        shape = self._rows[0].shape[1:]
        if mask is not None and mask.shape != shape:
            raise InputError(f"mask is {tuple(mask.shape)}; the last pass had {tuple(shape)}, batch and positions")
        device = self._rows[-1].device  # the layers of one model may lie on several
        counted = None if mask is None else mask.to(device).bool()
        return [summed(rows.to(device), counted) for rows in self._rows]

    def _see(self, place: int, seen: Seen) -> None:
        if place == 0:
            self._rows, self._last = [], None
            if self.view.num_layers != self.penalty.layers:
                raise InputError(
                    f"penalty jump: {self.view.name} runs {self.view.num_layers} layers, it was attached to "
                    f"{self.penalty.layers}; attach it inside the edit"
                )
            if self.view.model.training and _recomputes(self.view.model):
                raise InputError(
                    f"penalty jump: {self.view.name} recomputes layers in the backward pass; "
                    "turn gradient checkpointing off for it"
                )
        if self.penalty.reads_final_norm and place == self.penalty.layers - 1:
            self._last = seen["resid"]
        else:
            self._rows.append(self.penalty.rows(place, seen["resid"], seen[NEXT]))

    def _normed(self, module: nn.Module, args: tuple, output: Tensor) -> None:
        if self._last is not None and not self.view.replacing:
            self._rows.append(self.penalty.rows(self.penalty.layers - 1, self._last, output))
            self._last = None


def _recomputes(model: nn.Module) -> bool:
    """Whether gradient checkpointing is on, under whichever name the model's method has for it."""
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def _norms_its_embedding(view: "View") -> bool:
    """Whether a norm stands outside the layers that is not the final one."""
    inside = f"{view.container}."
    return any(
        "norm" in type(module).__name__.lower() and path != view.final_norm_path and not path.startswith(inside)
        for path, module in view.base.named_modules()
    )
