"""Probes inside a run: a copy of the model as it is now is measured on held-out text; rows join the run's."""

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from transect.data.corpus import Corpus
from transect.data.dataset import Dataset
from transect.data.of_corpus import from_corpus
from transect.errors import InputError
from transect.measure import run as run_plan
from transect.models.build import LanguageModel, build
from transect.options import made
from transect.plan import make
from transect.probes.base import Probe
from transect.recipes.recipe import Recipe
from transect.results import Row
from transect.train.config import ProbeConfig
from transect.train.distributed.world import World
from transect.train.saved import model_state
from transect.view.view import View


class Probing:
    """The probes of a recipe, each with its text, which is cut once."""

    def __init__(self, corpus: Corpus, recipe: Recipe, world: World) -> None:
        """Raises InputError for a probe, an option, a split or a domain that is not there, before anything runs."""
        self.recipe, self.world = recipe, world
        self.planned: list[tuple[ProbeConfig, Probe, Dataset]] = []
        for place, config in enumerate(recipe.train.probes):
            try:
                probe = made(config.probe, config.options)
                text = from_corpus(corpus, config.split, config.domain, recipe.data, recipe.model, config.tokens)
            except InputError as error:
                raise InputError(f"train.probes.{place}: {error}") from error
            self.planned.append((config, probe, text))

    def due(self, step: int, last: bool) -> list[tuple[ProbeConfig, Probe, Dataset]]:
        """The probes to run after so many steps."""
        return [one for one in self.planned if step and (last or step % one[0].every == 0)]

    def check(self) -> None:
        """Raise InputError now where a probe could not measure the model later."""
        if self.planned and self.world.is_main:
            view = self._view(build(self.recipe.model))
            for config, probe, text in self.planned:
                make(view, [probe], text, config.batch_size, self.recipe.train.seed)

    def rows(self, model: LanguageModel, due: Sequence[tuple[ProbeConfig, Probe, Dataset]]) -> list[Row]:
        """Measure the model; processes other than the first only give their part of the weights and wait."""
        if not due:
            return []
        state = {name: _whole(tensor) for name, tensor in model_state(model).items()}
        rows: list[Row] = []
        if self.world.is_main:
            copy = build(self.recipe.model)
            left = nn.Module.to(copy, model.dtype).load_state_dict(state, strict=False)
            assert not left.unexpected_keys and set(left.missing_keys) <= set(copy.all_tied_weights_keys)
            view = self._view(copy)
            for config, probe, text in due:
                table = run_plan(make(view, [probe], text, config.batch_size, self.recipe.train.seed))
                rows += [
                    replace(row, split=row.split or config.split, domain=row.domain or config.domain) for row in table
                ]
        self.world.barrier()
        return rows

    def _view(self, model: LanguageModel) -> View:
        view = View.load(nn.Module.to(model, self.world.device))
        view.name = self.recipe.name
        return view


def _whole(tensor: Tensor) -> Tensor:
    """A tensor of all processes' parts, on the CPU."""
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole.detach().cpu()
