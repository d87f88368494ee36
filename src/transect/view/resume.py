"""Start a forward pass in the middle: layers whose output is known are not run."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from torch import nn

from transect.view.walk import Walk

if TYPE_CHECKING:
    from transect.view.view import View


@contextmanager
def resumed(view: "View", known: Sequence[object]) -> Iterator[list[object]]:
    """In the block's forward passes the first layers return `known` without running; gives what the others return.

    `known` and the list given hold the layers' raw return values in executed order. Everything around the layers
    (embeddings, masks, final norm, head) is the model's own, so a pass from a known prefix has the bits of a whole one.
    """
    made: list[object] = []
    with Walk(view) as walk, ExitStack() as stack:

        def keep(module: nn.Module, args: tuple, output: object) -> None:
            if walk.place >= len(known) and not view.replacing:
                made.append(output)

        for layer in {id(module): module for module in view.layers}.values():
            _exchange(stack, layer, _from_known(layer.forward, walk, known))
            stack.callback(layer.register_forward_hook(keep).remove)  # after the hooks of edits, which it must see
        stack.callback(setattr, view, "known", view.known)
        view.known = len(known)
        yield made


def _from_known(forward: Callable, walk: Walk, known: Sequence[object]) -> Callable:
    def run(*args: object, **kwargs: object) -> object:
        if walk.place < len(known) and not walk.view.replacing:
            return known[walk.place]
        return forward(*args, **kwargs)

    return run


def _exchange(stack: ExitStack, module: nn.Module, forward: Callable) -> None:
    """Set a module's forward; what the instance had, as dispatch hooks leave there, comes back."""
    own = module.__dict__
    if "forward" in own:
        stack.callback(own.__setitem__, "forward", own["forward"])
    else:
        stack.callback(own.pop, "forward")
    own["forward"] = forward
