"""Which back end computes a memory: the fastest at the nearest measured shape, or a rule where nothing was measured.

The package comes with measurements of a CPU in float32. Nothing was measured on CUDA until `transect tune --device
cuda` ran on the machine: there the rule holds, which follows from what the back ends do and was never timed.
"""

import functools
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from transect.errors import InputError
from transect.models.memory.backends.tables import eagerly

SHIPPED = Path(__file__).with_name("measured.json")
NEAR = 3.0
"""A measured shape is near if none of its features differs by more than this power of two."""
WEIGHTS = (2, 2, 1, 1, 1)
"""How much each of `Case.features` counts: what a block is matters more than how much there is to do."""
LEAST_KEPT = ("grouped", "gather", "masked", "reference")
"""Back ends by what they keep for the backward pass, the least first."""
TIE = 1.05
FEW = 64
"""(token, block) pairs that are few enough to be fetched one by one."""
PRODUCT = 128
"""On an accelerator a matrix product is made in pieces about so many numbers wide, however narrow a block is."""
LOOPED = 256
"""On an accelerator more blocks than this are not multiplied one after the other."""


class Case(NamedTuple):
    """What a choice depends on; `tokens` rounded to a power of two. kind: `mix`, keys and values; `read`, values."""

    kind: Literal["mix", "read"]
    device: str
    dtype: str
    block_size: int
    blocks: int
    active: int
    width: int
    tokens: int

    @property
    def features(self) -> tuple[float, ...]:
        """Block size, blocks for each active one, active cells, width, tokens."""
        cells = self.active * self.block_size
        return self.block_size, self.blocks / self.active, cells, self.width, self.tokens

    @property
    def shape(self) -> str:
        """All but the tokens, in words."""
        blocks = f"{self.active} of {self.blocks} blocks of {self.block_size} cells"
        return f"{blocks}, width {self.width}, {self.dtype} on {self.device}"

    def __str__(self) -> str:
        return f"{self.shape}, {self.tokens} tokens"


class Measured(NamedTuple):
    """Seconds of each back end at one shape."""

    case: Case
    seconds: dict[str, float]


class Choice(NamedTuple):
    """A back end, and why it."""

    backend: str
    why: str


@dataclass
class Picker:
    """A forced back end, or `auto` with the table to choose from; `chosen` keeps what was decided.

    Without a table it is that of the machine (`find_table`), read at the first choice that needs it.
    """

    backend: str = "auto"
    table: Sequence[Measured] | None = None
    chosen: dict[Case, Choice] = field(default_factory=dict)

    def pick(self, case: Case) -> str:
        """The back end for a case; raises InputError where the user's own table cannot be read."""
        if self.backend != "auto":
            return self.backend
        if case not in self.chosen:
            self.chosen[case] = self._choose(case)
        return self.chosen[case].backend

    @eagerly
    def _choose(self, case: Case) -> Choice:
        return choose(case, find_table() if self.table is None else self.table)


def case_of(kind: Literal["mix", "read"], values: Tensor, active: int, tokens: int) -> Case:
    """The case of a table of values [blocks, block_size, width] read by so many tokens."""
    blocks, size, width = values.shape
    rounded = 1 << max(0, tokens - 1).bit_length()
    dtype = str(values.dtype).removeprefix("torch.")
    return Case(kind, values.device.type, dtype, size, blocks, active, width, rounded)


def choose(case: Case, table: Sequence[Measured]) -> Choice:
    """The fastest back end at the measured shape with the least weighted sum of |log2 ratio|, if near; else by rule.

    Of back ends within 5 % of the fastest, the one that keeps least.
    """
    same = [row for row in table if row.case[:3] == case[:3] and max(_distances(row.case, case)) <= NEAR]
    if not same:
        return Choice(_by_rule(case), "a rule, nothing near was measured")
    nearest = min(same, key=lambda row: _weighted(_distances(row.case, case)))
    limit = TIE * min(nearest.seconds.values())
    fast = [name for name in LEAST_KEPT if nearest.seconds.get(name, math.inf) <= limit]
    return Choice(fast[0], f"measured at {nearest.case}")


