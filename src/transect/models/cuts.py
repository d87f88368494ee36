"""What a part of a layer says about how it may be shared among processes that see the same text."""

from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable


@dataclass(frozen=True, slots=True)
class Cuts:
    """Each process has some heads, or some units.

    columns: linear maps cut by their outputs; rows: maps cut by their inputs, whose outputs are sums over processes.
    partial: parameters that stay whole and meet only what this process has, so that their gradients are to be summed.
    together: the part's first input goes to all of `columns` and nowhere else. counts: what the number of processes
    must divide, by the name of the setting. refused: why the part cannot be cut, and what to do; None where it can.
    """

    columns: tuple[str, ...] = ()
    rows: tuple[str, ...] = ()
    partial: tuple[str, ...] = ()
    together: bool = True
    counts: dict[str, int] = field(default_factory=dict)
    refused: str | None = None


@runtime_checkable
class Cuttable(Protocol):
    """A module that says how it is shared; one that does not stays whole in each process."""

    def cuts(self) -> Cuts: ...
