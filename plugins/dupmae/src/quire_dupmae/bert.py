"""BERT-shaped models of transformers: made or refused, and walked layer by layer over any tokens."""

from __future__ import annotations

import difflib
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from quire.contracts import Spec
from quire.data import expand
from quire.errors import ConfigError
from quire.roles.language.hf_config import read_config

DEFAULT = "bert"
BEHIND_PADDING = ("roberta", "xlm-roberta", "camembert")
"""Types whose places start behind the padding id, so the table is longer than the text."""


def recorded(name: str) -> tuple[str, dict[str, Any]]:
    """Where a folder or hub name leads, and its config as plain values, which rebuild the model without it."""
    path, config = read_config(name, "RetrievalEncoder")
    return path, config


def fresh_config(given: dict[str, Any], spec: Spec) -> Any:
    """The config of a dict; vocabulary, padding id and number of positions that it leaves out come from the data.

    Raises:
        ConfigError: a type that transformers doesn't know or that is no bidirectional encoder with an MLM head, or a
            key that the type does not know.
    """
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = str(given.get("model_type", DEFAULT))
    if kind not in CONFIG_MAPPING:
        near = difflib.get_close_matches(kind, list(CONFIG_MAPPING.keys()), 1)
        raise ConfigError(
            f"RetrievalEncoder.name_or_config has model_type {kind!r}, which transformers does not know"
            + (f"; did you mean {near[0]}?" if near else "")
        )
    cls = CONFIG_MAPPING[kind]
    if "transformers_version" not in given:
        known = {*cls().to_dict(), *getattr(cls, "attribute_map", {})}
        for key in given:
            near = difflib.get_close_matches(key, sorted(known), 1)
            if key not in known:
                hint = f"; did you mean {near[0]}?" if near else ""
                raise ConfigError(f"RetrievalEncoder.name_or_config has {key}, which {kind} does not know{hint}")
        first = int(spec.get("pad") or 0) + 1 if kind in BEHIND_PADDING else 0
        said = {"vocab_size": spec.get("vocab_size"), "pad_token_id": spec.get("pad")}
        said["max_position_embeddings"] = None if spec.get("length") is None else int(spec["length"]) + first
        given = {**{k: v for k, v in said.items() if v is not None}, **given}
    try:
        config = cls.from_dict({k: v for k, v in given.items() if k != "model_type"})
    except Exception as error:  # validation raises the library's own kinds
        reason = str(error).strip().splitlines()[-1].strip()
        raise ConfigError(f"RetrievalEncoder.name_or_config: {reason}") from error
    name = type(config).__name__.removesuffix("Config")
    heads = transformers.AutoModelForMaskedLM._model_mapping
    if config.is_encoder_decoder or getattr(config, "is_decoder", False) or type(config) not in heads:
        raise ConfigError(f"{name} isn't a bidirectional encoder with an MLM head: use a BERT-shaped model")
    return config


def make(path: str | None, config: Any) -> Any:
    """The module, with the weights at ``path`` or from scratch.

    Raises:
        ConfigError: a model whose layers aren't BERT's (other attention, no position table).
    """
    import transformers

    auto = transformers.AutoModelForMaskedLM
    if path is not None:
        folder = expand(path)
        module = auto.from_pretrained(str(folder) if folder.exists() else path, dtype=torch.float32)
    else:
        try:
            module = auto.from_config(config)
        except ValueError as error:
            raise ConfigError(f"RetrievalEncoder.name_or_config: {error}") from error
    base = module.base_model
    table = getattr(getattr(base, "embeddings", None), "position_embeddings", None)
    layer = getattr(getattr(base, "encoder", None), "layer", [None])[0]
    attention = getattr(getattr(layer, "attention", None), "self", None)
    same = all(hasattr(attention, n) for n in ("query", "key", "value")) and hasattr(layer.output, "LayerNorm")
    if table is None or not same or _head(module) is None:
        raise ConfigError(
            f"{type(module).__name__} is not BERT-shaped (word and position tables, layers with query, key and value, "
            "an MLM head): use bert, roberta, xlm-roberta or camembert"
        )
    return module.train()


def _head(module: Any) -> Any:
    return getattr(module, "cls", None) or getattr(module, "lm_head", None)


def logits(module: Any, hidden: Tensor) -> Tensor:
    """The MLM head: […,D] → […,V]."""
    return _head(module)(hidden)


def first_place(module: Any) -> int:
    """Row of the position table that the first token has: RoBERTa's come behind the padding id."""
    padding = module.base_model.embeddings.position_embeddings.padding_idx
    return 0 if padding is None else int(padding) + 1


def places(module: Any, index: Tensor) -> Tensor:
    """Rows of the position table for places ``index``: [B,T] → [B,T,D]."""
    return module.base_model.embeddings.position_embeddings(index + first_place(module))


def embedded(module: Any, vectors: Tensor, index: Tensor) -> Tensor:
    """BERT's whole embedding of word vectors [B,T,D] at places ``index`` [B,T]: word, place, type, norm, dropout."""
    own = module.base_model.embeddings
    kind = own.token_type_embeddings.weight[0] if hasattr(own, "token_type_embeddings") else 0.0
    return own.dropout(own.LayerNorm(vectors + kind + places(module, index)))


def attend(layer: Any, x: Tensor, source: Tensor, mask: Tensor | None) -> Tensor:
    """One BERT layer with queries [B,N,D] from one place, keys and values [B,M,D] from another.

    Args:
        layer: A BERT layer of transformers.
        x: The queries, also the residual.
        source: Keys and values; ``x`` itself for self-attention.
        mask: [B,M] bool, True = real key; None when all are.
    """
    own = layer.attention.self
    heads = own.num_attention_heads
    q, k, v = (
        m(s).unflatten(-1, (heads, -1)).transpose(1, 2)
        for m, s in ((own.query, x), (own.key, source), (own.value, source))
    )
    drop = own.dropout.p if own.training else 0.0
    keys = None if mask is None else mask[:, None, None, :]
    seen = F.scaled_dot_product_attention(q, k, v, attn_mask=keys, dropout_p=drop)
    x = layer.attention.output(seen.transpose(1, 2).flatten(2), x)
    return layer.output(layer.intermediate(x), x)
