"""Counts of n-grams in sorted arrays: looked up by bisection, memory-mapped from safetensors, no pickle."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from quire.contracts import Part
from quire.data import expand
from quire.errors import ConfigError, DataError
from quire.roles.language.accept import tiny_speculative

Table = dict[str, np.ndarray]
"""``contexts``, ``starts``, ``tokens`` and ``counts`` of one order."""


class NGramStore(Part):
    """How often each token followed each context of 1, 2 … tokens.

    For an order n (its context length) the store keeps distinct contexts as rows of ``contexts`` [R,n], sorted; row
    r's successors are ``tokens[starts[r]:starts[r+1]]``, ascending, with ``counts`` beside them.

    Args:
        orders: Context lengths, each at least 1.
        path: A file written by ``save``; null starts empty.

    Raises:
        ConfigError: an order below 1, a missing file, or a file without one of the orders. DataError: a damaged file.
    """

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """Counts of the run's own training tokens, for prompt lookup."""
        store = {"class_path": "NGramStore", "init_args": {"orders": [1, 2]}}
        return tiny_speculative({}, {"class_path": "PromptCopy", "init_args": {"corpus": store}})

    def __init__(self, orders: list[int] | None = None, path: str | None = None) -> None:
        super().__init__()
        self.orders = sorted(set(orders or [1, 2, 3, 4, 5]))
        if self.orders[0] < 1:
            raise ConfigError(f"NGramStore.orders must be at least 1, got {self.orders[0]}")
        self.vocab_size, self.fingerprint = 0, ""
        self.tables: dict[int, Table] = {n: _empty(n) for n in self.orders}
        self._keyed: dict[int, tuple[Table, np.ndarray]] = {}  # sorted keys of a table, kept while it is the same one
        self._file = ""
        if path is not None:
            self.read(path)

    # ---- counting
    def add(self, documents: Iterable[Sequence[int]], vocab_size: int, fingerprint: str = "") -> None:
        """Count documents of ids; an n-gram never spans two documents."""
        self._same(vocab_size, fingerprint)
        rows = [np.asarray(d, dtype=np.int64) for d in documents]
        for order in self.orders:
            parts = [np.lib.stride_tricks.sliding_window_view(r, order + 1) for r in rows if len(r) > order]
            if parts:
                grams = np.concatenate(parts)
                self.tables[order] = _merge(self.tables[order], _table(grams, np.ones(len(grams), dtype=np.int64)))

    def merge(self, other: NGramStore) -> None:
        """Add another store's counts: shards merged equal one pass."""
        self._same(other.vocab_size, other.fingerprint)
        for order in self.orders:
            if order not in other.tables:
                raise ConfigError(f"the store to merge has no order {order}; it has {other.orders}")
            self.tables[order] = _merge(self.tables[order], other.tables[order])

    def _same(self, vocab_size: int, fingerprint: str) -> None:
        if self.vocab_size and (vocab_size, fingerprint) != (self.vocab_size, self.fingerprint):
            ours, theirs = f"{self.vocab_size} ({self.fingerprint})", f"{vocab_size} ({fingerprint})"
            raise ConfigError(f"n-gram store was built for vocabulary {ours}, given {theirs}")
        self.vocab_size, self.fingerprint = vocab_size, fingerprint

    def need(self, vocab_size: int, fingerprint: str | None) -> None:
        """Raise ``ConfigError`` unless the store was built for this vocabulary."""
        other = fingerprint and self.fingerprint and fingerprint != self.fingerprint
        if self.vocab_size != vocab_size or other:
            where = self._file and f"{self._file}: "
            raise ConfigError(
                f"{where}n-gram store was built for vocabulary {self.vocab_size} ({self.fingerprint}), the model has"
                f" {vocab_size} ({fingerprint})"
            )

    # ---- lookup
    def find(self, order: int, contexts: np.ndarray) -> np.ndarray:
        """Row of each context [M,order] in the order's table, -1 where it was never seen."""
        table = self.tables[order]
        rows = len(table["contexts"])
        if not rows:
            return np.full(len(contexts), -1)
        keys, wanted = self._keys(order), _keys(np.ascontiguousarray(contexts, dtype=np.int32))
        place = np.searchsorted(keys, wanted)
        hit = keys[np.minimum(place, rows - 1)] == wanted
        return np.where(hit, np.minimum(place, rows - 1), -1)

    def successors(self, order: int, context: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """(tokens, counts) seen behind a context of ``order`` ids, ascending by token; empty when never seen."""
        row = int(self.find(order, np.asarray([context], dtype=np.int32))[0])
        table = self.tables[order]
        span = slice(0, 0) if row < 0 else slice(int(table["starts"][row]), int(table["starts"][row + 1]))
        return table["tokens"][span], table["counts"][span]

    def likeliest(self, context: Sequence[int]) -> int | None:
        """The commonest token behind the longest known end of ``context``; of equal ones the lowest id."""
        for order in reversed(self.orders):
            if len(context) >= order:
                tokens, counts = self.successors(order, context[-order:])
                if len(tokens):
                    return int(tokens[counts.argmax()])
        return None

    def _keys(self, order: int) -> np.ndarray:
        table = self.tables[order]
        if order not in self._keyed or self._keyed[order][0] is not table:
            self._keyed[order] = (table, _keys(table["contexts"]))
        return self._keyed[order][1]

    def __len__(self) -> int:
        return sum(len(t["tokens"]) for t in self.tables.values())

    # ---- files
    def save(self, path: str | Path) -> Path:
        """Write one safetensors file; the header says orders, vocabulary and fingerprint."""
        from safetensors.numpy import save_file

        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        header = {"orders": self.orders, "vocab_size": self.vocab_size, "fingerprint": self.fingerprint}
        tensors = {f"{n}.{k}": np.ascontiguousarray(v) for n, t in self.tables.items() for k, v in t.items()}
        for n in self.orders:  # the bytes that bisection compares, so that a mapped store reads a few pages only
            keys = self._keys(n)
            tensors[f"{n}.keys"] = keys.view(np.uint8).reshape(len(keys), keys.itemsize)
        partial = target.with_suffix(target.suffix + ".part")
        save_file(tensors, str(partial), metadata={"quire": json.dumps(header)})
        partial.replace(target)
        return target

    def read(self, path: str | Path) -> None:
        """Map a file written by ``save``: pages are read as they are looked up, and nothing is unpickled."""
        from safetensors import SafetensorError, safe_open

        file = expand(path)
        if not file.is_file():
            raise ConfigError(f"no n-gram store at {file}")
        try:
            with safe_open(str(file), framework="numpy") as handle:  # checks the header against the file's size
                header = json.loads((handle.metadata() or {})["quire"])
            orders, vocab, fingerprint = header["orders"], int(header["vocab_size"]), str(header["fingerprint"])
            missing = [n for n in self.orders if n not in orders]
            if missing:
                raise ConfigError(f"{file} has no order {missing[0]}; it has {orders}: count it again with this order")
            arrays = _mapped(file)
            self.tables = {n: {k: arrays[f"{n}.{k}"] for k in _empty(n)} for n in self.orders}
            self._keyed = {}
            for n, table in self.tables.items():
                rows, starts = len(table["contexts"]), table["starts"]
                if len(starts) != rows + 1 or not int(starts[-1]) == len(table["tokens"]) == len(table["counts"]):
                    raise ValueError(f"order {n}")
                if f"{n}.keys" in arrays:
                    width = np.int64 if n == 1 else f"S{4 * n}"
                    self._keyed[n] = (table, arrays[f"{n}.keys"].reshape(-1).view(width)[:rows])
        except ConfigError:
            raise
        except (SafetensorError, KeyError, ValueError, TypeError) as error:
            raise DataError(f"{file} is not an n-gram store, or is damaged: count it again") from error
        self.vocab_size, self.fingerprint, self._file = vocab, fingerprint, str(file)


def _mapped(file: Path) -> dict[str, np.ndarray]:
    """Arrays of a safetensors file, mapped into memory: safetensors itself copies each one."""
    with file.open("rb") as handle:
        size = int.from_bytes(handle.read(8), "little")
        header = json.loads(handle.read(size))
    kinds, arrays = {"I32": np.int32, "I64": np.int64, "U8": np.uint8}, {}
    for name, said in header.items():
        if name != "__metadata__":
            kind, shape, (start, end) = kinds[said["dtype"]], tuple(said["shape"]), said["data_offsets"]
            empty = start == end  # nothing to map
            arrays[name] = np.zeros(shape, kind) if empty else np.memmap(file, kind, "r", 8 + size + start, shape)
    return arrays


def _empty(order: int) -> Table:
    return {
        "contexts": np.zeros((0, order), dtype=np.int32),
        "starts": np.zeros(1, dtype=np.int64),
        "tokens": np.zeros(0, dtype=np.int32),
        "counts": np.zeros(0, dtype=np.int64),
    }


def _keys(contexts: np.ndarray) -> np.ndarray:
    """Rows as byte strings that sort as the rows do: big-endian."""
    big = np.ascontiguousarray(contexts.astype(">u4"))
    return big.view(f"S{4 * contexts.shape[1]}").ravel() if contexts.shape[1] > 1 else big.ravel().astype(np.int64)


def _table(grams: np.ndarray, weights: np.ndarray) -> Table:
    """Sorted distinct contexts with their successors' summed weights, from [G,n+1] grams."""
    order = np.lexsort(grams.T[::-1])
    grams, weights = grams[order], weights[order]
    new = np.ones(len(grams), dtype=bool)
    new[1:] = (grams[1:] != grams[:-1]).any(1)
    places = np.flatnonzero(new)
    counts = np.add.reduceat(weights, places)
    grams = grams[places]
    fresh = np.ones(len(grams), dtype=bool)
    fresh[1:] = (grams[1:, :-1] != grams[:-1, :-1]).any(1)
    starts = np.flatnonzero(fresh)
    return {
        "contexts": grams[starts, :-1].astype(np.int32),
        "starts": np.append(starts, len(grams)).astype(np.int64),
        "tokens": grams[:, -1].astype(np.int32),
        "counts": counts.astype(np.int64),
    }


def _merge(a: Table, b: Table) -> Table:
    if not len(a["tokens"]):
        return b
    if not len(b["tokens"]):
        return a

    def grams(t: Table) -> np.ndarray:
        repeated = np.repeat(t["contexts"], np.diff(t["starts"]), axis=0)
        return np.concatenate([repeated, t["tokens"][:, None]], 1).astype(np.int64)

    return _table(np.concatenate([grams(a), grams(b)]), np.concatenate([a["counts"], b["counts"]]))
