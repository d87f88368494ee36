"""The settings of a training run: how long, how large a step, which optimizer, what is watched and kept."""

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, SerializeAsAny, model_validator

from transect.config import Config, misfit
from transect.models.plug import PlugConfig, chooser

Count = Annotated[int, Field(ge=1)]
OptimizerChoice = Annotated[
    SerializeAsAny[PlugConfig], BeforeValidator(chooser("transect.train.optimizers", "Optimizer", "adamw"))
]


class ScheduleConfig(Config):
    """What the learning rate is multiplied with at a step.

    warmup: steps in a line up to 1, of which the first has 1 / warmup. Then `constant`; `linear` or `cosine` down to
    `final`, reached when `horizon` steps are done, by default all of the run; `wsd`: constant, then linear down to
    `final` over the last `decay` of the horizon. A run that ends before its horizon never completes the decay.
    """

    kind: Literal["constant", "linear", "cosine", "wsd"] = "cosine"
    warmup: Annotated[int, Field(ge=0)] = 0
    horizon: Count | None = None
    final: Annotated[float, Field(ge=0, le=1)] = 0.1
    decay: Annotated[float, Field(gt=0, le=1)] = 0.2


class EvaluationConfig(Config):
    """Language modelling on other text while training: every so many steps, at the first and at the last.

    tokens: at most so many of each domain, whole documents in a fixed order; splits: by default all but `train`.
    """

    every: Count | None = None
    tokens: Count | None = 65_536
    batch_size: Count | None = None
    splits: list[str] | None = None


class ProbeConfig(Config):
    """A probe that measures the model every so many steps, and at the last; options are the probe's own.

    tokens of `split`, of one `domain` or of all, in sequences of seq_len (by default that of the training).
    """

    probe: str
    every: Count
    options: dict[str, Any] = Field(default_factory=dict)
    tokens: Count = 16_384
    split: str = "valid"
    domain: str | None = None
    batch_size: Count = 8


class CheckpointConfig(Config):
    """Checkpoints every so many steps and at the last; the newest `keep_last` stay, and those at steps `keep_at`."""

    every: Count | None = None
    keep_last: Count = 2
    keep_at: list[Count] = Field(default_factory=list)


class TrainConfig(Config):
    """A training run.

    steps or tokens: its length. batch_size: sequences in a step, over all processes; micro_batch: sequences in one
    forward pass of one process, by default all it has. precision: the type of products; weights and optimizer state
    are float32, or float64. compile: `torch.compile` of each layer. recompute: activations that the backward pass
    computes again: `layer` all of a layer, `cheap` all but matrix products and attention. loss_chunk: rows of logits in
    memory at once; 0 is all of them, None chooses. clip: largest norm of the gradient. z_loss: weight of the mean
    squared log-partition of the vocabulary. bad_steps: so many steps in a row with a loss or gradient that is not
    finite, and the run stops; each such step is skipped. target_loss: the run stops when the in-distribution
    validation loss (nats per token, split `valid`) is no higher. track: `wandb`, beside rows and TensorBoard.
    peak_flops: of the device, per second, for MFU where it is not known.
    """

    seed: Annotated[int, Field(ge=0)] = 0
    steps: Count | None = None
    tokens: Count | None = None
    batch_size: Count = 32
    micro_batch: Count | None = None
    optimizer: OptimizerChoice = Field(default="adamw", validate_default=True)  # pyright: ignore[reportAssignmentType]
    schedule: ScheduleConfig = ScheduleConfig()
    clip: Annotated[float, Field(gt=0)] | None = 1.0
    precision: Literal["float32", "bfloat16", "float64"] = "float32"
    compile: bool = False
    recompute: Literal["none", "layer", "cheap"] = "none"
    loss_chunk: Annotated[int, Field(ge=0)] | None = None
    z_loss: Annotated[float, Field(ge=0)] = 0.0
    log_every: Count = 10
    bad_steps: Count = 10
    target_loss: Annotated[float, Field(gt=0)] | None = None
    max_minutes: Annotated[float, Field(gt=0)] | None = None
    evaluation: EvaluationConfig = EvaluationConfig()
    probes: list[ProbeConfig] = Field(default_factory=list)
    checkpoints: CheckpointConfig = CheckpointConfig()
    track: list[Literal["wandb"]] = Field(default_factory=list)
    peak_flops: Annotated[float, Field(gt=0)] | None = None

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if self.steps is not None and self.tokens is not None:
            raise misfit("tokens", self.tokens, "give steps or tokens, not both")
        return self
