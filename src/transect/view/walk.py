"""Know which executed layer a module call belongs to, and that every layer runs once and in the order expected."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Self

from torch import Tensor, nn

from transect.view.layout import Tap
from transect.view.tensors import Key, inputs, parts, put

if TYPE_CHECKING:
    from transect.view.view import View

Use = Callable[[int, Tensor], Tensor | None]
"""Called with the place in the executed order and the tensor at a tap; a tensor it returns takes its place."""


class OrderError(RuntimeError):
    """The model ran other layers than expected, or a site did not fire exactly once."""


def _nothing(place: int) -> None:
    """Do nothing on entering or leaving a layer."""


@contextmanager
def unheard(view: "View") -> Iterator[None]:
    """Let a replacement call the model's own modules without its taps, and those of a capture, firing."""
    before, view.replacing = view.replacing, True
    try:
        yield
    finally:
        view.replacing = before


class Walk:
    """Hooks that follow each forward pass layer by layer and raise OrderError when it leaves the expected order.

    A layer is keyed by its place in the executed order, not by its module: a model that shares one module over all
    layers fires the same hooks for each of them.
    """

    def __init__(
        self, view: "View", on_enter: Callable[[int], None] = _nothing, on_exit: Callable[[int], None] = _nothing
    ) -> None:
        self.view = view
        self.place = -1
        self._on_enter = on_enter
        self._on_exit = on_exit
        self._stack = ExitStack()
        self._passes = 0
        self._running = False

    def __enter__(self) -> Self:
        for root in {id(module): module for module in (self.view.model, self.view.base)}.values():
            self._keep(root.register_forward_pre_hook(self._heard(self._start)))
            self._keep(root.register_forward_hook(self._heard(self._finish)))
        for module in self._modules():
            self._keep(module.register_forward_pre_hook(self._heard(self._enter)))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def leave_last(self) -> None:
        """Call `on_exit` when a layer is done; call this after every `tap`, so that the taps fire before it."""
        for module in self._modules():
            self._keep(module.register_forward_hook(self._heard(self._leave)))

    def tap(self, layer: int, tap: Tap, use: Use) -> None:
        """Use the tensor that passes at a tap of a layer of the loaded model, wherever an edit has moved the layer.

        `use` sees and returns the raw tensor: without the tap's scale and in the module's own shape.
        """
        owners = {id(m): m for m, loaded in zip(self.view.layers, self.view.executed, strict=True) if loaded == layer}
        for owner in owners.values():
            module = _submodule(owner, tap)
            hook = self._before(layer, tap, use) if tap.side == "in" else self._after(layer, tap, use)
            if tap.side == "in":
                self._keep(module.register_forward_pre_hook(self._heard(hook), with_kwargs=True))
            else:
                self._keep(module.register_forward_hook(self._heard(hook)))

    def _before(self, layer: int, tap: Tap, use: Use) -> Callable:
        turn = self._turns(layer, tap)

        def hook(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
            new = use(self.place, _tensor(inputs(args, kwargs), tap)) if turn() else None
            if new is None:
                return None
            if isinstance(tap.key, str):
                return args, kwargs | {tap.key: new}
            return tuple(new if index == tap.key else item for index, item in enumerate(args)), kwargs

        return hook

    def _after(self, layer: int, tap: Tap, use: Use) -> Callable:
        turn = self._turns(layer, tap)

        def hook(module: nn.Module, args: tuple, output: object) -> object:
            new = use(self.place, _tensor(parts(output), tap)) if turn() else None
            return None if new is None else put(output, tap.key, new)

        return hook

    def _turns(self, layer: int, tap: Tap) -> Callable[[], bool]:
        """Whether this call is the tap's: of the layer, where it is run, and the nth of its module in this pass."""
        taps = next(m.taps for m, loaded in zip(self.view.maps, self.view.executed, strict=True) if loaded == layer)
        several = tap.nth > 0 or any(other.module == tap.module and other.nth > 0 for other in taps.values())
        count = [-1, 0]  # the pass through a layer counted in, calls in it

        def turn() -> bool:
            if self.place < 0:
                raise OrderError(f"the tap {tap} fired outside a forward pass; is gradient checkpointing on?")
            if self.view.executed[self.place] != layer or self.place < self.view.known:
                return False
            if not several:
                return True
            if count[0] != self._passes:
                count[:] = [self._passes, 0]
            count[1] += 1
            return count[1] - 1 == tap.nth

        return turn

    def _modules(self) -> list[nn.Module]:
        return list({id(module): module for module in self.view.layers}.values())

    def _heard(self, hook: Callable) -> Callable:
        """The hook, deaf to calls that a replacement makes of the model's own modules."""
        return lambda *given: None if self.view.replacing else hook(*given)

    def _keep(self, handle: Any) -> None:
        self._stack.callback(handle.remove)

    def _start(self, *_: object) -> None:
        self.place, self._running = -1, True

    def _enter(self, module: nn.Module, *_: object) -> None:
        place = self.place + 1
        if place >= self.view.num_layers or self.view.layers[place] is not module:
            raise OrderError(
                f"the layer executed in place {place} is not the one expected of {self.view.num_layers}; "
                "was the model changed from outside, or is gradient checkpointing on?"
            )
        self.place = place
        self._passes += 1
        self._on_enter(place)

    def _leave(self, *_: object) -> None:
        self._on_exit(self.place)

    def _finish(self, *_: object) -> None:
        """The end of a pass: that of the base model, or of the whole one where it calls the base's parts itself."""
        if not self._running:
            return
        self._running = False
        if self.place != self.view.num_layers - 1:
            raise OrderError(f"{self.place + 1} layers were executed, {self.view.num_layers} were expected")
        self.place = -1


def _submodule(layer: nn.Module, tap: Tap) -> nn.Module:
    try:
        return layer.get_submodule(tap.module)
    except AttributeError as error:
        raise OrderError(f"no module for the tap {tap} in a {type(layer).__name__}") from error


def _tensor(found: dict[Key, Tensor], tap: Tap) -> Tensor:
    if tap.key not in found:
        raise OrderError(f"no tensor at the tap {tap}; there are {list(found)}")
    return found[tap.key]
