"""Where runs are compared: at an in-distribution loss, or at steps, FLOPs or seconds, that all of them reach."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from transect.comparing.curves import Place, crossing, read_off
from transect.comparing.quantities import Quantity
from transect.comparing.reading import Run
from transect.errors import InputError

BY = ("loss", "steps", "flops", "seconds")
UNMEASURED = "was not measured"
AUTO = "auto"
_LOOSER = (0.05, 0.10)
_AMOUNTS = {"steps": "steps", "flops": "FLOPs", "seconds": "seconds"}


@dataclass(frozen=True, slots=True)
class Alignment:
    """A loss in nats per token, or steps, FLOPs or seconds, at which every run is read off.

    `name` ends the rows' variant; `main` is false of the looser losses that are there to show how much the choice
    matters; `reason` says why not all runs have it.
    """

    by: str
    name: str
    target: float
    main: bool = True
    reason: str | None = None

    @property
    def words(self) -> str:
        """How it is told to a reader."""
        if self.by == "loss":
            return f"in-distribution loss {self.target:.4g} nats"
        amount = f"{self.target:.3g}" if self.by == "flops" else f"{self.target:,.6g}"
        return f"{_AMOUNTS[self.by]} ({amount})"

    def place(self, run: Run) -> Place:
        """Where the run is there, among its evaluations; raises ValueError where it never is."""
        found = crossing(*self._falling(self._amount(run)))
        if found is None:
            raise ValueError(f"{run.name} is never at {self.words}")
        return found

    def value(self, run: Run, quantity: Quantity) -> tuple[float | None, str | None]:
        """The quantity of the run there, or why there is none."""
        curve = run.curves.get(quantity)
        if curve is None:
            return None, f"{run.name} {UNMEASURED}"
        # A checkpoint that was evaluated later stands between evaluations of the run itself.
        amount = np.interp(curve.steps, run.steps, self._amount(run))
        place = crossing(*self._falling(amount))
        if place is None:
            return None, f"no measurements of {run.name} lie on both sides of {self.words}"
        return read_off(curve.values, place), None

    def _amount(self, run: Run) -> np.ndarray:
        return amount_of(run, self.by)

    def _falling(self, amount: np.ndarray) -> tuple[np.ndarray, float]:
        return (amount, self.target) if self.by == "loss" else (-amount, -self.target)


def amount_of(run: Run, by: str) -> np.ndarray:
    """The run's loss, steps, FLOPs or seconds at each of its evaluations."""
    return getattr(run, by)


def alignments(runs: Sequence[Run], by: Sequence[str], at_loss: float | str = AUTO) -> list[Alignment]:
    """The alignments asked for; at the lowest loss that all runs reach also those 0.05 and 0.10 nats above it.

    Raises InputError for another quantity, runs that have none in common, and a loss that not all runs pass.
    """
    unknown = [one for one in by if one not in BY]
    if unknown or not by:
        given = repr(unknown[0]) if unknown else "empty"
        raise InputError(f"--by is {given}; it must be of {', '.join(BY)}, as in --by loss,steps")
    if at_loss != AUTO and "loss" not in by:
        raise InputError(f"--at-loss {at_loss} means nothing with --by {','.join(by)}; add loss to --by")
    found = []
    for one in dict.fromkeys(by):
        found += _at_loss(runs, at_loss) if one == "loss" else [_at_amount(runs, one)]
    return found


def _at_loss(runs: Sequence[Run], at_loss: float | str) -> list[Alignment]:
    low = max(float(run.loss.min()) for run in runs)
    high = min(float(run.loss[0]) for run in runs)
    if low > high:
        late = _named(run for run in runs if run.loss[0] < low)
        short = _named(run for run in runs if run.loss.min() > high)
        why = f"{short} never get below {low:.4g} nats, {late} start below it (a tenth into the run)"
        raise InputError(f"no in-distribution loss is common to all runs: {why}; leave these out or train longer")
    if at_loss != AUTO:
        return [Alignment("loss", "equal loss", _checked(runs, at_loss, low, high))]
    found = [Alignment("loss", "equal loss", low)]
    for more in _LOOSER:
        beyond = _named(run for run in runs if run.loss[0] < low + more)
        why = f"{beyond} starts below {low + more:.4g} nats" if beyond else None
        found.append(Alignment("loss", f"equal loss +{more:.2f}", low + more, main=False, reason=why))
    return found


def _checked(runs: Sequence[Run], at_loss: float | str, low: float, high: float) -> float:
    try:
        target = float(at_loss)
    except ValueError:
        target = float("nan")
    if not np.isfinite(target):
        raise InputError(f"--at-loss is {at_loss!r}; give nats per token, as in --at-loss 3.4, or {AUTO}")
    short = [f"{run.name} only gets down to {run.loss.min():.4g}" for run in runs if run.loss.min() > target]
    late = [f"{run.name} starts at {run.loss[0]:.4g}" for run in runs if run.loss[0] < target]
    if short or late:
        why = ", ".join([*short, *late])
        raise InputError(f"--at-loss {target:g}: {why}; all runs pass the losses from {low:.4g} to {high:.4g}")
    return target


def _at_amount(runs: Sequence[Run], by: str) -> Alignment:
    for run in runs:
        if not np.isfinite(amount_of(run, by)).all():
            raise InputError(f"the rows of {run.path} do not say {_AMOUNTS[by]}; leave {by} out of --by")
    target = min(float(amount_of(run, by)[-1]) for run in runs)
    late = _named(run for run in runs if amount_of(run, by)[0] > target)
    if late:
        short = _named(run for run in runs if amount_of(run, by)[-1] == target)
        why = f"{short} ends at {target:,.6g}, where {late} is not a tenth into the run"
        raise InputError(f"no number of {_AMOUNTS[by]} is common to all runs: {why}; leave one of them out")
    return Alignment(by, f"equal {_AMOUNTS[by]}", target)


def _named(runs: Iterable[Run]) -> str:
    return ", ".join(sorted(run.name for run in runs))
