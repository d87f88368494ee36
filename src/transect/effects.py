"""What edits cost: sums over a text for each variant, and the rows that come of them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from transect.errors import InputError
from transect.metrics.errors import Error, bootstrap
from transect.probes.base import Outcome, Setting
from transect.results import Row
from transect.view import edits
from transect.view.variants import Variant, planned_evaluations
from transect.view.view import View

SCORES = ("loss", "kl", "agreement", "state_change")
"""What is added up for each variant and error unit; all but the last need a head."""

METRICS = ("loss", "loss_change", "kl", "agreement", "state_change")
BLANK = Row(metric="loss", value=None, unit="nats", reason="not measured")
"""What the rows of an edited model start from: with its layers, its edit and how it is called they are `like`."""

UNITS = {"loss": "nats", "loss_change": "nats", "kl": "nats", "agreement": "1", "state_change": "1"}


@dataclass(slots=True, eq=False)
class Effects:
    """Sums [variants + 1, units, scores], the unedited model first; counts [units, 2] of targets and of tokens."""

    sums: Tensor
    counts: Tensor
    layers_run: int = 0
    batches: int = 0
    has_head: bool = False

    @classmethod
    def empty(cls, variants: int, units: int) -> "Effects":
        """Nothing seen yet."""
        sums = torch.zeros(variants + 1, units, len(SCORES), dtype=torch.float64)
        return cls(sums, torch.zeros(units, 2, dtype=torch.float64))

    @staticmethod
    def nbytes(variants: int, units: int) -> int:
        """Bytes of the sums and of the draws that errors are computed from."""
        return 8 * (variants + 2) * len(SCORES) * (units + 1100)

    def pack(self) -> dict:
        """Plain tensors and numbers."""
        return {name: getattr(self, name) for name in self.__slots__}

    def add(self, variant: int | None, outcome: Outcome) -> None:
        """Add what one variant made of one batch."""
        at = 0 if variant is None else variant + 1
        targets, tokens = outcome.target_unit.cpu(), outcome.token_unit.cpu()
        if variant is None:
            self.batches += 1
            self.counts[:, 0].index_add_(0, targets, torch.ones(len(targets), dtype=torch.float64))
            self.counts[:, 1].index_add_(0, tokens, torch.ones(len(tokens), dtype=torch.float64))
        self.layers_run += outcome.layers_run
        if outcome.loss is not None and outcome.kl is not None and outcome.agree is not None:
            self.has_head = True
            for column, values in enumerate((outcome.loss, outcome.kl, outcome.agree)):
                self.sums[at, :, column].index_add_(0, targets, values.double().cpu())
        self.sums[at, :, 3].index_add_(0, tokens, outcome.displacement.double().cpu())


@dataclass(frozen=True, slots=True, eq=False)
class Measured:
    """Values [variants + 1, metrics] with their errors, NaN where there is none."""

    values: np.ndarray
    errors: list[list[Error | None]]
    metrics: tuple[str, ...]
    targets: int
    tokens: int
    units: int

    def rows(self, variant: int | None, like: Row) -> Iterator[Row]:
        """The rows of one variant; `like` holds its layers, its edit and how it is called."""
        at = 0 if variant is None else variant + 1
        for column, metric in enumerate(self.metrics):
            if variant is None and metric != "loss":
                continue
            value = float(self.values[at, column])
            count = self.tokens if metric == "state_change" else self.targets
            row = replace(like, metric=metric, unit=UNITS[metric], n=count, documents=self.units)
            if not np.isfinite(value):
                why = "the edited model gives numbers that are not finite" if count else "no position has a target"
                yield row.missing(why)
                continue
            yield row.measured(value, self.errors[at][column])


def measured(effects: Effects, setting: Setting) -> Measured:
    """Means over targets and tokens; changes are against the unedited model on the same draws of documents."""
    filled = effects.counts[:, 1] > 0
    sums, counts = effects.sums[:, filled].numpy(), effects.counts[filled].numpy()
    variants, units = sums.shape[:2]
    columns = np.concatenate([counts, sums.transpose(1, 0, 2).reshape(units, -1)], axis=1)
    metrics = METRICS if effects.has_head else METRICS[-1:]

    def statistic(totals: np.ndarray) -> np.ndarray:
        scores = totals[:, 2:].reshape(len(totals), variants, len(SCORES))
        with np.errstate(invalid="ignore", divide="ignore"):  # a draw without targets has no loss
            loss, kl, agree = (scores[..., column] / totals[:, :1] for column in range(3))
            state = scores[..., 3] / totals[:, 1:2]
        found = {"loss": loss, "loss_change": loss - loss[:, :1], "kl": kl, "agreement": agree, "state_change": state}
        return np.stack([found[metric] for metric in metrics], axis=-1).reshape(len(totals), -1)

    values, errors = bootstrap(columns, setting.unit_keys[filled.numpy()], statistic, setting.seed)
    width = len(metrics)
    paired = [errors[start : start + width] for start in range(0, len(errors), width)]
    targets, tokens = (int(total) for total in counts.sum(0))
    return Measured(values.reshape(variants, width), paired, metrics, targets, tokens, units)


def fixed_order(view: View) -> str | None:
    """Why a model's layers cannot be run in another order; None when they can."""
    try:
        with edits.order(view, range(view.num_layers)):
            return None
    except InputError as error:
        return str(error)


