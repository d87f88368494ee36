"""Checkpoints of edited models against the temporary edits, to the last bit; refusals leave nothing behind."""

import copy
import errno
import functools
import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel

from families import FAMILIES, HEADS, random_ids, tiny_model
from transect.errors import InputError
from transect.view import commit as commit_module
from transect.view import edits
from transect.view.commit import Changes, Removal, commit
from transect.view.load import align
from transect.view.view import View

Nested = Callable[[View, ExitStack], object]
"""The same edit, made with the context managers and their own numbers."""

EDITS: dict[str, tuple[Changes, Nested]] = {
    "ffn": (Changes(removed=(Removal("ffn", 1),)), lambda v, s: s.enter_context(edits.remove(v, "ffn", 1))),
    "attn": (Changes(removed=(Removal("attn", 1),)), lambda v, s: s.enter_context(edits.remove(v, "attn", 1))),
    "head": (Changes(removed=(Removal("head", 1, 2),)), lambda v, s: s.enter_context(edits.remove(v, "head", 1, 2))),
    "swap": (Changes(swapped=((1, 2),)), lambda v, s: s.enter_context(edits.swap(v, 1, 2))),
    "layer": (Changes(removed=(Removal("layer", 1),)), lambda v, s: s.enter_context(edits.remove(v, "layer", 1))),
    "repeat": (Changes(repeated=((1, 2),)), lambda v, s: s.enter_context(edits.repeat(v, 1, 2))),
    "combination": (
        Changes(
            removed=(Removal("ffn", 1), Removal("attn", 0), Removal("head", 2, 3), Removal("head", 2, 0)),
            swapped=((1, 2),),
            repeated=((1, 2),),
        ),
        lambda v, s: [
            s.enter_context(made())  # one after the other: each counts layers as the ones before left them
            for made in (
                lambda: edits.swap(v, 1, 2),
                lambda: edits.remove(v, "ffn", 2),
                lambda: edits.remove(v, "attn", 0),
                lambda: edits.remove(v, "head", 1, 3),
                lambda: edits.remove(v, "head", 1, 0),
                lambda: edits.repeat(v, 2, 2),
            )
        ],
    ),
}
SHARED = "its layers share their weights"
SWAP_FIRST = Changes(swapped=((0, 1),))


@functools.cache
def view_of(name: str) -> View:
    return View(tiny_model(name), name=name)


def reloaded(view: View, folder: Path) -> PreTrainedModel:
    """The checkpoint by transformers alone, nothing missing in it, computed as the tiny models are."""
    ways = {"attn_implementation": "eager", "experts_implementation": "eager"}
    model, report = type(view.model).from_pretrained(folder, dtype=view.dtype, output_loading_info=True, **ways)
    assert not any(report.values()), report
    align(model)
    return model.eval()


def outputs(model: PreTrainedModel, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids)[0]


def wanted(view: View, nested: Nested, ids: Tensor) -> Tensor:
    with ExitStack() as stack:
        nested(view, stack)
        return outputs(view.model, ids)


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "albert"])
def test_every_family_reloads_to_the_bits_of_the_temporary_edit(name, edit, tmp_path, generator):
    view, (changes, nested) = view_of(name), EDITS[edit]
    done = commit(view, changes, tmp_path / "edited")
    assert [path.name for path in tmp_path.iterdir()] == ["edited"]
    again = reloaded(view, done.folder)
    for length in (1, 11, 29):
        ids = random_ids((3, length), generator)
        expected = wanted(view, nested, ids)
        assert torch.equal(outputs(again, ids), expected)
        assert (expected - outputs(view.model, ids)).abs().max() > 1e-3
    if edit == "combination":
        assert View(again).num_layers == view.num_layers + 1


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("name", ["albert", "albert/two_groups", "albert/two_inner"])
def test_shared_layers_are_refused(name, edit, tmp_path):
    with pytest.raises(InputError, match=rf"^albert cannot express .*{SHARED}.*nothing was written$"):
        commit(view_of(name), EDITS[edit][0], tmp_path / "deep" / "edited")
    assert not any(tmp_path.iterdir())


