"""Language modelling on the evaluation splits while training: nats per token and bits per byte by domain."""

import math
from collections.abc import Sequence

import numpy as np
import torch

from transect.data.corpus import Corpus
from transect.data.evaluation import EvaluationText
from transect.errors import InputError
from transect.metrics.errors import bootstrap
from transect.models.build import LanguageModel
from transect.models.loss import LossRule
from transect.recipes.recipe import Recipe
from transect.results import Row
from transect.train.distributed.world import World
from transect.train.step import autocast

VALID = "valid"


class Evaluation:
    """The evaluation text of a run, cut once, read by the model as often as asked."""

    def __init__(self, corpus: Corpus, recipe: Recipe, world: World) -> None:
        config = recipe.train.evaluation
        self.world, self.precision = world, recipe.train.precision
        self.rule = LossRule(chunk=recipe.train.loss_chunk)
        self.batch_size = config.batch_size or recipe.train.micro_batch or min(recipe.train.batch_size, 16)
        splits = [name for name in corpus.splits if name != "train"] if config.splits is None else config.splits
        for name in splits:
            if name not in corpus.splits:
                known = ", ".join(corpus.splits)
                raise InputError(f"train.evaluation.splits names {name!r}; {corpus.path} has {known}")
        self.texts = {
            (split, domain): EvaluationText(corpus, split, domain, recipe.data, recipe.model, config.tokens)
            for split in splits
            for domain in corpus.domains(split)
        }

    def rows(self, model: LanguageModel) -> tuple[list[Row], float | None]:
        """Rows of every domain, and the loss over all of `valid` in nats per token; None without that split."""
        rows: list[Row] = []
        nats = tokens = 0.0
        for (split, domain), text in self.texts.items():
            sums = self._sums(model, text)
            rows += domain_rows(split, domain, sums, text.keys)
            if split == VALID:
                nats, tokens = nats + sums[:, 0].sum(), tokens + sums[:, 1].sum()
        loss = float(nats / tokens) if tokens else None
        return rows, loss if loss is not None and math.isfinite(loss) else None

    @torch.no_grad()
    def _sums(self, model: LanguageModel, text: EvaluationText) -> np.ndarray:
        """[documents, 3]: nats, predicted tokens, bytes of these; each process reads its part of the batches."""
        model.eval()
        world = self.world
        nats = torch.zeros(text.documents, dtype=torch.float64)
        counts = torch.zeros(text.documents, dtype=torch.float64)
        batches = text.count(self.batch_size)
        for start in range(0, batches, world.data_size):
            number = start + world.data_rank
            batch = text.batch(min(number, batches - 1), self.batch_size)
            with autocast(world.device, self.precision):
                losses = model(**batch.inputs(world.device), rule=self.rule).token_losses
            if number >= batches:  # all processes run the model equally often
                continue
            found = losses.double().cpu()
            rows = batch.document[:, None].expand_as(batch.predicted)[batch.predicted]
            nats.index_add_(0, rows, found[batch.predicted])
            counts.index_add_(0, rows, torch.ones(len(rows), dtype=torch.float64))
        both = world.sum(torch.stack([nats, counts]).to(world.device)).cpu().numpy()
        return np.column_stack([both[0], both[1], text.bytes])


def domain_rows(
    split: str | None, domain: str, sums: np.ndarray, keys: np.ndarray, variant: str | None = None
) -> list[Row]:
    """nats_per_token and bits_per_byte of one text, with errors over its documents.

    sums [documents, 3]: nats, predicted tokens, bytes of these; keys [documents]: a hash of each.
    """

    def statistic(totals: np.ndarray) -> np.ndarray:
        with np.errstate(invalid="ignore", divide="ignore"):
            per_token = totals[:, 0] / totals[:, 1]
            return np.column_stack([per_token, totals[:, 0] / totals[:, 2] / math.log(2)])

    values, errors = bootstrap(sums, keys, statistic, seed=0)
    named: Sequence[tuple[str, str]] = (("nats_per_token", "nats/token"), ("bits_per_byte", "bits/byte"))
    blanks = [
        Row(
            metric=metric,
            value=0.0,
            unit=unit,
            task="language_modelling",
            split=split,
            domain=domain,
            variant=variant,
            n=int(sums[:, 1].sum()),
            documents=len(sums),
        )
        for metric, unit in named
    ]
    return [
        blank.measured(float(value), error)
        if math.isfinite(value)
        else blank.missing("the model gives NaN or infinity")
        for blank, value, error in zip(blanks, values, errors, strict=True)
    ]
