"""The model's own final norm and head, applied to any state of the stream."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from transect.errors import InputError
from transect.view.resume import resumed
from transect.view.sites import NEXT
from transect.view.tensors import eps, parts, put

if TYPE_CHECKING:
    from transect.view.view import View

_ROWS, _POSITIONS = 3, 5


class Lens:
    """Logits that the model would give if the last layer returned a given state: `lens(states)`.

    The whole model runs with every layer's return value given, so that final norm, projections, a masked-LM head's
    transform, logit scales and caps are the model's own. Source: the logit lens; difference: nothing is left out or
    rebuilt. Made once for a view; raises InputError for a model without a head, or one whose logits at a position
    depend on more than the last state there.
    """

    def __init__(self, view: "View") -> None:
        if not view.has_head:
            raise InputError(f"{view.name} has no head, so states cannot be read as tokens; load one with its head")
        self.view = view
        pad = view.model.config.pad_token_id
        self._token = 1 if pad == 0 else 0  # any but the padding token, which models warn of
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, view.vocab_size, (_ROWS, _POSITIONS), generator=generator)
        if pad is not None:
            ids[ids == pad] = self._token
        with torch.no_grad(), resumed(view, ()) as made:
            logits = view.run(ids, head=True)
        self._like = made
        last = parts(made[-1])[self._key(-1)]
        apart = (self(last.reshape(-1, view.width)) - logits.reshape(-1, logits.shape[-1])).abs().max()
        if not float(apart) <= 1000 * eps(view.dtype) * float(logits.abs().max()):
            raise InputError(f"{view.name}: its head reads more than the last state of each position; no lens on it")

    def __call__(self, states: Tensor) -> Tensor:
        """Logits [tokens, vocabulary] of states [tokens, width] of the stream, without gradients.

        Cost: 2 width vocabulary operations a token, and the embedding of one token each.
        """
        ids = torch.full((len(states), 1), self._token)
        shaped = states.to(self.view.dtype)[:, None]
        known = [put(value, self._key(place), shaped) for place, value in enumerate(self._like)]
        with torch.no_grad(), resumed(self.view, known):
            return self.view.run(ids, head=True)[:, 0]

    def _key(self, place: int) -> int | str | None:
        return self.view.maps[place].taps[NEXT].key
