"""Where hidden states jump: displacement, jump rate, angles between all layers, update size and stream norm."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from transect.errors import InputError
from transect.metrics.angles import chord_angle, chord_displacement, unit, widened
from transect.metrics.errors import bootstrap
from transect.metrics.jumps import hinge_rate
from transect.probes.base import Probe, Setting, Sight
from transect.results import Row
from transect.view.capture import Seen
from transect.view.sites import NEXT
from transect.view.view import View

Displacement = Literal["half_one_minus_cos", "one_minus_cos", "arccos_over_pi"]
Positions = Literal["all", "skip_first", "last_only"]
Column = tuple[str, int, int]
POSITIONS: tuple[Positions, ...] = ("all", "skip_first", "last_only")


@dataclass(slots=True, eq=False)
class JumpState:
    """Sums over tokens for each error unit: `sums` [positions, conventions, units, columns]; columns are named once."""

    sums: Tensor

    def pack(self) -> dict:
        """Plain tensors."""
        return {"sums": self.sums}


@dataclass(frozen=True, kw_only=True)
class Jump(Probe):
    """How far each layer turns the stream, and whether the turn grows towards the last layer.

    Psi_l = (1 - cos(h_{l-1}, h_l)) / 2 averaged over tokens; zeta_l = 100 sum over k >= l of max(0, Psi_k - Psi_{k-1}).
    Beside them the angle arccos(cos)/pi between resid[l] and resid[m] for every l < m, 1 - cos, |h_l - h_{l-1}| /
    |h_{l-1}| and |h_l|. Rows are 0-based: layer l turns resid[l] into resid[l+1]; zeta from paper layer l stands at
    layer l - 1. `variant` says whether resid[L] is taken before the final norm (`pre_norm`) or after it (`post_norm`),
    and which positions count; a model without a final norm has `pre_norm` only.

    Range and unit: displacement 0 to 1; jump_rate 0 to 100 (L - 1) percent points; angular_distance 0 to 1 (180
    degrees); block_influence 0 to 2; update_ratio and stream_norm from 0.
    Reads: resid[0..L]; resid[0] is the input of the first layer, after an embedding norm where the model has one.
    Source: arXiv 2601.18302, with angular distance and block influence of the layer-pruning literature. Differences:
    chords in place of cosines (equal, but exact near 0); both final-norm conventions are always written.
    Raises: InputError for an unknown option or a `zeta_from` outside 2..L.
    Cost: O(L^2 d) per token in time for all windows, 8 L^2 bytes per document in memory.
    """

    title: ClassVar[str] = "Where hidden states jump"
    source: ClassVar[str] = "arXiv 2601.18302"

    displacement: Displacement = "half_one_minus_cos"
    average: Literal["mean_then_zeta", "zeta_then_mean"] = "mean_then_zeta"
    positions: tuple[Positions, ...] = ("all", "skip_first")
    zeta_from: tuple[int, ...] | None = None
    windows: bool = True
    eps: float = 1e-6

    def __post_init__(self) -> None:
        for value in self.positions:
            if value not in POSITIONS:
                raise InputError(f"jump: positions {value!r} is unknown; allowed are {', '.join(POSITIONS)}")
        if self.displacement not in _DISPLACEMENTS:
            raise InputError(f"jump: displacement {self.displacement!r}; allowed are {', '.join(_DISPLACEMENTS)}")
        if self.average not in ("mean_then_zeta", "zeta_then_mean"):
            raise InputError(f"jump: average {self.average!r}; allowed are mean_then_zeta, zeta_then_mean")

    def sites(self, view: View, layer: int) -> tuple[str, ...]:
        """The stream before and, at the last layer, after."""
        return ("resid", NEXT) if layer == view.num_layers - 1 else ("resid",)

    def memory(self, setting: Setting) -> int:
        """The sums of every unit."""
        return 8 * len(self.positions) * 2 * setting.units * len(self._columns(setting.view.num_layers))

    def work(self, setting: Setting) -> float:
        """Chords of every window, which read memory more than they compute."""
        layers = setting.view.num_layers
        pairs = layers * layers / 2 if self.windows else 2.0 * layers
        return 40.0 * setting.data.num_tokens * pairs * setting.view.width

    def start(self, setting: Setting, packed: dict | None) -> JumpState:
        """Zeros."""
        self._starts(setting.view.num_layers)
        if packed is not None:
            return JumpState(packed["sums"].to(setting.view.device))
        columns = len(self._columns(setting.view.num_layers))
        shape = (len(self.positions), len(_conventions(setting.view)), setting.units, columns)
        return JumpState(torch.zeros(shape, dtype=torch.float64, device=setting.view.device))

    def see(self, state: JumpState, setting: Setting, layer: int, seen: Seen, sight: Sight) -> None:
        """Keep the states of the batch until the last layer, then add up everything between them."""
        states: list[Tensor] = sight.scratch.setdefault("stream", [])
        states.append(sight.rows(seen["resid"]))
        if layer < setting.view.num_layers - 1:
            return
        states.append(sight.rows(seen[NEXT]))
        norm = setting.view.final_norm
        chosen = self._chosen(sight)
        owners = sight.unit[sight.owners()]
        wide = [widened(tokens) for tokens in states]
        units = [unit(tokens, self.eps) for tokens in wide]
        numbers: dict[Column, Tensor] = {}
        for convention, name in enumerate(_conventions(setting.view)):
            if name == "post_norm" and norm is not None:
                wide[-1] = widened(norm(states[-1]))
                units[-1] = unit(wide[-1], self.eps)
            numbers = self._numbers(wide, units, numbers)
            columns = torch.stack(list(numbers.values()), dim=1).double()
            for place, which in enumerate(chosen):
                state.sums[place, convention].index_add_(0, owners[which], columns[which])
        states.clear()

    def _numbers(self, wide: list[Tensor], units: list[Tensor], before: dict[Column, Tensor]) -> dict[Column, Tensor]:
        """Every column for every token [tokens]; what the last state has no part in is taken from `before`."""
        layers = len(wide) - 1
        psi = _DISPLACEMENTS[self.displacement]
        numbers: dict[Column, Tensor] = {}
        for column in self._columns(layers):
            metric, layer, level = column
            if column in before and level < layers:
                numbers[column] = before[column]
            elif metric == "count":
                numbers[column] = torch.ones(len(wide[0]), dtype=wide[0].dtype, device=wide[0].device)
            elif metric == "displacement":
                numbers[column] = psi(units[layer], units[level])
            elif metric == "block_influence":
                numbers[column] = 2 * chord_displacement(units[layer], units[level])
            elif metric == "update_ratio":
                step = (wide[level] - wide[layer]).norm(dim=-1)
                numbers[column] = step / wide[layer].norm(dim=-1).clamp_min(self.eps)
            elif metric == "stream_norm":
                numbers[column] = wide[layer].norm(dim=-1)
            elif metric == "rise":
                earlier = numbers["displacement", layer - 1, layer]
                numbers[column] = hinge_rate(earlier, numbers["displacement", layer, level])
            else:
                numbers[column] = chord_angle(units[layer], units[level])
        return numbers

    def _columns(self, layers: int) -> list[Column]:
        """(metric, layer, last level it reads) of each column."""
        columns: list[Column] = [("count", 0, 0)]
        for name in ("displacement", "block_influence", "update_ratio"):
            columns += [(name, layer, layer + 1) for layer in range(layers)]
        columns += [("stream_norm", layer, layer) for layer in range(layers + 1)]
        columns += [("rise", layer, layer + 1) for layer in range(1, layers)]
        if self.windows:
            columns += [("angular_distance", i, j) for i in range(layers + 1) for j in range(i + 1, layers + 1)]
        return columns

    def _chosen(self, sight: Sight) -> list[Tensor]:
        """For each position rule, which of the real tokens count [tokens] bool."""
        place = torch.arange(sight.mask.shape[1], device=sight.mask.device).expand(sight.mask.shape)
        last = sight.mask.sum(1, keepdim=True) - 1
        rules = {"all": place >= 0, "skip_first": place > 0, "last_only": place == last}
        return [rules[name][sight.mask] for name in self.positions]

    def _starts(self, layers: int) -> list[int]:
        """The paper layers that zeta starts from: L, L-1, L/2 and 2 unless given."""
        if self.zeta_from is None:
            return sorted({start for start in (layers, layers - 1, layers // 2, 2) if 2 <= start <= layers})
        for start in self.zeta_from:
            if not 2 <= start <= layers:
                raise InputError(f"jump: zeta_from {start} is outside 2 to {layers}; zeta_1 would need a Psi_0")
        return sorted(set(self.zeta_from))

    def rows(self, state: JumpState, setting: Setting) -> Iterator[Row]:
        """A row for each metric, layer, final-norm convention and position rule."""
        layers = setting.view.num_layers
        columns = self._columns(layers)
        sums = state.sums.cpu().numpy()
        for place, positions in enumerate(self.positions):
            for convention, name in enumerate(_conventions(setting.view)):
                variant = f"{name}/{positions}"
                yield from self._rows(sums[place, convention], columns, variant, setting)

    def _rows(self, sums: np.ndarray, columns: list, variant: str, setting: Setting) -> Iterator[Row]:
        layers = setting.view.num_layers
        counted = sums[:, 0] > 0
        tokens, units = int(sums[:, 0].sum()), int(counted.sum())
        common = {"site": "resid", "variant": variant, "n": tokens, "documents": units}
        starts = self._starts(layers)
        if tokens == 0:
            yield Row(metric="displacement", value=None, unit="1", reason="no token counts under this rule", **common)
            return
        psi = slice(1, 1 + layers)
        rise = slice(columns.index(("rise", 1, 2)), columns.index(("rise", 1, 2)) + layers - 1) if layers > 1 else None

        def values(totals: np.ndarray) -> np.ndarray:
            with np.errstate(invalid="ignore", divide="ignore"):
                means = totals / totals[:, :1]
            steps = (
                np.maximum(np.diff(means[:, psi], axis=1), 0) if self.average == "mean_then_zeta" else means[:, rise]
            )
            zetas = [100 * steps[:, start - 2 :].sum(1) for start in starts]
            return np.column_stack([means, *zetas])

        value, errors = bootstrap(sums[counted], setting.unit_keys[counted], values, setting.seed)
        names = [*columns, *(("jump_rate", start - 1, layers) for start in starts)]
        for (metric, layer, layer_to), number, error in zip(names, value, errors, strict=True):
            if metric in ("count", "rise"):
                continue
            to = layer_to if metric in ("angular_distance", "jump_rate") else None
            row = Row(metric=metric, value=0.0, unit=_UNITS[metric], layer=layer, layer_to=to, **common)
            yield row.measured(float(number), error)


_DISPLACEMENTS = {
    "half_one_minus_cos": chord_displacement,
    "one_minus_cos": lambda before, after: 2 * chord_displacement(before, after),
    "arccos_over_pi": chord_angle,
}
_UNITS = {
    "displacement": "1",
    "block_influence": "1",
    "update_ratio": "1",
    "stream_norm": "stream",
    "angular_distance": "half turns",
    "jump_rate": "%",
}


def _conventions(view: View) -> tuple[str, ...]:
    return ("pre_norm",) if view.final_norm is None else ("pre_norm", "post_norm")
