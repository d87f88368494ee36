"""What a model costs: parameters, FLOPs, bytes moved and key-value cache, counted from its module tree by part."""

import inspect
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from torch import nn

from transect.errors import InputError
from transect.models.attention import Attention
from transect.models.blocks._residual import Residual
from transect.models.build import LanguageModel, skeleton
from transect.models.config import LayerConfig, ModelConfig
from transect.models.ffn.base import FFN
from transect.models.ffn.sparse import Sparse
from transect.models.selectors.base import Selector
from transect.models.transformer import TransectPreTrainedModel

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}
ADAMW_BYTES = 28
"""Of a parameter and an AdamW step in float32: gradient, weight and both moments read, the last three written."""
SCORES = "scores"
ORDER = ("embedding", "attention", SCORES, "inner_ffn", "ffn", "ffn2", "selector", "norm", "residual", "head")


@dataclass(frozen=True, slots=True)
class Part:
    """One part of the model over all its layers.

    parameters: each counted once, however many layers use it; active: those that one token uses; flops: forward, per
    token; read: numbers fetched to decode one token, a weight once for each layer that uses it.
    """

    name: str
    parameters: int
    active: int
    flops: float
    read: float


@dataclass(frozen=True, slots=True)
class Budget:
    """The cost of one token among `context`, in numbers of type `dtype`; see `budget` for what is counted.

    cache_numbers: keys and values that decoding keeps for one more position, over all layers; cache_full: those of a
    full context; a window hides positions and frees none, for transformers' cache keeps them all. Both None for a
    masked model.
    """

    parts: tuple[Part, ...]
    context: int
    dtype: str
    cache_numbers: int | None
    cache_full: int | None

    @property
    def parameters(self) -> int:
        """All parameters, shared and tied ones once."""
        return sum(part.parameters for part in self.parts)

    @property
    def active_parameters(self) -> int:
        """Parameters without the memory blocks that a token leaves out."""
        return sum(part.active for part in self.parts)

    @property
    def flops(self) -> float:
        """Forward FLOPs per token."""
        return sum(part.flops for part in self.parts)

    @property
    def training_flops(self) -> float:
        """Forward and backward FLOPs per token: three times the forward, nothing being recomputed."""
        return 3 * self.flops

    @property
    def weight_bytes(self) -> float:
        """Bytes of weights fetched to decode one token."""
        return BYTES[self.dtype] * sum(part.read for part in self.parts)

    @property
    def cache_bytes(self) -> int | None:
        """Bytes that decoding keeps for each position."""
        return None if self.cache_numbers is None else BYTES[self.dtype] * self.cache_numbers

    @property
    def cache_bytes_full(self) -> int | None:
        """Bytes that decoding keeps at the end of the context, and fetches for its last token."""
        return None if self.cache_full is None else BYTES[self.dtype] * self.cache_full

    @property
    def step_bytes(self) -> int:
        """Bytes of weights and optimizer state moved by one AdamW step, however many tokens it has.

        Each parameter is read forward and backward and its gradient written (3 numbers of `dtype`), then updated in
        float32 (28 bytes). Activations, which grow with the tokens, are not counted.
        """
        return self.parameters * (3 * BYTES[self.dtype] + ADAMW_BYTES)

    def part(self, name: str) -> Part:
        """One part; raises KeyError where the model has none of that name."""
        return {part.name: part for part in self.parts}[name]


def budget(
    model: ModelConfig | LanguageModel,
    context: int | None = None,
    dtype: str = "bfloat16",
    keys: Literal["seen", "all"] = "seen",
) -> Budget:
    """Count a model by part; settings are built on the meta device, so size costs nothing.

    FLOPs are those of matrix products, two for a multiply-add: every linear map, attention's two products (part
    `scores`) and what modules report by a method `flops()`, or `flops(positions)` where they mix positions: an FFN's
    with all that is inside it, any other's without the FFNs inside. Norms, activations, softmax, rotary angles and
    lookups are left out, as in PyTorch's counter. A query meets the keys it sees, on average over the context
    (T + 1) / 2 in a causal layer without a window; with `keys="all"` all T, which is what PyTorch's counter and the
    usual MFU count. context defaults to `max_positions`; 0 leaves attention's products out.
    Active: of a sparse FFN's memory only the blocks that a token gets, selectors whole. Read: of a lookup table one
    row, unless the head reads it too; for a selector without weights of its own the keys that it scores.
    Raises InputError for another argument, and for a module whose matrices nothing accounts for.
    Source: Avg-K 3.6, FFN-Wider section 6 (T6, T7). Cost: building the modules, about 4 ms a layer.
    """
    if not isinstance(model, (ModelConfig, TransectPreTrainedModel)):
        raise InputError(
            f"cannot count a {type(model).__name__}; give a ModelConfig (of a recipe: its model) or a model"
        )
    if keys not in ("seen", "all"):
        raise InputError(f"keys is {keys!r}; it must be seen or all")
    if dtype not in BYTES:
        raise InputError(f"dtype is {dtype!r}; known are {', '.join(BYTES)}")
    if context is not None and context < 0:
        raise InputError(f"context is {context}; it must be 0 or more")
    built = skeleton(model) if isinstance(model, ModelConfig) else model
    settings = built.settings
    context = settings.max_positions if context is None else context
    layers = [(built.trunk.layers[index], settings.layer_configs[index]) for index in settings.modules]
    tally = _Tally()
    tally.count(built)
    for layer, config in layers:
        met = context if keys == "all" else keys_seen(context, config.attention.window, settings.causal)
        tally.use(layer, "layer", met)
    tally.use(built, "layer", 0.0, skip=built.trunk.layers)
    cache = _cache(layers) if settings.causal else None
    return Budget(tally.parts(), context, dtype, cache, None if cache is None else cache * context)


