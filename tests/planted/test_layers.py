"""Layers whose output is known: by hand, by the equation of the layer, or from a layer of another library."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import FalconConfig, FalconModel, GPTNeoXConfig, GPTNeoXModel

from transect.errors import InputError
from transect.models import ModelConfig, TransectForCausalLM, TransectModel

VOCAB, WIDTH, UNITS, LENGTH = 53, 12, 17, 7
EXPERTS = {"kind": "sparse", "blocks": 5, "active_blocks": 1, "block_size": 3, "selector": "switch"}


def settings(block, layout: str = "pre", **changes) -> ModelConfig:
    given = {
        "vocab_size": VOCAB,
        "width": WIDTH,
        "layers": 1,
        "attention": {"heads": 3},
        "ffn": {"width": UNITS},
        "norm": {"layout": layout},
        "block": block,
        "init": {"std": 0.3, "depth_scaled": False, "rules": {"*bias": {"draw": "normal", "std": 0.3}}},
    }
    return ModelConfig.parse(given | changes)


def model(block, layout: str = "pre", kind=TransectModel, **changes):
    torch.manual_seed(0)
    return kind.make(settings(block, layout, **changes)).double().eval()


def drawn() -> Tensor:
    return torch.randn(2, LENGTH, WIDTH, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


class Watched:
    """A layer's input, output and what its modules made."""

    def __init__(self, made: TransectModel, x: Tensor) -> None:
        self.layer, self.seen, self.given = made.layers[0], {}, {}
        for path, module in self.layer.named_modules():
            module.register_forward_hook(self._keep(path))
        self.out = made(inputs_embeds=x, output_hidden_states=True).hidden_states[1]

    def _keep(self, path: str):
        def hook(_module, inputs, output) -> None:
            self.given[path] = inputs[0]
            self.seen[path] = output if isinstance(output, Tensor) else output[0]

        return hook


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, atol=1e-12, rtol=1e-12)


LAYOUTS = ("pre", "post", "sandwich", "branch", "none")


# --- residual numbers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [0.0, 0.5, 1.0, "learned"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_stream_is_multiplied_before_each_branch_is_added(layout, number):
    made, x = model("standard", layout, residual={"attn": number, "ffn": number}), drawn()
    layer = made.layers[0]
    if number == "learned":
        assert [float(r.number.detach()) for r in (layer.attn_residual, layer.ffn_residual)] == [1.0, 1.0]
        with torch.no_grad():
            layer.attn_residual.number.fill_(0.7)
            layer.ffn_residual.number.fill_(0.7)
    g = 0.7 if number == "learned" else number
    seen = Watched(made, x)
    stream = x
    for part in ("attn", "ffn"):
        residual, branch = getattr(layer, f"{part}_residual"), seen.seen[part]
        entered = residual.norm(stream) if layout in ("pre", "sandwich") else stream
        close(seen.given[part], entered)
        if layout == "sandwich":
            branch = residual.out_norm(branch)
        elif layout == "branch":
            branch = residual.norm(branch)
        stream = g * stream + branch
        stream = residual.norm(stream) if layout == "post" else stream
    close(seen.out, stream)


def test_a_cancelled_residual_leaves_nothing_of_the_stream():
    """A constant branch hides what came in; with half the residual half of it is left."""
    for number, left in ((0.0, 0.0), (0.5, 0.5)):
        made = model("attention_only", "none", residual={"attn": number})
        with torch.no_grad():
            made.layers[0].attn.out.weight.zero_()
        x = drawn()
        moved = made(inputs_embeds=x + 1).last_hidden_state - made(inputs_embeds=x).last_hidden_state
        close(moved, torch.full_like(moved, left))


@pytest.mark.parametrize("block", ["standard", "attention_only", {"kind": "caa", "outer_ratio": 0}, "parallel"])
def test_a_learned_residual_learns(block):
    made = model(block, residual={"attn": "learned", "ffn": "learned"}, kind=TransectForCausalLM)
    ids = torch.arange(2 * LENGTH).view(2, LENGTH)
    made(input_ids=ids, labels=ids).loss.backward()
    numbers = {name: p for name, p in made.named_parameters() if name.endswith("residual.number")}
    assert len(numbers) == (2 if block == "standard" else 1)
    assert all(float(number.grad.abs()) > 1e-6 for number in numbers.values())


# --- attention only ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["none", "gelu", "relu"])
def test_attention_only_is_the_activation_of_attention_added(activation):
    seen = Watched(model({"kind": "attention_only", "activation": activation}, "post"), x := drawn())
    branch = seen.seen["attn.out"]
    branch = {"none": lambda x: x, "gelu": F.gelu, "relu": F.relu}[activation](branch)
    close(seen.seen["attn"], branch)
    close(seen.out, seen.layer.attn_residual.norm(x + branch))
    assert not any("ffn" in name for name, _ in seen.layer.named_modules())


