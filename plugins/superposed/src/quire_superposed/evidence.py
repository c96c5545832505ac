"""What n-grams say of candidate tokens: one bisection for each order over all candidates at once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from quire.roles.language.ngrams import NGramStore

ROOM = 62  # bits of a key that may be used


class Evidence:
    """q(v) = Σ_i w_i · count_i(context, v) / count_i(context), over the orders whose context was seen.

    In memory it takes 8 bytes a context and 16 an n-gram beside the store.

    Args:
        store: Counts.
        lengths: Context lengths n_i, all in the store.
        weights: Their weights w_i.
    """

    def __init__(self, store: NGramStore, lengths: Sequence[int], weights: Sequence[float]) -> None:
        self.vocab_size = store.vocab_size
        self.reach = max(lengths)
        self.orders = [Order(store.tables[n], n, w, store.vocab_size) for n, w in zip(lengths, weights)]

    def of(self, tails: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """q of candidates.

        Args:
            tails: [M,reach] the last tokens of each text, -1 where it is shorter.
            tokens: [M,C] candidates.

        Returns:
            [M,C] float64.
        """
        found = np.zeros(tokens.shape)
        for order in self.orders:
            rows = order.contexts.find(tails[:, self.reach - order.length :])
            found += order.of(rows, tokens)
        return found

    def everywhere(self, tails: np.ndarray, width: int) -> np.ndarray:
        """q of every token: [M,reach] tails → [M,width]."""
        found = np.zeros((len(tails), width))
        for order in self.orders:
            order.spread(order.contexts.find(tails[:, self.reach - order.length :]), found)
        return found


class Order:
    """One order's n-grams as sorted numbers, with weighted relative frequencies beside them."""

    def __init__(self, table: dict[str, np.ndarray], length: int, weight: float, vocab_size: int) -> None:
        self.length, self.vocab_size = length, vocab_size
        self.starts, self.tokens = table["starts"], table["tokens"]
        sizes = np.diff(self.starts)
        self.contexts = Contexts(table["contexts"], vocab_size)
        counts = np.asarray(table["counts"], dtype=np.float64)
        totals = np.add.reduceat(counts, self.starts[:-1]) if len(counts) else counts
        self.shares = weight * counts / np.repeat(totals, sizes)
        self.keys = np.repeat(np.arange(len(sizes), dtype=np.int64), sizes) * vocab_size + self.tokens

    def of(self, rows: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """Weighted shares of candidates [M,C] behind the contexts of ``rows`` [M] (-1: never seen)."""
        if not len(self.keys):
            return np.zeros(tokens.shape)
        wanted = rows[:, None] * self.vocab_size + tokens
        place = np.minimum(np.searchsorted(self.keys, wanted), len(self.keys) - 1)
        hit = (self.keys[place] == wanted) & (rows[:, None] >= 0) & (tokens < self.vocab_size)
        return np.where(hit, self.shares[place], 0.0)

    def spread(self, rows: np.ndarray, into: np.ndarray) -> None:
        """Add the weighted shares of every successor to ``into`` [M,V]."""
        seen = np.flatnonzero(rows >= 0)
        first = self.starts[rows[seen]]
        sizes = self.starts[rows[seen] + 1] - first
        places = np.repeat(first - np.cumsum(sizes) + sizes, sizes) + np.arange(sizes.sum())
        into[np.repeat(seen, sizes), self.tokens[places]] += self.shares[places]


class Contexts:
    """Sorted contexts [R,n] packed into one number each, so that a lookup is a bisection of integers.

    As many tokens as fit make a number; where more are left, the number is replaced by its rank and goes on.
    """

    def __init__(self, contexts: np.ndarray, vocab_size: int) -> None:
        self.bits, self.vocab_size = max(1, (vocab_size - 1).bit_length()), vocab_size
        self.stages: list[tuple[int, np.ndarray]] = []  # columns so far, sorted distinct keys
        key, used = np.zeros(len(contexts), dtype=np.int64), 0
        while used < contexts.shape[1]:
            taken = max(1, (ROOM - len(contexts).bit_length() * bool(used)) // self.bits)
            columns = contexts[:, used : used + taken]
            key = self._packed(key, columns)
            new = np.ones(len(key), dtype=bool)
            new[1:] = key[1:] != key[:-1]
            used += columns.shape[1]
            self.stages.append((used, key[new]))
            key = np.cumsum(new) - 1

    def _packed(self, key: np.ndarray, columns: np.ndarray) -> np.ndarray:
        for column in columns.T:
            key = (key << self.bits) | column
        return key

    def find(self, wanted: np.ndarray) -> np.ndarray:
        """Row of each context [M,n], -1 where it was never seen or holds a -1."""
        rows, used = np.zeros(len(wanted), dtype=np.int64), 0
        good = ((wanted >= 0) & (wanted < self.vocab_size)).all(1)
        for until, keys in self.stages:
            if not len(keys):
                return np.full(len(wanted), -1)
            key = self._packed(rows, wanted[:, used:until])
            rows = np.minimum(np.searchsorted(keys, key), len(keys) - 1)
            good &= keys[rows] == key
            used = until
        return np.where(good, rows, -1)