def keys_seen(context: int, window: int | None, causal: bool) -> float:
    """How many keys a query sees, averaged over the context's positions; a masked model's window has two sides."""
    if context == 0:
        return 0.0
    reach = context if window is None else min(window, context)
    one_side = reach * (context - reach) + reach * (reach + 1) / 2
    return (one_side if causal else 2 * one_side - context) / context


class _Tally:
    """Sums by part."""

    def __init__(self) -> None:
        self._parameters: dict[str, int] = defaultdict(int)
        self._active: dict[str, float] = defaultdict(float)
        self._flops: dict[str, float] = defaultdict(float)
        self._read: dict[str, float] = defaultdict(float)

    def count(self, model: nn.Module) -> None:
        """Every parameter once, in the part where it is met first: a tied table is the embedding's."""
        seen: set[int] = set()
        for part, _, parameter, share in _weights(model, "layer"):
            if id(parameter) not in seen:
                self._parameters[part] += parameter.numel()
                self._active[part] += parameter.numel() * share
            seen.add(id(parameter))

    def use(self, module: nn.Module, part: str, keys: float, skip: nn.Module | None = None) -> None:
        """One token's pass through a module: its FLOPs and what it reads."""
        for name, flops in _work(module, part, keys, skip).items():
            self._flops[name] += flops
        for name, owner, parameter, share in _weights(module, part, skip=skip):
            row = isinstance(owner, nn.Embedding)
            self._read[name] += parameter.shape[-1] if row else parameter.numel() * share
        for selector in _selectors(module) if skip is None else ():
            if not list(selector.parameters()):
                self._read["selector"] += selector.flops() / 2  # keys of the memory: one multiply-add each

    def parts(self) -> tuple[Part, ...]:
        """All parts that have parameters or work, in the order of the model."""
        names = [*ORDER, *sorted(self._parameters.keys() - set(ORDER))]
        return tuple(
            Part(name, self._parameters[name], round(self._active[name]), self._flops[name], self._read[name])
            for name in names
            if self._parameters[name] or self._flops[name]
        )


def _weights(
    module: nn.Module, part: str, share: float = 1.0, skip: nn.Module | None = None
) -> Iterator[tuple[str, nn.Module, nn.Parameter, float]]:
    """Each parameter with its part, its owner, and the share of it that one token uses."""
    for parameter in module.parameters(recurse=False):
        yield part, module, parameter, share
    for name, child in module.named_children():
        if child is skip:
            continue
        used = share
        if isinstance(module, Sparse) and child is module.memory:
            used *= module.active / module.memory.blocks
        yield from _weights(child, _part(name, child, part), used, skip)


def _selectors(module: nn.Module) -> list[Selector]:
    return [inner for inner in module.modules() if isinstance(inner, Selector)]


def _work(
    module: nn.Module, part: str, keys: float, skip: nn.Module | None = None, told: bool = False
) -> dict[str, float]:
    """FLOPs per token by part; `told`: something around the module reports for it."""
    reported = _reported(module, keys)
    if reported is None and not told and not isinstance(module, nn.Embedding):
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim > 1:
                kind = type(module).__name__
                raise InputError(f"{kind}.{name} is a matrix nobody counts; give {kind} a method flops()")
    sums: dict[str, float] = defaultdict(float)
    for name, child in module.named_children():
        if child is not skip:
            inside = _work(child, _part(name, child, part), keys, skip, told or reported is not None)
            for inner, flops in inside.items():
                sums[inner] += flops
    if reported is not None:
        maps, products = reported
        nested = sum(flops for name, flops in sums.items() if name != part) if isinstance(module, FFN) else 0.0
        sums[part] = maps - nested
        sums[SCORES] += products
    return sums


def _reported(module: nn.Module, keys: float) -> tuple[float, float] | None:
    """FLOPs of a module's maps and of its products with `keys` keys; None where it does not say."""
    if isinstance(module, nn.Linear):
        return 2.0 * module.in_features * module.out_features, 0.0
    method = getattr(module, "flops", None)
    asked = list(inspect.signature(method).parameters) if method is not None else None
    if method is None or asked not in ([], ["positions"]):
        return None
    maps = method(0.0) if asked else method()
    return maps, method(keys) - maps if asked else 0.0


def _part(name: str, module: nn.Module, above: str) -> str:
    """The part that a child belongs to, by what it is and by its name."""
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        return "norm"
    if isinstance(module, Residual):
        return "residual"
    if isinstance(module, Selector):
        return "selector"
    if isinstance(module, Attention):
        return "attention"
    if isinstance(module, FFN) and not above.endswith("ffn"):
        return "inner_ffn" if above == "attention" or "inner" in name else name
    return {"embeddings": "embedding", "head": "head"}.get(name, above)


def _cache(layers: list[tuple[nn.Module, LayerConfig]]) -> int:
    """Numbers kept for each position."""
    attentions = [module for layer, _ in layers for module in layer.modules() if isinstance(module, Attention)]
    return sum(module.k.out_features + module.v.out_features for module in attentions)
