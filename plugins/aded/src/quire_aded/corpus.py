"""Where the first weights come from: the run's training tokens, a text, or a saved store."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from quire.data import expand
from quire.datasets.text import read_source
from quire.errors import ConfigError, DataError
from quire.roles.language.text import Tokenizer
from quire_aded.store import Trigrams

BINARY = (".safetensors", ".bin", ".pt", ".pth", ".pkl", ".pickle", ".npz", ".npy", ".idx")


def trigrams_of_data(source: Any, vocab_size: int, fingerprint: str, max_rows: int) -> Trigrams:
    """Trigrams of a data module's training split."""
    if source is None:
        raise ConfigError(
            "TrigramTree.corpus: data reads the run's training tokens, and there is no data module:"
            " run under a Trainer with data, give a path, or call learn(documents)"
        )
    rows = source.dataset("train")
    eos = source.spec.get("eos")
    return Trigrams.count(_documents(rows, eos), vocab_size, fingerprint, max_rows)


def _documents(rows: Any, eos: int | None, size: int = 256) -> Iterator[list[int]]:
    for start in range(0, len(rows), size):
        for i in range(start, min(start + size, len(rows))):
            sample = rows[i]
            if "tokens" not in sample:
                raise ConfigError("TrigramTree.corpus: data needs the field tokens; use a text data module, or a path")
            tokens = sample["tokens"]
            mask = sample.get("mask")
            tokens = tokens if mask is None else tokens[mask]
            ends = [] if eos is None else (torch.nonzero(tokens == eos).flatten() + 1).tolist()
            ids = tokens.tolist()
            for a, b in zip([0, *ends], [*ends, len(ids)]):  # a trigram never spans two documents
                if b - a > 2:
                    yield ids[a:b]


def trigrams_of_path(
    path: str, tokenizer: Tokenizer | None, vocab_size: int, fingerprint: str, top: int, max_rows: int
) -> Trigrams:
    """Trigrams of a text file or folder, or a store that ``SaveTrigrams`` wrote.

    Raises:
        ConfigError: nothing there, or no tokenizer to read text with. DataError: empty, or not a store.
    """
    file = path if path.startswith(("stdlib", "hf:")) else expand(path)
    if not isinstance(file, str):
        if not file.exists():
            raise ConfigError(f"TrigramTree.corpus: nothing at {file}: give data, a text, or a trigram store")
        if file.is_file() and not file.stat().st_size:
            raise DataError(f"TrigramTree.corpus: {file} is empty")
        if file.suffix in BINARY:
            return Trigrams.load(file, top, max_rows)
    if tokenizer is None:
        raise ConfigError(f"TrigramTree.corpus: {file} is text and the model has no tokenizer: save a store instead")
    texts = read_source(str(file))
    found = Trigrams.count((tokenizer.encode(t) for t in texts), vocab_size, fingerprint, max_rows)
    if not len(found):
        raise DataError(f"TrigramTree.corpus: {file} is empty: it holds no three tokens in a row")
    return found