PLACED = {
    "modernbert": (SWAP_FIRST, "layer 1 cannot stand in place 0: attn_norm would be of type Identity, not LayerNorm"),
    "deepseek_v3": (SWAP_FIRST, "layer 0 cannot stand in place 1: mlp would be of type DeepseekV3MoE"),
    "gpt2/scaled_by_layer": (SWAP_FIRST, "layer 1 cannot stand in place 0: scaling of attn would be"),
}


@pytest.mark.parametrize("name", PLACED)
def test_layers_that_depend_on_their_place_stay_there(name, tmp_path):
    changes, why = PLACED[name]
    with pytest.raises(InputError, match=why):
        commit(view_of(name), changes, tmp_path / "edited")
    assert not any(tmp_path.iterdir())


CONFIGS = {
    "qwen2_moe/mixed": (Changes(swapped=((1, 2),)), {"mlp_only_layers": [2], "decoder_sparse_step": 1}),
    "qwen3_moe/mixed": (Changes(repeated=((0, 2),)), {"mlp_only_layers": [0, 1, 3], "decoder_sparse_step": 1}),
    "deepseek_v3": (Changes(repeated=((0, 2),)), {"first_k_dense_replace": 2, "num_hidden_layers": 4}),
    "deepseek_v3/plain_query": (Changes(removed=(Removal("layer", 0),)), {"first_k_dense_replace": 0}),
    "gpt_neo": (
        Changes(order=(1, 0, 4)),
        {
            "attention_layers": ["local", "global", "global"],
            "attention_types": [[["local"], 1], [["global"], 1], [["global"], 1]],
            "num_layers": 3,
        },
    ),
    "smollm3": (Changes(order=(1, 0, 3, 2, 4)), {"no_rope_layers": [0, 1, 0, 1, 1]}),
    "gemma3_text": (
        Changes(order=(2, 0, 1)),
        {"layer_types": ["full_attention", "sliding_attention", "sliding_attention"]},
    ),
    "gpt2": (Changes(order=(2, 2, 0, 0, 1)), {"n_layer": 5}),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_what_the_config_says_of_each_layer_moves_with_it(name, tmp_path, generator):
    view, (changes, settings) = view_of(name), CONFIGS[name]
    done = commit(view, changes, tmp_path / "edited")
    again = reloaded(view, done.folder)
    assert {key: getattr(again.config, key) for key in settings} == settings
    ids = random_ids((2, 29), generator)
    with edits.order(view, changes.executed(view.num_layers)):
        assert torch.equal(outputs(again, ids), outputs(view.model, ids))


# which weights are silenced, and that no other changes


def silent(weight: Tensor, fill: float = 0.0) -> bool:
    return bool((weight == fill).all())


SILENCED = {
    ("gpt2", "ffn"): {"transformer.h.1.mlp.c_proj.weight": 0.0, "transformer.h.1.mlp.c_proj.bias": 0.0},
    ("gpt2", "attn"): {"transformer.h.1.attn.c_proj.weight": 0.0, "transformer.h.1.attn.c_proj.bias": 0.0},
    ("llama", "ffn"): {"model.layers.1.mlp.down_proj.weight": 0.0},
    ("gemma2", "ffn"): {"model.layers.1.post_feedforward_layernorm.weight": -1.0},
    ("gemma2", "attn"): {"model.layers.1.post_attention_layernorm.weight": -1.0},
    ("olmo2", "ffn"): {"model.layers.1.post_feedforward_layernorm.weight": 0.0},
    ("olmo2", "attn"): {"model.layers.1.post_attention_layernorm.weight": 0.0},
    ("mixtral", "ffn"): {"model.layers.1.mlp.experts.down_proj": 0.0},
    ("gpt_oss", "ffn"): {
        "model.layers.1.mlp.experts.down_proj": 0.0,
        "model.layers.1.mlp.experts.down_proj_bias": 0.0,
    },
    ("qwen2_moe", "ffn"): {
        "model.layers.1.mlp.experts.down_proj": 0.0,
        "model.layers.1.mlp.shared_expert.down_proj.weight": 0.0,
    },
    ("deepseek_v3", "ffn"): {
        "model.layers.1.mlp.experts.down_proj": 0.0,
        "model.layers.1.mlp.shared_experts.down_proj.weight": 0.0,
    },
}


@pytest.mark.parametrize(("name", "part"), SILENCED)
def test_the_silenced_weights_are_the_last_of_the_branch_and_no_others(name, part, tmp_path):
    view, fills = view_of(name), SILENCED[name, part]
    done = commit(view, Changes(removed=(Removal(part, 1),)), tmp_path / "edited")
    assert sorted(done.weights) == sorted(fills)
    new = reloaded(view, done.folder).state_dict()
    for weight, value in view.model.state_dict().items():
        if weight in fills:
            assert silent(new[weight], fills[weight]) and not silent(value, fills[weight])
        else:
            assert torch.equal(new[weight], value), weight


@pytest.mark.parametrize(
    ("name", "weight", "axis"),
    [
        ("gpt2", "transformer.h.1.attn.c_proj.weight", 0),
        ("bert", "bert.encoder.layer.1.attention.output.dense.weight", 1),
    ],
)
def test_a_head_is_the_rows_or_columns_that_read_it(name, weight, axis, tmp_path):
    view = view_of(name)
    done = commit(view, EDITS["head"][0], tmp_path / "edited")
    new, old = reloaded(view, done.folder).state_dict(), view.model.state_dict()
    assert done.weights == (weight,)
    here, there = (state[weight].chunk(HEADS, axis) for state in (new, old))
    for head in range(HEADS):
        assert silent(here[head]) if head == 2 else torch.equal(here[head], there[head])
    assert all(torch.equal(new[other], old[other]) for other in old if other != weight)


def test_repeated_layers_are_copies_of_their_own(tmp_path):
    view = view_of("gpt2")
    again = reloaded(view, commit(view, EDITS["repeat"][0], tmp_path / "edited").folder)
    for first, second in zip(again.transformer.h[1].parameters(), again.transformer.h[2].parameters(), strict=True):
        assert torch.equal(first, second) and first is not second


def test_tied_tables_stay_tied(tmp_path):
    view = view_of("llama/tied")
    again = reloaded(view, commit(view, EDITS["combination"][0], tmp_path / "edited").folder)
    assert again.get_output_embeddings().weight is again.get_input_embeddings().weight


def test_a_weight_that_two_layers_share_is_not_silenced(tmp_path):
    model = tiny_model("llama")
    model.model.layers[2].mlp.down_proj.weight = model.model.layers[1].mlp.down_proj.weight
    with pytest.raises(InputError, match=r"layer 1 shares .*layers\.1\.mlp\.down_proj.* with .*layers\.2"):
        commit(View(model), EDITS["ffn"][0], tmp_path / "edited")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(("name", "dtype"), [("gpt2", "bfloat16"), ("gemma2", "bfloat16"), ("mixtral", "float64")])
def test_other_dtypes(name, dtype, tmp_path, generator):
    changes, nested = EDITS["combination"]
    view = View(tiny_model(name, getattr(torch, dtype)))
    again = reloaded(view, commit(view, changes, tmp_path / "edited").folder)
    ids = random_ids((2, 11), generator)
    assert again.dtype == getattr(torch, dtype) and torch.equal(outputs(again, ids), wanted(view, nested, ids))


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_without_a_head_the_last_states_are_compared(name, tmp_path, generator):
    tiny_model(name).save_pretrained(tmp_path / "whole")
    model = AutoModel.from_pretrained(tmp_path / "whole", attn_implementation="eager")
    view = View(model)
    assert not view.has_head
    changes, nested = EDITS["combination"]
    again = reloaded(view, commit(view, changes, tmp_path / "edited").folder)
    ids = random_ids((2, 11), generator)
    assert torch.equal(outputs(again, ids), wanted(view, nested, ids))


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "qwen2_moe"])
def test_the_view_stays_as_it_was(name, tmp_path, generator):
    view, ids = view_of(name), random_ids((2, 11), generator)

    def state() -> tuple:
        weights = {key: (id(value), value.clone()) for key, value in view.model.named_parameters()}
        hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in view.model.modules())
        return weights, hooks, copy.deepcopy(view.model.config.to_dict()), outputs(view.model, ids)

    before, hooks, config, logits = state()
    commit(view, EDITS["combination"][0], tmp_path / "edited")
    after, hooks_after, config_after, logits_after = state()
    assert (hooks, config) == (hooks_after, config_after) and torch.equal(logits, logits_after)
    for key, (identity, value) in before.items():
        assert after[key][0] == identity and torch.equal(after[key][1], value)


