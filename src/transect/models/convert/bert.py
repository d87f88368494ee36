"""BERT: both sides seen, LayerNorm after, learned positions and segments, a transform before the vocabulary.

BERT counts positions from the first place of a row, we count real tokens: equal unless padding is on the left, where
`position_ids` say what is meant.
"""

from typing import Any

from transect.models.config import ModelConfig
from transect.models.convert import _decoder
from transect.models.convert._activations import ours, theirs
from transect.models.convert._attributes import Attributes
from transect.models.convert.base import Family, Part, module
from transect.models.plug import Unfit


def _settings(read: Attributes) -> dict[str, Any]:
    read.only("is_decoder", False, why="a BERT that writes is another model; import it as an encoder")
    read.only("position_embedding_type", "absolute", why="absolute positions are allowed")
    activation = ours(read, "hidden_act")
    dropout = read("hidden_dropout_prob")
    classifier = read("classifier_dropout")
    return {
        "objective": "masked",
        "vocab_size": read("vocab_size"),
        "width": read("hidden_size"),
        "layers": read("num_hidden_layers"),
        "max_positions": read("max_position_embeddings"),
        "positions": "learned",
        "norm": {"layout": "post", "type": "layer", "eps": read("layer_norm_eps")},
        "attention": {"heads": read("num_attention_heads"), "dropout": read("attention_probs_dropout_prob")},
        "ffn": {"kind": "dense", "width": read("intermediate_size"), "activation": activation},
        "embedding": {"norm": True, "types": read("type_vocab_size")},
        "head": {"tied": read("tie_word_embeddings"), "bias": True, "transform": activation},
        "init": {"std": read("initializer_range"), "depth_scaled": False},
        "dropout": dropout,
        "classifier_dropout": dropout if classifier is None else classifier,
        "pad_token_id": read("pad_token_id"),
    }


def _native(settings: ModelConfig) -> dict[str, Any]:
    if settings.objective != "masked":
        raise Unfit("objective", settings.objective, "masked")
    if settings.positions != "learned":
        raise Unfit("positions", settings.positions, "learned")
    if not settings.embedding.types:
        raise Unfit("embedding.types", 0, "at least 1")
    first = settings.layer_configs[0]
    return {
        "vocab_size": settings.vocab_size,
        "hidden_size": settings.width,
        "num_hidden_layers": settings.layers,
        "num_attention_heads": first.attention.heads,
        "intermediate_size": _decoder.dense_width(settings),
        "hidden_act": theirs(getattr(first.ffn, "activation", "gelu")),
        "hidden_dropout_prob": settings.dropout,
        "attention_probs_dropout_prob": first.attention.dropout,
        "classifier_dropout": settings.classifier_dropout,
        "max_position_embeddings": settings.max_positions,
        "type_vocab_size": settings.embedding.types,
        "layer_norm_eps": first.norm.eps,
        "initializer_range": settings.init.std,
        "tie_word_embeddings": settings.head.tied,
    }


FAMILY = Family(
    name="bert",
    classes={
        "TransectModel": "BertModel",
        "TransectForMaskedLM": "BertForMaskedLM",
        "TransectForSequenceClassification": "BertForSequenceClassification",
        "TransectForMultipleChoice": "BertForMultipleChoice",
    },
    settings=_settings,
    native=_native,
    trunk=(
        *module("embeddings.tokens", "embeddings.word_embeddings"),
        *module("embeddings.positions", "embeddings.position_embeddings"),
        *module("embeddings.types", "embeddings.token_type_embeddings"),
        *module("embeddings.norm", "embeddings.LayerNorm"),
        *module("layers.{}.attn.q", "encoder.layer.{}.attention.self.query"),
        *module("layers.{}.attn.k", "encoder.layer.{}.attention.self.key"),
        *module("layers.{}.attn.v", "encoder.layer.{}.attention.self.value"),
        *module("layers.{}.attn.out", "encoder.layer.{}.attention.output.dense"),
        *module("layers.{}.attn_residual.norm", "encoder.layer.{}.attention.output.LayerNorm"),
        *module("layers.{}.ffn.up", "encoder.layer.{}.intermediate.dense"),
        *module("layers.{}.ffn.down", "encoder.layer.{}.output.dense"),
        *module("layers.{}.ffn_residual.norm", "encoder.layer.{}.output.LayerNorm"),
    ),
    heads=(
        *module("head.dense", "cls.predictions.transform.dense"),
        *module("head.norm", "cls.predictions.transform.LayerNorm"),
        Part(("head.decoder.bias",), "cls.predictions.bias"),
        *module("head.decoder", "cls.predictions.decoder"),
        *module("pooler.dense", "bert.pooler.dense"),
        *module("next_sentence", "cls.seq_relationship"),
        *module("classifier", "classifier"),
    ),
    dropped={"TransectModel": ("pooler.dense.weight", "pooler.dense.bias")},
    bare={"add_pooling_layer": False},
    pretraining="BertForPreTraining",
)
