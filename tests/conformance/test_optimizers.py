"""What every registered optimizer owes the training loop and the checkpoints, over models of every kind."""

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from own_models import own_model
from transect import registry
from transect.errors import InputError
from transect.models.memory.memory import Memory
from transect.train.config import TrainConfig
from transect.train.optimizers.base import Optimizer, OptimizerConfig, build

PACKAGE = "transect.train.optimizers"
NAMES = registry.available(PACKAGE)
SETTINGS = {
    **{name: {"kind": name} for name in NAMES},
    "adamw, l2": {"kind": "adamw", "l2": True},
    "muon, keller": {"kind": "muon", "scale": "keller", "adamw_lr": 2e-3, "nesterov": False},
}
MODELS = ("standard", "standard/gated", "sparse/switch", "sparse/pkm", "residual/learned", "caa/sink", "share/two")
every = pytest.mark.parametrize("kind", SETTINGS)
each_model = pytest.mark.parametrize("name", MODELS)


def config_of(kind: str, **more) -> OptimizerConfig:
    """As a recipe gives it."""
    config = TrainConfig.parse({"optimizer": SETTINGS[kind] | {"lr": 0.01} | more}).optimizer
    assert isinstance(config, OptimizerConfig)
    return config


def backward(model: nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 40, (3, 7), generator=generator)
    model(input_ids=ids, labels=ids).loss.backward()


def numbers(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("name", NAMES)
def test_says_what_it_is(name: str):
    kind = registry.load(PACKAGE, name, Optimizer)
    assert kind.Config().kind == name and issubclass(kind.Config, OptimizerConfig)
    assert [part for part in ("Source", "Cost") if part not in (kind.__doc__ or "")] == []
    assert kind.Config.__doc__


@every
def test_settings_survive_yaml(kind: str):
    config = TrainConfig.parse({"optimizer": SETTINGS[kind] | {"rates": {"*.attn.*": 0.5}}})
    assert TrainConfig.parse(config.plain()) == config
    with pytest.raises(InputError, match=r"optimizer\.learning.* is not a setting"):
        TrainConfig.parse({"optimizer": SETTINGS[kind] | {"learning": 1}})


@every
@each_model
def test_each_trained_parameter_is_taken_once(kind: str, name: str):
    model = own_model(name)
    optimizer = build(config_of(kind), model)
    held = [id(p) for part in optimizer.parts for group in part.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters())
    names = [name for group in optimizer.taken for name in group.names]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())


@every
def test_a_tied_table_is_decayed_and_moved_once(kind: str):
    model = own_model("standard")
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    optimizer = build(config_of(kind), model)
    table = model.get_input_embeddings().weight
    held = [group for part in optimizer.parts for group in part.param_groups for p in group["params"] if p is table]
    assert len(held) == 1 and held[0]["weight_decay"] == 0.1
    spared = build(config_of(kind, decay_embeddings=False), model)
    decays = {name: group.weight_decay for group in spared.taken for name in group.names}
    assert decays["model.embeddings.tokens.weight"] == 0 and decays["model.layers.0.attn.q.weight"] == 0.1


@every
@each_model
def test_decay_is_for_matrices_and_tables_alone(kind: str, name: str):
    model = own_model(name)
    decayed = {name for group in build(config_of(kind), model).taken if group.weight_decay for name in group.names}
    wanted = set()
    for path, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            wanted.add(f"{path}.weight")
        if isinstance(module, Memory):
            wanted |= {f"{path}.{table}" for table in ("keys", "up", "values") if getattr(module, table) is not None}
    product_keys = {name for name in dict(model.named_parameters()) if name.endswith((".first", ".second"))}
    assert decayed == (wanted & dict(model.named_parameters()).keys()) | product_keys
    assert name != "sparse/pkm" or product_keys


@every
@each_model
def test_a_step_changes_what_has_a_gradient_and_nothing_else(kind: str, name: str):
    model = own_model(name)
    frozen = [parameter for path, parameter in model.named_parameters() if ".layers.1." in path]
    for parameter in frozen:
        parameter.requires_grad_(False)
    optimizer = build(config_of(kind), model)
    before = numbers(model)
    backward(model)
    moved = {
        name for name, parameter in model.named_parameters() if parameter.grad is not None and parameter.grad.any()
    }
    optimizer.step(1.0)
    after = numbers(model)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    without = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert moved <= changed and changed.isdisjoint(without)
    assert all(bool(parameter.isfinite().all()) for parameter in after.values())
    assert not any(".layers.1." in name for name in changed) and frozen
    optimizer.zero_grad()
    assert all(parameter.grad is None for parameter in model.parameters())


@every
def test_the_factor_is_of_this_step(kind: str):
    model = own_model("sparse/top_k")
    optimizer = build(config_of(kind), model)
    full = optimizer.rates()
    assert full and set(full.values()) <= {0.01, 2e-3}
    before = numbers(model)
    backward(model)
    optimizer.step(0.0)
    assert same(numbers(model), before)
    assert set(optimizer.rates().values()) == {0.0}
    optimizer.step(0.25)
    assert optimizer.rates() == pytest.approx({label: rate / 4 for label, rate in full.items()})
    assert not same(numbers(model), before)


