"""Drop a text when it shares a run of words with one that was kept."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np

FACTOR = 0x9E3779B97F4A7C15
"""Odd, so multiplying by it loses nothing modulo 2 to the 64."""


class Seen:
    """Remembers the n-grams of what was kept. Li, Ye et al. 2025 use n = 20 words.

    A text goes when any of its n-grams was seen. What goes leaves no n-grams behind. Texts of fewer than n words are
    compared as a whole.

    Args:
        n: Words of an n-gram; 0 compares whole texts only.
    """

    def __init__(self, n: int) -> None:
        self.n = n
        self.grams: set[int] = set()
        self.whole: set[bytes] = set()
        self._words: dict[str, int] = {}

    def fresh(self, text: str) -> bool:
        """Whether to keep a text; if so it is remembered."""
        words = text.split()
        if not self.n or len(words) < self.n:
            key = hashlib.blake2b(text.encode(), digest_size=16).digest()
            new = key not in self.whole
            self.whole.add(key)
            return new
        grams = self._grams(words)
        if not self.grams.isdisjoint(grams):
            return False
        self.grams.update(grams)
        return True

    def _grams(self, words: list[str]) -> list[int]:
        """A 64-bit hash of each n-gram; the same in every process."""
        ids = np.array([self._word(w) for w in words], dtype=np.uint64)
        count = len(ids) - self.n + 1
        made = np.zeros(count, dtype=np.uint64)
        for place in range(self.n):  # unsigned arithmetic wraps, as a polynomial hash wants it
            made = made * np.uint64(FACTOR) + ids[place : place + count]
        return made.tolist()

    def _word(self, word: str) -> int:
        if word not in self._words:
            digest = hashlib.blake2b(word.encode(errors="replace"), digest_size=8).digest()
            self._words[word] = int.from_bytes(digest, "little")
        return self._words[word]


def kept(texts: Iterable[str], n: int) -> list[int]:
    """Places of the texts that stay, in order."""
    seen = Seen(n)
    return [i for i, text in enumerate(texts) if seen.fresh(text)]
