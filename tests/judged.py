"""Tiny models with a tokenizer of their own, and the log-probabilities they give, computed without any of our code."""

import functools
from collections.abc import Sequence

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import PreTrainedTokenizerFast

from corpora import documents
from families import VOCAB, tiny_model
from transect.view.view import View

SPECIAL = {
    "pad_token": "<pad>",
    "bos_token": "<bos>",
    "eos_token": "<eos>",
    "mask_token": "<mask>",
    "unk_token": "<unk>",
}


@functools.cache
def tokenizer(wrapped: bool = False) -> PreTrainedTokenizerFast:
    """Byte-level BPE learned from made-up text; `wrapped` puts <bos> before and <eos> after, as BERT's does."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted({c for text in documents(23, 1) for c in text.replace(" ", "Ġ")} | set("xyzqjABC?,:'"))
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=[*SPECIAL.values()], initial_alphabet=alphabet, show_progress=False
    )
    raw.train_from_iterator(documents(23, 1), trainer)
    if wrapped:
        pairs = [(name, raw.token_to_id(name)) for name in ("<bos>", "<eos>")]
        raw.post_processor = processors.TemplateProcessing(single="<bos> $A <eos>", special_tokens=pairs)
    return PreTrainedTokenizerFast(tokenizer_object=raw, **SPECIAL)


def view(name: str = "gpt2", dtype: torch.dtype = torch.float64, seed: int = 0, positions: int | None = None) -> View:
    """A tiny model with the tokenizer that suits it; GPT-2 computes all of itself in the type asked for.

    positions: that a model with rotary ones says it takes.
    """
    model = tiny_model(name, dtype, seed)
    if positions is not None:
        model.config.max_position_embeddings = positions
    return View(model, tokenizer(wrapped=name == "bert"), name=name)


@torch.no_grad()
def causal_nats(model: nn.Module, before: Sequence[int], asked: Sequence[int]) -> list[float]:
    """log p of each id asked for, one forward pass a token, nothing padded and nothing shared."""
    found = []
    for place in range(len(asked)):
        ids = torch.tensor([[*before, *asked[:place]]])
        found.append(float(model(input_ids=ids).logits[0, -1].double().log_softmax(-1)[asked[place]]))
    return found


@torch.no_grad()
def masked_nats(model: nn.Module, ids: Sequence[int], places: Sequence[int], mask: int) -> list[float]:
    """log p of the id at each place, hidden alone."""
    found = []
    for place in places:
        hidden = torch.tensor([[*ids[:place], mask, *ids[place + 1 :]]])
        found.append(float(model(input_ids=hidden).logits[0, place].double().log_softmax(-1)[ids[place]]))
    return found
