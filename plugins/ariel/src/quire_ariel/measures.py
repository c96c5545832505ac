"""What a set of generated sentences is worth: validity, variety, novelty, coverage, with bootstrap intervals.

The two groups, generation from random points and saying held-out sentences again, are Celotti et al. 2020's; the
measures are ours.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from quire_ariel.grammar import Grammar

Words = tuple[str, ...]


def variety(drawn: Sequence[Words], grammar: Grammar, known: Collection[Words]) -> dict[str, float]:
    """Shares in [0, 1] of M generated sentences.

    Args:
        drawn: M sentences as words.
        grammar: Decides validity.
        known: Training sentences.

    Returns:
        ``valid`` of all; ``unique``: different ones over M; ``valid unique``: different valid ones over M; ``novel``:
        of these, those not in training; ``vocabulary``: words used in valid ones over all words; ``grammar``:
        productions used over all.
    """
    different = set(drawn)
    good = {s for s in different if grammar.valid(s)}
    count = max(1, len(drawn))
    used = set().union(*(grammar.used(s) for s in good)) if good else set()
    words = {w for s in good for w in s}
    return {
        "valid": sum(s in good for s in drawn) / count,
        "unique": len(different) / count,
        "valid unique": len(good) / count,
        "novel": sum(s not in known for s in good) / max(1, len(good)),
        "vocabulary": len(words) / len(grammar.words),
        "grammar": len(used) / len(grammar.productions),
    }


def fidelity(said: Sequence[Sequence[int]], meant: Sequence[Sequence[int]]) -> dict[str, float]:
    """Held-out sentences said again, as ids with the end token: whole ones right, and tokens right in their place."""
    pairs = list(zip(said, meant))
    places = sum(max(len(a), len(b)) for a, b in pairs)
    return {
        "exact": sum(list(a) == list(b) for a, b in pairs) / max(1, len(pairs)),
        "tokens": sum(x == y for a, b in pairs for x, y in zip(a, b)) / max(1, places),
    }


def marks(drawn: Sequence[Words], grammar: Grammar) -> dict[str, list[float]]:
    """What each sentence adds to ``valid`` and to ``valid unique`` of ``variety``: 1 or 0, in order."""
    seen: set[Words] = set()
    found: dict[str, list[float]] = {"valid": [], "valid unique": []}
    for sentence in drawn:
        good = grammar.valid(sentence)
        found["valid"].append(float(good))
        found["valid unique"].append(float(good and sentence not in seen))
        seen.add(sentence)
    return found


def interval(each: Sequence[float], draws: int = 1000, seed: int = 0) -> tuple[float, float]:
    """95 % bootstrap interval of the mean of what each sentence adds."""
    chance = np.random.default_rng(seed)
    values = np.asarray(each)
    means = chance.choice(values, (draws, len(values))).mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def words_of(rows: Sequence[Sequence[int]], words: Sequence[str], special: int, ends: Collection[int]) -> list[Words]:
    """Ids as words, the end token dropped; a row without one, or with a special id inside, is a sentence of nobody."""
    found: list[Words] = []
    for row in rows:
        ended = bool(row) and row[-1] in ends
        body = row[:-1] if ended else row
        text = tuple(words[i - special] if i >= special else f"<{i}>" for i in body)
        found.append(text if ended else (*text, "<cut>"))
    return found
