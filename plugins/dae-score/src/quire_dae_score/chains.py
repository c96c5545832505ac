"""Markov chains on a score, all rows at once: proposals and the Metropolis-Hastings test."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from quire.errors import ConfigError, DataError
from quire_dae_score.energy import Quadrature, Score, energy_difference

KINDS = ("random_walk", "mala", "langevin", "alternate", "jacobian")
FLOOR = 0.1
"""Share of the noise of ``jacobian`` that leaves the manifold, as a standard deviation."""


@dataclass
class Chains:
    """What a run of chains leaves.

    Attributes:
        samples: [B,K,…] kept states.
        accepted: [B] share of the moves after the burn-in that were accepted.
        outside: [B] int64 moves refused because they left the box.
        energy_error: [B] mean estimate of the energy difference's error; NaN where nothing estimates it.
    """

    samples: Tensor
    accepted: Tensor
    outside: Tensor
    energy_error: Tensor


@dataclass
class Walk:
    """How chains move. p is the density whose score is given, s = ∇log p, and r(x) = x + σ²s(x).

    Attributes:
        score: s.
        sigma: σ.
        kind: One of ``KINDS``; ``move`` says what each does.
        step: Standard deviation of the noise of ``random_walk`` and ``jacobian``.
        drift: Of ``mala`` and ``langevin``: how far towards r(x), so that λ = drift·σ².
        quadrature: Of the energy difference.
        tangent: States [B,…] → the encoder's Jacobian [B,k,D], for ``jacobian``.
    """

    score: Score
    sigma: float
    kind: str = "random_walk"
    step: float = 0.1
    drift: float = 1.0
    quadrature: Quadrature = "scaled"
    tangent: Callable[[Tensor], Tensor] | None = None

    @property
    def tested(self) -> bool:
        """Whether moves are tested, so that p is exactly what the chain samples."""
        return self.kind not in ("langevin", "alternate")

    # ---- proposals
    def centre(self, x: Tensor) -> Tensor:
        """Mean of the Langevin proposal, x + λ·s(x) with λ = drift·σ²; r(x) for drift 1."""
        return x + self.drift * self.sigma**2 * self.score(x)

    def move(self, x: Tensor, generator: torch.Generator | None) -> Tensor:
        """A proposal for every row.

        random_walk: x + τξ. mala and langevin: x + λs(x) + √(2λ)ξ. alternate: r(x + √2·σξ). jacobian: x + C(x)^½ ξ.
        """
        noise = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
        if self.kind == "random_walk":
            return x + self.step * noise
        if self.kind == "alternate":
            noisy = x + math.sqrt(2) * self.sigma * noise
            return noisy + self.sigma**2 * self.score(noisy)
        if self.kind == "jacobian":
            shift = self._root(x) @ noise.flatten(1).double()[..., None]
            return x + shift[..., 0].to(x.dtype).view_as(x)
        return self.centre(x) + math.sqrt(2 * self.drift) * self.sigma * noise

    def log_ratio(self, x: Tensor, y: Tensor) -> Tensor:
        """log q(x|y) − log q(y|x) [B] in double, 0 for a symmetric proposal."""
        if self.kind == "mala":
            there, back = _squared(y - self.centre(x)), _squared(x - self.centre(y))
            return (there - back) / (4 * self.drift * self.sigma**2)
        if self.kind == "jacobian":
            return self._log_normal(y, x) - self._log_normal(x, y)
        return torch.zeros(len(x), dtype=torch.double, device=x.device)

    def log_accept(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """log of the probability [B] that y is taken after x, not yet cut at 0; and the energy error's estimate."""
        delta, error = energy_difference(self.score, x, y, self.sigma, self.quadrature)
        return self.log_ratio(x, y) - delta, error

    # ---- noise along the manifold
    def _root(self, x: Tensor) -> Tensor:
        """The Cholesky root [B,D,D] of C(x) = τ²(k·JᵀJ/‖J‖² + 0.1²·I), J the encoder's Jacobian with k rows.

        Codes answer to moves along the manifold and not to moves off it, so JᵀJ spans its tangent.
        """
        if self.tangent is None:
            raise ConfigError("kind=jacobian needs an encoder's Jacobian")
        jacobian = self.tangent(x).double()
        size = jacobian.square().sum((1, 2), keepdim=True).clamp_min(1e-30)
        spread = len(jacobian[0]) * jacobian.transpose(1, 2) @ jacobian / size
        eye = torch.eye(spread.shape[-1], dtype=torch.double, device=x.device)
        return torch.linalg.cholesky(self.step**2 * (spread + FLOOR**2 * eye))

    def _log_normal(self, mean: Tensor, at: Tensor) -> Tensor:
        """log N(at; mean, C(mean)) up to a constant, [B]: the determinants of the two ends differ."""
        root = self._root(mean)
        away = (at - mean).flatten(1).double()[..., None]
        white = torch.linalg.solve_triangular(root, away, upper=False)
        return -white[..., 0].square().sum(1) / 2 - root.diagonal(dim1=1, dim2=2).log().sum(1)


