"""JREG: a penalty on how far each layer turns the stream, so that no layer makes a jump."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from transect.config import misfit
from transect.errors import InputError
from transect.metrics.angles import angular_distance
from transect.metrics.jumps import jump_rate
from transect.models.norms import FINAL
from transect.models.penalties._chord import turns
from transect.models.penalties.base import LayerSums, Penalty, PenaltyConfig, PenaltyOutput
from transect.models.plug import Unfit

if TYPE_CHECKING:
    from transect.models.config import LayerConfig, ModelConfig
    from transect.models.penalties._attached import Attached
    from transect.view.view import View

Rule = Literal["softmax_alpha", "uniform", "last_only", "last_k"]
Weight = Annotated[float, Field(ge=0)]


class JumpConfig(PenaltyConfig):
    """Which turns are penalised, and how much each.

    displacement: `half_one_minus_cos` Psi = (1 - cos) / 2, `one_minus_cos`, or `arccos_over_pi`, the angle as a share
    of 180 degrees. final_state: h_L before the final norm (`pre_norm`) or after it (`post_norm`). first_state: h_0 is
    what the norm of the embedding receives (`embedding`), or the input of the first layer (`after_embedding_norm`,
    which is what the `jump` probe takes); without such a norm both are the input of the first layer. weights of the
    layers: `softmax_alpha`, softmax(alpha (1, ..., L)); `uniform` 1/L; `last_only`; `last_k`, 1/k for each of the last
    k; or a list of L numbers, used as they are. stop_grad: which state does not move: `prev` the earlier one, `next`
    the later one, `both` (a meter only). hinge: penalise max(0, Psi_l - Psi_{l-1}) of the means, for l from 2, in place
    of Psi_l; a control. eps: lengths count as at least this.
    Source: arXiv 2601.18302, JREG. ASSUMED: strength, alpha (mid-grid, ours), final_state, first_state, stop_grad.
    """

    kind: str = "jump"
    displacement: Literal["half_one_minus_cos", "one_minus_cos", "arccos_over_pi"] = "half_one_minus_cos"
    final_state: Literal["pre_norm", "post_norm"] = "pre_norm"
    first_state: Literal["embedding", "after_embedding_norm"] = "embedding"
    weights: Rule | list[Weight] = "softmax_alpha"
    alpha: Annotated[float, Field(ge=0)] = 0.5
    k: Annotated[int, Field(ge=1)] | None = None
    stop_grad: Literal["none", "prev", "next", "both"] = "none"
    hinge: bool = False
    eps: Annotated[float, Field(gt=0)] = 1e-6

    @model_validator(mode="after")
    def _last_k(self) -> Self:
        if (self.weights == "last_k") != (self.k is not None):
            raise misfit("k", self.k, "weights last_k need it, other weights have none")
        return self

    def check(self, layer: "LayerConfig", model: "ModelConfig", where: str) -> None:
        """Raise Unfit where the weights do not go with the number of layers, or there is no final norm to read."""
        try:
            self.layer_weights(model.layers)
        except Unfit as error:
            raise Unfit(f"{where}.{error.where}", error.given, error.why) from error
        if self.final_state == "post_norm" and layer.norm.layout not in FINAL:
            raise Unfit(f"{where}.final_state", self.final_state, "the model has no final norm; use pre_norm")

    def layer_weights(self, layers: int) -> list[float]:
        """w_1..w_L; raises Unfit where the settings do not go with so many layers."""
        if self.hinge and layers < 2:
            raise Unfit("hinge", self.hinge, "a single layer has no layer before it to compare with")
        if isinstance(self.weights, list):
            if len(self.weights) != layers:
                raise Unfit("weights", self.weights, f"give one number for each of {layers} layers")
            return self.weights
        if self.k is not None and self.k > layers:
            raise Unfit("k", self.k, f"there are {layers} layers")
        if self.weights == "softmax_alpha":
            places = torch.arange(layers, dtype=torch.float64, device="cpu")
            return torch.softmax(self.alpha * places, 0).tolist()
        last = {"uniform": layers, "last_only": 1}.get(self.weights, self.k or layers)
        return [0.0] * (layers - last) + [1 / last] * last


class Jump(Penalty):
    """lambda sum_l w_l Psi_l: the mean turn of the stream in each layer, weighted towards the last ones.

    Psi_l is the `jump` probe's displacement, averaged over counted tokens. Beside it |h_l| and |h_l - h_{l-1}| /
    |h_{l-1}| are always logged, as growing norms lower Psi by scale alone. Columns of the sums: displacement,
    update_ratio, |h_{l-1}|, |h_l|.
    Range: 0 to lambda for Psi with weights that sum to 1. Raises InputError for settings that do not fit the layers.
    Source: arXiv 2601.18302, JREG. Differences: an analytic gradient; the mean over tokens, layer by layer, ASSUMED.
    Cost: O(width) per token and layer; no state is copied, but for `arccos_over_pi`. Repeated layers count each time.
    """

    Config: ClassVar[type[JumpConfig]] = JumpConfig
    config: JumpConfig

    def __init__(self, config: JumpConfig, layers: int) -> None:
        super().__init__(config, layers)
        try:
            self.weights = config.layer_weights(layers)
        except Unfit as error:
            raise InputError(f"penalty jump: {error.where} is {error.given!r}: {error.why}") from error
        self.reads_final_norm = config.final_state == "post_norm"
        self.reads_raw_embedding = config.first_state == "embedding"

    @classmethod
    def attach(
        cls, view: "View", config: JumpConfig | Mapping[str, Any] | None = None, *, strength: float | None = None
    ) -> "Attached":
        """The penalty of a model seen through a view: a context manager, see `Attached`.

        config: settings, as an object or a mapping; strength: lambda, in place of the one in `config`. A mapping that
        names no first_state, and no config at all, mean `after_embedding_norm`, which every view sees. Raises
        InputError for settings that do not fit the model.
        """
        from transect.models.penalties._attached import Attached

        seen = {"first_state": "after_embedding_norm"}
        settings = config if isinstance(config, JumpConfig) else JumpConfig.parse(seen | dict(config or {}))
        if strength is not None:
            settings = settings.but(strength=strength)
        return Attached(cls(settings, view.num_layers), view)

    def rows(self, place: int, before: Tensor, after: Tensor) -> Tensor:
        """The columns of each token [4, batch, positions], in float32 or better; only the first has a gradient."""
        stop = self.config.stop_grad if self._pulls(place) else "both"
        eps = self.config.eps
        if stop in ("prev", "both"):
            before = before.detach()
        if stop in ("next", "both"):
            after = after.detach()
        psi, earlier, later = turns(before, after, eps)
        with torch.no_grad():  # |b - a|^2 from what is known already
            step = ((later - earlier).square() + 4 * earlier * later * psi).sqrt() / earlier.clamp_min(eps)
        if self.config.displacement == "one_minus_cos":
            psi = 2 * psi
        elif self.config.displacement == "arccos_over_pi":
            psi = angular_distance(before, after, eps)
        return torch.stack([psi, step, earlier, later])

    def layer(self, place: int, before: Tensor, after: Tensor, counted: Tensor | None) -> LayerSums:
        """The sums of the columns over counted tokens."""
        return summed(self.rows(place, before, after), counted)

    def total(
        self, sums: Sequence[LayerSums], step: int | None = None, tokens: Tensor | int | None = None
    ) -> PenaltyOutput:
        """lambda(step) sum_l w_l Psi_l.

        With `hinge` the means of each part are compared, weighted by its tokens: how a step is cut then matters.
        """
        self._check(sums)
        counts = torch.stack([layer.count for layer in sums])
        means = torch.stack([layer.values[0] for layer in sums]) / counts.clamp_min(1)
        weights = means.new_tensor(self.weights)
        terms = weights[1:] * means.diff().clamp_min(0) if self.config.hinge else weights * means
        penalty = terms.sum() if tokens is None else terms.sum() * (counts[0].to(means.dtype) / tokens)
        stats = self.stats(sums) | {"penalty": penalty.detach()}
        return PenaltyOutput(self.config.strength_at(step) * penalty, stats)

    def stats(self, sums: Sequence[LayerSums]) -> dict[str, Tensor]:
        """displacement and update_ratio [L], stream_norm [L + 1], and the last layer's jump_rate where L > 1."""
        self._check(sums)
        means = torch.stack([layer.values.detach() / layer.count for layer in sums])
        found = {
            "displacement": means[:, 0],
            "update_ratio": means[:, 1],
            "stream_norm": torch.cat([means[:, 2], means[-1:, 3]]),
        }
        return found | ({"jump_rate": jump_rate(means[:, 0], self.layers)} if self.layers > 1 else {})

    def _pulls(self, place: int) -> bool:
        """Whether this layer's turn has any weight in the penalty; with `hinge` the next layer's term reads it too."""
        reach = slice(max(place, 1), place + 2) if self.config.hinge else slice(place, place + 1)
        return any(self.weights[reach])

    def _check(self, sums: Sequence[LayerSums]) -> None:
        if len(sums) != self.layers:
            raise ValueError(f"sums of {len(sums)} layers; the penalty was made for {self.layers}")


def summed(rows: Tensor, counted: Tensor | None) -> LayerSums:
    """The sums of rows [columns, batch, positions] over counted positions [batch, positions]; None counts all."""
    if counted is None:
        return LayerSums(rows.sum((1, 2)), torch.tensor(rows[0].numel(), device=rows.device))
    return LayerSums(torch.where(counted, rows, 0).sum((1, 2)), counted.sum())
