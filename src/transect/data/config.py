"""The settings of what a training run reads."""

from typing import Annotated

from pydantic import Field

from transect.config import Config


class DataConfig(Config):
    """Text of a run, and how it is cut into sequences; what is predicted is the model's `objective`.

    path: a folder made by `transect data prepare`. seq_len: tokens in a sequence, special ones included; by default the
    model's `max_positions`. across_documents: attention sees other documents packed into the same sequence; off, each
    document of a sequence is read by itself. mask_rate: share of positions that a masked model is asked for (80 % a
    mask token, 10 % a random one, 10 % left). next_sentence: sequences are [CLS] A [SEP] B [SEP], half of them with a B
    from another document, and the model is asked which.
    """

    path: str | None = None
    seq_len: Annotated[int, Field(ge=2)] | None = None
    across_documents: bool = False
    mask_rate: Annotated[float, Field(gt=0, lt=1)] = 0.15
    next_sentence: bool = False
