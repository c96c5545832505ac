"""Densities that are known: log p, its gradient and draws, of the density itself and of its convolution with noise."""

from __future__ import annotations

import math
from functools import cached_property

import torch
from torch import Tensor
from torch.func import grad

GRID = 360
"""Cells a side on which a density without a closed form is summed."""


class Density:
    """A density whose every answer can be checked against.

    Attributes:
        width: Coordinates.
        half: Half the side of the box round 0 that holds all but a negligible part of it.
    """

    width: int = 2
    half: float

    def log_prob(self, x: Tensor, sigma: float = 0.0) -> Tensor:
        """log p_σ [N] in double of points [N,D]; p_σ is p convolved with N(0, σ²I), p itself for σ = 0."""
        raise NotImplementedError

    def score(self, x: Tensor, sigma: float = 0.0) -> Tensor:
        """∇log p_σ [N,D] in double."""
        return grad(lambda at: self.log_prob(at, sigma).sum())(x.double())

    def sample(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """Draws of p, [count,D] in float32."""
        raise NotImplementedError


class Mixture(Density):
    """Gaussians of one covariance.

    Args:
        means: [k,D].
        covariance: [D,D], of each.
        weights: [k], summing to 1.
    """

    def __init__(self, means: list[list[float]], covariance: list[list[float]], weights: list[float]) -> None:
        self.means, self.covariance = (torch.tensor(v, dtype=torch.double) for v in (means, covariance))
        self.weights = torch.tensor(weights, dtype=torch.double)
        self.width = self.means.shape[1]
        self.half = float(self.means.abs().max() + 5 * self.covariance.diagonal().max().sqrt())

    def log_prob(self, x: Tensor, sigma: float = 0.0) -> Tensor:
        """Closed form: noise adds σ²I to the covariance."""
        spread = self.covariance + sigma**2 * torch.eye(self.width, dtype=torch.double)
        away = x.double()[:, None] - self.means
        distance = (away @ torch.linalg.inv(spread) * away).sum(-1)
        constant = torch.logdet(2 * math.pi * spread) / 2
        return torch.logsumexp(self.weights.log() - distance / 2, 1) - constant

    def sample(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """Choose a Gaussian, draw from it."""
        chosen = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        noise = torch.randn(count, self.width, generator=generator, dtype=torch.double)
        return (self.means[chosen] + noise @ torch.linalg.cholesky(self.covariance).T).float()


class Planar(Density):
    """A density of the plane given up to a constant: normalised, convolved and bounded on a fine grid.

    The convolution is the sum of the cells' masses times Gaussians, which for a smooth density and cells well below σ
    is exact to many digits.
    """

    def energy(self, x: Tensor) -> Tensor:
        """−log p up to a constant, [N]."""
        raise NotImplementedError

    @cached_property
    def axis(self) -> Tensor:
        """Middles of the cells along one side."""
        cell = 2 * self.half / GRID
        return (torch.arange(GRID, dtype=torch.double) + 0.5) * cell - self.half

    @cached_property
    def mass(self) -> Tensor:
        """Mass of each cell [GRID,GRID], summing to 1."""
        points = torch.cartesian_prod(self.axis, self.axis)
        return torch.exp(-self.energy(points) - self._peak).view(GRID, GRID) / self._total

    @cached_property
    def _peak(self) -> Tensor:
        return -self.energy(torch.cartesian_prod(self.axis, self.axis)).min()

    @cached_property
    def _total(self) -> Tensor:
        return torch.exp(-self.energy(torch.cartesian_prod(self.axis, self.axis)) - self._peak).sum()

    @property
    def log_constant(self) -> float:
        """log ∫ exp(−energy)."""
        return float(self._total.log() + self._peak) + 2 * math.log(2 * self.half / GRID)

    def log_prob(self, x: Tensor, sigma: float = 0.0) -> Tensor:
        """Closed form but for the constant; with noise the sum over cells."""
        x = x.double()
        if sigma == 0:
            return -self.energy(x) - self.log_constant
        apart = -((x[:, :, None] - self.axis) ** 2) / (2 * sigma**2)  # [N,2,GRID]
        near = apart.amax(2, keepdim=True).detach()  # so that points far from every cell don't underflow
        kernel = torch.exp(apart - near)
        summed = (kernel[:, 0] @ self.mass * kernel[:, 1]).sum(1).clamp_min(1e-300)
        return summed.log() + near.sum((1, 2)) - math.log(2 * math.pi * sigma**2)

    def table(self, sigma: float) -> tuple[Tensor, Tensor]:
        """log p_σ [GRID,GRID] and its gradient [2,GRID,GRID] at the cells' middles, for all of them at once."""
        apart = self.axis[:, None] - self.axis
        kernel = torch.exp(-(apart**2) / (2 * sigma**2))
        slope = -apart / sigma**2 * kernel
        summed = (kernel @ self.mass @ kernel.T).clamp_min(1e-300)
        gradient = torch.stack([slope @ self.mass @ kernel.T, kernel @ self.mass @ slope.T]) / summed
        return summed.log() - math.log(2 * math.pi * sigma**2), gradient

    def sample(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """Exact draws from the box: points uniform in it, kept in proportion to the density."""
        cells = torch.cartesian_prod(self.axis, self.axis)
        high = float(-self.energy(cells).min()) + 0.25  # above the grid's largest value
        found: list[Tensor] = []
        while sum(map(len, found)) < count:
            points = (2 * torch.rand(1 << 17, 2, generator=generator, dtype=torch.double) - 1) * self.half
            level = torch.rand(len(points), generator=generator, dtype=torch.double).log() + high
            found.append(points[level < -self.energy(points)])
        return torch.cat(found)[:count].float()


class Ring(Planar):
    """Radius N(2, 0.2²), every direction alike."""

    half = 3.4

    def energy(self, x: Tensor) -> Tensor:
        """The density of the radius over its circle."""
        radius = _radius(x)
        return (radius - 2).square() / (2 * 0.2**2) + radius.log()


class NinjaStar(Planar):
    """Four thorns on a ring: (ρ − 2)² + (x² − y²)² + ½log(ρ² + 1)."""

    half = 5.2

    def energy(self, x: Tensor) -> Tensor:
        """As said."""
        square = x.square().sum(1)
        thorn = (x[:, 0] ** 2 - x[:, 1] ** 2) ** 2
        return (_radius(x) - 2).square() + thorn + torch.log(square + 1) / 2


class Spiral(Planar):
    """0.04t(sin t, cos t) for t uniform in [3, 15], with N(0, 0.01²) on the radius: two turns within 0.65 of 0."""

    half = 0.66
    turns, noise = (3.0, 15.0), 0.01

    def energy(self, x: Tensor) -> Tensor:
        """Every t of a point's direction, one a turn, gives a Gaussian on the radius."""
        radius = _radius(x)
        angle = torch.atan2(x[:, 0], x[:, 1])
        time = angle[:, None] + 2 * math.pi * torch.arange(4, dtype=torch.double)
        real = (time >= self.turns[0]) & (time <= self.turns[1])
        near = -((radius[:, None] - 0.04 * time) ** 2) / (2 * self.noise**2)
        return radius.log() - torch.logsumexp(torch.where(real, near, -1e4), 1)


def _radius(x: Tensor) -> Tensor:
    return (x.square().sum(1) + 1e-12).sqrt()  # its gradient at 0 is 0, not NaN


def gaussian() -> Mixture:
    """N(0, S) with S = [[2, 0.8], [0.8, 1]]."""
    return Mixture([[0.0, 0.0]], [[2.0, 0.8], [0.8, 1.0]], [1.0])


def mixture() -> Mixture:
    """0.3·N((−2, 0), ¼I) + 0.7·N((2, 0), ¼I)."""
    return Mixture([[-2.0, 0.0], [2.0, 0.0]], [[0.25, 0.0], [0.0, 0.25]], [0.3, 0.7])


DENSITIES = {"gaussian": gaussian, "mixture": mixture, "ring": Ring, "spiral": Spiral, "ninja_star": NinjaStar}
"""By the name that ``ToyDensity`` takes."""