@torch.no_grad()
def run(
    walk: Walk,
    start: Tensor,
    steps: int,
    burn_in: int = 0,
    thin: int = 1,
    box: tuple[float, float] | None = None,
    generator: torch.Generator | None = None,
    names: list[int] | None = None,
) -> Chains:
    """Move every row ``steps`` times; keep every ``thin``-th state after ``burn_in``.

    Args:
        walk: How they move.
        start: First states [B,…].
        steps: Moves.
        burn_in: Moves before anything is kept or counted.
        thin: Moves from one kept state to the next.
        box: Least and greatest coordinate; a move out of it is refused and counted.
        generator: Of all draws.
        names: What the rows are called in an error; default their places.

    Raises:
        DataError: a start or an energy that is not finite (chain and step are named), or no start inside the box.
    """
    names = list(range(len(start))) if names is None else names
    _check_start(start, box, names)
    x, kept, counted = start, [], max(1, steps - burn_in)
    accepted = torch.zeros(len(x), dtype=torch.double, device=x.device)
    error_sum, outside = torch.zeros_like(accepted), torch.zeros_like(accepted, dtype=torch.long)
    broken = torch.full_like(outside, -1)
    for step in range(1, steps + 1):
        y = walk.move(x, generator)
        if walk.tested:
            log_a, error = walk.log_accept(x, y)
            draw = torch.rand(len(x), generator=generator, device=x.device, dtype=torch.double)
            take, finite = draw.log() < log_a, torch.isfinite(log_a)
        else:
            finite = torch.isfinite(y).flatten(1).all(1)
            take, error = torch.ones_like(finite), torch.full_like(accepted, float("nan"))
        broken = torch.where(~finite & (broken < 0), step, broken)
        if box is not None:
            left = ~_inside(y, box)
            outside += left
            take = take & ~left
        x = torch.where(take.view(-1, *[1] * (x.ndim - 1)), y, x)
        if step > burn_in:
            accepted += take
            error_sum += error
            if (step - burn_in) % thin == 0:
                kept.append(x)
        if step % 100 == 0 or step == steps:  # seldom: it waits for the device
            _check_finite(broken, names, walk.tested)
    return Chains(torch.stack(kept, 1), accepted / counted, outside, error_sum / counted)


def _squared(difference: Tensor) -> Tensor:
    return difference.flatten(1).double().square().sum(1)


def _inside(x: Tensor, box: tuple[float, float]) -> Tensor:
    return ((x >= box[0]) & (x <= box[1])).flatten(1).all(1)


def _check_start(start: Tensor, box: tuple[float, float] | None, names: list[int]) -> None:
    bad = ~torch.isfinite(start).flatten(1).all(1)
    if bool(bad.any()):
        raise DataError(f"chain {names[int(bad.nonzero()[0])]} starts at a value that is not finite: clean the data")
    if box is not None and not bool(_inside(start, box).any()):
        low, high = float(start.min()), float(start.max())
        raise DataError(
            f"box [{box[0]:g}, {box[1]:g}] excludes all {len(start)} starts, which are in {low:g}..{high:g}: widen it"
        )


def _check_finite(broken: Tensor, names: list[int], tested: bool) -> None:
    if bool((broken > 0).any()):
        first = int(torch.where(broken > 0, broken, broken.max() + 1).argmin())
        what = "energy" if tested else "state"
        raise DataError(
            f"{what} of chain {names[first]} is not finite at step {int(broken[first])}: the score is not learned "
            "there; set sampler.box or a smaller step"
        )
