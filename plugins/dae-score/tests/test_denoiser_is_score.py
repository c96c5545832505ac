"""Oracles of the linear Gaussian case (spec, section 7, 1 and 2): the trained optimum is the score, in numbers."""

import pytest
import torch

from quire.data import DataModule, Fields
from quire.roles.latent import VectorCodes, VectorEncoder
from quire_dae_score.densities import gaussian
from quire_dae_score.objective import Contractive, Denoising

S = torch.tensor([[2.0, 0.8], [0.8, 1.0]], dtype=torch.double)
SIGMA = 0.5
BEST = torch.tensor([[0.85616, 0.09206], [0.09206, 0.74108]], dtype=torch.double)
EYE = torch.eye(2, dtype=torch.double)


class Linear(VectorEncoder):
    """net(x) = Bx in double."""

    fields = ("vector",)

    def build(self, spec):
        self.width = spec["width"]
        self.matrix = torch.nn.Parameter(torch.zeros(self.width, self.width, dtype=torch.double))

    def forward(self, batch):
        return VectorCodes(batch["vector"] @ self.matrix.T)


def pairs(count=200_000):
    draws = torch.Generator().manual_seed(0)
    x = torch.randn(count, 2, generator=draws, dtype=torch.double) @ torch.linalg.cholesky(S).T
    return x, x + SIGMA * torch.randn(count, 2, generator=draws, dtype=torch.double)


def test_the_best_linear_denoiser_is_the_score_of_the_smoothed_density():
    best = S @ torch.linalg.inv(S + SIGMA**2 * EYE)
    torch.testing.assert_close(best, BEST, atol=1e-5, rtol=0)
    torch.testing.assert_close((best - EYE) / SIGMA**2, -torch.linalg.inv(S + SIGMA**2 * EYE), atol=1e-12, rtol=0)
    x, y = pairs()
    found = torch.linalg.lstsq(y, x).solution.T
    assert (found - BEST).abs().max() < 0.003
    assert (y @ found.T - x).square().sum(1).mean() == pytest.approx(0.39931, abs=0.003)


@pytest.mark.parametrize(
    ("sigma", "error"), [(1, 0.630), (0.3, 0.136), (0.1, 0.0172), (0.03, 0.00158), (0.01, 1.75e-4)]
)
def test_the_error_against_the_clean_score_falls_with_the_square_of_sigma(sigma, error):
    density, x = gaussian(), torch.eye(2, dtype=torch.double)  # a linear score's matrix, a column an axis
    smooth, clean = density.score(x, sigma), density.score(x)
    torch.testing.assert_close(clean, -torch.linalg.inv(S), atol=1e-12, rtol=0)
    assert float((smooth - clean).norm() / clean.norm()) == pytest.approx(error, rel=0.01)


@pytest.mark.parametrize("residual", [True, False])
def test_the_denoising_loss_is_least_where_r_is_the_best_denoiser(make, residual):
    """The loss in the module, on many pairs: its minimiser over linear maps is A*, its value .39931 (spec)."""
    model = make(Denoising(SIGMA, "vector", residual), encoder=Linear())
    with torch.no_grad():
        model.encoder.matrix.copy_((BEST - EYE) / SIGMA**2 if residual else BEST)
    losses = model.objective(model, {"vector": pairs()[0]})
    assert losses["denoise"].item() == pytest.approx(0.39931, abs=0.004)
    losses["denoise"].backward()
    assert model.encoder.matrix.grad.abs().max() < 0.01 * (SIGMA**2 if residual else 1)
    score = model.objective.score(model, torch.tensor([[0.3, -0.7]], dtype=torch.double))
    torch.testing.assert_close(score, gaussian().score(torch.tensor([[0.3, -0.7]]), SIGMA), atol=1e-4, rtol=0)


@pytest.mark.parametrize("jacobian", ["exact", "hutchinson", "difference"])
def test_contraction_and_denoising_are_one_loss_for_a_linear_map(make, jacobian):
    """tr((B−I)S(B−I)ᵀ) + σ²‖B‖² for any B (spec, section 3)."""
    matrix = torch.tensor([[0.7, 0.3], [-0.2, 0.4]], dtype=torch.double)
    model = make(Contractive(SIGMA, jacobian, 1, "vector", residual=False), encoder=Linear())
    with torch.no_grad():
        model.encoder.matrix.copy_(matrix)
    losses = model.objective(model, {"vector": pairs()[0]})
    expected = torch.trace((matrix - EYE) @ S @ (matrix - EYE).T)
    assert losses["reconstruct"].item() == pytest.approx(float(expected), rel=0.02)
    assert losses["contract"].item() == pytest.approx(float(SIGMA**2 * matrix.square().sum()), rel=0.01)
    other = make(Denoising(SIGMA, "vector", residual=False), encoder=Linear())
    other.encoder.load_state_dict(model.encoder.state_dict())
    denoise = other.objective(other, {"vector": pairs()[0]})["denoise"]
    assert denoise.item() == pytest.approx(sum(v.item() for v in losses.values()), rel=0.02)


class Points(DataModule):
    """Draws of N(0, S)."""

    fields = ("vector", "index")

    def sizes(self):
        return {"width": 2}

    def split(self, name):
        return Fields(vector=pairs(4096)[0])


@pytest.mark.parametrize(
    "objective", [Denoising(SIGMA, "vector"), Contractive(SIGMA, field="vector")], ids=["dae", "cae"]
)
def test_training_finds_the_score(make, trainer, objective):
    """Both objectives end at −(S+σ²I)⁻¹; 4096 points and Adam's noise leave a few percent."""
    model = make(objective, encoder=Linear(), rate=0.02)
    trainer(max_epochs=12).fit(model, datamodule=Points(batch_size=128))
    spread = torch.linalg.inv(S + SIGMA**2 * EYE)
    assert float((model.encoder.matrix.detach() + spread).norm() / spread.norm()) < 0.12
