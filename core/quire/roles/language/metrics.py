"""How much of a drafter's guesses a language model accepts, over a prediction run."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quire.contracts import Batch, Metric
from quire.roles.language.accept import tiny_speculative
from quire.roles.language.contract import Generated
from quire.roles.language.stats import Stats


class AcceptanceStats(Metric):
    """Drafted tokens accepted per step of ``predict``, by depth and by prompt number.

    ``compute`` is the mean over steps, the bonus token not counted; ``by_depth``, ``steps_by_depth`` and ``curve`` say
    the rest. A prompt's number is its place in the data, so a drafter that learns shows a rising curve.

    Returns:
        Accepted tokens per step, 0 before any step.
    """

    full_state_update = False
    accepted: Tensor
    steps: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("accepted", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("steps", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")
        self.total = Stats()
        self.prompts: dict[int, tuple[int, int]] = {}

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """Prompt lookup on the standard library's text."""
        run = tiny_speculative({})
        run["model"]["metrics"] = ["AcceptanceStats"]
        return run

    def update(self, stats: Stats, index: list[int], rows: list[Stats] | None = None) -> None:
        """Add one batch's statistics.

        Args:
            stats: Of the whole batch.
            index: The rows' places in the data.
            rows: Each row's own counts; without them the batch counts for its first prompt.
        """
        self.accepted += stats.accepted
        self.steps += stats.steps
        self.total = self.total.merge(stats)
        for number, row in zip(index, rows) if rows else [(min(index), stats)] if index else []:
            accepted, steps = self.prompts.get(number, (0, 0))
            self.prompts[number] = (accepted + row.accepted, steps + row.steps)

    def sampled(self, model: Any, batch: Batch, results: Any) -> None:
        """Read a language sampler's results; others have no such statistics."""
        if isinstance(results, Generated):
            self.update(results.stats, list(results.index), results.row_stats)

    def compute(self) -> Tensor:
        """Accepted tokens per step."""
        return self.accepted / self.steps.clamp(min=1)

    def by_depth(self) -> dict[int, float]:
        """Share of drafted nodes that stood, by depth from 1; of this process."""
        return self.total.per_depth_accept()

    def steps_by_depth(self) -> dict[int, float]:
        """Share of steps whose accepted path reached each depth, from 1; of this process."""
        return self.total.per_step_accept()

    def curve(self) -> dict[int, float]:
        """Accepted per step by the prompt's number, in order; of this process."""
        return {i: accepted / max(1, steps) for i, (accepted, steps) in sorted(self.prompts.items())}

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.total, self.prompts = Stats(), {}
