"""How alike the layers' streams are, and how many directions each stream uses."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from transect.data import sample_tokens
from transect.errors import InputError
from transect.metrics.angles import unit, widened
from transect.metrics.cka import from_products, gram_products
from transect.metrics.errors import jackknife
from transect.metrics.spectrum import effective_rank, pair_cosine, participation_ratio
from transect.parallel import on_every_core
from transect.probes.base import Probe, Setting, Sight
from transect.results import Row
from transect.view.capture import Seen
from transect.view.sites import NEXT
from transect.view.view import View

GROUPS = 10
_TINY = 1e-30
_UNDIRECTED = "fewer than two states have a direction, the others are zero"


@dataclass(slots=True, eq=False)
class SimilarityState:
    """The sampled states [layers + 1, sample, width], which of them came, and unit-vector sums by hash group."""

    place: Tensor  # [tokens of the data] int32: where a token stands in the sample, -1 elsewhere
    states: Tensor
    came: Tensor  # [sample] bool
    unit_sums: Tensor  # [layers + 1, groups, width]
    counts: Tensor  # [layers + 1, groups]

    def pack(self) -> dict:
        """Everything but `place`, which follows from the data."""
        return {"states": self.states, "came": self.came, "unit_sums": self.unit_sums, "counts": self.counts}


@dataclass(frozen=True, kw_only=True)
class Similarity(Probe):
    """How alike the streams of any two layers are, and how many directions each uses.

    cka(l, m) = |X_l^T X_m|_F^2 / (|X_l^T X_l|_F |X_m^T X_m|_F) of centred states; effective_rank = exp(-sum p ln p) and
    participation_ratio = (sum lambda)^2 / sum lambda^2 of the covariance's eigenvalues, p = lambda / sum lambda;
    anisotropy = mean cosine over all pairs of tokens. Rows: resid[0..L], 0-based, L is before the final norm.

    Range and unit: cka 0 to 1; ranks 1 to the width (or the sample less one); anisotropy -1 to 1.
    Reads: resid[0..L]; CKA and ranks on a seeded sample of tokens chosen by hash of (document, position), anisotropy on
    all tokens.
    Source: arXiv 1905.00414 (linear CKA), arXiv 2101.04547 (cone size). Differences: a sample, stated in `n`.
    Raises: InputError for a sample under two tokens.
    Cost: (L+1) sample d numbers in memory; (L+1) sample^2 d multiplications once; errors of CKA and ranks (`errors`)
    repeat that for ten groups.
    """

    title: ClassVar[str] = "How alike the layers are"
    source: ClassVar[str] = "arXiv 1905.00414; arXiv 2101.04547"

    sample: int = 4096
    errors: bool = False

    def __post_init__(self) -> None:
        if self.sample < 2:
            raise InputError(f"similarity: sample is {self.sample}; it takes two tokens or more")

    def sites(self, view: View, layer: int) -> tuple[str, ...]:
        """The stream before and, at the last layer, after."""
        return ("resid", NEXT) if layer == view.num_layers - 1 else ("resid",)

    def memory(self, setting: Setting) -> int:
        """The sample in the captured dtype twice (once centred), and a block of Gram matrices."""
        count = min(self.sample, setting.data.num_tokens)
        size = 8 if setting.view.dtype == torch.float64 else 4
        layers = setting.view.num_layers + 1
        return layers * count * (2 * setting.view.width + 256) * size + 4 * setting.data.num_tokens

    def work(self, setting: Setting) -> float:
        """Gram matrices of the sample at every layer and their products, then the spectra."""
        layers, width = setting.view.num_layers + 1, setting.view.width
        count = float(min(self.sample, setting.data.num_tokens))
        once = count * count * layers * (2 * width + layers) + 20.0 * layers * width**3
        return once * (11 if self.errors else 1)

    def start(self, setting: Setting, packed: dict | None) -> SimilarityState:
        """The sample is chosen before the first token."""
        view, device = setting.view, setting.view.device
        chosen = sample_tokens(setting.data, self.sample, setting.seed)
        place = np.full(setting.data.num_tokens, -1, dtype=np.int32)
        place[chosen] = np.arange(len(chosen), dtype=np.int32)
        layers, wide = view.num_layers + 1, torch.promote_types(view.dtype, torch.float32)
        if packed is not None:
            return SimilarityState(torch.from_numpy(place), **{name: packed[name].to(device) for name in packed})
        return SimilarityState(
            torch.from_numpy(place),
            torch.zeros(layers, len(chosen), view.width, dtype=wide, device=device),
            torch.zeros(len(chosen), dtype=torch.bool, device=device),
            torch.zeros(layers, GROUPS, view.width, dtype=torch.float64, device=device),
            torch.zeros(layers, GROUPS, dtype=torch.float64, device=device),
        )

    def see(self, state: SimilarityState, setting: Setting, layer: int, seen: Seen, sight: Sight) -> None:
        """Keep the sampled tokens' states and add up unit vectors."""
        if "sample" not in sight.scratch:
            sight.scratch["sample"] = _sampled(state, setting, sight)
        rows, places, groups = sight.scratch["sample"]
        state.came[places] = True
        for site, level in (("resid", layer), (NEXT, layer + 1)):
            if site == "resid" or level == setting.view.num_layers:
                tokens = widened(sight.rows(seen[site]))
                state.states[level, places] = tokens[rows]
                directed = tokens.abs().amax(1) > 0  # a zero state has no direction and is not counted
                state.unit_sums[level].index_add_(0, groups, unit(tokens, _TINY).double())
                state.counts[level].index_add_(0, groups, directed.double())

    def rows(self, state: SimilarityState, setting: Setting) -> Iterator[Row]:
        """CKA of every pair l <= m, then the numbers of each layer."""
        states = state.states[:, state.came]
        groups = _sample_groups(state, setting)[state.came]
        count = states.shape[1]
        common = {"site": "resid", "n": count, "documents": setting.units, "variant": "linear"}
        if count < 2:
            yield Row(metric="cka", value=None, unit="1", reason="fewer than two tokens were sampled", **common)
            return
        centred = _recentred(states)
        constant = [
            layer for layer, (state, rest) in enumerate(zip(states, centred, strict=True)) if _is_constant(state, rest)
        ]
        if constant:
            reason = f"resid[{constant[0]}] is the same for every token"
            yield Row(metric="cka", value=None, unit="1", reason=reason, **common)
        else:
            full = _matrices(centred)
            without = (
                [_matrices(_recentred(states[:, groups != group])) for group in groups.unique()] if self.errors else []
            )
            yield from _matrix_rows(full, without, common)
        yield from self._anisotropy(state, setting)

    def _anisotropy(self, state: SimilarityState, setting: Setting) -> Iterator[Row]:
        sums, counts = state.unit_sums.cpu(), state.counts.cpu()
        filled = counts[0] > 0
        for layer in range(len(sums)):
            total, number = sums[layer].sum(0), float(counts[layer].sum())
            row = Row(
                metric="anisotropy", value=None, unit="1", reason=_UNDIRECTED, layer=layer, site="resid", n=int(number)
            )
            if number < 2:
                yield replace(row, documents=setting.units)
                continue
            value = float(pair_cosine(total, number))
            left = [
                float(pair_cosine(total - sums[layer, group], number - float(counts[layer, group])))
                for group in filled.nonzero()[:, 0].tolist()
                if number - float(counts[layer, group]) > 1
            ]
            yield replace(row, documents=setting.units).measured(value, jackknife(value, left))


