"""Tokenizers learned from the train split; the same text gives the same one, whatever the order of hash tables."""

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Literal

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from transect.data.tokenizer import Taken, take
from transect.errors import InputError

Kind = Literal["bpe", "wordpiece", "characters"]
KINDS: tuple[Kind, ...] = ("bpe", "wordpiece", "characters")
Texts = Callable[[], Iterable[str]]
"""Makes another pass over the text."""

_SPECIAL = ["<|end|>", "<|pad|>", "<|mask|>"]
_BERT = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
_LEAST_COUNT = 2  # a pair seen once is no pattern
_BERT_SIGNS = 1000  # characters of a WordPiece vocabulary, as in BERT's
_SMALLEST = {"bpe": 256 + len(_SPECIAL), "wordpiece": 2 * 26 + len(_BERT), "characters": 257 + len(_SPECIAL)}


def check_size(kind: Kind, size: int) -> None:
    """Raises InputError for a vocabulary too small for the kind."""
    if size < _SMALLEST[kind]:
        raise InputError(f"--vocab-size is {size}; a {kind} tokenizer needs at least {_SMALLEST[kind]}")


def learn(kind: Kind, texts: Texts, size: int, lower_case: bool = False) -> Taken:
    """A tokenizer of at most `size` tokens.

    bpe: bytes, merged within GPT-2's words. wordpiece: BERT's rules, signs outside the 1,000 most frequent being
    unknown; `lower_case` as in its uncased models. characters: the most frequent characters, others as their bytes.
    Raises InputError when the size is too small.
    """
    check_size(kind, size)
    if kind == "wordpiece":
        return _wordpiece(texts, size, lower_case)
    raw = _bpe(texts(), size) if kind == "bpe" else _characters(texts(), size)
    made = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        eos_token=_SPECIAL[0],
        pad_token=_SPECIAL[1],
        mask_token=_SPECIAL[2],
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )
    return take(made)


def _bpe(texts: Iterable[str], size: int) -> Tokenizer:
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        min_frequency=_LEAST_COUNT,
        special_tokens=_SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(texts, trainer)
    return raw


def _characters(texts: Iterable[str], size: int) -> Tokenizer:
    kept = _frequent(texts, size - len(_SPECIAL) - len(_BYTES))
    vocab = {token: number for number, token in enumerate([*_SPECIAL, *_BYTES, *kept])}
    raw = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    raw.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    raw.add_special_tokens(_SPECIAL)
    return raw


def _frequent(texts: Iterable[str], most: int) -> list[str]:
    """The most frequent characters in the order of their code points; of equally frequent ones the first by it."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(text)
    return sorted(sorted(counts, key=lambda sign: (-counts[sign], sign))[:most])


def _wordpiece(texts: Texts, size: int, lower_case: bool) -> Taken:
    normaliser = normalizers.BertNormalizer(lowercase=lower_case)
    cutter = pre_tokenizers.BertPreTokenizer()
    cleaned = (normaliser.normalize_str(text) for text in texts())
    signs = [sign for sign in _frequent(cleaned, _BERT_SIGNS) if not sign.isspace()]
    # The library numbers signs inside words in the order of a hash table that differs from run to run, and lets that
    # decide between equally frequent pairs; naming those signs beforehand fixes their numbers.
    inner = [f"##{sign}" for sign in signs if len(cutter.pre_tokenize_str(f"a{sign}")) == 1]
    named = _BERT + inner
    if size < len(named) + len(signs):
        raise InputError(
            f"--vocab-size is {size}; wordpiece needs at least {len(named) + len(signs)} for the signs of this text"
        )
    learner = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    learner.normalizer, learner.pre_tokenizer = normaliser, cutter
    trainer = trainers.WordPieceTrainer(
        vocab_size=size,
        min_frequency=_LEAST_COUNT,
        special_tokens=named,
        initial_alphabet=signs,
        limit_alphabet=len(signs),
        show_progress=False,
    )
    learner.train_from_iterator(texts(), trainer)
    # A second tokenizer, since to the first one the signs inside words are special.
    raw = Tokenizer(models.WordPiece(vocab=learner.get_vocab(), unk_token="[UNK]"))
    raw.normalizer, raw.pre_tokenizer, raw.decoder = normaliser, cutter, decoders.WordPiece()
    raw.add_special_tokens(_BERT)
    ends = [(name, _BERT.index(name)) for name in ("[CLS]", "[SEP]")]
    raw.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ends
    )
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), _BERT, strict=True))
    return take(PreTrainedTokenizerFast(tokenizer_object=raw, model_input_names=inputs, **names))