def test_three_layers_of_attention_have_the_size_of_a_standard_layer_with_a_wide_ffn():
    """BERT-small: 18 attention layers for 6 standard ones, 12 d^2 each."""
    plain = {"attention": {"heads": 3, "bias": False}, "ffn": {"bias": False}, "norm": {"layout": "none"}}
    standard, three = model("standard", **plain), model("attention_only", layers=3, **plain)
    count = [sum(p.numel() for p in made.layers.parameters()) for made in (standard, three)]
    assert count[0] == count[1] == 12 * WIDTH**2


# --- parallel ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norms", ["one", "two"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_parallel_branches_read_the_same_stream(layout, norms):
    if (layout, norms) == ("post", "two"):
        with pytest.raises(InputError, match=r"block\.norms is 'two'"):
            settings({"kind": "parallel", "norms": norms}, layout)
        return
    seen = Watched(
        model({"kind": "parallel", "norms": norms}, layout, residual={"attn": 0.5, "ffn": 0.5}), x := drawn()
    )
    first = seen.layer.attn_residual
    second = seen.layer.ffn_residual or first
    attn, ffn = seen.seen["attn"], seen.seen["ffn"]
    inside = layout in ("pre", "sandwich")
    close(seen.given["attn"], first.norm(x) if inside else x)
    close(seen.given["ffn"], second.norm(x) if inside else x)
    if norms == "one":
        outer = {"sandwich": first.out_norm, "branch": first.norm}.get(layout, lambda x: x)
        added = outer(attn + ffn)
    else:
        names = {"sandwich": "out_norm", "branch": "norm"}
        outer = [getattr(r, names[layout]) if layout in names else (lambda x: x) for r in (first, second)]
        added = outer[0](attn) + outer[1](ffn)
    wanted = 0.5 * x + added
    close(seen.out, first.norm(wanted) if layout == "post" else wanted)


def copied(ours: TransectModel, state: dict[str, Tensor], names: dict[str, str]) -> TransectModel:
    """Ours with another model's weights, by the names of its modules."""
    mine = {f"{our}.{kind}": state[f"{name}.{kind}"] for our, name in names.items() for kind in ("weight", "bias")
            if f"{name}.{kind}" in state}  # fmt: skip
    assert set(mine) == set(ours.state_dict())
    ours.load_state_dict(mine)
    return ours


def test_parallel_with_two_norms_is_a_model_of_gpt_neox():
    config = GPTNeoXConfig(
        vocab_size=VOCAB,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=UNITS,
        use_parallel_residual=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5},
    )
    torch.manual_seed(1)
    theirs = GPTNeoXModel(config).double().eval()
    state = noised(theirs)
    names = {"embeddings.tokens": "embed_in", "final_norm": "final_layer_norm"}
    for layer in range(2):
        to, source = f"layers.{layer}", f"layers.{layer}.attention"
        for kind in ("weight", "bias"):
            parts = state[f"{source}.query_key_value.{kind}"].unflatten(0, (3, 3, 8)).unbind(1)
            state |= {f"{source}.{name}.{kind}": part.flatten(0, 1) for name, part in zip("qkv", parts, strict=True)}
        names |= {f"{to}.attn.{name}": f"{source}.{name}" for name in "qkv"} | {f"{to}.attn.out": f"{source}.dense"}
        names |= {f"{to}.attn_residual.norm": f"{to}.input_layernorm", f"{to}.ffn.up": f"{to}.mlp.dense_h_to_4h"}
        names |= {
            f"{to}.ffn_residual.norm": f"{to}.post_attention_layernorm",
            f"{to}.ffn.down": f"{to}.mlp.dense_4h_to_h",
        }
    ours = model({"kind": "parallel", "norms": "two"}, width=24, layers=2, rotary={"fraction": 0.5})
    same_as(theirs, copied(ours, state, names))


def test_parallel_with_one_norm_is_a_model_of_falcon():
    config = FalconConfig(
        vocab_size=VOCAB,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        ffn_hidden_size=UNITS,
        parallel_attn=True,
        new_decoder_architecture=False,
        multi_query=True,
        bias=False,
        alibi=False,
    )
    torch.manual_seed(1)
    theirs = FalconModel(config).double().eval()
    state = noised(theirs)
    names = {"embeddings.tokens": "word_embeddings", "final_norm": "ln_f"}
    for layer in range(2):
        to, from_ = f"layers.{layer}", f"h.{layer}"
        fused = state[f"{from_}.self_attention.query_key_value.weight"].split([24, 8, 8])
        state |= {f"{from_}.{name}.weight": part for name, part in zip("qkv", fused, strict=True)}
        names |= {f"{to}.attn.{name}": f"{from_}.{name}" for name in "qkv"}
        names |= {
            f"{to}.attn.out": f"{from_}.self_attention.dense",
            f"{to}.attn_residual.norm": f"{from_}.input_layernorm",
        }
        names |= {f"{to}.ffn.up": f"{from_}.mlp.dense_h_to_4h", f"{to}.ffn.down": f"{from_}.mlp.dense_4h_to_h"}
    attention = {"heads": 3, "kv_heads": 1, "bias": False}
    ours = model("parallel", width=24, layers=2, attention=attention, ffn={"width": UNITS, "bias": False})
    same_as(theirs, copied(ours, state, names))