@every
def test_rates_by_pattern(kind: str):
    def step(rates: dict[str, float]) -> tuple[nn.Module, Optimizer]:
        model = own_model("sparse/top_k")
        optimizer = build(config_of(kind, rates=rates), model)
        backward(model)
        optimizer.step(0.5)
        return model, optimizer

    before = numbers(own_model("sparse/top_k"))
    plain, usual = step({})
    changed, optimizer = step({"*.selector.*": 0.0, "*.layers.0.*": 0.5, "*.layers.*": 1.0})
    ends, others = numbers(plain), numbers(changed)
    for name in before:
        moved, other = ends[name] - before[name], others[name] - before[name]
        if ".selector." in name:
            assert not other.any() and moved.any()
        elif ".layers.0." in name:
            torch.testing.assert_close(other, moved / 2, rtol=1e-2, atol=1e-6)
        else:
            torch.testing.assert_close(other, moved, rtol=1e-4, atol=1e-7)  # other matrices in one product
    labels = optimizer.rates()
    assert {label.partition(" ")[2] for label in labels} == {"", "*.selector.*", "*.layers.0.*", "*.layers.*"}
    assert all(rate == 0 for label, rate in labels.items() if label.endswith("*.selector.*"))
    assert {label.partition(" ")[0] for label in labels} == usual.rates().keys()


@every
def test_what_cannot_be_meant_is_refused_in_one_line(kind: str):
    model = own_model("standard")
    with pytest.raises(InputError, match=r"'\*\.router\.\*', which fits no trained parameter") as error:
        build(config_of(kind, rates={"*.router.*": 2.0}), model)
    assert "\n" not in str(error.value)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(InputError, match="no parameter to train"):
        build(config_of(kind), model)
    with pytest.raises(InputError, match=r"optimizer\.lr is 0"):
        config_of(kind, lr=0)


@every
@each_model
def test_state_goes_through_a_checkpoint_by_name(kind: str, name: str):
    """Six steps are equal to the last bit to three, a checkpoint, another process' fresh model, and three."""

    def trained(model: nn.Module, optimizer: Optimizer, steps: range) -> None:
        for step in steps:
            backward(model, step)
            optimizer.step(1 / (1 + step))
            optimizer.zero_grad()

    def freshly(seed: int) -> tuple[nn.Module, Optimizer]:
        model = own_model(name, seed=seed)
        next(iter(model.trunk.layers[0].parameters())).requires_grad_(False)
        return model, build(config_of(kind), model)

    whole, optimizer = freshly(0)
    trained(whole, optimizer, range(6))
    first, before = freshly(0)
    trained(first, before, range(3))
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    saved = get_optimizer_state_dict(first, before.parts, options=options)
    state = {key: value.clone() for key, value in saved.items() if key.startswith("state.")}
    assert state and all(isinstance(value, Tensor) for value in state.values())
    assert {key.split(".", 1)[1].rpartition(".")[0] for key in state} <= dict(first.named_parameters()).keys()

    second, after = freshly(1)
    second.load_state_dict({key: value.clone() for key, value in first.state_dict().items()})
    settings = {key: value for key, value in saved.items() if not key.startswith("state.")}
    set_optimizer_state_dict(second, after.parts, settings | state, options=options)
    trained(second, after, range(3, 6))
    assert same(numbers(second), numbers(whole))


@every
def test_torchs_own_state_goes_round_and_the_settings_stay(kind: str):
    first = own_model("sparse/switch")
    one = build(config_of(kind), first)
    for step in range(2):
        backward(first, step)
        one.step(1.0)
        one.zero_grad()
    second = own_model("sparse/switch")
    second.load_state_dict(first.state_dict())
    other = build(config_of(kind, lr=0.02, weight_decay=0.3), second)
    for part, filled in zip(other.parts, one.parts, strict=True):
        part.load_state_dict(filled.state_dict())
    backward(second)
    other.step(0.5)
    assert {group["lr"] for group in other.parts[0].param_groups} == {0.01}
    assert 0.3 in {group["weight_decay"] for group in other.parts[0].param_groups}


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_every_type_of_weights(kind: str, dtype: torch.dtype):
    model = own_model("sparse/switch", dtype)
    optimizer = build(config_of(kind), model)
    backward(model)
    optimizer.step(1.0)
    assert all(p.dtype == dtype and bool(p.isfinite().all()) for p in model.parameters())


@every
def test_the_loss_falls(kind: str):
    model = own_model("sparse/top_k").train()
    optimizer = build(config_of(kind), model)
    ids = torch.arange(5, 33).view(4, 7)
    losses = []
    for _ in range(30):
        loss = model(input_ids=ids, labels=ids).losses["main"]
        loss.backward()
        optimizer.step(1.0)
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]


def test_the_optimizer_of_the_docs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    page = (Path(__file__).parents[2] / "docs/add_an_optimizer.md").read_text()
    (tmp_path / "sgd.py").write_text(page.split("```python\n")[1].split("```")[0])
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "sgd", raising=False)
    config = TrainConfig.parse({"optimizer": {"kind": "sgd:Sgd", "lr": 0.5, "weight_decay": 0.25, "momentum": 0.0}})
    model = own_model("standard")
    before = numbers(model)
    backward(model)
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    build(config.optimizer, model).step(0.5)
    for name, after in numbers(model).items():
        decay = 0.25 if before[name].ndim > 1 else 0.0
        torch.testing.assert_close(after, before[name] - 0.25 * (gradients[name] + decay * before[name]))
