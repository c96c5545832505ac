"""Token trees by a Monte-Carlo tree search over trigram weights, with PUCT as the rule of descent."""

from __future__ import annotations

import random
from bisect import bisect_left
from collections.abc import Iterable
from itertools import accumulate
from math import inf, log, sqrt

from quire.roles.language.contract import Draft
from quire_aded.store import Row, Trigrams


class Search:
    """One search from a bigram. Nodes are rows of parallel lists, not objects: 150 descents must cost less than a step.

    Args:
        store: M.
        depth: L, nodes of a path with the root; L-1 new tokens.
        iterations: Descents.
        c1, c2: PUCT's constants.
        top: Most children of a node, the heaviest.
        seed: Of the rollouts.

    Attributes:
        token, parent, visits, total: Per node; node 0 is the root.
    """

    def __init__(
        self, store: Trigrams, depth: int = 4, iterations: int = 150, c1: float = 32.0, c2: float = 8.0, top: int = 12
    ) -> None:
        self.store, self.depth, self.iterations, self.c1, self.c2, self.top = store, depth, iterations, c1, c2, top

    def run(self, a: int, b: int, seed: int = 0) -> bool:
        """Grow the tree behind the bigram (a,b); False when it was never seen."""
        self.vocab = self.store.vocab_size
        row = self._cut(self.store.row(a, b))
        self.token, self.parent, self.visits, self.total = [b], [-1], [0], [0.0]
        self.prior, self.edges, self.level = [1.0], [0.0], [1]
        self.row: list[Row] = [row]
        self.first: list[int] = [-1]  # first child; children of a node are neighbours
        self.fresh: list[int] = [0]  # children visited so far, in order: an unvisited one comes before any other
        if not row[0]:
            return False
        draw = random.Random(seed).random
        for _ in range(self.iterations):
            node = self._descend()
            if self.level[node] < self.depth and self.row[node][0]:
                node = self._expand(node)
            value = 1.0 + self._rollout(node, draw)
            while node >= 0:
                self.visits[node] += 1
                self.total[node] += value
                node = self.parent[node]
        return True

    def _cut(self, row: Row) -> Row:
        return row if len(row[0]) <= self.top else (row[0][: self.top], row[1][: self.top])

    def _descend(self) -> int:
        visits, total, prior, node = self.visits, self.total, self.prior, 0
        while (start := self.first[node]) >= 0:
            size = len(self.row[node][0])
            if self.fresh[node] < size:  # unvisited scores +inf
                child = start + self.fresh[node]
                self.fresh[node] += 1
                if visits[child]:  # the last one, entered when it was made
                    continue
                return child
            count = visits[node]
            pull = (self.c1 + log((count + self.c2 + 1) / self.c2)) * sqrt(count)
            best, node = -inf, start
            for child in range(start, start + size):
                n = visits[child]
                score = total[child] / n + pull * prior[child] / (1 + n)
                if score > best:
                    best, node = score, child
        return node

    def _expand(self, node: int) -> int:
        tokens, weights = self.row[node]
        start, level = len(self.token), self.level[node] + 1
        self.first[node] = start
        count = len(tokens)
        self.token += tokens
        self.parent += [node] * count
        self.prior += weights
        self.edges += [self.edges[node] + w for w in weights]
        self.level += [level] * count
        self.visits += [0] * count
        self.total += [0.0] * count
        self.first += [-1] * count
        self.fresh += [0] * count
        if level < self.depth:
            above = self.token[node] * self.vocab
            self.row += [self._cut(r) for r in self.store.rows([above + t for t in tokens])]
        else:
            self.row += [([], [])] * count
        return start + count - 1

    def _rollout(self, node: int, draw: object) -> float:
        value, level, last, row = self.edges[node], self.level[node], self.token[node], self.row[node]
        while level < self.depth and row[0]:
            sums = list(accumulate(row[1]))
            place = min(bisect_left(sums, draw() * sums[-1]), len(sums) - 1)  # type: ignore[operator]
            value += row[1][place]
            level += 1
            if level < self.depth:
                last, before = row[0][place], last
                row = self.store.rows([before * self.vocab + last])[0]
        return value

    # ---- what came of it
    def paths(self, count: int, extend: int) -> list[list[int]]:
        """The ``count`` most visited prefixes without the root, each longer by ``extend`` heaviest successors."""
        seen = [i for i in range(1, len(self.token)) if self.visits[i]]
        seen.sort(key=lambda i: (-self.visits[i], i))
        chosen = [self._path(i) for i in seen[:count]]
        for _ in range(extend):
            rows = self.store.rows([path[-2] * self.vocab + path[-1] for path in chosen])
            for path, (tokens, _) in zip(chosen, rows):
                path += tokens[:1]
        return list(map(list, dict.fromkeys(tuple(path[1:]) for path in chosen)))

    def _path(self, node: int) -> list[int]:
        path = []
        while node >= 0:
            path.append(self.token[node])
            node = self.parent[node]
        return path[::-1]

    def best_chain(self, extend: int) -> list[int]:
        """The most visited child again and again, then ``extend`` heaviest successors."""
        path, node = [self.token[0]], 0
        while (start := self.first[node]) >= 0:
            children = range(start, start + len(self.row[node][0]))
            node = max(children, key=lambda i: (self.visits[i], -i))
            path.append(self.token[node])
        for _ in range(extend):
            path += self.store.row(path[-2], path[-1])[0][:1]
        return path[1:]


def trie(paths: Iterable[list[int]], nodes: int) -> Draft | None:
    """Merge paths into one tree of at most ``nodes``; whole paths go, those with most distinct tokens first.

    Among equals the earlier path stays. Should not even the first path fit, its beginning is taken.
    """
    tokens: list[int] = []
    parents: list[int] = []
    known: dict[tuple[int, int], int] = {}
    for path in sorted(paths, key=lambda p: len(set(p))):
        at, found = -1, 0
        while found < len(path) and (at, path[found]) in known:
            at = known[at, path[found]]
            found += 1
        rest = path[found:]
        if len(tokens) + len(rest) > nodes:
            if tokens:
                break
            rest = rest[:nodes]
        for token in rest:
            known[at, token] = len(tokens)
            tokens.append(token)
            parents.append(at)
            at = len(tokens) - 1
    return Draft(tokens, parents) if tokens else None