def evaluation_rows(effects: Effects, setting: Setting, variants: Sequence[Variant], probe: str) -> Iterator[Row]:
    """How many layers each sequence went through, and how many more it would have gone through without sharing."""
    naive = planned_evaluations(variants, setting.view.num_layers)[1]
    done = effects.layers_run / max(effects.batches, 1)
    count = len(setting.edit_sequences)
    common = {"metric": "layer_evaluations", "unit": "layers", "edit": probe, "n": count, "layer": 0}
    common |= {"layer_to": setting.view.num_layers - 1, "documents": setting.units}
    yield Row(value=done, variant="done", **common)
    yield Row(value=naive - done, variant="saved", **common)


@dataclass(frozen=True, slots=True, eq=False)
class Recovered:
    """What share of an edit's cost training takes back [cases], with errors; and the errors of the costs themselves."""

    values: np.ndarray
    errors: list[Error | None]
    costs: list[Error | None]

    @property
    def cases(self) -> int:
        """Edited models that there is a direct cost of."""
        return len(self.values)

    def row(self, at: int, like: Row, reason: str | None) -> Row:
        """The row of the edited model number `at`, counted from 1; reason: why there is no cost after training."""
        row, cost = replace(like, metric="recovered"), self.costs[at - 1]
        if reason is None and (cost is None or not cost.low > 0):
            reason = "the cost before training is not above its error, so no share of it can be told"
        return row.measured(float(self.values[at - 1]), self.errors[at - 1]) if reason is None else row.missing(reason)


def recovered(before: np.ndarray, after: np.ndarray, keys: np.ndarray, seed: int) -> Recovered:
    """1 - cost after training / cost before it, a cost being the loss above the unedited model's; 1: all is back.

    before, after [units, 1 + cases]: sums of what is lost, the unedited model's first, trained equally long where the
    edited ones are. Below 0: training has made it worse. Dimensionless, up to 1 or above.
    """
    cases = before.shape[1] - 1

    def statistic(totals: np.ndarray) -> np.ndarray:
        costs = [part[:, 1:] - part[:, :1] for part in (totals[:, : cases + 1], totals[:, cases + 1 :])]
        with np.errstate(invalid="ignore", divide="ignore"):  # a draw without any cost has no share
            return np.concatenate([costs[0], 1 - costs[1] / costs[0]], axis=1)

    values, errors = bootstrap(np.concatenate([before, after], axis=1), keys, statistic, seed)
    return Recovered(values[cases:], errors[cases:], errors[:cases])