# the order of changes, and what is said of them


ORDERS = {
    "all by their loaded numbers": (Changes(swapped=((1, 4),), repeated=((4, 2),)), (0, 4, 4, 2, 3, 1)),
    "two swaps": (Changes(swapped=((1, 2), (2, 3))), (0, 3, 1, 2, 4)),
    "order first": (Changes(order=(4, 0, 0), swapped=((0, 1),)), (4, 1, 1)),
    "layers last": (Changes(repeated=((2, 3),), removed=(Removal("layer", 2), Removal("ffn", 1))), (0, 1, 3, 4)),
    "repeated no times": (Changes(repeated=((3, 0),)), (0, 1, 2, 4)),
}


@pytest.mark.parametrize("case", ORDERS)
def test_the_order_in_which_changes_are_made(case):
    changes, order = ORDERS[case]
    assert changes.executed(5) == order
    assert changes.words(5).endswith(f"; layers run {' '.join(map(str, order))}")


WRONG = {
    "unknown part": (
        Changes(removed=(Removal("mlp", 0),)),
        "unknown part 'mlp'; parts are attn, ffn, head, expert, layer",
    ),
    "no such expert": (Changes(removed=(Removal("expert", 0, expert=7),)), "has no experts"),
    "part beyond": (Changes(removed=(Removal("ffn", 3),)), "layer 3 does not exist; the model has layers 0 to 2"),
    "negative": (Changes(swapped=((-1, 0),)), "layer -1 does not exist"),
    "head beyond": (Changes(removed=(Removal("head", 0, 4),)), "head is 4; layer 0 has heads 0 to 3"),
    "no head": (Changes(removed=(Removal("head", 0),)), "head is None"),
    "no layer": (Changes(removed=tuple(Removal("layer", layer) for layer in range(3))), "no layer of 0 to 2 is left"),
    "empty order": (Changes(order=()), "no layer of 0 to 2 is left"),
    "negative times": (Changes(repeated=((0, -1),)), "times is -1"),
    "of a layer that is gone": (Changes(removed=(Removal("layer", 1), Removal("ffn", 1))), "layer 1 does not run"),
    "repeat of a layer left out": (Changes(order=(0, 2), repeated=((1, 2),)), "layer 1 does not run"),
    "nothing": (Changes(), "nothing to change"),
    "the same order": (Changes(order=(0, 1, 2)), "nothing to change"),
}


