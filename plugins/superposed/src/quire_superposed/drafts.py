"""The k drafts of each prompt: mixed scores, selection, the superposed input's weights, the finished ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Judge = Callable[[int, list[int]], str | None]
"""(prompt's place among the drafts' rows, ids of a candidate) → ``eos`` or ``stop`` if it ends there."""


def mixed(log_p: np.ndarray, q: np.ndarray | None, alpha: float, penalty: float, floor: float = 0.0) -> np.ndarray:
    """l = (1-α) log p + α log q; -inf where either is 0, and (1-α) log p - penalty where that is everywhere.

    Args:
        log_p: [...,C] of the kept tokens, renormalised.
        q: [...,C] of the n-grams, or None for none.
        alpha: In [0, 1]; 0 leaves log p alone.
        penalty: Taken off where no candidate has n-gram evidence.
        floor: Least q of a draft that has some evidence; 0 as published.
    """
    if q is None or alpha == 0:
        return log_p
    possible = log_p > -np.inf
    lonely = ~((q > 0) & possible).any(-1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        own = np.where(possible, (1 - alpha) * log_p, -np.inf)  # at α = 1, 0 · -inf
        both = own + alpha * np.log(np.maximum(q, floor))
    return np.where(lonely, own - penalty, both)


def best(values: np.ndarray, count: int) -> np.ndarray:
    """Places [P,count] of the largest of each row [P,N], descending; of equal ones the first places."""
    size = values.shape[1]
    if size <= 512:
        return np.argsort(-values, axis=1, kind="stable")[:, :count]
    out = np.empty((len(values), count), dtype=np.int64)
    for row, line in enumerate(values):
        least = np.partition(line, size - count)[size - count]
        places = np.flatnonzero(line >= least) if least > -np.inf else np.argsort(-line, kind="stable")[: 2 * count]
        out[row] = places[np.argsort(-line[places], kind="stable")[:count]]
    return out


@dataclass
class Finished:
    """A draft that has ended: log-score per token, ids, and why."""

    score: float
    ids: list[int]
    reason: str


class Drafts:
    """Drafts of P prompts that all have the same number of new tokens.

    Args:
        tails: [P,n] last tokens of each prompt, -1 where it is shorter.
        count: k.
        limits: [P] most new tokens.

    Attributes:
        ids: [P,k,t] int64.
        scores: [P,k] float64 sums of l; -inf for a draft that is no more.
        tails: [P,k,n] last tokens of prompt and draft.
        finished: P lists, the best first, at most k each.
    """

    def __init__(self, tails: np.ndarray, count: int, limits: np.ndarray) -> None:
        rows = len(tails)
        self.count, self.limits = count, limits
        self.ids = np.zeros((rows, count, 0), dtype=np.int64)
        self.scores = np.full((rows, count), -np.inf)
        self.scores[:, 0] = 0.0  # the drafts are still equal: one stands for all
        self.tails = np.repeat(tails[:, None], count, axis=1)
        self.finished: list[list[Finished]] = [[] for _ in range(rows)]

    @property
    def length(self) -> int:
        """New tokens of each draft."""
        return self.ids.shape[2]

    def advance(self, tokens: np.ndarray, gains: np.ndarray, ends: frozenset[int], judge: Judge | None = None) -> None:
        """Every draft goes on by one token, or ends.

        Args:
            tokens: [P,k or 1,C] candidates, ascending along C so that ties go to the lower id.
            gains: [P,k,C] their mixed scores l; C >= k.
            ends: Tokens that end a draft.
            judge: Also asks each candidate's text, for stop strings.
        """
        rows, choices = len(gains), gains.shape[2]
        totals = (self.scores[:, :, None] + gains).reshape(rows, -1)
        # with one draft nothing is left to compare: a lower candidate would only replace the one that has just ended
        order = best(totals, min(2 * self.count if self.count > 1 else 1, totals.shape[1]))
        values = np.take_along_axis(totals, order, 1)
        parents, here = order // choices, np.arange(rows)[:, None]
        last = np.broadcast_to(tokens, gains.shape)[here, parents, order % choices]
        over = np.zeros(last.shape, dtype=bool)
        for end in ends:
            over |= last == end
        real = values > -np.inf
        reasons: dict[tuple[int, int], str] = {}
        for p, i in np.argwhere(real if judge is not None else real & over).tolist():
            ids = [*self.ids[p, parents[p, i]].tolist(), int(last[p, i])]
            reason = "eos" if over[p, i] else judge(p, ids) if judge is not None else None
            if reason is not None:
                reasons[p, i] = reason
                over[p, i] = True
                self._finish(p, Finished(float(values[p, i]) / len(ids), ids, reason))
        values = np.where(over, -np.inf, values)
        keep = np.argsort(-values, axis=1, kind="stable")[:, : self.count]
        values = np.take_along_axis(values, keep, 1)
        parents, last = parents[here, keep], last[here, keep]
        self.scores = values
        self.ids = np.concatenate([self.ids[here, parents], last[:, :, None]], axis=2)
        self.tails = np.concatenate([self.tails[here, parents], last[:, :, None]], axis=2)[:, :, 1:]

    def _finish(self, row: int, draft: Finished) -> None:
        pool = [*self.finished[row], draft]
        self.finished[row] = sorted(pool, key=lambda d: -d.score)[: self.count]

    def weights(self) -> np.ndarray:
        """u = softmax(s) [P,k] over the drafts that live."""
        raised = np.exp(self.scores - self.scores.max(1, keepdims=True))
        return raised / raised.sum(1, keepdims=True)

    def done(self, early: bool) -> np.ndarray:
        """[P] bool: no draft lives, the limit is reached, or (early) none that lives can come among the best k.

        Scores only fall, so a draft with score s ends at s / limit per token at best.
        """
        top = self.scores.max(1)
        over = (top == -np.inf) | (self.length >= self.limits)
        if early:
            for p, pool in enumerate(self.finished):
                over[p] |= len(pool) == self.count and pool[-1].score >= top[p] / self.limits[p]
        return over

    def ranked(self, row: int) -> list[Finished]:
        """The k best of a prompt's finished and living drafts: lowest exp(-s / length) first."""
        length = max(1, self.length)
        alive = [
            Finished(float(s) / length, ids.tolist(), "length")
            for s, ids in zip(self.scores[row], self.ids[row])
            if s > -np.inf
        ]
        return sorted([*self.finished[row], *alive], key=lambda d: -d.score)[: self.count]

    def select(self, rows: np.ndarray) -> None:
        """Keep some prompts."""
        self.ids, self.scores, self.tails = self.ids[rows], self.scores[rows], self.tails[rows]
        self.limits = self.limits[rows]
        self.finished = [self.finished[int(r)] for r in rows]
