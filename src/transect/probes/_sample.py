"""The tokens of `contribution`: which of the text count for what, and which of a batch these are."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from transect.data import sample_tokens
from transect.data.objective import NONE
from transect.errors import InputError
from transect.probes.base import Setting, Sight

if TYPE_CHECKING:
    from transect.probes.contribution import Contribution

_PER_CLUSTER = 500
_MOST_CLUSTERS = 2000


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """Which tokens count for what: positions in the dataset, looked up by token; -1 = not in it."""

    mi: np.ndarray  # [sample] dataset positions whose labels are counted
    mi_at: Tensor  # [tokens] int32 place in `mi`
    fits: Tensor  # [tokens] bool: centres are fitted on it
    class_of: Tensor  # [tokens] int32 class of the target, numbered by id among those that come often enough
    classes: int
    half: Tensor  # [units] 0 or 1
    lens: Tensor  # [tokens] bool
    clusters: int


def drawn(probe: "Contribution", setting: Setting) -> Sample:
    """The sample that a probe's options ask for; raises InputError for fewer states than clusters."""
    data, seed = setting.data, setting.seed
    assert data.target is not None
    asked = data.target != NONE
    mi = sample_tokens(data, probe.mi_positions, seed, among=asked)
    fitted = mi
    if probe.asked(setting.view).kind == "masked" and probe.mi_fit_positions == "all":
        # Not by the hash that drew the masks: its smallest values are those of masked tokens.
        fitted = sample_tokens(data, probe.mi_positions, seed + 1)
    clusters = probe.mi_clusters or max(2, min(_MOST_CLUSTERS, len(mi) // _PER_CLUSTER))
    if probe.measures("mutual_information") and clusters > len(fitted):
        raise InputError(
            f"contribution: {clusters} clusters need as many states, the text has {len(fitted)} to fit them on; "
            "give more text or a smaller contribution.mi_clusters"
        )
    class_of, classes = _classes(data.target, asked, probe.tp_min_count)
    half = (setting.unit_keys >> np.uint64(17)) & np.uint64(1)
    return Sample(
        mi=mi,
        mi_at=_looked_up(data.num_tokens, mi),
        fits=_marked(data.num_tokens, fitted),
        class_of=torch.from_numpy(class_of),
        classes=classes,
        half=torch.from_numpy(half.astype(np.int64)),
        lens=_marked(data.num_tokens, sample_tokens(data, probe.lens_tokens, seed, among=asked)),
        clusters=clusters,
    )


def _classes(target: np.ndarray, asked: np.ndarray, least: int) -> tuple[np.ndarray, int]:
    """[tokens] int32 class of each target that comes `least` times, -1 elsewhere, and how many classes there are."""
    counts = np.bincount(target[asked], minlength=1)
    kept = np.flatnonzero(counts >= least)
    number = np.full(len(counts), -1, dtype=np.int32)
    number[kept] = np.arange(len(kept))
    class_of = np.full(len(target), -1, dtype=np.int32)
    class_of[asked] = number[target[asked]]
    return class_of, len(kept)


@dataclass(slots=True, eq=False)
class Tokens:
    """Which of a batch's real tokens [n] count for what, found once for all places."""

    fits: Tensor  # rows that centres are fitted on
    labelled: Tensor  # rows in the MI sample
    places: Tensor  # their places in it
    kept: Tensor  # rows whose target is a class
    classes: Tensor
    halves: Tensor
    kept_units: Tensor
    lens: Tensor
    lens_targets: Tensor
    lens_units: Tensor
    lens_states: list[Tensor] = field(default_factory=list)

    @classmethod
    def of(cls, sample: Sample, sight: Sight) -> "Tokens":
        """Look up every real token of the batch."""
        device = sight.mask.device
        real = sight.mask.cpu()
        token = sight.token[real]
        units = sight.unit.cpu()[sight.owners().cpu()]
        assert sight.target is not None
        target = sight.target.cpu()[real]

        def rows(chosen: Tensor) -> Tensor:
            return chosen.nonzero()[:, 0]

        at, classes = sample.mi_at[token], sample.class_of[token]
        labelled, kept, lens = rows(at >= 0), rows(classes >= 0), rows(sample.lens[token])
        return cls(
            fits=rows(sample.fits[token]).to(device),
            labelled=labelled.to(device),
            places=at[labelled].long(),
            kept=kept.to(device),
            classes=classes[kept].long().to(device),
            halves=sample.half[units[kept]].to(device),
            kept_units=units[kept],
            lens=lens.to(device),
            lens_targets=target[lens].to(device),
            lens_units=units[lens],
        )


def _looked_up(tokens: int, sample: np.ndarray) -> Tensor:
    """[tokens] int32 place of each token in the sample, -1 elsewhere."""
    place = np.full(tokens, -1, dtype=np.int32)
    place[sample] = np.arange(len(sample), dtype=np.int32)
    return torch.from_numpy(place)


def _marked(tokens: int, sample: np.ndarray) -> Tensor:
    """[tokens] whether a token is in the sample."""
    marks = np.zeros(tokens, dtype=bool)
    marks[sample] = True
    return torch.from_numpy(marks)