@pytest.mark.parametrize("case", WRONG)
def test_changes_that_do_not_fit(case, tmp_path):
    changes, message = WRONG[case]
    with pytest.raises(InputError, match=message):
        commit(view_of("gpt2"), changes, tmp_path / "deep" / "edited")
    assert not any(tmp_path.iterdir())


def test_the_note_is_read_again_and_kept_by_the_next_edit(tmp_path):
    view = View(tiny_model("gpt2"), name="tiny", revision="r1", notes=("drawn at random",))
    first = commit(view, Changes(removed=(Removal("ffn", 1), Removal("head", 0, 3)), swapped=((1, 2),)), tmp_path / "a")
    words = "edited from tiny (r1): removed ffn 1; removed head 3 of 0; swapped 1 and 2; layers run 0 2 1"
    assert first.note == f"{words}; drawn at random"
    again = View.load(tmp_path / "a")
    assert again.notes == (first.note,) and again.revision is None and again.name == "a"
    second = commit(again, Changes(removed=(Removal("layer", 0),)), tmp_path / "b")
    assert second.note == f"edited from a: removed layer 0; layers run 1 2; {first.note}"
    (tmp_path / "b" / "provenance.json").write_text(json.dumps({"note": "of a package", "package": "some"}))
    with pytest.raises(InputError, match=r"provenance\.json: KeyError 'version'"):
        View.load(tmp_path / "b")


