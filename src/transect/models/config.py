"""The settings of a Transformer: one flat description, any part of which may differ from layer to layer."""

from collections.abc import Mapping
from functools import cached_property
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, SerializeAsAny, ValidationError, model_validator

from transect.config import Config, inner_misfit, misfit
from transect.models.plug import PlugConfig, Unfit, chooser

Size = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, lt=1)]
BlockChoice = Annotated[
    SerializeAsAny[PlugConfig], BeforeValidator(chooser("transect.models.blocks", "Block", "standard"))
]
FFNChoice = Annotated[SerializeAsAny[PlugConfig], BeforeValidator(chooser("transect.models.ffn", "FFN", "dense"))]
PenaltyChoice = Annotated[SerializeAsAny[PlugConfig], BeforeValidator(chooser("transect.models.penalties", "Penalty"))]


class NormConfig(Config):
    """Norms of the layers.

    layout: `pre` x + f(N(x)); `post` N(x + f(x)); `sandwich` x + N'(f(N(x))); `branch` x + N(f(x)), off the residual
    path; `none`. A pre-norm or sandwich model has a final norm, and a branch-norm model too.
    """

    layout: Literal["pre", "post", "sandwich", "branch", "none"] = "pre"
    type: Literal["layer", "rms"] = "layer"
    eps: Annotated[float, Field(gt=0)] = 1e-5
    bias: bool = True


class AttentionConfig(Config):
    """Self-attention.

    kv_heads: key and value heads, each shared by heads / kv_heads queries (all: MHA, some: GQA, one: MQA). head_width
    defaults to width / heads. qk_norm: RMS norm of queries and keys, each `head` by itself or over the `full` width.
    window: keys at a distance below it are seen (a masked model: on both sides). weights: `softmax`, or `linear`:
    scaled products divided by the number of keys seen. scale multiplies the products, by default
    1 / sqrt(head_width).
    """

    heads: Size = 4
    kv_heads: Size | None = None
    head_width: Size | None = None
    bias: bool = True
    out_bias: bool | None = None
    qk_norm: Literal["none", "head", "full"] = "none"
    window: Size | None = None
    weights: Literal["softmax", "linear"] = "softmax"
    dropout: Share = 0.0
    scale: Annotated[float, Field(gt=0)] | None = None

    @property
    def groups(self) -> int:
        """Key and value heads."""
        return self.kv_heads or self.heads


_SCALINGS: dict[Any, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "linear": (("factor",), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"), ()),
    "yarn": (
        ("factor", "original_max_position_embeddings"),
        ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    ),
}
"""Numbers that each context extension needs, and those it may have."""


class RotaryConfig(Config):
    """Rotary positions: angle position / theta^(2i / n) on the first n = fraction * head_width of each head.

    fraction 0: this layer knows no positions. scaling: one of the context extensions of transformers, as it writes
    them: `rope_type` linear, llama3 or yarn, and its numbers. Those that turn otherwise in a longer text (dynamic,
    longrope) are refused: cached keys would stay as the shorter text turned them.
    """

    theta: Annotated[float, Field(gt=0)] = 10_000.0
    fraction: Annotated[float, Field(ge=0, le=1)] = 1.0
    scaling: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _known_scaling(self) -> Self:
        if self.scaling is None:
            return self
        kind = self.scaling.get("rope_type")
        if kind not in _SCALINGS:
            raise misfit("scaling.rope_type", kind, f"allowed are {', '.join(_SCALINGS)}")
        needed, optional = _SCALINGS[kind]
        for name in needed:
            if not isinstance(self.scaling.get(name), int | float):
                raise misfit(f"scaling.{name}", self.scaling.get(name), f"{kind} needs a number")
        for name in self.scaling:
            if name not in ("rope_type", *needed, *optional):
                raise misfit(f"scaling.{name}", self.scaling[name], f"{kind} has {', '.join((*needed, *optional))}")
        return self


class ResidualConfig(Config):
    """What the stream is multiplied with where a sub-layer is added: g x + f(x).

    0 cancels the residual, "learned" is a trained number that starts at 1.
    """

    attn: float | Literal["learned"] = 1.0
    ffn: float | Literal["learned"] = 1.0


class InitRule(Config):
    """How parameters are drawn: `normal` or `truncated` (at 2 std) with a std, or filled with a `value`.

    depth_scaled divides std by sqrt(2 layers), the habit for maps that write into the stream.
    """

    draw: Literal["normal", "truncated", "uniform"] | None = None
    std: Annotated[float, Field(ge=0)] = 0.02
    depth_scaled: bool = False
    value: float | None = None

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.draw is None) == (self.value is None):
            raise misfit("", self.plain(), "give either draw, with its std, or value")
        return self