def lines(model: nn.Module) -> list[str]:
    """One line for each shape and back end that a model's memories have chosen so far; who runs a model prints them."""
    pickers = [
        held for held in (getattr(module, "picker", None) for module in model.modules()) if isinstance(held, Picker)
    ]
    reasons: dict[tuple[str, str], dict[int, str]] = {}
    for picker in pickers:
        for case, chosen in picker.chosen.items():
            reasons.setdefault((case.shape, chosen.backend), {})[case.tokens] = chosen.why
    return [
        f"sparse FFN, {shape} for {_range(whys)} tokens: {backend} ({whys[max(whys)]})"
        for (shape, backend), whys in reasons.items()
    ]


def _range(counts: Iterable[int]) -> str:
    low, high = min(counts), max(counts)
    return f"{low}" if low == high else f"{low} to {high}"


def user_path() -> Path:
    """Where `tune` leaves this machine's table, by the habit of the platform."""
    from typer import get_app_dir

    return Path(get_app_dir("transect")) / "backends.json"


def find_table() -> tuple[Measured, ...]:
    """The user's own table, where there is one, and the shipped rows of each device and dtype that it lacks.

    Raises InputError where the user's file is no table.
    """
    own = user_path()
    rows = read_table(own) if own.is_file() else ()
    known = {kind_of(row.case) for row in rows}
    return rows + tuple(row for row in read_table(SHIPPED) if kind_of(row.case) not in known)


def read_table(path: Path) -> tuple[Measured, ...]:
    """The table in a file, read once as long as the file stays as it is; raises InputError where it is no table."""
    try:
        return _read(path, path.stat().st_mtime_ns)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is no table of back ends: {error}; write one with `transect tune`") from error


def kind_of(case: Case) -> tuple[str, str]:
    """Device and dtype, what a table is measured for at a time."""
    return case.device, case.dtype


def table_text(rows: Sequence[Measured], about: dict[str, Any]) -> str:
    """The table as JSON, one shape a line; `about` says where and how each device and dtype was measured."""
    shown = ",\n".join("    " + json.dumps(row.case._asdict() | {"seconds": row.seconds}) for row in rows)
    head = "".join(f"  {json.dumps(key)}: {json.dumps(value)},\n" for key, value in about.items())
    return f'{{\n{head}  "rows": [\n{shown}\n  ]\n}}\n'


@functools.lru_cache(maxsize=4)
def _read(path: Path, changed: int) -> tuple[Measured, ...]:
    """`changed` is when the file was, so that a new one is read anew."""
    found = []
    for row in json.loads(path.read_text(encoding="utf-8"))["rows"]:
        seconds = row.pop("seconds")
        if not seconds or not set(seconds) <= set(LEAST_KEPT):
            raise ValueError(f"seconds are of {', '.join(LEAST_KEPT)}")
        if not all(isinstance(value, float) and value > 0 for value in seconds.values()):
            raise ValueError("seconds must be positive numbers")
        found.append(Measured(Case(**row), seconds))
    return tuple(found)


def _distances(one: Case, other: Case) -> list[float]:
    """|log2 ratio| of each feature."""
    return [abs(math.log2(a / b)) for a, b in zip(one.features, other.features, strict=True)]


def _weighted(distances: list[float]) -> float:
    return sum(weight * distance for weight, distance in zip(WEIGHTS, distances, strict=True))


def _by_rule(case: Case) -> str:
    if case.device != "cpu":
        return _by_rule_elsewhere(case)
    if _few(case) or (case.block_size == 1 and 16 * case.active <= case.blocks):
        return "gather"
    return "masked" if 2 * case.active >= case.blocks or case.block_size <= 4 else "grouped"


def _by_rule_elsewhere(case: Case) -> str:
    """The rule for accelerators, unmeasured: a product that is narrower than `PRODUCT` costs as much as a full one.

    Blocks of g cells so cost PRODUCT / g times their share, all B blocks B / b times: the less decides. Single cells
    that are too few for the latter are fetched. Where `grouped_mm` takes no such tables and there are many blocks, all
    of them in large products beat a loop over them.
    """
    if _few(case):
        return "gather"
    if 2 * case.active >= case.blocks or case.blocks * case.block_size <= PRODUCT * case.active:
        return "masked"
    if case.block_size == 1:
        return "gather"
    at_once = case.dtype == "bfloat16" and case.block_size % 8 == case.width % 8 == 0
    return "grouped" if at_once or case.blocks <= LOOPED else "masked"


def _few(case: Case) -> bool:
    return case.tokens * case.active <= FEW
