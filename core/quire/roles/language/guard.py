"""Goes plain where drafting does not pay, by measured cost."""

from __future__ import annotations

import time
from collections import deque
from typing import Any

import torch

from quire.contracts import Part
from quire.errors import ConfigError
from quire.roles.language.contract import StepModel, device_of

SLOTS = (1, 2, 4, 8, 16, 32, 64)
SIZES = (1, 3, 7, 15, 31, 63)
TRIAL = 4


class SpeedGuard(Part):
    """Choose the draft budget with the most tokens per unit of time; none if plain decoding is as fast.

    The cost of a pass with q slots relative to one is a table; tokens emitted per budget is a running mean. Under
    a lossless acceptance rule it never changes the output.

    Args:
        cost: Slots → cost relative to one slot, for instance ``{1: 1.0, 8: 2.0}``; null measures it once.
        window: Steps over which the running mean is taken.
        retry: Tokens after which a guard that went plain tries again, for four steps.
        min_gain: Tokens per cost that a draft must exceed.

    Raises:
        ConfigError: an empty or non-positive cost table, ``window`` or ``retry`` below 1.
    """

    def __init__(
        self, cost: dict[int, float] | None = None, window: int = 16, retry: int = 64, min_gain: float = 1.0
    ) -> None:
        super().__init__()
        cost = None if cost is None else {int(slots): float(price) for slots, price in cost.items()}
        if cost is not None and (not cost or min(cost) < 1 or min(cost.values()) <= 0):
            raise ConfigError("SpeedGuard.cost needs slots of at least 1 with positive costs, like {1: 1.0, 8: 2.0}")
        if window < 1 or retry < 1:
            raise ConfigError(f"SpeedGuard needs window and retry of at least 1, got {window} and {retry}")
        self.cost, self.window, self.retry, self.min_gain = cost, window, retry, min_gain
        self.measured: dict[int, float] | None = None
        self.step_ms = float("inf")  # a given table counts draft time as nothing
        self.reset()

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """Prompt lookup that is switched off when it loses."""
        from quire.roles.language.accept import tiny_speculative

        return tiny_speculative({"guard": {"class_path": "SpeedGuard", "init_args": {"cost": {1: 1.0, 8: 2.0}}}})

    def reset(self) -> None:
        """Forget what was seen: a new model or a new kind of text."""
        self.plain_left, self.steps, self.enough = 0, TRIAL, self.window
        self.recent: dict[int, deque[tuple[int, float]]] = {}

    def calibrate(self, model: StepModel) -> None:
        """Measure the cost of 1, 2, 4 … 64 slots behind a prompt of 64 tokens, about a second, once a model."""
        if self.cost is not None or self.measured is not None:
            return
        device = device_of(model)
        most = model.caps().positions_max or 256
        state = model.open(torch.zeros(1, min(64, most // 2), dtype=torch.long, device=device), max_length=most)
        times = {}
        for width in (w for w in SLOTS if w < most // 2):
            ids = torch.zeros(1, width, dtype=torch.long, device=device)
            best = float("inf")
            for attempt in range(5):
                start = time.perf_counter()
                model.step(state, ids)[0, -1, 0].item()  # waits for a GPU
                best = min(best, time.perf_counter() - start) if attempt else best  # the first one may allocate
                model.keep(state, torch.full((1, 1), -1))
            times[width] = best
        self.measured = {w: t / times[1] for w, t in times.items()}
        self.step_ms = 1e3 * times[1]

    def price(self, nodes: int) -> float:
        """Cost of a step with ``nodes`` drafted nodes, linear between the table's entries."""
        table = sorted((self.cost or self.measured or {1: 1.0}).items())
        slots = nodes + 1
        below = [(w, c) for w, c in table if w <= slots] or table[:1]
        above = [(w, c) for w, c in table if w >= slots]
        (w0, c0), (w1, c1) = below[-1], above[0] if above else below[-1]
        if w0 == w1:
            return c0 * max(1.0, slots / w0)  # beyond the table cost grows with the slots
        return c0 + (c1 - c0) * (slots - w0) / (w1 - w0)

    def budget(self, most: int) -> int:
        """Nodes that the next draft may have; 0 to go plain."""
        if self.plain_left > 0:
            return 0
        sizes = sorted({min(most, n) for n in SIZES})
        if not self.recent:
            return min(sizes, key=lambda n: abs(n - 7))
        best = max(self.recent, key=lambda n: (self._gain(n), -n))
        if self.steps % self.window < TRIAL:  # now and then a neighbour of the best size gets a few steps
            at = sizes.index(best) if best in sizes else 0
            return sizes[max(0, min(len(sizes) - 1, at + (1 if self.steps // self.window % 2 else -1)))]
        return best

    def note(self, allowed: int, nodes: int, emitted: int, draft_ms: float = 0.0) -> None:
        """One row's step: budget given, nodes drafted, tokens emitted, time of drafting."""
        if allowed == 0:
            if self.plain_left > 0:
                self.plain_left -= emitted
                if self.plain_left <= 0:  # try again: a few drafts decide
                    self.recent, self.steps, self.enough = {}, TRIAL, TRIAL
            return
        if nodes == 0:  # nothing was found and nothing was paid
            return
        self.steps += 1
        cost = self.price(nodes) + draft_ms / self.step_ms
        self.recent.setdefault(allowed, deque(maxlen=self.window)).append((emitted, cost))
        tried = sum(len(held) for held in self.recent.values())
        if tried >= self.enough:
            if max(self._gain(n) for n in self.recent) <= self.min_gain:
                self.plain_left = self.retry
            self.enough = self.window

    def _gain(self, allowed: int) -> float:
        """Tokens per cost of one plain step."""
        held = self.recent[allowed]
        return sum(emitted for emitted, _ in held) / sum(cost for _, cost in held)
