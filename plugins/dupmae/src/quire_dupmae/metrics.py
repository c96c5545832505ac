"""MRR, nDCG and recall of rankings, as trec_eval counts them; in validation, of a batch's own documents."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from quire.contracts import Batch, Losses, Metric
from quire.errors import ConfigError

if TYPE_CHECKING:
    from quire.model import Model


def reciprocal_rank(ranking: Sequence[int], gains: Mapping[int, float], cutoff: int) -> float:
    """1 / rank of the first relevant document, 0 when it isn't among the first ``cutoff``."""
    return next((1 / rank for rank, d in enumerate(ranking[:cutoff], 1) if gains.get(d, 0) > 0), 0.0)


def discounted_gain(ranking: Sequence[int], gains: Mapping[int, float], cutoff: int) -> float:
    """nDCG: gains (linear) over log2(rank + 1), divided by the best order's."""
    found = sum(gains.get(d, 0.0) / math.log2(rank + 1) for rank, d in enumerate(ranking[:cutoff], 1))
    best = sorted(gains.values(), reverse=True)[:cutoff]
    return found / sum(g / math.log2(rank + 1) for rank, g in enumerate(best, 1))


def recall(ranking: Sequence[int], gains: Mapping[int, float], cutoff: int) -> float:
    """Share of the relevant documents among the first ``cutoff``."""
    wanted = {d for d, g in gains.items() if g > 0}
    return len(wanted & set(ranking[:cutoff])) / len(wanted)


class _Ranking(Metric):
    """What the three share: a mean over queries that have a relevant document."""

    def __init__(self, cutoff: int) -> None:
        super().__init__()
        if cutoff < 1:
            raise ConfigError(f"{type(self).__name__}.cutoff must be at least 1, got {cutoff}")
        self.cutoff = cutoff
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """Contrastive training on docstrings, then search."""
        from quire_dupmae.tuning import Contrastive

        return Contrastive.tiny()

    @property
    def label(self) -> str:
        """Its name in the log."""
        return f"{type(self).__name__}@{self.cutoff}"

    def of(self, ranking: Sequence[int], gains: Mapping[int, float]) -> float:
        """The value of one query."""
        raise NotImplementedError

    def update(self, ranking: Sequence[int], gains: Mapping[int, float]) -> None:
        """Add one query; one without a relevant document doesn't count.

        Args:
            ranking: Document numbers, best first.
            gains: Document number → gain.
        """
        if any(g > 0 for g in gains.values()):
            self.total += self.of(ranking, gains)
            self.count += 1

    def observe(self, model: Model, batch: Batch, losses: Losses) -> None:
        """Rank a batch's documents: an online signal, far easier than the corpus. Nothing without scores."""
        found, own = losses.outputs.get("scores"), losses.outputs.get("own")
        if not isinstance(found, Tensor) or not isinstance(own, Tensor):
            self.update((), {})  # not a number, without torchmetrics' warning
            return
        order = torch.argsort(found, dim=1, descending=True, stable=True)[:, : self.cutoff]
        for ranking, mine in zip(order.tolist(), own.tolist()):
            self.update(ranking, {mine: 1.0})

    def sampled(self, model: Model, batch: Batch, results: Any) -> None:
        """The rankings of a search, judged by the batch's ``relevant`` and ``gain``."""
        for row, numbers, gains in zip(results, batch["relevant"].tolist(), batch["gain"].tolist()):
            self.update(row["numbers"], {d: g for d, g in zip(numbers, gains) if d >= 0})

    def compute(self) -> Tensor:
        """Mean over queries in [0,1]; not a number before the first."""
        return (self.total / self.count).float()


class MRR(_Ranking):
    """Mean reciprocal rank of the first relevant document. Beside Xiao et al. 2022 (DupMAE).

    Args:
        cutoff: Ranks that count.

    Raises:
        ConfigError: ``cutoff`` below 1.
    """

    def __init__(self, cutoff: int = 10) -> None:
        super().__init__(cutoff)

    def of(self, ranking: Sequence[int], gains: Mapping[int, float]) -> float:
        """See ``reciprocal_rank``."""
        return reciprocal_rank(ranking, gains, self.cutoff)


class NDCG(_Ranking):
    """Normalised discounted cumulative gain with linear gains, as trec_eval. Beside Xiao et al. 2022 (DupMAE).

    Args:
        cutoff: Ranks that count.

    Raises:
        ConfigError: ``cutoff`` below 1.
    """

    def __init__(self, cutoff: int = 10) -> None:
        super().__init__(cutoff)

    def of(self, ranking: Sequence[int], gains: Mapping[int, float]) -> float:
        """See ``discounted_gain``."""
        return discounted_gain(ranking, gains, self.cutoff)


class RecallAtK(_Ranking):
    """Share of the relevant documents that were found. Beside Xiao et al. 2022 (DupMAE).

    Args:
        cutoff: Ranks that count.

    Raises:
        ConfigError: ``cutoff`` below 1.
    """

    def __init__(self, cutoff: int = 1000) -> None:
        super().__init__(cutoff)

    def of(self, ranking: Sequence[int], gains: Mapping[int, float]) -> float:
        """See ``recall``."""
        return recall(ranking, gains, self.cutoff)
