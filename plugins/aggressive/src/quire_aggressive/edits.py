"""Edits between a text and its correction, F0.5 over them, and BLEU: counts over rows of words or ids."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from difflib import SequenceMatcher

Words = Sequence[Hashable]
Edit = tuple[int, int, tuple[Hashable, ...]]


def edits(source: Words, target: Words) -> frozenset[Edit]:
    """What turns ``source`` into ``target``: (start, end, replacement) of each stretch where the two differ."""
    found = SequenceMatcher(None, source, target, autojunk=False).get_opcodes()
    return frozenset((a, b, tuple(target[c:d])) for kind, a, b, c, d in found if kind != "equal")


def edit_counts(source: Words, output: Words, references: Sequence[Words]) -> tuple[int, int, int]:
    """(right, made, wanted) edits, against the reference that gives this row the best F0.5."""
    made = edits(source, output)
    counts = [(len(made & wanted), len(made), len(wanted)) for wanted in (edits(source, r) for r in references)]
    return max(counts, key=lambda c: (f_score(*c), c[0], -c[2]))


def f_score(right: float, made: float, wanted: float, beta: float = 0.5) -> float:
    """F of precision right/made and recall right/wanted; 1 where there was nothing to do and nothing was done."""
    if not made and not wanted:
        return 1.0
    square = beta * beta
    return (1 + square) * right / (square * wanted + made)


def bleu_counts(output: Words, references: Sequence[Words], order: int = 4) -> list[int]:
    """Output length, the nearest reference's length, then matched and all n-grams for n = 1 … ``order``."""
    nearest = min((abs(len(r) - len(output)), len(r)) for r in references)[1]
    counts = [len(output), nearest]
    for n in range(1, order + 1):
        own = _grams(output, n)
        most: Counter[tuple[Hashable, ...]] = Counter()
        for reference in references:
            most |= _grams(reference, n)
        counts += [(own & most).total(), own.total()]
    return counts


def bleu(counts: Sequence[float]) -> float:
    """Corpus BLEU in [0, 1] from summed ``bleu_counts``: geometric mean of precisions times the brevity penalty."""
    length, nearest, pairs = counts[0], counts[1], list(zip(counts[2::2], counts[3::2]))
    if not length or any(matched == 0 for matched, _ in pairs):
        return 0.0
    precision = sum(math.log(matched / total) for matched, total in pairs) / len(pairs)
    return math.exp(precision + min(0.0, 1 - nearest / length))


def _grams(words: Words, n: int) -> Counter[tuple[Hashable, ...]]:
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
