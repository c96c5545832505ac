"""BM25 with the bm25s library: hard negatives, a teacher, and the baseline beside every result; mined rankings."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from quire.data import expand
from quire.errors import ConfigError, DataError


def _index(documents: list[str]) -> tuple[Any, Any]:
    try:
        import bm25s
    except ImportError as error:
        raise ConfigError("BM25 needs bm25s: pip install bm25s") from error
    index = bm25s.BM25()  # Lucene's variant, k1 1.5, b 0.75
    index.index(_cut(bm25s, documents), show_progress=False)
    return bm25s, index


def _cut(bm25s: Any, texts: list[str]) -> list[list[str]]:
    return bm25s.tokenize(texts, stopwords="en", return_ids=False, show_progress=False)


def rank(documents: list[str], queries: list[str], top: int) -> Iterator[list[int]]:
    """The numbers of the best documents of each query, best first; those without a common word are left out."""
    if not queries:
        return
    bm25s, index = _index(documents)
    found, given = index.retrieve(_cut(bm25s, queries), k=min(top, len(documents)), show_progress=False, n_threads=1)
    for numbers, values in zip(found.tolist(), given.tolist()):
        yield [n for n, v in zip(numbers, values) if v > 0]


def scores(documents: list[str], asked: list[tuple[str, list[int]]]) -> Iterator[list[float]]:
    """The scores of some documents of each query."""
    bm25s, index = _index(documents)
    for cut, (_, numbers) in zip(_cut(bm25s, [q for q, _ in asked]), asked):
        told = index.get_scores(cut)
        yield [float(told[n]) for n in numbers]


def mined(path: str, names: list[str]) -> dict[str, list[int]]:
    """Query id → document numbers, from the ``predictions.jsonl`` of a search.

    Raises:
        ConfigError: no such file.
        DataError: rows that aren't a search's, or documents that the corpus lacks.
    """
    file = expand(path)
    if not file.is_file():
        raise ConfigError(f"negatives_from: no file at {file}; write bm25, or predict with HybridSearch first")
    number = {name: i for i, name in enumerate(names)}
    found = {}
    for place, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            found[str(row["query"])] = [number[d] for d in row["documents"]]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{file}, line {place}: no ranking of this corpus ({error})") from error
    return found
