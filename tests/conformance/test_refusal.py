"""What cannot be proven is refused, with the module path, the identity and the residual; nothing is guessed."""

import re
import types

import pytest
import torch
from transformers import AutoModelForMaskedLM

from families import family, random_ids, tiny_model
from transect.errors import InputError
from transect.view.layout import Tap
from transect.view.sites import NEXT
from transect.view.view import View
from transect.view.walk import OrderError

RESIDUAL = r"residual \d\.?\d*(e[+-]\d+)?, allowed 1e-10"

# family, site, wrong tap, where the message must point, the identity it must state
BROKEN = {
    "FFN output before its last linear map": (
        "llama", "ffn_out", Tap("mlp.gate_proj", "in", 0), r"model\.layers\.0\.mlp\.gate_proj",
        r"resid\[l\+1\] = resid_mid \+ ffn_out",
    ),
    "FFN output at its first linear map": (
        "gpt2", "ffn_out", Tap("mlp.c_fc", "out"), r"transformer\.h\.0\.mlp\.c_fc",
        r"resid\[l\+1\] = resid_mid \+ ffn_out",
    ),
    "attention output at the norm before it": (
        "gpt2", "attn_out", Tap("ln_1", "out"), r"transformer\.h\.0\.ln_1", r"resid_mid = resid \+ attn_out",
    ),
    "middle of the stream at the input of the layer": (
        "gpt2", "resid_mid", Tap("ln_1", "in", 0), r"transformer\.h\.0", r"resid_mid = resid \+ attn_out",
    ),
    "attention output with a wrong scale": (
        "granite", "attn_out", Tap("self_attn.o_proj", "out", None, scale=0.81), r"model\.layers\.0\.self_attn\.o_proj",
        r"resid_mid = resid \+ attn_out",
    ),
    "parallel FFN output with a wrong scale": (
        "gpt_neox", "ffn_out", Tap("mlp.dense_4h_to_h", "out", None, scale=1.0001), r"layers\.0\.mlp\.dense_4h_to_h",
        r"resid\[l\+1\] = resid \+ attn_out \+ ffn_out",
    ),
    "post-norm attention output after its norm": (
        "bert", "attn_out", Tap("attention.output.LayerNorm", "out"), r"bert\.encoder\.layer\.0\.attention\.output",
        r"resid_mid = LN\(resid \+ attn_out\)",
    ),
    "sandwich FFN output before its norm": (
        "gemma2", "ffn_out", Tap("mlp.down_proj", "out"), r"model\.layers\.0\.mlp\.down_proj",
        r"resid\[l\+1\] = resid_mid \+ ffn_out",
    ),
    "input of attention before its norm": (
        "llama", "attn_in", Tap("input_layernorm", "in", 0), r"model\.layers\.0\.input_layernorm",
        r"attn_in = LN\(resid\)",
    ),
    "heads of the query only": (
        "gpt2", "heads_out", Tap("attn.c_attn", "in", 0), r"transformer\.h\.0\.attn\.c_proj",
        r"attn_out = c_proj\(heads_out\)",
    ),
    "FFN hidden at the activation of a gated FFN": (
        "llama", "ffn_hidden", Tap("mlp.act_fn", "out"), r"model\.layers\.0\.mlp\.down_proj",
        r"ffn_out = down_proj\(ffn_hidden\)",
    ),
    "stream leaving the layer at its FFN": (
        "gpt2", NEXT, Tap("mlp", "out"), r"transformer\.h\.0", r"resid\[l\+1\] = resid_mid \+ ffn_out",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_broken_adapter_is_refused(case):
    name, site, tap, path, identity = BROKEN[case]
    model = tiny_model(name, torch.float64)
    with pytest.raises(InputError) as refusal:
        View(model, adapter={site: tap})
    message = str(refusal.value)
    assert re.search(path, message)
    assert re.search(identity, message)
    assert re.search(RESIDUAL, message) or "residual inf" in message


def test_right_adapter_is_accepted():
    view = View(tiny_model("gpt2", torch.float64), adapter={"ffn_out": Tap("mlp.dropout", "out")})
    assert view.maps[0].taps["ffn_out"] == Tap("mlp.dropout", "out")


def test_adapter_at_a_module_that_does_not_exist_is_refused():
    with pytest.raises(InputError, match=r"no module for the tap mlp\.nothing\.output"):
        View(tiny_model("gpt2"), adapter={"ffn_out": Tap("mlp.nothing", "out")})


def test_adapter_at_an_argument_that_does_not_exist_is_refused():
    with pytest.raises(InputError, match=r"no tensor at the tap attn\.c_attn\.input\[3\]"):
        View(tiny_model("gpt2"), adapter={"attn_in": Tap("attn.c_attn", "in", 3)})


def test_adapter_for_an_unknown_site_is_refused():
    with pytest.raises(InputError, match="unknown site 'ffn_output'"):
        View(tiny_model("gpt2"), adapter={"ffn_output": Tap("mlp", "out")})


def test_site_that_does_not_reach_the_output_is_refused():
    def forward(self, hidden_states):
        hidden = self.act(self.c_fc(hidden_states))
        return self.dropout(self.c_proj(hidden.detach()))

    model = tiny_model("gpt2")
    for block in model.transformer.h:
        block.mlp.forward = types.MethodType(forward, block.mlp)
    with pytest.raises(InputError, match=r"ffn_\w+\[0\] at transformer\.h\.0\.mlp.* does not reach the output"):
        View(model)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weight_that_is_not_finite_is_refused(value):
    model = tiny_model("gpt2")
    with torch.no_grad():
        model.transformer.h[1].mlp.c_proj.weight[2, 3] = value
    with pytest.raises(InputError, match=r"transformer\.h\.1\.mlp\.c_proj\.weight holds NaN or infinity"):
        View(model)


def adds(model, extra):
    """Make the model's middle layer add something of its own to the stream."""
    block = model.transformer.h[1]
    plain = type(block).forward

    def forward(self, hidden_states, *args, **kwargs):
        return plain(self, hidden_states, *args, **kwargs) + extra(hidden_states)

    block.forward = types.MethodType(forward, block)
    return model


@pytest.mark.parametrize("size", [1.0, 1e-2, 1e-4, 1e-7])
def test_layer_that_adds_something_else_is_refused(size):
    model = adds(tiny_model("gpt2", torch.float64), lambda stream: size * stream.roll(1, dims=-1).sin())
    with pytest.raises(InputError, match=r"layer at h\.1: .* residual of"):
        View(model)


def test_small_addition_that_passes_the_reading_is_caught_by_the_proof():
    model = adds(tiny_model("gpt2"), lambda stream: 1e-4 * stream.roll(1, dims=-1).sin())
    with pytest.raises(InputError, match=r"transformer\.h\.1\.mlp\S* the identity resid\[l\+1\] = .*allowed 1e-05"):
        View(model)


def test_model_without_a_chain_of_layers_is_refused():
    model = tiny_model("gpt2")
    model.transformer.h = torch.nn.ModuleList()
    with pytest.raises(InputError, match="no chain of layers"):
        View(model)


@pytest.mark.parametrize("layers", [3, 5])
def test_layers_in_several_lists_are_refused(layers):
    """Groups of two layers each: a list of groups that are no layers, and two lists of layers."""
    config = family("albert").but(num_hidden_groups=2, inner_group_num=2)(layers)
    with pytest.raises(InputError, match="its layers stand in several lists"):
        View(AutoModelForMaskedLM.from_config(config, dtype=torch.float64))


@pytest.mark.parametrize("frozen", [False, True])
def test_proof_does_not_depend_on_the_gradient_mode(frozen):
    model = tiny_model("gpt2").requires_grad_(not frozen)
    with torch.no_grad():
        view = View(model)
    assert view.proof == View(tiny_model("gpt2")).proof
    assert all(parameter.requires_grad != frozen for parameter in model.parameters())


@pytest.fixture(scope="module")
def gpt2():
    return View(tiny_model("gpt2"))


@pytest.fixture
def ids(generator):
    return random_ids((2, 7), generator)


def test_unknown_site(gpt2, ids):
    with pytest.raises(InputError, match="unknown site 'mlp_out'; sites are resid, "), gpt2.capture(("mlp_out",)):
        gpt2.run(ids)


def test_layer_without_the_site(gpt2):
    with pytest.raises(InputError, match="has no site 'selected': dense FFN"), gpt2.capture(("selected",), [0]):
        pass
    parallel = View(tiny_model("gpt_neox"))
    with (
        pytest.raises(InputError, match=r"layer 2 of .* has no site 'resid_mid': a parallel layer"),
        parallel.capture(("resid_mid",), [2]),
    ):
        pass


def test_layer_out_of_range(gpt2):
    for layer in (3, -1):
        with pytest.raises(InputError, match=f"layer {layer} does not exist"), gpt2.capture(("resid",), [layer]):
            pass


def test_gradient_checkpointing_is_noticed(ids):
    view = View(tiny_model("gpt2"))
    view.model.activation_checkpointing_enable()
    view.model.train()
    with view.capture(("ffn_hidden",)):
        output = view.run(ids)
        with pytest.raises(OrderError, match="gradient checkpointing"):
            output.sum().backward()


def test_site_that_fires_twice_is_noticed(ids):
    view = View(tiny_model("gpt2"))
    mlp = view.layers[1].mlp

    def forward(self, hidden_states):
        hidden = self.act(self.c_fc(hidden_states))
        return self.c_proj(hidden) + self.c_proj(hidden)

    mlp.forward = types.MethodType(forward, mlp)
    with pytest.raises(OrderError, match="layer 1: site 'ffn_hidden' fired twice"), view.capture(("ffn_hidden",)):
        view.run(ids)


def test_site_that_does_not_fire_is_noticed(ids):
    view = View(tiny_model("gpt2"))
    mlp = view.layers[1].mlp
    mlp.forward = types.MethodType(lambda self, hidden: torch.zeros_like(hidden), mlp)
    with pytest.raises(OrderError, match="layer 1: site 'ffn_hidden' did not fire"), view.capture(("ffn_hidden",)):
        view.run(ids)


def test_changed_module_list_is_noticed(ids):
    view = View(tiny_model("gpt2"))
    view.base.h = torch.nn.ModuleList([view.base.h[0], view.base.h[2], view.base.h[1]])
    with pytest.raises(OrderError, match="place 1 is not the one expected"), view.capture(("resid",)):
        view.run(ids)
    view.base.h = torch.nn.ModuleList(list(view.base.h)[:2])
    with pytest.raises(OrderError), view.capture(("resid",)):
        view.run(ids)
