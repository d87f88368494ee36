"""What a comparison finds: every quantity of every arm at every alignment, and its difference to the baseline."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from transect.comparing.alignment import Alignment
from transect.comparing.arms import Arm
from transect.comparing.quantities import BITS, LANGUAGE, LOSS, VALID, Quantity, whole
from transect.comparing.statistics import Difference, Mean, difference, holm, mean_of

COUNTED_ONCE = "counted once, as {}"


@dataclass(frozen=True, slots=True)
class Finding:
    """One quantity of one arm at one alignment.

    values, reasons: by seed. difference: to the baseline, None for the baseline itself and where there is no value.
    holm: the p value among all arms and quantities of the alignment. repeats: the quantity that says the same.
    """

    alignment: Alignment
    quantity: Quantity
    arm: Arm
    values: dict[int, float]
    reasons: dict[int, str]
    mean: Mean | None
    difference: Difference | None
    baseline: str | None
    repeats: Quantity | None
    holm: float | None = None

    @property
    def verdict(self) -> str | None:
        """better or worse, higher or lower where neither is declared, or no difference shown; None for no test."""
        if self.difference is None or self.difference.mean.error is None:
            return None
        error, value = self.difference.mean.error, self.difference.mean.value
        if error.low <= 0 <= error.high:
            return "no difference shown"
        if not self.quantity.direction:
            return "higher" if value > 0 else "lower"
        return "better" if value * self.quantity.direction > 0 else "worse"


def findings(arms: Sequence[Arm], alignment: Alignment) -> list[Finding]:
    """All findings of an alignment, headlines first; the first arm is the baseline."""
    found = []
    quantities = {quantity for arm in arms for run in arm.runs.values() for quantity in run.curves}
    for quantity in sorted(quantities, key=Quantity.order):
        if not _is_matched(quantity, alignment, quantities):
            found += _of_quantity(quantity, arms, alignment, _repeated(quantity, quantities))
    return _corrected(found)


def _of_quantity(
    quantity: Quantity, arms: Sequence[Arm], alignment: Alignment, repeats: Quantity | None
) -> list[Finding]:
    found: list[Finding] = []
    for arm in arms:
        read = {seed: alignment.value(run, quantity) for seed, run in arm.runs.items()}
        values = {seed: value for seed, (value, _) in read.items() if value is not None}
        reasons = {seed: reason for seed, (_, reason) in read.items() if reason is not None}
        found.append(
            Finding(
                alignment,
                quantity,
                arm,
                values,
                reasons,
                mean=mean_of([values[seed] for seed in sorted(values)]) if values else None,
                difference=difference(values, found[0].values) if found else None,
                baseline=found[0].arm.name if found else None,
                repeats=repeats,
            )
        )
    return found


def _corrected(found: list[Finding]) -> list[Finding]:
    """With Holm's p values: the family is every difference of the alignment that has a p value, each said once."""
    family = [
        number
        for number, one in enumerate(found)
        if one.difference is not None and one.difference.p is not None and one.repeats is None
    ]
    p_values = [one.p for number in family if (one := found[number].difference) is not None and one.p is not None]
    corrected = dict(zip(family, holm(p_values), strict=True))
    return [replace(one, holm=corrected.get(number)) for number, one in enumerate(found)]


def _is_matched(quantity: Quantity, alignment: Alignment, known: set[Quantity]) -> bool:
    """Whether it is the loss that the runs are matched at, and so equal by construction."""
    if alignment.by != "loss" or quantity.task != LANGUAGE or quantity.split != VALID or quantity.variant:
        return False
    return quantity == whole(VALID) or len(_domains(quantity, known)) == 1


def _repeated(quantity: Quantity, known: set[Quantity]) -> Quantity | None:
    """The quantity that this one repeats: nats of the same text; the whole split of a split with one domain."""
    if quantity.task != LANGUAGE:
        return None
    nats = replace(quantity, metric=LOSS, unit="nats/token")
    if quantity.metric == BITS and nats in known:
        return nats
    together = replace(quantity, domain=None)
    return together if quantity.domain and together in known and len(_domains(quantity, known)) == 1 else None


def _domains(quantity: Quantity, known: set[Quantity]) -> set[str | None]:
    return {one.domain for one in known if one.domain and replace(one, domain=None) == replace(quantity, domain=None)}
