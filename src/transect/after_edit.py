"""How an edited model is judged beyond the text it is shown: on labelled texts, and after it was trained further."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator

from transect.errors import InputError
from transect.tasks._fine_tune import refusal as untrainable
from transect.tasks._frozen import chosen
from transect.tasks._labelled import SHORTEST, Example
from transect.tasks.base import Subject, data_label
from transect.tasks.fine_tuning import FineTuning
from transect.view.view import View

AFTER = ("direct", "continued")


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """What an edited model is trained and judged on, and how.

    data: a labelled data set, a name or a YAML file, whose files are looked for in `folder`; without one the model's
    own loss on the documents that are not scored. after_edit: `direct`, no training after the edit, which only labelled
    data have to offer; `continued`, training under the edit, by AdamW with eps 1e-6, decay 0.01 of matrices, clip 1.0
    and a rate that rises over the first 10 % of all steps to `lr` and falls in a line to 0. epochs: over labelled data,
    of the first fine-tuning and of each training after an edit. steps: of training on text. batch_size: items or
    sequences a step. train_items, test_items: so many labelled records, drawn by a hash of their texts. length: most
    tokens of one. freeze: parts that no training moves: `ffn:3`, `attn:3`, `layer:3`, `embeddings`.
    Source: arXiv 2101.04547, fine-tuning; training on text, and so `steps`, is ours. Raises InputError for values out
    of range.
    """

    data: str | None = None
    folder: str | None = None
    after_edit: str = "continued"
    epochs: int = 3
    steps: int = 100
    lr: float = 2e-5
    batch_size: int = 64
    train_items: int | None = None
    test_items: int | None = None
    length: int = 128
    freeze: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.after_edit not in AFTER:
            raise InputError(f"transfer: after_edit is {self.after_edit!r}; allowed are {', '.join(AFTER)}")
        if self.data is None and not self.continued:
            raise InputError(
                "transfer: without data, direct costs are there anyway; give data, or after_edit: continued"
            )
        for name in ("epochs", "steps", "batch_size", "train_items", "test_items"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"transfer: {name} is {value}; it is 1 or more")
        if not self.lr > 0:
            raise InputError(f"transfer: lr is {self.lr}; it is above 0")
        if self.length < SHORTEST:
            raise InputError(f"transfer: length is {self.length}; it is {SHORTEST} or more")

    @property
    def continued(self) -> bool:
        """Whether edited models are trained."""
        return self.after_edit == "continued"

    @property
    def on_text(self) -> bool:
        """Whether it is the model's own loss on text that edited models are trained on."""
        return self.data is None

    @property
    def label(self) -> str | None:
        """What rows call the labelled data."""
        return None if self.data is None else data_label(self.data)

    def refusal(self, view: View) -> str | None:
        """Why this model cannot be trained so; None when it can. Raises InputError for a frozen part it lacks."""
        chosen(view, self.freeze, norms_only=False)
        if self.on_text and not view.has_head:
            return f"{view.name} has no head, so it has no loss to be trained on; give transfer labelled data"
        if not self.on_text and view.tokenizer is None:
            return f"{view.name} has no tokenizer, and labelled data are text; load it with one"
        limit = view.max_positions
        if not self.on_text and limit is not None and self.length > limit:
            return f"transfer.length is {self.length}; {view.name} takes up to {limit} tokens"
        return untrainable(view)

    def examples(self, view: View, seed: int) -> tuple[list[Example], list[Example], tuple[str, ...]]:
        """Training and test examples, which share neither texts nor groups, and the names of classes.

        Raises InputError for an unknown data set, files that are not there, records without labels, one class alone.
        """
        assert self.data is not None
        task = FineTuning(
            data=self.data, limit_training=self.train_items, limit_test=self.test_items, length=self.length
        )
        folders = () if self.folder is None else (Path(self.folder),)
        parts = task.parts(Subject(view=view, folders=folders, seed=seed))
        return [*parts.training, *parts.held_out], parts.test, parts.classes


def _known(given: Any) -> Any:
    """Refuse options that there are not, which a plain dataclass would pass over."""
    if isinstance(given, Mapping):
        known = [field.name for field in fields(Transfer)]
        for name in given:
            if name not in known:
                close = difflib.get_close_matches(str(name), known, n=1)
                hint = f"; did you mean {close[0]!r}?" if close else ""
                raise InputError(f"transfer has no option {name!r}; its options are {', '.join(known)}{hint}")
    return given


TransferOption = Annotated[Transfer | None, BeforeValidator(_known)]
"""The option as a probe has it: None, a Transfer, or a mapping of its options."""