# nothing is left behind


FAILURES = {
    "a full disk": (OSError(errno.ENOSPC, "No space left on device"), InputError, "No space left on device"),
    "Ctrl-C": (KeyboardInterrupt(), KeyboardInterrupt, None),
    "a mistake of ours": (RuntimeError("ours"), RuntimeError, "ours"),
}


@pytest.mark.parametrize("case", FAILURES)
@pytest.mark.parametrize("step", ["_result", "_save", "_reloaded", "_compare"])
def test_whatever_stops_it_leaves_nothing(case, step, tmp_path, monkeypatch):
    raised, expected, message = FAILURES[case]
    happens = getattr(commit_module, step)

    def fail(*given):
        happens(*given)
        raise raised

    monkeypatch.setattr(commit_module, step, fail)
    with pytest.raises(expected, match=message):
        commit(view_of("gpt2"), EDITS["ffn"][0], tmp_path / "deep" / "deeper" / "edited")
    assert not any(tmp_path.iterdir())


def test_a_checkpoint_that_differs_is_not_kept(tmp_path, monkeypatch):
    """The comparison is of numbers: one weight that is off by the last bit is noticed."""
    happens = commit_module.rebuilt

    def off(*given):
        model = happens(*given)
        with torch.no_grad():
            weight: nn.Parameter = model.transformer.ln_f.bias
            weight[3] = torch.nextafter(weight[3], torch.tensor(9.0))
        return model

    monkeypatch.setattr(commit_module, "rebuilt", off)
    with pytest.raises(InputError, match="logits that differ by up to"):
        commit(view_of("gpt2"), EDITS["ffn"][0], tmp_path / "edited")
    assert not any(tmp_path.iterdir())


def test_a_folder_that_holds_something_is_left_alone(tmp_path):
    (tmp_path / "edited").mkdir()
    (tmp_path / "edited" / "mine.txt").write_text("mine")
    for folder in (tmp_path / "edited", tmp_path / "edited" / "mine.txt"):
        with pytest.raises(InputError, match="is there and not an empty folder"):
            commit(view_of("gpt2"), EDITS["ffn"][0], folder)
    assert [path.name for path in (tmp_path / "edited").iterdir()] == ["mine.txt"]
    (tmp_path / "edited" / "mine.txt").unlink()
    commit(view_of("gpt2"), EDITS["ffn"][0], tmp_path / "edited")
    assert (tmp_path / "edited" / "config.json").is_file()


@pytest.mark.parametrize("name", ["mixtral", "olmoe", "qwen2_moe", "qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_a_removed_expert_is_zero_in_its_slice_of_every_stacked_weight(name, tmp_path, generator):
    view = View(tiny_model(name, torch.float32, 0, 3))
    layer = next(place for place in (2, 1, 0) if view.maps[place].sparse)
    done = commit(view, Changes(removed=(Removal("expert", layer, expert=3),)), tmp_path / "edited")
    again = reloaded(view, done.folder)
    ids = random_ids((3, 11), generator)
    with edits.remove(view, "expert", layer, expert=3):
        assert torch.equal(outputs(again, ids), outputs(view.model, ids))
    before, after = dict(view.model.named_parameters()), dict(again.named_parameters())
    for path in done.weights:
        assert not after[path][3].any() and before[path][3].any()
        assert torch.equal(after[path][:3], before[path][:3])
    changed = {path for path in before if not torch.equal(before[path], after[path])}
    assert changed == set(done.weights) and len(changed) >= 2
