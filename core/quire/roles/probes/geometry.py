"""What features look like without labels: rank, spread, alignment, uniformity, neighbours."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize, pdist


def effective_rank(features: Tensor) -> float:
    """exp of the entropy of the normalised singular values of centred features. Roy and Vetterli 2007.

    Args:
        features: [N,D].

    Returns:
        d for features that fill d dimensions evenly, 1 for features on a line, 0 for a single point.
    """
    x = features.double()
    x = x - x.mean(0)
    if not bool((x.abs() > 0).any()):
        return 0.0
    square = x.T @ x if x.shape[1] <= x.shape[0] else x @ x.T
    values = torch.linalg.eigvalsh(square).clamp(min=0).sqrt()
    values = values[values > values.max() * 1e-7]  # what rounding leaves of a zero
    share = values / values.sum()
    return float(torch.exp(-(share * share.log()).sum()))


def alignment(first: Tensor, second: Tensor) -> float:
    """Mean squared distance of two views of a sample on the unit sphere, in [0,4]; 0 is best. Wang and Isola 2020.

    Args:
        first: [N,D].
        second: [N,D].
    """
    return float((normalize(first, dim=1) - normalize(second, dim=1)).square().sum(1).mean())


def uniformity(features: Tensor) -> float:
    """log of the mean of exp(-2 d²) over all pairs on the unit sphere; 0 is a single point. Wang and Isola 2020.

    Args:
        features: [N,D], N at least 2.
    """
    distances = pdist(normalize(features.double(), dim=1))
    return float((-2 * distances.square()).exp().mean().log())


def agreement(features: Tensor, views: Tensor) -> float:
    """Share of samples whose nearest other sample (cosine) is the same seen from a view of it.

    Args:
        features: [N,D].
        views: [N,D], one view of each sample.

    Returns:
        In [0,1]; 1 / (N - 1) at chance.
    """
    bank, views = normalize(features, dim=1), normalize(views, dim=1)
    same = 0
    for rows in torch.arange(len(bank), device=bank.device).split(2048):
        own = torch.nn.functional.one_hot(rows, len(bank)).bool()
        first, second = ((x[rows] @ bank.T).masked_fill(own, -2).argmax(1) for x in (bank, views))
        same += int((first == second).sum())
    return same / len(bank)


@dataclass
class Moments:
    """Sums over rows that come in pieces, from every rank.

    Args:
        count: Rows so far.
        total: [D] double, their sum.
        square: [D] double, the sum of their squares.
    """

    count: int
    total: Tensor
    square: Tensor

    @classmethod
    def of(cls, rows: Tensor) -> Moments:
        """Of [...,D] rows."""
        rows = rows.detach().double().flatten(0, -2).cpu()
        return cls(len(rows), rows.sum(0), rows.square().sum(0))

    def __add__(self, other: Moments) -> Moments:
        return Moments(self.count + other.count, self.total + other.total, self.square + other.square)

    @property
    def std(self) -> Tensor:
        """[D] standard deviation of each dimension."""
        mean = self.total / self.count
        return (self.square / self.count - mean.square()).clamp(min=0).sqrt()
