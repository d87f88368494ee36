"""How far a run has come, as its checkpoints keep it."""

from dataclasses import asdict, dataclass
from typing import Any, Self


@dataclass(slots=True)
class Progress:
    """What was done up to the end of step `step`, over all processes and all sittings of the run.

    seconds: spent in steps, without evaluation, probes and writing. flops: of the model as `budget` counts them,
    forward and backward. skipped: steps whose loss or gradient was not finite; bad: how many of these there were in a
    row, up to now. loss: the last in-distribution validation loss, nats per token. owed: whether the evaluation and the
    probes that are due at this step were put off, as the run was being stopped.
    """

    step: int = 0
    samples: int = 0
    tokens: int = 0
    seconds: float = 0.0
    flops: float = 0.0
    skipped: int = 0
    bad: int = 0
    loss: float | None = None
    owed: bool = False

    def plain(self) -> dict[str, Any]:
        """Numbers for a JSON file."""
        return asdict(self)

    @classmethod
    def of(cls, plain: dict[str, Any]) -> Self:
        """The progress that `plain` wrote."""
        return cls(**plain)
