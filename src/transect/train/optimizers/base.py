"""What an optimizer is to the training loop."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import nn

from transect.errors import InputError
from transect.models.plug import PlugConfig, plugin_of
from transect.train.optimizers._parameters import Named, trained

Moment = Annotated[float, Field(ge=0, lt=1)]
Group = dict[str, Any]


class OptimizerConfig(PlugConfig):
    """Settings that any optimizer has beside its own.

    lr: the learning rate that the schedule multiplies. weight_decay: of matrices, stacked ones too, and of the head;
    never of biases, norms and learned numbers. decay_embeddings: of lookup tables too, which includes a tied head.
    rates: factors of the learning rate by patterns of parameter names, as in `{"*.selector.*": 0.1}`; the first that
    fits counts. Defaults are nanoGPT's for GPT-2 124M, which decays every matrix and lookup table.
    """

    lr: Annotated[float, Field(gt=0)] = 6e-4
    betas: tuple[Moment, Moment] = (0.9, 0.95)
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    decay_embeddings: bool = True
    rates: dict[str, Annotated[float, Field(ge=0)]] = Field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Taken:
    """Parameters that are treated alike: by which rule, how fast before the schedule, with how much decay."""

    label: str
    names: tuple[str, ...]
    lr: float
    weight_decay: float


class Optimizer(ABC):
    """One or more torch optimizers over all trained parameters of a model, each parameter in exactly one.

    parts are what a checkpoint keeps, by parameter name; their state is tensors only. Everything else follows from the
    settings, which hold whatever a loaded state says. taken tells which parameters are treated how.
    """

    Config: ClassVar[type[OptimizerConfig]]

    def __init__(self, config: OptimizerConfig, model: nn.Module) -> None:
        """The model is where it will be trained, sharded if it will be.

        Raises InputError where nothing is trained, and for a pattern of `rates` that fits no trained parameter.
        """
        self.config = config
        self._factor = 1.0
        self.taken: list[Taken] = []
        parameters = list(trained(model))
        if not parameters:
            raise InputError("the model has no parameter to train; set requires_grad of some")
        for pattern in config.rates:
            if not any(fnmatchcase(item.name, pattern) for item in parameters):
                known = parameters[-1].name
                raise InputError(f"optimizer.rates has {pattern!r}, which fits no trained parameter such as {known}")
        self.parts: list[torch.optim.Optimizer] = self.make(parameters)
        self._own = [[_settings(group) for group in part.param_groups] for part in self.parts]

    @abstractmethod
    def make(self, parameters: list[Named]) -> list[torch.optim.Optimizer]:
        """The parts, over groups that `groups` makes, each parameter in one of them."""

    def groups(self, label: str, parameters: Iterable[Named], lr: float, turned: bool = False) -> list[Group]:
        """Parameter groups for torch: alike in rate and decay, and on one mesh, as fused kernels want them.

        turned: also alike in what their rows are, which each group then says as `transposed`.
        """
        found: dict[tuple, list[Named]] = {}
        for item in parameters:
            mesh = getattr(item.parameter, "device_mesh", None)
            key = (self._pattern(item.name), self._decay(item), turned and item.transposed, mesh)
            found.setdefault(key, []).append(item)
        made = []
        for (pattern, decay, transposed, _), items in found.items():
            rate = lr if pattern is None else lr * self.config.rates[pattern]
            name = label if pattern is None else f"{label} {pattern}"
            self.taken.append(Taken(name, tuple(item.name for item in items), rate, decay))
            group = {"params": [item.parameter for item in items], "lr": rate, "weight_decay": decay}
            made.append(group | ({"transposed": transposed} if turned else {}))
        return made

    def step(self, factor: float) -> None:
        """Change the parameters by their gradients, at learning rates of `factor` times their own."""
        self._factor = factor
        for part, own in zip(self.parts, self._own, strict=True):
            for group, settings in zip(part.param_groups, own, strict=True):
                group.update(settings, lr=settings["lr"] * factor)
            part.step()

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for part in self.parts:
            part.zero_grad(set_to_none=True)

    def rates(self) -> dict[str, float]:
        """Learning rates of the last step by label, for the log; before the first step, those at factor 1."""
        return {group.label: group.lr * self._factor for group in self.taken}

    def _pattern(self, name: str) -> str | None:
        return next((pattern for pattern in self.config.rates if fnmatchcase(name, pattern)), None)

    def _decay(self, item: Named) -> float:
        spared = item.role == "plain" or (item.role == "embedding" and not self.config.decay_embeddings)
        return 0.0 if spared else self.config.weight_decay


def build(config: PlugConfig, model: nn.Module) -> Optimizer:
    """The optimizer that the settings were read for, over the model's trained parameters."""
    assert isinstance(config, OptimizerConfig)
    return plugin_of(config, "transect.train.optimizers", Optimizer)(config, model)  # pyright: ignore[reportAbstractUsage]


def _settings(group: Group) -> Group:
    return {name: given for name, given in group.items() if name != "params"}
