"""Which objective a model is asked with."""

from typing import Literal

from transect.data.objective import KINDS, Objective
from transect.errors import InputError
from transect.view.view import View

Asked = Literal["auto", "causal", "masked"]


def check_objective(probe: str, asked: str, rate: float) -> None:
    """Refuse unknown names and rates before a model is there."""
    if asked != "auto" and asked not in KINDS:
        raise InputError(f"{probe}: objective {asked!r} is unknown; allowed are auto, {', '.join(KINDS)}")
    if not 0 < rate < 1:
        raise InputError(f"{probe}: mask_rate is {rate}; it lies between 0 and 1")


def objective_for(view: View, probe: str, asked: Asked, mask_id: int | None, rate: float) -> Objective:
    """The objective asked for; `auto` is causal where no position sees a later one, else masked.

    Raises InputError when the id of the mask token is needed and neither given nor known to the tokenizer.
    """
    kind = ("causal" if view.causal else "masked") if asked == "auto" else asked
    if kind == "causal":
        return Objective(kind="causal")
    known = getattr(view.tokenizer, "mask_token_id", None) if mask_id is None else mask_id
    if known is None:
        raise InputError(
            f"{probe}: {view.name} is asked for masked tokens, but no tokenizer names its mask token; "
            f"give --set {probe}.mask_id=ID"
        )
    if not 0 <= known < view.vocab_size:
        raise InputError(f"{probe}: mask_id {known} is out of range; {view.name} has ids 0 to {view.vocab_size - 1}")
    return Objective(kind="masked", mask_id=known, rate=rate)
