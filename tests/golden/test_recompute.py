"""Layers that are computed again in the backward pass change no bit, and never what a selector chose."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from own_models import _BASE, BLOCKS, LAYERS, OWN, _cells, _sparse, own_model
from transect.errors import InputError
from transect.models.config import ModelConfig, merged
from transect.models.ffn.sparse import Sparse
from transect.models.heads import TransectForCausalLM, TransectForMaskedLM
from transect.models.memory.memory import Memory
from transect.models.recompute import COSTLY, recomputed
from transect.models.selectors.base import Selector

MODES = ["layer", "cheap"]
TOKENS = (3, 13)

CHOOSING: dict[str, dict[str, Any]] = {
    "avg_k": _sparse("avg_k"),
    "avg_k/norms": _sparse({"kind": "avg_k", "block_score": "max_norm_key"}),
    "switch": _sparse({"kind": "switch", "capacity": 1.0}),
    "switch/by_score": _sparse({"kind": "switch", "capacity": 1.0, "drop": "score", "accept_leak": True}),
    "vanilla_m": _cells("vanilla_m"),
    "lorkm": _cells("lorkm"),
    "pkm": _cells("pkm"),
    "pkm_ffn": _cells("pkm_ffn"),
    "top_k": _sparse("top_k"),
    "top_k/groups": _sparse({"kind": "top_k", "groups": 7, "active_groups": 3}),
    "gshard": _sparse({"kind": "gshard", "accept_leak": True}),
    "expert_choice": _sparse({"kind": "expert_choice", "accept_leak": True}),
    "bias_balanced": _sparse("bias_balanced"),
    "random_router": _sparse("random_router"),
    "rand_hash": _sparse("rand_hash"),
}


def made_of(changes: dict[str, Any], dtype: torch.dtype = torch.float32) -> TransectForCausalLM | TransectForMaskedLM:
    chosen = ModelConfig.parse(merged(_BASE, changes))
    torch.manual_seed(7)
    return (TransectForCausalLM if chosen.causal else TransectForMaskedLM).make(chosen).to(dtype).train()


def ids_of(generator: torch.Generator) -> Tensor:
    return torch.randint(5, 40, TOKENS, generator=generator)


def trained(model: nn.Module, mode: str, **given: Any) -> tuple[Any, list[Tensor | None]]:
    """Output and gradients of one pass, drawn from the same random state each time."""
    model.recompute(mode)
    model.zero_grad()
    torch.manual_seed(11)
    out = model(**given)
    out.loss.backward()
    return out, [one.grad for one in model.parameters()]


def assert_same_bits(model: nn.Module, **given: Any) -> None:
    plain, gradients = trained(model, "none", **given)
    for mode in MODES:
        out, again = trained(model, mode, **given)
        assert torch.equal(out.loss, plain.loss)
        assert out.losses.keys() == plain.losses.keys() and out.stats.keys() == plain.stats.keys()
        for name, number in plain.stats.items():
            assert torch.equal(out.stats[name], number), name
        for own, twin in zip(again, gradients, strict=True):
            assert (own is None) == (twin is None) and (own is None or torch.equal(own, twin))


@pytest.mark.parametrize("name", OWN)
def test_no_bit_changes(name: str, generator: torch.Generator):
    """Every block, kind of FFN and selector; losses, statistics and gradients."""
    ids = ids_of(generator)
    mask = (torch.arange(TOKENS[1]) < torch.tensor([[13], [7], [11]])).long()
    assert_same_bits(own_model(name).train(), input_ids=ids, labels=ids, attention_mask=mask)


@pytest.mark.parametrize("backend", ["reference", "masked", "grouped", "gather"])
@pytest.mark.parametrize("gated", [False, True])
def test_no_bit_changes_with_any_back_end(backend: str, gated: bool, generator: torch.Generator):
    ids = ids_of(generator)
    model = made_of(_sparse("top_k", backend=backend, gated=gated))
    assert_same_bits(model, input_ids=ids, labels=ids)


@pytest.mark.parametrize("name", ["standard", "caa/sparse"])
def test_no_bit_changes_in_half_precision(name: str, generator: torch.Generator):
    ids = ids_of(generator)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same_bits(own_model(name).train(), input_ids=ids, labels=ids)


@pytest.mark.parametrize("name", ["switch", "gshard", "pkm", "expert_choice"])
def test_noise_is_drawn_once(name: str, generator: torch.Generator):
    """Dropout, router noise, chances and the penalty of the stream, all inside the region."""
    ids, jump = ids_of(generator), {"kind": "jump", "strength": 0.5, "final_state": "post_norm"}
    noisy = {"dropout": 0.2, "attention": {"dropout": 0.1}, "penalties": [jump]}
    selector = CHOOSING[name]["ffn"]["selector"]
    selector = {"kind": selector} if isinstance(selector, str) else selector
    model = made_of(merged(CHOOSING[name], {"ffn": {"selector": selector | {"router_noise": 0.3}}} | noisy))
    assert_same_bits(model, input_ids=ids, labels=ids)
    assert "jump" in trained(model, "cheap", input_ids=ids, labels=ids)[0].losses


class Watched:
    """What memories were told, call by call, of selectors that are led astray from their second call on."""

    def __init__(self, model: nn.Module) -> None:
        self.blocks: dict[Memory, list[Tensor]] = {}
        calls: dict[Selector, int] = {}

        def astray(selector: Selector, given: tuple) -> tuple:
            calls[selector] = calls.get(selector, 0) + 1
            noise = torch.randn(given[0].shape, generator=torch.Generator().manual_seed(calls[selector]))
            return (given[0] + (calls[selector] > 1) * 3 * noise.to(given[0].dtype), *given[1:])

        def told(memory: Memory, given: tuple) -> None:
            self.blocks.setdefault(memory, []).append(given[1])

        for part in model.modules():
            if isinstance(part, Selector):
                part.register_forward_pre_hook(astray)
            if isinstance(part, Memory):
                part.register_forward_pre_hook(told)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", CHOOSING)
def test_the_first_choice_holds(name: str, mode: str, dtype: torch.dtype, generator: torch.Generator):
    """Scores that come out otherwise the second time decide nothing any more."""
    model, ids = made_of(CHOOSING[name], dtype), ids_of(generator)
    watched = Watched(model)
    _, gradients = trained(model, mode, input_ids=ids, labels=ids)
    assert len(watched.blocks) == LAYERS
    for first, again in watched.blocks.values():
        assert torch.equal(first, again)
    assert all(one is None or bool(one.isfinite().all()) for one in gradients)


@pytest.mark.parametrize("name", [name for name in CHOOSING if name != "rand_hash"])
def test_without_care_the_choice_would_change(name: str, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch):
    """The control of the test above: a plain checkpoint decides again (or finds that the sizes no longer fit)."""
    plain = lambda run, entering, mode, choosing: checkpoint(run, entering, use_reentrant=False)  # noqa: E731
    monkeypatch.setattr("transect.models.transformer.recomputed", plain)
    model, ids = made_of(CHOOSING[name]), ids_of(generator)
    watched = Watched(model)
    try:
        trained(model, "layer", input_ids=ids, labels=ids)
    except torch.utils.checkpoint.CheckpointError:
        return
    assert any(not torch.equal(first, again) for first, again in watched.blocks.values())


class Counted(nn.Module):
    """Counts its calls."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.calls = inner, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.inner(x)


