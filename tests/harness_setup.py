"""Tiny models that read text, and lm-evaluation-harness beside them without a network."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedModel, PreTrainedTokenizerFast

from families import enliven, family
from prepared import texts
from transect.models import ModelConfig, TransectForCausalLM

POSITIONS = 101
START = "<s>"
SENTENCES = ("The cat sat on the mat.", "A dog ran home, and slept.", "Oaks grow slowly here.\nPines do not.")


@cache
def tokenizer(adds_start: bool = False, masked: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE; `adds_start`: puts its start token before every text; `masked`: an end token after it too."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    special = ["<pad>", START, "</s>", "<mask>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=331, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    raw.train_from_iterator([*SENTENCES, *texts(23)], trainer)
    named = {"pad_token": "<pad>", "bos_token": START, "eos_token": "</s>"}
    if adds_start or masked:
        after = " </s>" if masked else ""
        raw.post_processor = processors.TemplateProcessing(
            f"{START} $A{after}", special_tokens=[(START, 1), ("</s>", 2)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=raw, **named, **({"mask_token": "<mask>"} if masked else {}))


def hf_model(name: str = "llama") -> PreTrainedModel:
    """A random model of a Hugging Face type that takes the tokenizer's ids and `POSITIONS` tokens."""
    chosen = family(name)
    config = chosen()
    config.vocab_size = len(tokenizer())
    config.update({"n_positions" if name == "gpt2" else "max_position_embeddings": POSITIONS})
    auto = AutoModelForMaskedLM if chosen.masked else AutoModelForCausalLM
    model = auto.from_config(config, dtype=torch.float32, attn_implementation="eager")
    enliven(model, 0)
    return model.eval()


def own_model() -> PreTrainedModel:
    """One of our own."""
    settings = {"vocab_size": len(tokenizer()), "width": 24, "layers": 3, "max_positions": POSITIONS}
    parsed = ModelConfig.parse(settings | {"attention": {"heads": 4}, "ffn": {"width": 36}})
    model = TransectForCausalLM.make(parsed)
    enliven(model, 3)
    return model.eval()


def requests(given: list[tuple]) -> list:
    """What lm_eval asks of a model."""
    from lm_eval.api.instance import Instance

    return [Instance("loglikelihood", {}, arguments, number) for number, arguments in enumerate(given)]


def hflm(model: PreTrainedModel, words: PreTrainedTokenizerFast, batch_size: int = 3) -> Any:
    """lm_eval's own object for a model."""
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=model, tokenizer=words, batch_size=batch_size)


def without_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No network, and no cache outside the test."""
    import datasets
    import huggingface_hub.constants

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