class InitConfig(Config):
    """The table of initial values: the first rule whose pattern fits a parameter's path holds, then the defaults.

    Patterns are those of file names, on paths such as `layers.0.attn.out.weight`. By default matrices and tables are
    normal with `std`, those that write into the stream (`out`, `down`, `values`) depth-scaled if `depth_scaled`;
    norms are 1, biases 0.
    """

    std: Annotated[float, Field(gt=0)] = 0.02
    depth_scaled: bool = True
    rules: dict[str, InitRule] = Field(default_factory=dict)


class EmbeddingConfig(Config):
    """Token embeddings: `norm` after them and `types` for segment ids as in BERT; `scale` multiplies them."""

    norm: bool = False
    types: Annotated[int, Field(ge=0)] = 0
    scale: Annotated[float, Field(gt=0)] = 1.0


class HeadConfig(Config):
    """The map to the vocabulary; `tied` to the embedding; `transform`: a dense layer, activation and norm before it.

    next_sentence: a masked model is also asked whether the second text of a sequence follows the first, as in BERT.
    """

    tied: bool = True
    bias: bool = False
    transform: Literal["none", "gelu", "gelu_tanh", "relu", "silu"] = "none"
    next_sentence: bool = False


class LayerConfig(Config):
    """All that one layer may have of its own."""

    block: BlockChoice = Field(default="standard", validate_default=True)  # pyright: ignore[reportAssignmentType]
    attention: AttentionConfig = AttentionConfig()
    ffn: FFNChoice = Field(default="dense", validate_default=True)  # pyright: ignore[reportAssignmentType]
    norm: NormConfig = NormConfig()
    rotary: RotaryConfig = RotaryConfig()
    residual: ResidualConfig = ResidualConfig()
    dropout: Share = 0.0


class Override(Config):
    """Settings of some layers: a list of 0-based layers, or a slice such as `1::2` (every second, from layer 1).

    Where layers share weights, a layer here is a set of weights, numbered as in `share`.
    """

    layers: list[int] | str
    set: dict[str, Any]

    def indices(self, count: int) -> list[int]:
        """The layers meant, of `count`."""
        if isinstance(self.layers, list):
            return self.layers
        steps = [int(part) if part.strip() else None for part in self.layers.split(":")]
        return list(range(count)[slice(*steps)])

    @model_validator(mode="after")
    def _readable(self) -> Self:
        if isinstance(self.layers, str):
            try:
                if ":" not in self.layers:
                    raise ValueError
                self.indices(1)
            except (ValueError, TypeError) as error:
                raise misfit("layers", self.layers, "give a list of layers or a slice such as '1::2'") from error
        return self


