"""A data module's training split as documents of ids, for stores that count them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch

from quire.errors import ConfigError
from quire.roles.language.ngrams import NGramStore

AT_ONCE = 20_000
"""Documents counted before they are merged into the store, which bounds the memory of a large count."""


def documents(source: Any) -> Iterator[list[int]]:
    """Real tokens of each training row from behind the start token, cut after each end token.

    Raises:
        ConfigError: rows without ``tokens``.
    """
    rows, bos, eos = source.dataset("train"), source.spec.get("bos"), source.spec.get("eos")
    for i in range(len(rows)):
        sample = rows[i]
        if "tokens" not in sample:
            raise ConfigError(
                f"{type(source).__name__} has no field tokens to count n-grams of: use a text data module"
            )
        tokens, mask = sample["tokens"], sample.get("mask")
        tokens = tokens if mask is None else tokens[mask]
        ends = [] if eos is None else (torch.nonzero(tokens == eos).flatten() + 1).tolist()
        ids = tokens.tolist()
        for a, b in zip([0, *ends], [*ends, len(ids)]):
            document = ids[a + 1 : b] if a < b and ids[a] == bos else ids[a:b]
            if len(document) > 1:
                yield document


def count_into(store: NGramStore, source: Any) -> None:
    """Count a data module's training tokens into a store."""
    vocab, fingerprint = source.spec.need("vocab_size", store), source.spec.get("tokenizer") or ""
    rows = documents(source)
    while part := list(islice(rows, AT_ONCE)):
        store.add(part, vocab, fingerprint)
