"""One forward pass written down: every module call with the tensors that went in and came out."""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from transect.view.tensors import Key, inputs, parts, put


@dataclass(slots=True, eq=False)
class Call:
    """One call of one module, with copies of its tensors; `start` and `end` are points in the order of the pass."""

    path: str
    module: nn.Module
    nth: int
    start: int
    args: tuple
    kwargs: dict[str, object]
    end: int = -1
    inputs: dict[Key, Tensor] = field(default_factory=dict)
    outputs: dict[Key, Tensor] = field(default_factory=dict)
    returned: dict[Key, Tensor] = field(default_factory=dict)

    def overwritten(self, side: str, key: Key) -> bool:
        """Whether the model wrote into this tensor after the call; the recorded copy keeps the value of the call."""
        now = inputs(self.args, self.kwargs) if side == "in" else self.returned
        then = self.inputs if side == "in" else self.outputs
        return not torch.equal(now[key], then[key])


@contextmanager
def recorded(root: nn.Module, *, stirred: bool) -> Iterator[list[Call]]:
    """Record every call below `root` while the block runs.

    With `stirred`, each module that owns parameters gets seeded noise on its output, growing with its input, so that
    the structure shows even where a weight is zero. Numbers of a stirred pass say nothing about the model itself.
    """
    calls: list[Call] = []
    counts: dict[str, int] = {}
    clock = iter(range(1 << 62))
    open_calls: list[Call] = []

    def before(path: str) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            nth = counts.get(path, 0)
            counts[path] = nth + 1
            call = Call(path, module, nth, next(clock), args, dict(kwargs))
            call.inputs = {key: item.clone() for key, item in inputs(args, kwargs).items()}
            open_calls.append(call)
            calls.append(call)

        return hook

    def after(path: str) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict, output: object) -> object:
            call = open_calls.pop()
            if stirred and path and any(True for _ in module.parameters(recurse=False)):
                output = _stir(path, call, output)
            call.end = next(clock)
            call.returned = parts(output)
            call.outputs = {key: item.clone() for key, item in call.returned.items()}
            return output

        return hook

    with ExitStack() as stack:
        for path, module in root.named_modules():
            for handle in (
                module.register_forward_pre_hook(before(path), with_kwargs=True),
                module.register_forward_hook(after(path), with_kwargs=True),
            ):
                stack.callback(handle.remove)
        yield calls


def _stir(path: str, call: Call, output: object) -> object:
    if not isinstance(output, Tensor) or not output.is_floating_point():
        return output
    source = next((item for item in call.inputs.values() if item.is_floating_point()), None)
    if source is None or source.shape[:-1] != output.shape[:-1]:
        return output
    seed = int.from_bytes(hashlib.blake2b(f"{path}:{call.nth}".encode(), digest_size=7).digest(), "big")
    noise = torch.randn(output.shape[-1], generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    noise = noise.to(device=output.device, dtype=output.dtype)
    size = output.abs().mean(-1, keepdim=True) + 0.1
    return put(output, None, output + size * noise * (1 + torch.tanh(source.mean(-1, keepdim=True))))
