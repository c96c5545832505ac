"""Where n-gram counts come from: a file, or the training tokens of a data module."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import torch

from quire.errors import ConfigError
from quire.roles.language.ngrams import NGramStore

AT_ONCE = 20_000
"""Documents counted before they are merged into the store, which bounds the memory of a large count."""


def opened(ngrams: str, lengths: Sequence[int], model: Any, vocab_size: int) -> NGramStore:
    """The store that a run's sampler reads, checked against the run's tokenizer.

    Raises:
        ConfigError: no such file, an order that it lacks, another tokenizer, or no data to count.
    """
    spec = getattr(model, "spec", None) or {}
    if ngrams == "data":
        source = getattr(model, "datamodule", None)
        if source is None:
            raise ConfigError(
                "Superposed.ngrams: data counts the run's training tokens, and there is no data module: run under a"
                " Trainer with data, or write a store with quire ngrams and give its path"
            )
        store = counted(source, lengths)
    else:
        store = NGramStore(orders=list(lengths), path=ngrams)
    store.need(spec.get("vocab_size") or vocab_size, _fingerprint(model, spec))
    return store


def _fingerprint(model: Any, spec: Any) -> str | None:
    """Of the tokenizer itself, if there is one: twelve digits in the spec may have been read as a number."""
    own = getattr(getattr(model, "tokenizer", None), "fingerprint", None)
    said = own or spec.get("tokenizer")
    return said if isinstance(said, str) else None


def counted(source: Any, lengths: Sequence[int], shard: tuple[int, int] = (0, 1)) -> NGramStore:
    """Count the training split of a data module.

    Args:
        source: A data module with ``tokens``.
        lengths: Context lengths.
        shard: (i, n): only every n-th row from the i-th on; the n stores merged are the whole.
    """
    sizes = source.spec
    store = NGramStore(orders=list(lengths))
    vocab = sizes.need("vocab_size", store)
    rows = documents(source.dataset("train"), sizes.get("bos"), sizes.get("eos"), shard)
    fingerprint = sizes.get("tokenizer") or ""
    store.add([], vocab, fingerprint)
    while part := list(islice(rows, AT_ONCE)):
        store.add(part, vocab, fingerprint)
    if not len(store):
        raise ConfigError(
            f"the training split of {type(source).__name__} holds no {1 + min(lengths)} tokens in a row to count"
        )
    return store


def documents(rows: Any, bos: int | None, eos: int | None, shard: tuple[int, int] = (0, 1)) -> Iterator[list[int]]:
    """Real tokens of each row from behind the start token, cut after each end token.

    Raises:
        ConfigError: rows without ``tokens``.
    """
    for i in range(shard[0], len(rows), shard[1]):
        sample = rows[i]
        if "tokens" not in sample:
            raise ConfigError("counting n-grams needs the field tokens: use a text data module")
        tokens, mask = sample["tokens"], sample.get("mask")
        tokens = tokens if mask is None else tokens[mask]
        ends = [] if eos is None else (torch.nonzero(tokens == eos).flatten() + 1).tolist()
        ids = tokens.tolist()
        for a, b in zip([0, *ends], [*ends, len(ids)]):
            document = ids[a + 1 : b] if a < b and ids[a] == bos else ids[a:b]
            if len(document) > 1:
                yield document