class ModelConfig(LayerConfig):
    """A whole Transformer; the layer settings hold for every layer that no override changes.

    objective: `causal` (a position sees itself and earlier ones, the head predicts the next token) or `masked` (all
    positions are seen, the head predicts the token itself). share: which weights each layer uses, repeated to the
    number of layers: [0] one set for all, [0, 1] two in turn. penalties: extra losses on the stream, summed by the
    model.
    Raises InputError, through `parse`, with the path of what does not fit.
    """

    objective: Literal["causal", "masked"] = "causal"
    vocab_size: Size
    width: Size
    layers: Size
    max_positions: Size = 1024
    positions: Literal["learned", "rotary", "none"] = "rotary"
    embedding: EmbeddingConfig = EmbeddingConfig()
    head: HeadConfig = HeadConfig()
    overrides: list[Override] = Field(default_factory=list)
    share: list[int] | None = None
    penalties: list[PenaltyChoice] = Field(default_factory=list)
    init: InitConfig = InitConfig()
    classifier_dropout: Share = 0.1
    pad_token_id: Annotated[int, Field(ge=0)] | None = None

    @property
    def causal(self) -> bool:
        """Whether no position sees a later one."""
        return self.objective == "causal"

    @cached_property
    def modules(self) -> tuple[int, ...]:
        """The weights that each layer uses, by number; 0, 1, 2, ... where none are shared."""
        pattern = self.share or list(range(self.layers))
        return tuple(pattern[place % len(pattern)] for place in range(self.layers))

    @cached_property
    def layer_configs(self) -> tuple[LayerConfig, ...]:
        """The settings of each set of weights; as many as `modules` has different numbers."""
        count = max(self.modules) + 1
        base = {name: value for name, value in self.plain().items() if name in LayerConfig.model_fields}
        made = []
        for index in range(count):
            settings = base
            for override in self.overrides:
                if index in override.indices(count):
                    settings = merged(settings, override.set)
            made.append(LayerConfig.model_validate(settings))
        return tuple(made)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        self._check_share()
        self._check_penalties()
        count = max(self.modules) + 1
        for place, override in enumerate(self.overrides):
            wrong = [index for index in override.indices(count) if not 0 <= index < count]
            if wrong:
                one, all_ = ("set of weights", "sets") if self.share else ("layer", "layers")
                why = f"this {one} does not exist; {all_} are 0 to {count - 1}"
                raise misfit(f"overrides.{place}.layers", wrong[0], why)
            unknown = [name for name in override.set if name not in LayerConfig.model_fields]
            if unknown:
                known = ", ".join(LayerConfig.model_fields)
                raise misfit(f"overrides.{place}.set.{unknown[0]}", override.set[unknown[0]], f"a layer has {known}")
            self._check_override(place, override)
        if self.head.next_sentence and self.causal:
            raise misfit("head.next_sentence", True, "only a masked model sees both texts; set objective to masked")
        if self.pad_token_id is not None and self.pad_token_id >= self.vocab_size:
            raise misfit("pad_token_id", self.pad_token_id, f"the vocabulary has ids 0 to {self.vocab_size - 1}")
        for index, layer in enumerate(self.layer_configs):
            try:
                self._check_layer(layer)
            except Unfit as error:
                changed = bool(self.overrides) and any(index in o.indices(count) for o in self.overrides)
                raise misfit(error.where, error.given, error.why + (f" (layer {index})" if changed else "")) from error
        return self

    def _check_override(self, place: int, override: Override) -> None:
        base = {name: value for name, value in self.plain().items() if name in LayerConfig.model_fields}
        for before in self.overrides[:place]:
            base = merged(base, before.set)
        try:
            LayerConfig.model_validate(merged(base, override.set))
        except ValidationError as error:
            raise inner_misfit(LayerConfig, error, f"overrides.{place}.set") from error

    def _check_penalties(self) -> None:
        for place, penalty in enumerate(self.penalties):
            if penalty.kind in [other.kind for other in self.penalties[:place]]:
                raise misfit(f"penalties.{place}", penalty.kind, "is there already; give each penalty once")
            try:
                penalty.check(self, self, f"penalties.{place}")
            except Unfit as error:
                raise misfit(error.where, error.given, error.why) from error

    def _check_share(self) -> None:
        if self.share is None:
            return
        used = list(dict.fromkeys(self.modules))
        if not self.share or used != list(range(len(used))):
            raise misfit(
                "share", self.share, "give numbers that first appear in order 0, 1, 2, ..., as in [0, 0, 1, 1]"
            )

    def _check_layer(self, layer: LayerConfig) -> None:
        attention = layer.attention
        if attention.head_width is None and self.width % attention.heads:
            raise Unfit(
                "attention.heads",
                attention.heads,
                f"must divide width {self.width}, or give attention.head_width",
            )
        if attention.heads % attention.groups:
            raise Unfit("attention.kv_heads", attention.kv_heads, f"must divide heads {attention.heads}")
        head_width = attention.head_width or self.width // attention.heads
        rotated = layer.rotary.fraction * head_width
        if self.positions == "rotary" and (rotated % 2 or rotated != int(rotated)):
            raise Unfit(
                "rotary.fraction", layer.rotary.fraction, f"of head width {head_width} must be an even whole number"
            )
        layer.block.check(layer, self, "block")
        if not layer.block.checks_ffn:
            layer.ffn.check(layer, self, "ffn")


def merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with some changed, level by level; a plug-in of another kind takes the place of the old one."""
    result = dict(base)
    for name, new in changes.items():
        old = result.get(name)
        if isinstance(old, Mapping) and isinstance(new, str) and "kind" in old:
            new = {"kind": new}
        if isinstance(old, str) and isinstance(new, Mapping) and "kind" not in new:  # the short form of a plug-in
            old = {"kind": old}
        if (
            isinstance(old, Mapping)
            and isinstance(new, Mapping)
            and new.get("kind", old.get("kind")) == old.get("kind")
        ):
            result[name] = merged(old, new)
        else:
            result[name] = new
    return result
