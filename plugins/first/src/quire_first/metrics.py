"""How many layers ran, how sure the routers were, and whether prompts differ."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quire.contracts import Batch, Losses, Metric
from quire.errors import ConfigError
from quire_first.model import RoutedModel, tiny_routed
from quire_first.routing import Routing

REPORTS = ("layers", "skip_rate", "entropy", "diversity")


class LayersUsed(Metric):
    """What the routers decided, over an evaluation or a prediction run.

    Skip rates are as in Jain et al. 2024; diversity is ours.

    Args:
        report: What ``compute`` and the log say: ``layers`` used a row (mean), ``skip_rate`` in [0, 1], ``entropy`` of
            the routers in nats a layer, or ``diversity``: 1 minus the mean Jaccard index of two rows' skipped layers,
            0 when every prompt skips the same.

    Returns:
        The number of ``report``; 0 before any row.

    Raises:
        ConfigError: an unknown ``report``.
    """

    decoder: RoutedModel
    full_state_update = False
    patterns: Any
    entropies: Tensor
    rows: Tensor

    def __init__(self, report: str = "layers") -> None:
        super().__init__()
        if report not in REPORTS:
            raise ConfigError(f"LayersUsed.report is {', '.join(REPORTS)}; got {report!r}")
        self.report = report
        self.label = "LayersUsed" if report == "layers" else f"LayersUsed_{report}"
        self.add_state("patterns", [], dist_reduce_fx="cat")
        self.add_state("entropies", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("rows", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """On digit strings."""
        return tiny_routed({"class_path": "RouterTraining"}, metrics=["LayersUsed"])

    def update(self, routing: Routing) -> None:
        """Add rows."""
        rho = routing.rho.detach().float().clamp(1e-7, 1 - 1e-7)
        entropy = -(rho * rho.log() + (1 - rho) * (1 - rho).log())
        self.patterns.append(routing.on.detach().to(self.rows.device))
        self.entropies += entropy.mean(1).sum().to(self.rows.device)
        self.rows += len(rho)

    def observe(self, model: Any, batch: Batch, losses: Losses) -> None:
        """The routing of the objective's pass."""
        model.decoder.role(RoutedModel).recent.clear()
        if "routing" in losses.outputs:
            self.update(losses.outputs["routing"])

    def sampled(self, model: Any, batch: Batch, results: Any) -> None:
        """What was decided since the last batch."""
        recent = model.decoder.role(RoutedModel).recent
        for routing in recent:
            self.update(routing)
        if [m for m in model.metrics if isinstance(m, LayersUsed)][-1] is self:
            recent.clear()  # several of these read the same

    def compute(self) -> Tensor:
        """The number of ``report``."""
        if not int(self.rows):
            return torch.zeros(())
        if self.report == "entropy":
            return self.entropies / self.rows
        on = self.patterns if isinstance(self.patterns, Tensor) else torch.cat(self.patterns)
        if self.report == "layers":
            return on.float().sum(1).mean()
        if self.report == "skip_rate":
            return 1 - on.float().mean()
        return 1 - mean_jaccard(~on)


def mean_jaccard(sets: Tensor) -> Tensor:
    """Mean Jaccard index over pairs of rows; two empty sets count 1, one row counts 1.

    Args:
        sets: [B,N] bool.
    """
    kinds, counts = sets.unique(dim=0, return_counts=True)
    members, weights = kinds.double(), counts.double()
    both = members @ members.T
    either = members.sum(1)[:, None] + members.sum(1)[None] - both
    index = torch.where(either > 0, both / either.clamp(min=1), torch.ones_like(either))
    total = weights.sum()
    if total < 2:
        return torch.ones(())
    same = (weights[:, None] * weights[None] * index).sum() - weights.sum()  # without each row and itself
    return (same / (total * (total - 1))).float()