def noised(theirs: nn.Module) -> dict[str, Tensor]:
    """Its weights, none of them 0 or 1 any more."""
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return dict(theirs.state_dict())


def same_as(theirs: nn.Module, ours: TransectModel) -> None:
    """Rotary angles and softmax are in float32 there."""
    ids = torch.randint(VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(2))
    wanted, found = (made(input_ids=ids).last_hidden_state for made in (theirs, ours))
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


# --- a mixture before the FFN ------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["before", "parallel"])
@pytest.mark.parametrize("layout", ["pre", "post"])
def test_the_mixture_has_a_sublayer_of_its_own_or_shares_the_ffns(layout, place):
    seen = Watched(model({"kind": "moe_before_ffn", "moe": EXPERTS, "place": place}, layout), x := drawn())
    layer, pre = seen.layer, layout == "pre"

    def added(residual: nn.Module, stream: Tensor, branch: Tensor) -> Tensor:
        return stream + branch if pre else residual.norm(stream + branch)

    middle = added(layer.attn_residual, x, seen.seen["attn"])
    entered = layer.ffn_residual.norm(middle) if pre else middle
    close(seen.given["ffn"], entered)
    if place == "before":
        second = added(layer.ffn_residual, middle, seen.seen["ffn"])
        close(seen.given["ffn2"], layer.ffn2_residual.norm(second) if pre else second)
        close(seen.out, added(layer.ffn2_residual, second, seen.seen["ffn2"]))
    else:
        close(seen.given["ffn2"], entered)
        close(seen.out, added(layer.ffn_residual, middle, seen.seen["ffn"] + seen.seen["ffn2"]))


def test_the_papers_mixture_by_default():
    """64 blocks as wide as the stream, one active, the best by a softmax over all, balance 0.01."""
    made = model("moe_before_ffn", kind=TransectForCausalLM)
    layer = made.model.layers[0]
    assert layer.ffn.memory.values.shape == (64, WIDTH, WIDTH) and layer.ffn.active == 1
    assert layer.ffn2.up.out_features == UNITS
    ids = torch.arange(2 * LENGTH).view(2, LENGTH)
    output = made(input_ids=ids, labels=ids)
    assert set(output.losses) == {"main", "balance"}
    x = torch.randn(LENGTH, WIDTH, dtype=torch.float64)
    chosen = layer.ffn.selector(x, layer.ffn.memory)
    logits = x @ layer.ffn.selector.router.weight.T
    close(chosen.weights[:, 0], logits.softmax(-1).max(-1).values)
    assert torch.equal(chosen.blocks[:, 0], logits.argmax(-1))
    torch.testing.assert_close(0.01 * float(output.stats["layers.0.balance"]), float(output.losses["balance"].detach()))


def test_two_sparse_ffns_of_a_layer_keep_their_losses_apart():
    made = model({"kind": "moe_before_ffn", "moe": EXPERTS}, ffn=EXPERTS, kind=TransectForCausalLM)
    ids = torch.arange(2 * LENGTH).view(2, LENGTH)
    output = made(input_ids=ids, labels=ids)
    assert set(output.losses) == {"main", "balance", "ffn2.balance"}


# --- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("block", "path"),
    [
        ({"kind": "parallel", "norms": "three"}, "block.norms"),
        ({"kind": "attention_only", "activation": "tanh"}, "block.activation"),
        ({"kind": "moe_before_ffn", "moe": {"kind": "dense", "multiple": 0.3}}, "block.moe.multiple"),
        ({"kind": "moe_before_ffn", "moe": "densest"}, "block.moe"),
        ("paralel", "block"),
    ],
)
def test_mistakes_are_one_line_with_the_path(block, path):
    with pytest.raises(InputError) as refusal:
        settings(block)
    assert str(refusal.value).startswith(f"{path} ") and "\n" not in str(refusal.value)


def test_a_parallel_layer_has_one_residual():
    with pytest.raises(InputError, match=r"residual\.ffn is 1\.0"):
        settings("parallel", residual={"attn": 0.5})
