"""The reference Transformer: every setting does what it says, and nothing else."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from transect.errors import InputError
from transect.models import (
    ModelConfig,
    TransectForCausalLM,
    TransectForMaskedLM,
    TransectForMultipleChoice,
    TransectForSequenceClassification,
)

VOCAB, WIDTH, LAYERS, POSITIONS, UNITS = 97, 40, 3, 31, 53
BASE = {
    "vocab_size": VOCAB,
    "width": WIDTH,
    "layers": LAYERS,
    "max_positions": POSITIONS,
    "attention": {"heads": 4},
    "ffn": {"width": UNITS},
    "init": {"std": 0.3, "depth_scaled": False, "rules": {"*bias": {"draw": "normal", "std": 0.3}}},
}


def settings(**changes) -> ModelConfig:
    return ModelConfig.parse(BASE | changes)


def model(kind=TransectForCausalLM, dtype=torch.float64, **changes):
    torch.manual_seed(0)
    return kind.make(settings(**changes)).to(dtype).eval()


def ids(rows: int = 2, length: int = 13, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


CHANGES = {
    "norm kind": {"norm": {"type": "rms"}},
    "norm eps": {"norm": {"eps": 0.1}},
    "norm layout": {"norm": {"layout": "post"}},
    "learned positions": {"positions": "learned"},
    "no positions": {"positions": "none"},
    "theta": {"rotary": {"theta": 100.0}},
    "fraction": {"rotary": {"fraction": 0.6}},
    "scaling": {"rotary": {"scaling": {"rope_type": "linear", "factor": 4.0}}},
    "kv heads": {"attention": {"heads": 4, "kv_heads": 2}},
    "one kv head": {"attention": {"heads": 4, "kv_heads": 1}},
    "head width": {"attention": {"heads": 4, "head_width": 14}},
    "no bias": {"attention": {"heads": 4, "bias": False}},
    "no out bias": {"attention": {"heads": 4, "out_bias": False}},
    "qk norm, heads": {"attention": {"heads": 4, "qk_norm": "head"}},
    "qk norm, full": {"attention": {"heads": 4, "qk_norm": "full"}},
    "window": {"attention": {"heads": 4, "window": 3}},
    "linear weights": {"attention": {"heads": 4, "weights": "linear"}},
    "scale": {"attention": {"heads": 4, "scale": 1.0}},
    "residual": {"residual": {"attn": 0.0}},
    "residual number": {"residual": {"ffn": 0.5}},
    "gated": {"ffn": {"width": UNITS, "gated": True}},
    "ffn without bias": {"ffn": {"width": UNITS, "bias": False}},
    "activation": {"ffn": {"width": UNITS, "activation": "relu2"}},
    "linear ffn": {"ffn": {"width": UNITS, "activation": "identity"}},
    "untied": {"head": {"tied": False}},
    "head bias": {"head": {"bias": True}},
    "transform": {"head": {"transform": "gelu"}},
    "embedding norm": {"embedding": {"norm": True}},
    "embedding types": {"embedding": {"types": 2}},
    "embedding scale": {"embedding": {"scale": 2.0}},
    "shared": {"share": [0]},
    "override": {"overrides": [{"layers": [1], "set": {"ffn": {"activation": "relu"}}}]},
}


@pytest.mark.parametrize("name", CHANGES)
def test_every_setting_changes_the_logits_and_caching_does_not(name):
    given = ids()
    changed = model(**CHANGES[name])
    logits = changed(input_ids=given).logits
    assert torch.isfinite(logits).all()
    assert not torch.allclose(logits, model()(input_ids=given).logits, atol=1e-6)
    first = changed(input_ids=given[:, :5], use_cache=True)
    second = changed(input_ids=given[:, 5:9], past_key_values=first.past_key_values, use_cache=True)
    third = changed(input_ids=given[:, 9:], past_key_values=second.past_key_values, use_cache=True)
    cached = torch.cat([first.logits, second.logits, third.logits], dim=1)
    torch.testing.assert_close(cached, logits, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("name", CHANGES)
def test_padding_on_either_side_changes_nothing(name):
    whole = model(**CHANGES[name])
    given = ids(1, 9)
    alone = whole(input_ids=given).logits
    for side in ("left", "right"):
        pad = (4, 0) if side == "left" else (0, 4)
        padded = torch.nn.functional.pad(given, pad, value=7)
        mask = torch.nn.functional.pad(torch.ones_like(given), pad)
        logits = whole(input_ids=padded, attention_mask=mask).logits
        assert torch.isfinite(logits).all()
        torch.testing.assert_close(logits[mask.bool()][None], alone, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("layout", ["pre", "post", "sandwich", "branch", "none"])
def test_streams_are_those_of_the_layers(layout):
    whole = model(norm={"layout": layout})
    seen = []
    for layer in whole.model.layers:
        layer.register_forward_hook(lambda _, args, out: seen.append((args[0], out.hidden)))
    out = whole.model(input_ids=ids(), output_hidden_states=True)
    assert len(out.hidden_states) == LAYERS + 1
    for place, (entering, leaving) in enumerate(seen):
        assert torch.equal(entering, out.hidden_states[place])
        assert torch.equal(leaving, out.hidden_states[place + 1])
    last = out.hidden_states[-1]
    norm = whole.model.final_norm
    assert (norm is None) == (layout in ("post", "none"))
    assert torch.equal(out.last_hidden_state, last if norm is None else norm(last))


def test_a_causal_model_does_not_look_ahead_and_a_window_not_far_back():
    given = ids(1)
    changed = given.clone()
    changed[0, 6] = 3
    windowed = model(attention={"heads": 4, "window": 2}, layers=1)
    for whole, last in ((model(), 12), (windowed, 7)):
        moved = (whole(input_ids=given).logits - whole(input_ids=changed).logits).abs().amax(-1)[0] > 1e-12
        assert moved.nonzero().flatten().tolist() == list(range(6, last + 1))
    masked = model(TransectForMaskedLM, objective="masked", attention={"heads": 4, "window": 2}, layers=1)
    moved = (masked(input_ids=given).logits - masked(input_ids=changed).logits).abs().amax(-1)[0] > 1e-12
    assert moved.nonzero().flatten().tolist() == [5, 6, 7]


@pytest.mark.parametrize("objective", ["causal", "masked"])
def test_packed_documents_do_not_see_each_other(objective):
    whole = model(TransectForMaskedLM if objective == "masked" else TransectForCausalLM, objective=objective)
    first, second = ids(2, 5, seed=1), ids(2, 8, seed=2)
    documents = torch.tensor([[0] * 5 + [1] * 8]).expand(2, -1)
    positions = torch.tensor([[*range(5), *range(8)]])
    packed = torch.cat([first, second], dim=1)
    logits = whole(input_ids=packed, document_ids=documents, position_ids=positions).logits
    for part, alone in ((logits[:, :5], first), (logits[:, 5:], second)):
        torch.testing.assert_close(part, whole(input_ids=alone).logits, atol=1e-10, rtol=1e-10)


def test_shared_layers_are_counted_once_and_run_every_time():
    shared, plain = model(share=[0, 1], layers=4), model(layers=2)
    assert sum(p.numel() for p in shared.parameters()) == sum(p.numel() for p in plain.parameters())
    unrolled = model(layers=4)
    with torch.no_grad():
        for place in range(4):
            unrolled.model.layers[place].load_state_dict(shared.model.layers[place % 2].state_dict())
        unrolled.model.embeddings.load_state_dict(shared.model.embeddings.state_dict())
        unrolled.model.final_norm.load_state_dict(shared.model.final_norm.state_dict())
    assert torch.equal(unrolled(input_ids=ids()).logits, shared(input_ids=ids()).logits)


def test_overrides_by_list_and_by_slice():
    made = settings(
        layers=5,
        overrides=[
            {"layers": "1::2", "set": {"ffn": {"gated": True}}},
            {"layers": [3], "set": {"attention": {"window": 7}, "rotary": {"fraction": 0}}},
        ],
    )
    assert [layer.ffn.gated for layer in made.layer_configs] == [False, True, False, True, False]
    assert [layer.attention.window for layer in made.layer_configs] == [None, None, None, 7, None]
    assert made.layer_configs[3].attention.heads == 4
    assert made.layer_configs[3].ffn.width == UNITS


def test_the_loss_is_the_mean_over_the_next_tokens():
    whole, given = model(), ids()
    labels = given.clone()
    labels[0, :4] = -100
    out = whole(input_ids=given, labels=labels)
    logp = out.logits[:, :-1].log_softmax(-1).gather(-1, given[:, 1:, None])[..., 0]
    counted = labels[:, 1:] != -100
    torch.testing.assert_close(out.loss, -logp[counted].mean())
    assert set(out.losses) == {"main"}


def test_checkpointed_layers_give_equal_gradients():
    gradients = []
    for checkpointed in (False, True):
        whole = model(dropout=0.1).train()
        whole.model.gradient_checkpointing = checkpointed
        torch.manual_seed(3)
        whole(input_ids=ids(), labels=ids()).loss.backward()
        gradients.append([p.grad for p in whole.parameters()])
    for plain, again in zip(*gradients, strict=True):
        assert torch.equal(plain, again)


def test_classifier_and_choices_read_the_right_state():
    given = ids(3, 7)
    causal = model(TransectForSequenceClassification)
    left, right = torch.nn.functional.pad(given, (2, 0)), torch.nn.functional.pad(given, (0, 2))
    mask = torch.ones_like(given)
    alone = causal(input_ids=given).logits
    assert alone.shape == (3, 2)
    for padded, pad in ((left, (2, 0)), (right, (0, 2))):
        found = causal(input_ids=padded, attention_mask=torch.nn.functional.pad(mask, pad)).logits
        torch.testing.assert_close(found, alone, atol=1e-10, rtol=1e-10)
    masked = model(TransectForSequenceClassification, objective="masked")
    first = masked.model(input_ids=given).last_hidden_state[:, 0]
    expected = masked.classifier(torch.tanh(masked.pooler.dense(first)))
    torch.testing.assert_close(masked(input_ids=given).logits, expected)
    choices = model(TransectForMultipleChoice)
    out = choices(input_ids=ids(6, 7).reshape(2, 3, 7), labels=torch.tensor([1, 2]))
    assert out.logits.shape == (2, 3)
    torch.testing.assert_close(out.loss, torch.nn.functional.cross_entropy(out.logits, torch.tensor([1, 2])))


def test_initial_values_follow_the_table():
    torch.manual_seed(0)
    wide = TransectForCausalLM.make(
        ModelConfig.parse(
            {
                "vocab_size": 997,
                "width": 256,
                "layers": 2,
                "norm": {"layout": "post"},
                "residual": {"attn": "learned"},
                "init": {"std": 0.05, "rules": {"layers.1.attn.q.weight": {"draw": "uniform", "std": 0.5}}},
            }
        )
    )
    parameters = dict(wide.named_parameters())
    std = {name: value.std().item() for name, value in parameters.items() if value.ndim > 1}
    assert std["model.embeddings.tokens.weight"] == pytest.approx(0.05, rel=0.02)
    assert std["model.layers.0.attn.q.weight"] == pytest.approx(0.05, rel=0.02)
    assert std["model.layers.0.attn.out.weight"] == pytest.approx(0.05 / math.sqrt(4), rel=0.02)
    assert std["model.layers.1.ffn.down.weight"] == pytest.approx(0.05 / math.sqrt(4), rel=0.02)
    assert std["model.layers.1.attn.q.weight"] == pytest.approx(0.5, rel=0.02)
    assert parameters["model.layers.1.attn.q.weight"].abs().max() <= 0.5 * math.sqrt(3)
    for name, value in parameters.items():
        if name.endswith("bias"):
            assert not value.any(), name
        elif "norm" in name or value.ndim == 0:
            assert bool((value == 1).all()), name


def test_the_same_seed_gives_the_same_model_and_another_does_not():
    first, again = model(), model()
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    torch.manual_seed(1)
    other = TransectForCausalLM.make(settings()).double()
    assert not torch.equal(other.head.decoder.weight, first.head.decoder.weight)


def test_saved_and_loaded_again(tmp_path):
    whole = model(dtype=torch.float32, residual={"attn": "learned"}, share=[0, 1], layers=4)
    whole.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(again) is TransectForCausalLM
    assert again.settings == whole.settings
    assert torch.equal(again(input_ids=ids()).logits, whole(input_ids=ids()).logits)


def test_what_cannot_be_is_refused_in_one_line():
    whole = model(positions="learned")
    with pytest.raises(InputError, match="32 positions do not fit: the model has 31"):
        whole(input_ids=ids(1, 32))
    with pytest.raises(InputError, match="either input_ids or inputs_embeds"):
        whole()
    with pytest.raises(InputError, match=r"attention_mask is \(1, 3\); it must be \(batch, 4\)"):
        whole(input_ids=ids(1, 4), attention_mask=torch.ones(1, 3))
    with pytest.raises(InputError, match="objective is 'causal': a TransectForMaskedLM needs 'masked'"):
        TransectForMaskedLM.make(settings())


def test_only_the_training_loss_has_penalties_and_balance():
    sparse = {"kind": "sparse", "block_size": 20, "expansion": 2, "selector": "switch"}
    whole = model(ffn=sparse, penalties=[{"kind": "jump", "schedule": "warmup", "schedule_steps": 4}])
    out = whole(input_ids=ids(), labels=ids())
    assert torch.equal(out.loss, out.losses["main"])
    out = whole.train()(input_ids=ids(), labels=ids(), step=2)
    assert set(out.losses) == {"main", "balance", "jump"}
    torch.testing.assert_close(out.loss, sum(out.losses.values()))


def test_a_bfloat16_model_has_a_float32_loss():
    whole = model(dtype=torch.bfloat16)
    out = whole(input_ids=ids(), labels=ids())
    assert out.loss.dtype == torch.float32
    wide = out.logits[:, :-1].float().flatten(0, 1)
    assert torch.equal(out.loss, torch.nn.functional.cross_entropy(wide, ids()[:, 1:].flatten()))


def test_no_document_predicts_the_next_one_and_each_has_its_own_positions():
    whole = model(positions="learned")  # rotary ones would only tell distances
    given, documents = ids(1, 9), torch.tensor([[0] * 4 + [5] * 5])
    packed = whole(input_ids=given, labels=given, document_ids=documents)
    positions = torch.tensor([[*range(4), *range(5)]])
    logp = whole(input_ids=given, document_ids=documents, position_ids=positions).logits[:, :-1].log_softmax(-1)
    each = -logp.gather(-1, given[:, 1:, None])[0, :, 0]
    torch.testing.assert_close(packed.loss, torch.cat([each[:3], each[4:]]).mean())


def test_learned_positions_are_counted_where_they_are_used():
    whole = model(positions="learned")
    padded = torch.nn.functional.pad(ids(1, POSITIONS), (4, 0))
    mask = torch.nn.functional.pad(torch.ones(1, POSITIONS), (4, 0))
    fits = whole(input_ids=padded, attention_mask=mask).logits[:, 4:]
    torch.testing.assert_close(fits, whole(input_ids=ids(1, POSITIONS)).logits, atol=1e-10, rtol=1e-10)
    with pytest.raises(InputError, match="32 positions do not fit"):
        whole(input_ids=ids(1, 3), position_ids=torch.tensor([[0, 1, 31]]))
    with pytest.raises(InputError, match="32 positions do not fit"):
        whole.generate(ids(1, 29), max_new_tokens=9, do_sample=False, pad_token_id=0)


def test_a_classifier_without_a_mask_looks_for_the_padding():
    causal = model(TransectForSequenceClassification, pad_token_id=0)
    given = ids(3, 7)
    padded = torch.nn.functional.pad(given, (0, 3), value=0)
    torch.testing.assert_close(causal(input_ids=padded).logits, causal(input_ids=given).logits, atol=1e-10, rtol=1e-10)


def test_the_vocabulary_can_grow_unless_a_selector_has_a_table_of_it():
    whole = model(dtype=torch.float32)
    before = whole(input_ids=ids()).logits
    whole.resize_token_embeddings(VOCAB + 6, mean_resizing=False)
    after = whole(input_ids=ids()).logits
    assert whole.settings.vocab_size == whole.config.vocab_size == after.shape[-1] == VOCAB + 6
    torch.testing.assert_close(after[..., :VOCAB], before)
    hashed = model(ffn={"kind": "sparse", "block_size": 20, "expansion": 2, "selector": "rand_hash"})
    with pytest.raises(InputError, match=r"selector is a table of 97 tokens; it cannot be resized"):
        hashed.resize_token_embeddings(VOCAB + 6, mean_resizing=False)


def test_arguments_that_contradict_each_other_are_refused():
    with pytest.raises(InputError, match="logits_to_keep goes without labels"):
        model()(input_ids=ids(), labels=ids(), logits_to_keep=1)
    with pytest.raises(InputError, match="a masked model has no cache"):
        model(TransectForMaskedLM, objective="masked").model(input_ids=ids(), use_cache=True)


def test_states_are_kept_only_when_asked_for():
    assert model().model(input_ids=ids()).hidden_states is None
