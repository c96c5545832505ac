"""How much drafts of one prompt differ: distinct n-grams and self-BLEU, on token ids."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

SMALL = 0.1
"""Matches counted where an order has none: smoothing 1 of Chen and Cherry 2014."""


def grams(ids: Sequence[int], order: int) -> Counter[tuple[int, ...]]:
    """Every run of ``order`` ids with its count."""
    return Counter(tuple(ids[i : i + order]) for i in range(len(ids) - order + 1))


def distinct(drafts: Sequence[Sequence[int]], order: int) -> float:
    """Different n-grams over all n-grams of the drafts together; 0 where they are too short."""
    counts: Counter[tuple[int, ...]] = Counter()
    for ids in drafts:
        counts += grams(ids, order)
    return len(counts) / max(1, counts.total())


def bleu(candidate: Sequence[int], references: Sequence[Sequence[int]], orders: int = 4) -> float:
    """Sentence BLEU of ids: geometric mean of clipped precisions times the brevity penalty, in [0, 1].

    Orders that the candidate is too short for are left out.
    """
    if not candidate or not references:
        return 0.0
    logs = []
    for order in range(1, min(orders, len(candidate)) + 1):
        mine = grams(candidate, order)
        most: Counter[tuple[int, ...]] = Counter()
        for reference in references:
            most |= grams(reference, order)
        matched = (mine & most).total()
        logs.append(math.log((matched or SMALL) / mine.total()))
    nearest = min((abs(len(r) - len(candidate)), len(r)) for r in references)[1]
    short = min(0.0, 1 - nearest / len(candidate))
    return math.exp(short + sum(logs) / len(logs))


def self_bleu(drafts: Sequence[Sequence[int]]) -> float:
    """Mean BLEU of each draft against the others; high where they are alike. 0 for fewer than two."""
    if len(drafts) < 2:
        return 0.0
    others = [[d for j, d in enumerate(drafts) if j != i] for i in range(len(drafts))]
    return sum(bleu(d, rest) for d, rest in zip(drafts, others)) / len(drafts)