class Products(TorchDispatchMode):
    """Counts matrix products and attention that are really made."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in COSTLY
        return func(*args, **kwargs or {})


def test_modes_do_what_they_say(generator: torch.Generator):
    """none keeps everything; layer and cheap run activations twice; only layer multiplies matrices again."""
    ids, found = ids_of(generator), {}
    for mode in ("none", *MODES):
        model = made_of({})
        model.recompute(mode)
        for layer in model.model.layers:
            layer.ffn.act = Counted(layer.ffn.act)
        out = model(input_ids=ids, labels=ids)
        with Products() as seen:
            out.loss.backward()
        found[mode] = ([layer.ffn.act.calls for layer in model.model.layers], seen.count)
    assert [calls for calls, _ in found.values()] == [[1] * LAYERS, [2] * LAYERS, [2] * LAYERS]
    assert found["cheap"][1] == found["none"][1] < found["layer"][1]


def test_less_is_kept(generator: torch.Generator):
    """Numbers that autograd holds between the two passes."""
    ids = torch.randint(5, 40, (3, 61), generator=generator)
    held = {}
    for mode in ("none", "layer"):
        model = made_of({"attention": {"window": 5}})
        model.recompute(mode)
        kept: dict[int, int] = {}

        def keep(one: Tensor, kept: dict[int, int] = kept) -> Tensor:
            kept[one.untyped_storage().data_ptr()] = one.untyped_storage().nbytes()
            return one

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda one: one):
            model(input_ids=ids, labels=ids)
        held[mode] = sum(kept.values())
    assert held["layer"] < held["none"] / 2


def test_transformers_switch_means_layer():
    model = made_of({})
    assert not model.model.gradient_checkpointing
    switch = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    switch()
    assert model.model.recompute_mode == "layer"
    model.recompute("cheap")
    assert model.model.gradient_checkpointing
    getattr(model, "activation_checkpointing_disable", model.gradient_checkpointing_disable)()
    assert model.model.recompute_mode == "none"


def test_other_words_are_refused():
    with pytest.raises(InputError, match="recompute is 'all'; give one of none, layer, cheap"):
        made_of({}).recompute("all")


def test_evaluation_keeps_out_of_it(generator: torch.Generator):
    model, ids = own_model("sparse/top_k"), ids_of(generator)
    model.recompute("layer")
    watched = Watched(model)
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(len(calls) == 1 for calls in watched.blocks.values())


@pytest.mark.parametrize("mode", MODES)
def test_a_rule_from_outside_that_uses_torch(mode: str, generator: torch.Generator):
    """What a plug-in picks by torch.topk, sort, argmax or multinomial is kept without its help."""
    seen: list[list[Tensor]] = []

    def run(x: Tensor) -> Tensor:
        x = x * (1 if not seen else -1)  # the opposite order the second time
        wide = x.softmax(-1)
        drawn = torch.multinomial(wide.detach(), 1, generator=torch.Generator().manual_seed(len(seen)))
        picks = [wide.topk(2).indices, wide.sort().indices[:, :2], wide.argmax(1, keepdim=True), drawn]
        seen.append(picks)
        return sum((wide.gather(1, pick).log().sum() for pick in picks), wide.sum())

    x = torch.randn(17, BLOCKS, generator=generator).requires_grad_()
    recomputed(run, x, mode, choosing=True).backward()
    assert len(seen) == 2
    for first, again in zip(*seen, strict=True):
        assert torch.equal(first, again)


def test_every_selector_is_tried():
    import transect.registry as registry

    assert {name.split("/")[0] for name in CHOOSING} == set(registry.available("transect.models.selectors"))
    assert Sparse.Config().selector.kind in CHOOSING
