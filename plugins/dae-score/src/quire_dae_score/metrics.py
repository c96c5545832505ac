"""How good a learnt score is, where the truth is known: score, energy, and whether it is a gradient at all."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quire.contracts import Batch, Losses, Metric
from quire.model import Model
from quire_dae_score.denoiser import GaussianDenoiser, denoiser_of, evaluating
from quire_dae_score.energy import energy_difference
from quire_dae_score.jacobian import asymmetry, exact
from quire_dae_score.modules import tiny_run
from quire_dae_score.toy import density_of

ROWS = 64
"""Rows of a batch whose whole Jacobians are made."""


class _Mean(Metric):
    """A sum over a count."""

    objective: GaussianDenoiser
    higher_is_better: bool | None = False
    full_state_update = False
    above: Tensor
    below: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("above", "below"):
            self.add_state(name, torch.zeros((), dtype=torch.double), dist_reduce_fx="sum")

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """On two modes in the plane."""
        return tiny_run(metrics=[cls.__name__])

    @torch.no_grad()
    def observe(self, model: Model, batch: Batch, losses: Losses) -> None:
        """Add one batch."""
        denoiser = denoiser_of(model, self)
        with evaluating(model):
            self.update(*self.measure(model, denoiser, denoiser.clean(batch)))

    def measure(self, model: Model, denoiser: GaussianDenoiser, x: Tensor) -> tuple[Tensor, Tensor]:
        """What to add above and below the line."""
        raise NotImplementedError

    def update(self, above: Tensor, below: Tensor | float) -> None:
        """Add to the sum and to the count."""
        self.above += torch.as_tensor(above).to(self.above)
        self.below += torch.as_tensor(below).to(self.below)

    def compute(self) -> Tensor:
        """The quotient."""
        return self.above / self.below.clamp_min(1e-30)


class ScoreError(_Mean):
    """Distance of the learnt score from that of the data's own density, relative. After Alain and Bengio 2012.

    The model's score is that of p_σ, so a large σ costs a bias and a small one, where the noise hides the score from
    training, a variance: the error is smallest in between.

    Returns:
        √(E‖s − ∇log p‖² / E‖∇log p‖²) over the evaluated rows: 0 is exact, 1 what a score of 0 has.

    Raises:
        ConfigError: data whose density isn't known.
    """

    def measure(self, model: Model, denoiser: GaussianDenoiser, x: Tensor) -> tuple[Tensor, Tensor]:
        """Squares of the difference and of the truth."""
        true = density_of(model, self).score(x.cpu()).to(x.device)
        return (denoiser.score(model, x).double() - true).square().sum(), true.square().sum()

    def compute(self) -> Tensor:
        """The root of the quotient."""
        return super().compute().sqrt()


class EnergyError(_Mean):
    """Distance of path energies from the differences of −log p_σ. After Alain and Bengio 2012.

    Paths lead from each evaluated row to the next, so for separated modes some cross where nothing was learnt.

    Returns:
        Mean absolute error in nats.

    Raises:
        ConfigError: data whose density isn't known.
    """

    def measure(self, model: Model, denoiser: GaussianDenoiser, x: Tensor) -> tuple[Tensor, Tensor]:
        """Sum over the pairs, and their number."""
        sigma, to = denoiser.sigma, x.roll(1, 0)
        found, _ = energy_difference(lambda at: denoiser.score(model, at, sigma), x, to, sigma)
        level = density_of(model, self).log_prob(x.cpu(), sigma).to(x.device)
        return (found - (level - level.roll(1, 0))).abs().sum(), torch.tensor(float(len(x)))


class JacobianAsymmetry(_Mean):
    """How far the score is from being a gradient: ‖J − Jᵀ‖/‖J‖ of its Jacobian. After Alain and Bengio 2012.

    A free network's score is no gradient, so its path energies depend on the path; a conservative model has 0.

    Returns:
        Mean over the first 64 rows of each batch, between 0 and 2.

    Raises:
        ConfigError: more than 64 numbers a sample.
    """

    def measure(self, model: Model, denoiser: GaussianDenoiser, x: Tensor) -> tuple[Tensor, Tensor]:
        """Sum over rows, and their number."""
        sigma, x = denoiser.sigma, x[:ROWS]
        jacobian = exact(lambda at: denoiser.score(model, at, sigma), x)
        return asymmetry(jacobian).sum(), torch.tensor(float(len(x)))
