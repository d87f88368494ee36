"""Models of transformers against ours with the same weights, and back."""

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
)

from conftest import require_material
from families import FAMILIES, VOCAB, random_ids
from hf_layouts import CAUSAL, LAYOUTS, LENGTHS, apart, eager_experts, made, padded, tolerance
from transect.errors import InputError
from transect.models import TransectForCausalLM, TransectModel, hf
from transect.models.config import ModelConfig
from transect.models.convert.base import families, to_theirs
from transect.models.transformer import TransectPreTrainedModel
from transect.view.load import align

BOTH = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
EVERY = pytest.mark.parametrize("name", LAYOUTS)
MAIN = ("llama", "mistral/sliding", "qwen2/sliding", "qwen3", "gpt2", "bert", "mixtral", "olmoe", "qwen3_moe/mixed")


@functools.cache
def native(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return made(LAYOUTS[name], dtype)


@functools.cache
def ours(name: str, dtype: torch.dtype = torch.float32) -> TransectPreTrainedModel:
    return hf.import_model(native(name, dtype))


def rows_of_ids(generator: torch.Generator) -> list[Tensor]:
    return [random_ids((length,), generator) for length in LENGTHS]


def counted(mask: Tensor) -> Tensor:
    """Positions of real tokens, as `generate` counts them."""
    return (mask.cumsum(1) - 1).clamp_min(0)


# logits


@EVERY
@BOTH
@torch.no_grad()
def test_logits(name: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    theirs, model = native(name, dtype), ours(name, dtype)
    assert next(model.parameters()).dtype == dtype
    for row in rows_of_ids(generator):
        assert apart(model(row[None]).logits, theirs(row[None]).logits) <= tolerance(name, dtype)


@EVERY
@BOTH
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding_on_either_side_is_as_no_padding(
    name: str, dtype: torch.dtype, side: str, generator: torch.Generator
) -> None:
    rows = rows_of_ids(generator)
    ids, mask = padded(rows, side)
    logits = ours(name, dtype)(ids, attention_mask=mask).logits
    for row, real, found in zip(rows, mask.bool(), logits, strict=True):
        expected = native(name, dtype)(row[None]).logits[0]
        assert apart(found[real], expected) <= tolerance(name, dtype)


@EVERY
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@torch.no_grad()
def test_padded_batches_of_both(name: str, side: str, attention: str, generator: torch.Generator) -> None:
    theirs = made(LAYOUTS[name])
    theirs.set_attn_implementation(attention)
    ids, mask = padded(rows_of_ids(generator), side)
    expected = theirs(ids, attention_mask=mask, position_ids=counted(mask)).logits
    found = ours(name)(ids, attention_mask=mask).logits
    assert apart(found[mask.bool()], expected[mask.bool()]) <= tolerance(name, torch.float32)


@torch.no_grad()
def test_segments_of_bert(generator: torch.Generator) -> None:
    ids = random_ids((3, 19), generator)
    types = torch.randint(0, 3, ids.shape, generator=generator)
    name, dtype = "bert/gelu_new", torch.float64
    expected = native(name, dtype)(ids, token_type_ids=types).logits
    assert apart(ours(name, dtype)(ids, token_type_ids=types).logits, expected) <= 1e-10
    assert apart(ours(name, dtype)(ids).logits, expected) > 1e-3


@EVERY
@torch.no_grad()
def test_hidden_states(name: str, generator: torch.Generator) -> None:
    """Both keep the stream entering each layer; the last one of theirs is after the final norm."""
    ids = random_ids((2, 13), generator)
    expected = native(name)(ids, output_hidden_states=True).hidden_states
    found = ours(name)(ids, output_hidden_states=True).hidden_states
    assert len(found) == len(expected)
    for mine, their in zip(found[:-1], expected[:-1], strict=True):
        assert apart(mine, their) <= 1e-5


# gradients


def gradients(model: PreTrainedModel) -> dict[str, Tensor]:
    named = model.named_parameters(remove_duplicate=False)
    return {name: parameter.grad for name, parameter in named if parameter.grad is not None}


@EVERY
@BOTH
def test_gradients(name: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    """Of a random linear function of the logits, for every parameter of theirs: rows one by one, here in one batch."""
    theirs, model = made(LAYOUTS[name], dtype), hf.import_model(native(name, dtype))
    rows = rows_of_ids(generator)
    weights = [torch.randn((len(row), VOCAB), generator=generator, dtype=torch.float64).to(dtype) for row in rows]
    ids, mask = padded(rows, "left")
    (model(ids, attention_mask=mask).logits[mask.bool()] * torch.cat(weights)).sum().backward()
    for row, weight in zip(rows, weights, strict=True):
        (theirs(row[None]).logits[0] * weight).sum().backward()
    family = families()[theirs.config.model_type]
    parts = family.parts(model.settings.layers, "model.", f"{theirs.base_model_prefix}.")
    found, expected = to_theirs(parts, gradients(model)), gradients(theirs)
    assert found.keys() == expected.keys()
    assert len(expected) == len(dict(theirs.named_parameters(remove_duplicate=False)))
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    limit = tolerance(name, dtype)
    for key, gradient in expected.items():
        if without_effect(name, key):
            assert max(float(found[key].abs().max()), float(gradient.abs().max())) <= limit * largest
        else:
            assert apart(found[key], gradient) <= limit, key


def without_effect(name: str, key: str) -> bool:
    """A bias of keys adds the same to all products of a query; one expert's weight is 1 whatever the router says."""
    return key.endswith("key.bias") or (name == "mixtral/one_expert" and key.endswith("mlp.gate.weight"))


@EVERY
def test_loss(name: str, generator: torch.Generator) -> None:
    ids, mask = padded(rows_of_ids(generator), "right")
    labels = ids.masked_fill(mask == 0, -100)
    expected = native(name)(ids, attention_mask=mask, labels=labels).loss
    assert apart(ours(name)(ids, attention_mask=mask, labels=labels).loss, expected) <= 1e-5


# back


@EVERY
@BOTH
@torch.no_grad()
def test_there_and_back_every_bit_is_the_same(name: str, dtype: torch.dtype) -> None:
    theirs = native(name, dtype)
    back = hf.export_model(ours(name, dtype), family=theirs.config.model_type)
    assert type(back) is type(theirs)
    expected, found = theirs.state_dict(), back.state_dict()
    assert found.keys() == expected.keys()
    for key, weight in expected.items():
        assert found[key].dtype == weight.dtype and torch.equal(found[key], weight), key


@pytest.mark.parametrize("name", [*MAIN, "llama/tied", "llama/yarn", "gpt2/untied_relu", "bert/gelu_new"])
@torch.no_grad()
def test_a_saved_export_is_read_by_the_auto_classes(name: str, tmp_path: Path, generator: torch.Generator) -> None:
    ids = random_ids((3, 19), generator)
    hf.save(ours(name), tmp_path / "native", native=True)
    auto = AutoModelForMaskedLM if LAYOUTS[name].masked else AutoModelForCausalLM
    again = auto.from_pretrained(
        tmp_path / "native", dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )
    assert not type(again).__module__.startswith("transect")
    align(again)
    export = eager_experts(hf.export_model(ours(name)))
    export.set_attn_implementation("eager")
    assert torch.equal(again(ids).logits, export(ids).logits)
    assert apart(again(ids).logits, ours(name)(ids).logits) <= 1e-5
    from_folder = hf.import_model(tmp_path / "native")
    assert torch.equal(from_folder(ids).logits, ours(name)(ids).logits)


@torch.no_grad()
def test_untied_bert_reads_its_decoder_bias(generator: torch.Generator) -> None:
    """Theirs has a second bias then, which nothing reads."""
    theirs = made(FAMILIES["bert"].but(tie_word_embeddings=False))
    assert not torch.equal(theirs.cls.predictions.bias, theirs.cls.predictions.decoder.bias)
    model = hf.import_model(theirs)
    ids = random_ids((2, 11), generator)
    assert apart(model(ids).logits, theirs(ids).logits) <= 1e-5
    assert apart(hf.export_model(model)(ids).logits, theirs(ids).logits) <= 1e-5


@pytest.mark.parametrize("name", MAIN)
def test_export_finds_the_family(name: str) -> None:
    """Mistral without a window is Llama to the last bit, and only then another class is taken."""
    assert type(hf.export_model(ours(name))) is type(native(name))


def test_export_of_what_is_equal_by_another_name(generator: torch.Generator) -> None:
    settings = ours("olmoe/as_switch").settings
    switch = {"kind": "switch", "gate": "softmax_all", "balance": 0.03}
    renamed = ModelConfig.parse(settings.plain() | {"ffn": settings.ffn.plain() | {"selector": switch}})
    model = TransectForCausalLM.make(renamed).eval()
    model.load_state_dict(ours("olmoe/as_switch").state_dict())
    ids = random_ids((2, 11), generator)
    export = eager_experts(hf.export_model(model))
    assert type(export).__name__ == "OlmoeForCausalLM" and export.config.output_router_logits
    with torch.no_grad():
        assert apart(export(ids).logits, native("olmoe/as_switch")(ids).logits) <= 1e-6


@torch.no_grad()
def test_caa_with_nothing_inside_is_standard(generator: torch.Generator) -> None:
    model = TransectForCausalLM.make(
        ModelConfig.parse(ours("llama").settings.plain() | {"block": {"kind": "caa", "outer_ratio": 1.0}})
    ).eval()
    ids = random_ids((2, 11), generator)
    assert apart(hf.export_model(model)(ids).logits, model(ids).logits) <= 1e-5


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe/mixed"])
def test_balance_loss_agrees_at_perfect_balance(name: str) -> None:
    """k times the coefficient there, a sum over sparse layers here."""
    family = LAYOUTS[name].but(output_router_logits=True, router_aux_loss_coef=0.3)
    model = hf.import_model(made(family))
    sparse = [layer.ffn.plain() for layer in model.settings.layer_configs if layer.ffn.kind == "sparse"]
    weight = sum(ffn["selector"]["balance"] for ffn in sparse)
    assert weight == pytest.approx(0.3 * 2)
    assert hf.export_model(model).config.router_aux_loss_coef == pytest.approx(0.3)
    assert not any("balance" in loss for loss in ours(name)(torch.arange(5, 16)[None]).losses)


# other heads


HEADS: list[tuple[str, Callable, dict]] = [
    ("llama", AutoModelForSequenceClassification, {"num_labels": 3}),
    ("mistral", AutoModelForSequenceClassification, {"num_labels": 1}),
    ("gpt2", AutoModelForSequenceClassification, {"num_labels": 3}),
    ("mixtral", AutoModelForSequenceClassification, {"num_labels": 3}),
    ("bert", AutoModelForSequenceClassification, {"num_labels": 5, "classifier_dropout": 0.2}),
    ("bert", AutoModelForSequenceClassification, {"num_labels": 1}),
]


@pytest.mark.parametrize(("name", "auto", "settings"), HEADS, ids=lambda given: str(given)[:40])
def test_classifiers(name: str, auto: Callable, settings: dict, generator: torch.Generator) -> None:
    family = FAMILIES[name].but(**settings)
    theirs = made(family, torch.float64, auto=auto)
    model = hf.import_model(theirs)
    ids, mask = padded(rows_of_ids(generator), "right")
    ids = ids.masked_fill(mask == 0, 0)  # decoders look for the last token that is not padding
    labels = torch.randn(3, generator=generator).double() if settings["num_labels"] == 1 else torch.tensor([2, 0, 1])
    expected, found = (one(ids, attention_mask=mask, labels=labels) for one in (theirs, model))
    limit = tolerance(name, torch.float64)
    assert apart(found.logits, expected.logits) <= limit and apart(found.loss, expected.loss) <= limit
    back = hf.export_model(model, family=name)
    assert type(back) is type(theirs) and back.config.num_labels == settings["num_labels"]
    assert all(torch.equal(back.state_dict()[key], weight) for key, weight in theirs.state_dict().items())


def test_multiple_choice(generator: torch.Generator) -> None:
    theirs = made(FAMILIES["bert"], torch.float64, auto=AutoModelForMultipleChoice)
    model = hf.import_model(theirs)
    ids, labels = random_ids((3, 4, 13), generator), torch.tensor([3, 0, 2])
    mask = torch.ones_like(ids)
    mask[1, 2, 7:] = 0
    expected, found = (one(ids, attention_mask=mask, labels=labels) for one in (theirs, model))
    assert apart(found.logits, expected.logits) <= 1e-10 and apart(found.loss, expected.loss) <= 1e-10
    assert type(hf.export_model(model)) is type(theirs)


@pytest.mark.parametrize("name", [*MAIN, "bert"])
@torch.no_grad()
def test_bare_models(name: str, generator: torch.Generator) -> None:
    """Without a head; BERT's pooler stays behind, and comes back only with a classifier."""
    theirs = made(LAYOUTS[name], auto=AutoModel)
    model = hf.import_model(theirs)
    assert type(model) is TransectModel
    ids = random_ids((2, 11), generator)
    expected = theirs(ids).last_hidden_state
    assert apart(model(ids).last_hidden_state, expected) <= 1e-5
    back = eager_experts(hf.export_model(model))
    assert type(back) is type(theirs)
    assert apart(back(ids).last_hidden_state, expected) <= 1e-5


# manners


def test_import_copies_and_draws_nothing() -> None:
    theirs = made(LAYOUTS["llama/tied"]).train()
    state, before = torch.get_rng_state(), theirs.lm_head.weight.detach().clone()
    model = hf.import_model(theirs)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training and not hf.import_model(theirs.eval()).training
    assert model.head.decoder.weight is model.trunk.embeddings.tokens.weight
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(theirs.lm_head.weight, before)
    back = hf.export_model(model)
    assert torch.equal(torch.get_rng_state(), state) and back.lm_head.weight is back.model.embed_tokens.weight
    assert hf.import_model(model) is model


def test_tokens_labels_and_generation_settings_go_along() -> None:
    family = FAMILIES["gpt2"].but(id2label={0: "no", 1: "yes"}, label2id={"no": 0, "yes": 1})
    theirs = made(family)
    theirs.generation_config.max_new_tokens = 7
    model = hf.import_model(theirs)
    back = hf.export_model(model)
    for one in (model, back):
        assert (one.config.pad_token_id, one.config.bos_token_id, one.config.eos_token_id) == (0, 1, 2)
        assert one.config.id2label == {0: "no", 1: "yes"} and one.generation_config.max_new_tokens == 7
    model.generation_config.max_new_tokens = 8
    assert theirs.generation_config.max_new_tokens == 7


def test_dtype_asked_for() -> None:
    theirs = made(LAYOUTS["llama"])
    assert hf.import_model(theirs, dtype="float64").dtype == torch.float64
    model = hf.import_model(theirs)
    assert theirs.dtype == model.dtype == torch.float32
    assert hf.import_model(model, dtype=torch.float64).dtype == torch.float64 and model.dtype == torch.float32
    with pytest.raises(InputError, match="unknown dtype 'float8'"):
        hf.import_model(theirs, dtype="float8")


# real models


@pytest.mark.real
@torch.no_grad()
def test_real_encoder() -> None:
    folder = require_material("minilm")
    theirs = AutoModel.from_pretrained(folder, dtype=torch.float32)
    model = hf.import_model(folder)
    batch = AutoTokenizer.from_pretrained(folder)(["A short text.", "Another one, somewhat longer."], padding=True)
    ids, mask = torch.tensor(batch["input_ids"]), torch.tensor(batch["attention_mask"])
    expected = theirs(ids, attention_mask=mask, output_hidden_states=True)
    found = model(ids, attention_mask=mask, output_hidden_states=True)
    for mine, their in zip(found.hidden_states, expected.hidden_states, strict=True):
        assert apart(mine[mask.bool()], their[mask.bool()]) <= 1e-5
    assert apart(found.last_hidden_state[mask.bool()], expected.last_hidden_state[mask.bool()]) <= 1e-5


@pytest.mark.real
@torch.no_grad()
def test_real_decoder(tmp_path: Path) -> None:
    folder = require_material("smollm2")
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = hf.import_model(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor(tokenizer(["The capital of France is Paris, and the capital of Italy is"])["input_ids"])
    expected = theirs(ids).logits
    assert apart(model(ids).logits, expected) <= 1e-5
    assert torch.equal(model.generate(ids, max_new_tokens=8), theirs.generate(ids, max_new_tokens=8))
    hf.save(model, tmp_path / "native", tokenizer, native=True)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "native", dtype=torch.float32)
    assert torch.equal(again(ids).logits, expected)


def test_every_causal_layout_is_listed() -> None:
    assert {LAYOUTS[name].model_type for name in LAYOUTS} == set(families()) and "bert" not in CAUSAL
