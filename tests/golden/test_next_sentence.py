"""Two questions in one pass: our masked model against BertForPreTraining, and the parts of a training step."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForMaskedLM, BertForPreTraining, BertForSequenceClassification, PreTrainedModel

from families import FAMILIES, VOCAB, enliven, random_ids
from hf_layouts import apart
from known_tokens import corpus, distinct
from transect.data.config import DataConfig
from transect.data.samples import Samples
from transect.errors import InputError
from transect.models import TransectForMaskedLM, TransectForSequenceClassification, hf
from transect.models.budget import budget
from transect.models.config import ModelConfig
from transect.models.loss import IGNORED, LossRule
from transect.view.view import View

BOTH = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


def native(dtype: torch.dtype = torch.float32, **settings: Any) -> PreTrainedModel:
    model = BertForPreTraining(FAMILIES["bert"].but(**settings)())
    enliven(model, 3)
    return model.to(dtype).eval()


def ours(**changes: Any) -> ModelConfig:
    plain = {
        "objective": "masked",
        "vocab_size": VOCAB,
        "width": 20,
        "layers": 2,
        "attention": {"heads": 2},
        "max_positions": 23,
        "embedding": {"types": 2},
        "head": {"next_sentence": True},
    }
    return ModelConfig.parse(plain | changes)


def asked(generator: torch.Generator, rows: int = 5, width: int = 19) -> dict[str, Tensor]:
    """Sequences of unequal lengths in two segments, some positions asked for."""
    ids = random_ids((rows, width), generator)
    real = torch.arange(width) < torch.randint(11, width + 1, (rows, 1), generator=generator)
    chosen = (torch.rand(ids.shape, generator=generator) < 0.3) & real
    return {
        "input_ids": ids,
        "attention_mask": real.long(),
        "token_type_ids": (torch.arange(width) > 7).long().expand(rows, -1),
        "labels": torch.where(chosen, random_ids(ids.shape, generator), IGNORED),
        "next_sentence_label": torch.randint(0, 2, (rows,), generator=generator),
    }


@BOTH
def test_against_berts_pre_training(dtype: torch.dtype, generator: torch.Generator) -> None:
    """Both logits, the sum of both losses, and every gradient."""
    theirs = native(dtype).train()
    for module in theirs.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model = hf.import_model(theirs)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    assert type(model) is TransectForMaskedLM and model.settings.head.next_sentence
    batch = asked(generator)
    expected, found = theirs(**batch), model(**batch)
    real = batch["attention_mask"].bool()
    assert apart(found.logits[real], expected.prediction_logits[real]) <= TOLERANCE[dtype]
    assert apart(found.next_sentence_logits, expected.seq_relationship_logits) <= TOLERANCE[dtype]
    assert apart(found.loss, expected.loss) <= TOLERANCE[dtype]
    assert set(found.losses) == {"main", "next_sentence"}
    assert torch.equal(found.loss, found.losses["main"] + found.losses["next_sentence"])
    expected.loss.backward()
    found.loss.backward()
    back = hf.export_model(model)
    for ours_, theirs_ in (("pooler.dense", "bert.pooler.dense"), ("next_sentence", "cls.seq_relationship")):
        for kind in ("weight", "bias"):
            mine, their = model.get_parameter(f"{ours_}.{kind}"), theirs.get_parameter(f"{theirs_}.{kind}")
            assert torch.equal(mine, their) and torch.equal(mine, back.get_parameter(f"{theirs_}.{kind}"))
            assert mine.grad is not None and apart(mine.grad, their.grad) <= 10 * TOLERANCE[dtype]
    first, last = "model.embeddings.tokens.weight", "model.layers.2.ffn.down.weight"
    named = (first, "bert.embeddings.word_embeddings.weight"), (last, "bert.encoder.layer.2.output.dense.weight")
    for mine, their in named:
        gradient = model.get_parameter(mine).grad
        assert gradient is not None and apart(gradient, theirs.get_parameter(their).grad) <= 10 * TOLERANCE[dtype]


@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_export_and_folders(tied: bool, tmp_path: Path, generator: torch.Generator) -> None:
    theirs = native(tie_word_embeddings=tied)
    model = hf.import_model(theirs)
    ids = random_ids((3, 17), generator)
    expected = theirs(ids)
    back = hf.export_model(model)
    hf.save(model, tmp_path / "ours")
    hf.save(model, tmp_path / "native", native=True)
    again = AutoModelForMaskedLM.from_pretrained(tmp_path / "ours")
    assert type(back) is BertForPreTraining and type(again) is TransectForMaskedLM
    for one in (back, BertForPreTraining.from_pretrained(tmp_path / "native")):
        assert torch.equal(one(ids).seq_relationship_logits, expected.seq_relationship_logits)
        assert torch.equal(one(ids).prediction_logits, expected.prediction_logits)
    assert torch.equal(again(ids).next_sentence_logits, model(ids).next_sentence_logits)
    classifier = TransectForSequenceClassification.from_pretrained(tmp_path / "ours")
    assert torch.equal(classifier.pooler.dense.weight, model.pooler.dense.weight)  # as BERT's fine-tuning has it
    assert type(hf.export_model(classifier)) is BertForSequenceClassification


@torch.no_grad()
def test_evaluation_counts_the_main_loss_alone(generator: torch.Generator) -> None:
    model = TransectForMaskedLM.make(ours()).eval()
    found = model(**asked(generator))
    assert torch.equal(found.loss, found.losses["main"]) and found.losses["next_sentence"] > 0
    without = model(**{name: value for name, value in asked(generator).items() if name != "next_sentence_label"})
    assert set(without.losses) == {"main"} and without.next_sentence_logits.shape == (5, 2)


@pytest.mark.parametrize("masked", [True, False])
def test_parts_of_a_step_add_up(masked: bool, generator: torch.Generator) -> None:
    """However the sequences are cut into passes; the whole is the mean where all are equally long."""
    model = TransectForMaskedLM.make(ours()).double()
    enliven(model, 5)
    batch = asked(generator, rows=11)
    if not masked:
        del batch["attention_mask"]
    real = batch["attention_mask"].sum(1) if masked else torch.full((11,), 19)
    tokens = int((batch["labels"] != IGNORED).sum())
    found = []
    for sizes in ([11], [1, 10], [3, 3, 5]):
        model.zero_grad()
        total, start = torch.zeros((), dtype=torch.float64), 0
        for size in sizes:
            rows = slice(start, start + size)
            rule = LossRule(tokens=tokens, share=float(real[rows].sum() / real.sum().double()))
            made = model(**{name: value[rows] for name, value in batch.items()}, rule=rule)
            assert set(made.losses) == {"main", "next_sentence"} and made.logits is None
            made.loss.backward()
            total, start = total + made.losses["next_sentence"].detach(), start + size
        assert model.pooler is not None and model.pooler.dense is not None
        gradient = model.pooler.dense.weight.grad
        assert gradient is not None
        found.append((total, gradient.clone()))
    for total, gradient in found[1:]:
        assert apart(total, found[0][0]) <= 1e-10 and apart(gradient, found[0][1]) <= 1e-10
    with torch.no_grad():
        logits = model(**batch).next_sentence_logits
    each = torch.nn.functional.cross_entropy(logits, batch["next_sentence_label"], reduction="none")
    assert apart(found[0][0], (each * real).sum() / real.sum()) <= 1e-10
    assert masked or apart(found[0][0], each.mean()) <= 1e-10


def test_a_batch_of_pairs_teaches_the_answer(tmp_path: Path) -> None:
    """Two texts without a token in common: whether B is from the text that A is from can be learned, and is."""
    texts = distinct([[40, 40]])[0]
    vocab_size = 17 + 80
    data = DataConfig(seq_len=23, next_sentence=True)
    settings = ours(vocab_size=vocab_size, width=32, init={"std": 0.2})
    samples = Samples(corpus(tmp_path / "c", {"train": {"a": texts}}, vocab_size, masked=True), data, settings, 0)
    torch.manual_seed(0)
    model = TransectForMaskedLM.make(settings)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for step in range(100):
        batch = samples.batch(step * 32, 32)
        made = model(
            input_ids=batch.ids,
            labels=batch.labels,
            attention_mask=batch.attention_mask,
            token_type_ids=batch.token_type_ids,
            next_sentence_label=batch.next_sentence_label,
        )
        made.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(made.losses["next_sentence"].item())
    assert sum(losses[:10]) > 6.0 and sum(losses[-10:]) < 2.5


def test_what_does_not_fit(generator: torch.Generator) -> None:
    with pytest.raises(InputError, match=r"head\.next_sentence is True: only a masked model"):
        ours(objective="causal")
    plain = TransectForMaskedLM.make(ours(head={}))
    with pytest.raises(InputError, match=r"needs head\.next_sentence true"):
        plain(**asked(generator))
    assert plain.pooler is None and not [name for name in plain.state_dict() if "next_sentence" in name]
    with pytest.raises(InputError, match="positions is 'rotary'"):
        hf.export_model(TransectForMaskedLM.make(ours()))


def test_the_second_head_is_counted_and_seen() -> None:
    settings = ours()
    more = budget(settings).parameters - budget(ours(head={})).parameters
    assert more == 20 * 20 + 20 + 2 * 20 + 2
    assert View.load(TransectForMaskedLM.make(settings).eval()).num_layers == 2