def _sampled(state: SimilarityState, setting: Setting, sight: Sight) -> tuple[Tensor, Tensor, Tensor]:
    """Which of the batch's real tokens are sampled, their places in the sample, and each token's hash group."""
    starts = torch.from_numpy(setting.data.starts)[sight.sequence.cpu()]
    offsets = torch.arange(sight.mask.shape[1])
    index = (starts[:, None] + offsets)[sight.mask.cpu()]
    place = state.place[index]
    rows = (place >= 0).nonzero()[:, 0]
    keys = torch.from_numpy((setting.unit_keys % GROUPS).astype(np.int64)).to(sight.unit.device)
    device = sight.mask.device
    return rows.to(device), place[rows].long().to(device), keys[sight.unit][sight.owners()]


def _sample_groups(state: SimilarityState, setting: Setting) -> Tensor:
    """The hash group of each sampled token's document [sample]."""
    sequence_of = np.repeat(np.arange(setting.data.num_sequences), setting.data.lengths)
    tokens = (state.place >= 0).nonzero()[:, 0]
    units = setting.unit_of[sequence_of[tokens.numpy()]]
    groups = torch.zeros(len(state.came), dtype=torch.int64)
    groups[state.place[tokens].long()] = torch.from_numpy((setting.unit_keys[units] % GROUPS).astype(np.int64))
    return groups.to(state.came.device)


def _recentred(states: Tensor) -> Tensor:
    return states - states.mean(1, keepdim=True, dtype=torch.float64).to(states.dtype)


def _is_constant(states: Tensor, centred: Tensor) -> bool:
    """Whether no coordinate varies by more than the rounding of its mean."""
    rounding = 4 * torch.finfo(states.dtype).eps * (states - centred).abs().amax(0)
    return bool((centred.abs().amax(0) <= rounding).all())


def _matrices(centred: Tensor) -> tuple[Tensor, list[float], list[float]]:
    matrix = from_products(gram_products(centred)).cpu()
    spectra = on_every_core(lambda state: torch.linalg.eigvalsh((state.double().T @ state.double()).cpu()), centred)
    return matrix, [float(effective_rank(s)) for s in spectra], [float(participation_ratio(s)) for s in spectra]


def _matrix_rows(full: tuple, without: list[tuple], common: dict) -> Iterator[Row]:
    matrix, effective, participation = full
    for left in range(len(matrix)):
        for right in range(left, len(matrix)):
            value = float(matrix[left, right])
            error = jackknife(value, [float(other[0][left, right]) for other in without])
            row = Row(metric="cka", value=value, unit="1", layer=left, layer_to=right, **common)
            yield row.measured(value, error)
    for metric, values, index in (("effective_rank", effective, 1), ("participation_ratio", participation, 2)):
        for layer, value in enumerate(values):
            row = Row(metric=metric, value=value, unit="directions", layer=layer, **common)
            yield row.measured(value, jackknife(value, [other[index][layer] for other in without]))
