"""Trigram weights: a sorted base from a corpus, and the rows that decoding has changed on top of it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from quire.data import expand
from quire.errors import ConfigError, DataError
from quire.roles.language.ngrams import NGramStore

Row = tuple[list[int], list[float]]
"""Successors of a bigram and their weights, heaviest first, ties by lower id."""

NOTHING: Row = ([], [])


class Trigrams:
    """Sparse M[(a,b)][c] = weight. Rows from a corpus sum to 1; observed tokens add to them without bound of the sum.

    The base is four arrays: ``keys`` [R] int64 = a·V + b ascending, ``starts`` [R+1], ``tokens`` and ``weights``, each
    row heaviest first. Changed rows live in a dictionary above it.

    Args:
        vocab_size: V.
        fingerprint: Of the tokenizer that made the ids; empty when unknown.
        max_rows: Most rows of the base and, separately, most changed rows; the rarest and the oldest go.
    """

    def __init__(self, vocab_size: int, fingerprint: str = "", max_rows: int = 1_000_000) -> None:
        self.vocab_size, self.fingerprint, self.max_rows = vocab_size, fingerprint, max_rows
        self.keys = np.zeros(0, dtype=np.int64)
        self.starts = np.zeros(1, dtype=np.int64)
        self.tokens = np.zeros(0, dtype=np.int32)
        self.weights = np.zeros(0, dtype=np.float32)
        self.changed: dict[int, dict[int, float]] = {}
        self._read: dict[int, Row] = {}

    # ---- from a corpus
    @classmethod
    def count(
        cls, documents: Iterable[Sequence[int]], vocab_size: int, fingerprint: str = "", max_rows: int = 1_000_000
    ) -> Trigrams:
        """Trigrams within each document, each bigram's row normalised to 1."""
        counts = NGramStore([2])
        counts.add(documents, vocab_size, fingerprint)
        return cls.normalised(counts, max_rows)

    @classmethod
    def normalised(cls, counts: NGramStore, max_rows: int = 1_000_000) -> Trigrams:
        """From counts; shards are merged as counts (``NGramStore.merge``), before they are normalised."""
        made = cls(counts.vocab_size, counts.fingerprint, max_rows)
        table = counts.tables[2]
        keys = table["contexts"][:, 0].astype(np.int64) * counts.vocab_size + table["contexts"][:, 1]
        sizes = np.diff(table["starts"])
        totals = np.add.reduceat(table["counts"], table["starts"][:-1]) if len(keys) else np.zeros(0)
        weights = (table["counts"] / np.repeat(totals, sizes)).astype(np.float32)
        keep = np.ones(len(keys), dtype=bool)
        if len(keys) > max_rows:
            keep[np.lexsort((keys, -totals))[max_rows:]] = False
        inside = np.repeat(keep, sizes)
        made._fill(np.repeat(keys, sizes)[inside], table["tokens"][inside], weights[inside])
        return made

    def _fill(self, keys: np.ndarray, tokens: np.ndarray, weights: np.ndarray, top: int | None = None) -> None:
        order = np.lexsort((tokens, -weights, keys))
        keys, tokens, weights = keys[order], tokens[order], weights[order]
        first = np.ones(len(keys), dtype=bool)
        first[1:] = keys[1:] != keys[:-1]
        places = np.flatnonzero(first)
        if top is not None:
            rank = np.arange(len(keys)) - np.repeat(places, np.diff(np.append(places, len(keys))))
            keys, tokens, weights = keys[rank < top], tokens[rank < top], weights[rank < top]
            first = np.ones(len(keys), dtype=bool)
            first[1:] = keys[1:] != keys[:-1]
            places = np.flatnonzero(first)
        self.keys, self.starts = keys[places].astype(np.int64), np.append(places, len(keys)).astype(np.int64)
        self.tokens, self.weights = tokens.astype(np.int32), weights.astype(np.float32)
        self.forget()

    # ---- reading
    def rows(self, keys: Sequence[int]) -> list[Row]:
        """The row of each bigram a·V + b, empty where it was never seen; one bisection for all that are new."""
        read = self._read
        missing = [k for k in keys if k not in read]
        if len(read) + len(missing) > self.max_rows + len(keys):  # what was read is bounded too
            read.clear()
            missing = list(keys)
        if missing:
            self._fetch(missing)
        return [read[k] for k in keys]

    def _fetch(self, keys: list[int]) -> None:
        places = np.searchsorted(self.keys, keys).tolist()
        for key, place in zip(keys, places):
            row = NOTHING
            if key in self.changed:
                row = _sorted(self.changed[key])
            elif place < len(self.keys) and self.keys[place] == key:
                span = slice(self.starts[place], self.starts[place + 1])
                row = (self.tokens[span].tolist(), self.weights[span].tolist())
            self._read[key] = row

    def row(self, a: int, b: int) -> Row:
        """Successors of the bigram (a,b)."""
        return self.rows([a * self.vocab_size + b])[0]

    def __len__(self) -> int:
        """Rows."""
        old = np.isin(np.fromiter(self.changed, dtype=np.int64, count=len(self.changed)), self.keys)
        return len(self.keys) + len(self.changed) - int(old.sum())

    # ---- learning
    def observe(self, ids: Sequence[int], delta: float, cap: float, update: str = "additive") -> None:
        """Strengthen every trigram of ``ids``: by ``delta`` up to ``cap``, or as a running mean with rate ``delta``."""
        if not delta:
            return
        for a, b, c in zip(ids, ids[1:], ids[2:]):
            key = a * self.vocab_size + b
            row = self.changed.pop(key, None)  # put back at the end: the dictionary is in order of use
            if row is None:
                row = dict(zip(*self.rows([key])[0]))
            if update == "ema":
                row = {token: weight * (1 - delta) for token, weight in row.items()}
            row[c] = min(cap, row.get(c, 0.0) + delta)
            self.changed[key] = row
            self._read[key] = _sorted(row)
        while len(self.changed) > self.max_rows:
            oldest = next(iter(self.changed))
            del self.changed[oldest]
            self._read.pop(oldest, None)

    def forget(self) -> None:
        """Back to the corpus: what was observed is gone."""
        self.changed, self._read = {}, {}

    # ---- files
    def save(self, path: str | Path) -> Path:
        """One safetensors file with base and observations joined; the header says vocabulary and fingerprint."""
        from safetensors.numpy import save_file

        target = expand(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        keys = np.repeat(self.keys, np.diff(self.starts))
        old = ~np.isin(keys, np.fromiter(self.changed, dtype=np.int64, count=len(self.changed)))
        new = [(k, t, w) for k, row in self.changed.items() for t, w in row.items()]
        tensors = {
            "keys": np.concatenate([keys[old], np.array([k for k, _, _ in new], dtype=np.int64)]),
            "tokens": np.concatenate([self.tokens[old], np.array([t for _, t, _ in new], dtype=np.int32)]),
            "weights": np.concatenate([self.weights[old], np.array([w for _, _, w in new], dtype=np.float32)]),
        }
        header = {"kind": "trigrams", "vocab_size": self.vocab_size, "fingerprint": self.fingerprint}
        partial = target.with_suffix(target.suffix + ".part")
        save_file(tensors, str(partial), metadata={"quire": json.dumps(header)})
        partial.replace(target)
        return target

    @classmethod
    def load(cls, path: str | Path, top: int | None = None, max_rows: int = 1_000_000) -> Trigrams:
        """Read a file of ``save``, keeping each row's ``top`` heaviest successors as they are; nothing is unpickled.

        Raises:
            ConfigError: no such file. DataError: not a trigram store.
        """
        from safetensors import SafetensorError, safe_open

        file = expand(path)
        if not file.is_file():
            raise ConfigError(f"TrigramTree.corpus: no trigram store at {file}")
        try:
            with safe_open(str(file), framework="numpy") as handle:
                header = json.loads((handle.metadata() or {})["quire"])
                vocab_size, fingerprint = header["vocab_size"], header["fingerprint"]
                keys, tokens, weights = (handle.get_tensor(n) for n in ("keys", "tokens", "weights"))
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{file} is no trigram store: only safetensors written by SaveTrigrams are read, a pickle never is"
            ) from error
        made = cls(vocab_size, fingerprint, max_rows)
        made._fill(keys, tokens, weights, top)
        return made

    def need(self, vocab_size: int, fingerprint: str | None) -> None:
        """Raise ``ConfigError`` unless the store was built for this vocabulary."""
        other = fingerprint and self.fingerprint and fingerprint != self.fingerprint
        if self.vocab_size != vocab_size or other:
            raise ConfigError(
                f"trigram store was built for vocab {self.vocab_size} ({self.fingerprint or 'unknown'}),"
                f" model has {vocab_size} ({fingerprint or 'unknown'}): build it again with the model's tokenizer"
            )


def _sorted(row: dict[int, float]) -> Row:
    pairs = sorted(row.items(), key=lambda pair: (-pair[1], pair[0]))
    return [t for t, _ in pairs], [w for _, w in pairs]
