"""Ablated models by name: which part of which layers goes, and how."""

from dataclasses import dataclass, replace

from transect.effects import BLANK
from transect.results import Row
from transect.view.sites import ELEMENTS, Element, present
from transect.view.view import View


@dataclass(frozen=True, slots=True)
class Case:
    """One ablated model: which part of which layers goes, and how."""

    part: str
    method: str
    schedule: str
    layers: tuple[int, ...]
    head: int | None = None
    weight: float | None = None  # of a residual

    def row(self) -> Row:
        """The columns that say which ablation it is."""
        first, last = self.layers[0], self.layers[-1]
        where = f"{first}" if self.schedule == "single" else f"{first}-{last}"
        head = None if self.head is None else f"head {self.head}"
        return replace(
            BLANK,
            element=self.part,
            part=head,
            variant=f"{self.method}/{self.schedule}",
            edit=" ".join(word for word in (self.method, self.part, where, head) if word),
            layer=first,
            layer_to=None if self.schedule == "single" else last,
        )


def element_of(part: str) -> str:
    """The element that a part is, or is a slice of."""
    return "attn_heads" if part == "head" else part


def has(view: View, layer: int, part: str) -> bool:
    """Whether a layer has the part."""
    return isinstance(present(ELEMENTS[element_of(part)], view.maps[layer]), Element)


def runs(schedule: str, layers: list[int]) -> list[tuple[int, ...]]:
    """The layers ablated together: each alone, all up to each, or all from each on."""
    if schedule == "single":
        return [(layer,) for layer in layers]
    if schedule == "from_below":
        return [tuple(layers[: count + 1]) for count in range(len(layers))]
    return [tuple(layers[start:]) for start in range(len(layers))]


def nothing_left(case: Case, view: View) -> bool:
    """A model without any layer cannot be run."""
    return case.part == "layer" and case.method == "zero" and len(case.layers) == view.num_layers
