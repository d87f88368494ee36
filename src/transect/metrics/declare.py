"""What a metric says of itself, so that one suite can test the claims of all of them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

Function = TypeVar("Function", bound=Callable)


@dataclass(frozen=True, slots=True)
class Declared:
    """A metric's claims: closed range, unit, symmetry in its first two arguments, and what leaves it unchanged.

    Invariances: `scale` (each argument times its own positive number), `rotate` (all arguments by one orthogonal
    matrix), `rotate_each` (each by its own), `shift` (adding a constant vector to an argument), `order` (of samples).
    """

    range: tuple[float, float]
    unit: str
    symmetric: bool
    invariant: tuple[str, ...]


METRICS: dict[str, tuple[Callable, Declared]] = {}
"""Every declared metric by its function's name."""


def metric(
    *, range: tuple[float, float], unit: str, symmetric: bool, invariant: tuple[str, ...] = ()
) -> Callable[[Function], Function]:
    """Declare a metric; the function itself stays as it is."""

    def register(function: Function) -> Function:
        METRICS[function.__name__] = (function, Declared(range, unit, symmetric, invariant))
        return function

    return register
