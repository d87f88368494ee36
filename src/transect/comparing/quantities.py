"""What is compared: a metric of a task or probe, whether lower is better, what size is worth seeing, its words."""

from dataclasses import dataclass
from typing import Self

from transect.results import Row

LANGUAGE = "language_modelling"
LOSS, BITS = "nats_per_token", "bits_per_byte"
VALID, OOD = "valid", "ood"
_LOWER = frozenset({"nats", "bits", "perplexity"})
_HIGHER = frozenset({"accuracy", "acc", "f1"})
_CHOSEN = ("lr ", "ridge ")
_USUAL = (": option", ": option per character")  # of the rules of scoring options
_SECOND = ("perplexity", "macro_f1")  # metrics that say again what another of their task says
_WORTH_NATS, _WORTH_SHARE = 0.01, 0.02
_UNITS = {"nats/token": " nats", "bits/byte": " bits per byte", "1": ""}


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantity:
    """One number of a model, the same in every run; of language modelling without a domain that of a whole split."""

    metric: str
    unit: str
    probe: str | None = None
    task: str | None = None
    split: str | None = None
    domain: str | None = None
    element: str | None = None
    site: str | None = None
    part: str | None = None
    edit: str | None = None
    layer: int | None = None
    variant: str | None = None

    @classmethod
    def of(cls, row: Row, evaluated: bool = False) -> Self:
        """The quantity of a row; `evaluated` tells language modelling after the training from that of the run itself.

        A part that says what a task chose for this model, such as its learning rate, is no part of what was measured.
        """
        variant = ", ".join(word for word in (row.variant, "evaluated" if evaluated else None) if word)
        part = None if row.part and row.part.startswith(_CHOSEN) else row.part
        return cls(
            metric=row.metric,
            unit=row.unit,
            probe=row.probe,
            task=row.task,
            split=row.split,
            domain=row.domain,
            element=row.element,
            site=row.site,
            part=part,
            edit=row.edit,
            layer=row.layer,
            variant=variant or None,
        )

    @property
    def direction(self) -> int:
        """-1 where lower is better, 1 where higher is, 0 where neither is declared."""
        words = set(self.metric.split("_"))
        return -1 if words & _LOWER else 1 if words & _HIGHER else 0

    @property
    def worth(self) -> float | None:
        """The smallest difference worth seeing, in the quantity's unit: 0.01 nats, 0.02 of accuracies and shares."""
        if self.unit.startswith("nats"):
            return _WORTH_NATS
        share = self.unit == "1" and (self.direction == 1 or self.metric.startswith("share_"))
        return _WORTH_SHARE if share else None

    @property
    def headline(self) -> bool:
        """Whether it is one of the numbers to read first: loss of a whole split, the usual scores of other tasks."""
        if self.task == LANGUAGE:
            return self.domain is None and self.metric == LOSS
        rule = self.variant or ""
        usual = rule.endswith(_USUAL) or (": " not in rule and not rule.endswith(" per token"))
        return self.task is not None and self.layer is None and usual and self.metric not in _SECOND

    @property
    def told(self) -> str:
        """What tells it from other quantities of its metric beside the row's own columns."""
        return ", ".join(word for word in (self.probe, self.variant, self.site, self.part, self.edit) if word)

    @property
    def words(self) -> str:
        """Its name for a reader."""
        names = {VALID: "in-distribution", OOD: "out-of-distribution"}
        name = {LOSS: "loss", BITS: "bits per byte"}.get(self.metric, self.metric.replace("_", " "))
        rest = [self.element, None if self.layer is None else f"layer {self.layer}", *self.told.split(", ")]
        if self.task == LANGUAGE and self.split in names:
            name, rest = f"{names[self.split]} {name}", [self.domain, *rest]
        else:
            task = None if self.task is None else self.task.replace("_", " ")
            rest = [task, self.domain, self.split, *rest]
        inside = ", ".join(word for word in rest if word)
        return f"{name} ({inside})" if inside else name

    @property
    def ending(self) -> str:
        """The unit as it stands behind a number."""
        return _UNITS.get(self.unit, f" {self.unit}")

    def order(self) -> tuple[bool, bool, tuple[str, ...]]:
        """Sorts headlines first, language modelling before the rest."""
        named = (self.task, self.probe, self.metric, self.split, self.domain, self.told, self.element)
        return not self.headline, self.task != LANGUAGE, (*(str(one or "") for one in named), f"{self.layer or 0:04d}")


def whole(split: str, metric: str = LOSS, variant: str | None = None) -> Quantity:
    """Language modelling of a whole split: `valid` over all its tokens, `ood` as the plain mean over its domains."""
    unit = "nats/token" if metric == LOSS else "bits/byte"
    return Quantity(metric=metric, unit=unit, task=LANGUAGE, split=split, variant=variant)
