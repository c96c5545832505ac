"""Metrics are 0 for the truth, and see what is wrong."""

from types import SimpleNamespace

import pytest
import torch

from quire.errors import ConfigError
from quire.roles.latent import VectorCodes, VectorEncoder
from quire_dae_score.chain_metrics import ClassCoverage, EffectiveSamples, GridKL, NearestTraining, grid_kl, mmd
from quire_dae_score.densities import mixture
from quire_dae_score.metrics import EnergyError, JacobianAsymmetry, ScoreError
from quire_dae_score.objective import Denoising
from quire_dae_score.toy import ToyDensity

SIGMA = 0.4


class Truth(VectorEncoder):
    """The exact score of p_σ, or of p, turned by ``turn``."""

    fields = ("vector",)
    width = 2

    def __init__(self, sigma=SIGMA, turn=0.0):
        super().__init__()
        self.sigma, self.turn = sigma, turn

    def forward(self, batch):
        x = batch["vector"]
        swirl = torch.stack([-x[:, 1], x[:, 0]], 1)
        return VectorCodes(mixture().score(x, self.sigma).to(x.dtype) + self.turn * swirl)


def measured(make, trainer, metric, encoder):
    model = make(Denoising(SIGMA, "vector"), encoder=encoder, metrics=[metric])
    return trainer().validate(model, datamodule=ToyDensity(samples=2048), verbose=False)[0]


def test_the_true_clean_score_has_no_score_error_and_a_smoothed_one_has_its_bias(make, trainer):
    assert measured(make, trainer, ScoreError(), Truth(0.0))["val/ScoreError"] < 1e-5
    found = measured(make, trainer, ScoreError(), Truth(SIGMA))["val/ScoreError"]
    # within one mode of variance .25: 1 − .25/(.25 + .16)
    assert found == pytest.approx(1 - 0.25 / 0.41, rel=0.02)


def test_the_true_score_has_hardly_an_energy_error(make, trainer):
    assert measured(make, trainer, EnergyError(), Truth())["val/EnergyError"] < 1e-3
    assert measured(make, trainer, EnergyError(), Truth(0.0))["val/EnergyError"] > 0.2


def test_a_swirl_is_no_gradient(make, trainer):
    assert measured(make, trainer, JacobianAsymmetry(), Truth())["val/JacobianAsymmetry"] < 1e-5
    assert measured(make, trainer, JacobianAsymmetry(), Truth(turn=1.0))["val/JacobianAsymmetry"] > 0.3


def test_data_without_a_known_density_are_refused(make):
    with pytest.raises(ConfigError, match="^ScoreError compares with the truth, which only ToyDensity has"):
        ScoreError().observe(make(), {"vector": torch.zeros(2, 2)}, None)


def noised(count, seed):
    draws = torch.Generator().manual_seed(seed)
    return mixture().sample(count, draws) + SIGMA * torch.randn(count, 2, generator=draws)


def test_kl_of_true_draws_is_its_known_bias_and_a_wrong_mass_is_seen():
    """576 cells and N draws: about (cells in use − 1)/(2N)."""
    right = noised(20_000, 0)
    assert 0 < grid_kl(right, mixture(), SIGMA) < 576 / (2 * 20_000)
    mirrored = right * torch.tensor([-1.0, 1.0])
    expected = 0.4 * torch.log(torch.tensor(0.7 / 0.3))  # Σ q log(q/p) of masses .7/.3 for .3/.7
    assert float(grid_kl(mirrored, mixture(), SIGMA)) == pytest.approx(float(expected), abs=0.03)
    assert grid_kl(right + 100, mixture(), SIGMA) > 10, "outside counts"


def test_mmd_is_nothing_for_one_law_and_something_for_two():
    same = torch.stack([mmd(noised(1000, 2 * i), noised(1000, 2 * i + 1)) for i in range(8)])
    assert same.abs().max() < 2e-3 and same.min() < 0 < same.max(), "unbiased"
    assert mmd(noised(1000, 0), noised(1000, 1) * 1.3) > 3e-3
    assert mmd(noised(1000, 0), noised(1000, 1) * torch.tensor([-1.0, 1.0])) > 0.1


def test_a_mode_that_is_never_left_shows_in_effective_samples(make):
    metric, draws = EffectiveSamples(), torch.Generator().manual_seed(0)
    free = torch.randn(8, 200, 2, generator=draws)
    for part in free.split(4):
        metric.update(None, {}, part)
    assert metric.compute() > 1000
    metric.reset()
    metric.update(None, {}, free + 5 * torch.arange(8.0)[:, None, None])
    assert metric.compute() < 60


def chain_of(states):
    return states[:, None].expand(-1, 3, -1)


def test_nearest_training_tells_memory_from_new_data(make, toy):
    data, metric = toy(samples=2048), NearestTraining()
    model = make(Denoising(SIGMA, "vector"))
    model._trainer = SimpleNamespace(datamodule=data, global_rank=0)
    train, start = data.dataset("train").tensors["vector"], data.dataset("test").tensors["vector"]
    for states, low, high in ((noised(256, 0), 0.6, 1.6), (train[:256], 0.0, 1e-3), (train[:256] + 50, 20, 1e4)):
        metric.reset()
        metric.update(model, {"vector": start}, chain_of(states))
        assert low <= metric.compute() <= high


def test_coverage_counts_classes(make):
    from quire.datasets.images import Digits
    from quire.roles.latent.plain import FlatPixels

    data, metric = Digits(train_samples=500), ClassCoverage()
    model = make(Denoising(0.3), {"image_size": [8, 8], "channels": 1}, encoder=FlatPixels())
    model._trainer = SimpleNamespace(datamodule=data, global_rank=0)
    test = data.dataset("test").tensors
    batch = {"image": test["image"]}
    metric.update(model, batch, chain_of(test["image"].flatten(1)))
    assert metric.compute() == 10
    metric.reset()
    metric.update(model, batch, chain_of(test["image"][test["label"] == 3].flatten(1)))
    assert metric.compute() <= 5


def test_metrics_of_chains_are_left_out_of_validation(make, trainer, toy):
    model = make(metrics=[GridKL(), ScoreError()])
    logged = trainer().validate(model, datamodule=toy(), verbose=False)[0]
    assert "val/ScoreError" in logged and "val/GridKL" not in logged
