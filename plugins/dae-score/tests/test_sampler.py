"""MetropolisHastings on a model: what predict leaves, seeds, modes, and every refusal."""

import json

import pytest
import torch
from torch import nn

from quire import Sum
from quire.errors import ConfigError, DataError
from quire.roles.latent import VectorCodes, VectorEncoder
from quire.roles.latent.mlp import MlpVectorDecoder, MlpVectorEncoder
from quire.roles.latent.plain import Pooled
from quire.roles.reconstruction import Reconstruction
from quire.roles.tokens.vit import ViTEncoder
from quire_dae_score.densities import gaussian
from quire_dae_score.objective import Contractive, Denoising
from quire_dae_score.sampler import MetropolisHastings

IMAGES = {"image_size": [8, 8], "channels": 1, "classes": 10}
SHORT = {"steps": 60, "burn_in": 20, "thin": 4}


class Exact(VectorEncoder):
    """The exact score of N(0, S) with noise of 0.5, as a network."""

    fields = ("vector",)
    width = 2

    def build(self, spec):
        spread = gaussian().covariance + 0.25 * torch.eye(2)
        self.register_buffer("matrix", -torch.linalg.inv(spread).float())

    def forward(self, batch):
        return VectorCodes(batch["vector"] @ self.matrix)


def chains(make, count=200, seed=0, objective=None, **given):
    model = make(
        objective or Denoising(0.5, "vector"),
        encoder=Exact(),
        sampler=MetropolisHastings(**{**SHORT, "step": 1.0, **given}),
    )
    start = gaussian().sample(count, torch.Generator().manual_seed(seed))
    return model.sampler(model, {"vector": start})


@pytest.mark.parametrize("kind", ["random_walk", "mala", "langevin", "alternate", "jacobian"])
def test_every_kind_gives_a_row_a_chain(make, kind):
    found = chains(make, 7, kind=kind)
    assert found["samples"].shape == (7, 10, 2)
    for name in ("acceptance", "effective", "outside", "energy_error"):
        assert found[name].shape == (7,), name
    assert ((found["acceptance"] >= 0) & (found["acceptance"] <= 1)).all()
    assert (found["effective"] >= 1).all()
    tested = kind in ("random_walk", "mala", "jacobian")
    assert torch.isfinite(found["energy_error"]).all() if tested else torch.isnan(found["energy_error"]).all()


def test_a_model_with_the_exact_score_samples_its_density(make):
    found = chains(make, 2000, steps=300, burn_in=100, thin=20)
    cover = torch.cov(found["samples"].flatten(0, 1).T.double())
    torch.testing.assert_close(cover, torch.tensor([[2.25, 0.8], [0.8, 1.25]]).double(), atol=0.1, rtol=0)
    assert float(found["acceptance"].mean()) == pytest.approx(0.60, abs=0.01), "the spec's number for step 1"
    assert found["energy_error"].max() < 1e-5


def test_seeds_differ_and_repeat(make):
    assert torch.equal(chains(make)["samples"], chains(make)["samples"])

    def of_seed(seed):
        model = make(Denoising(0.5, "vector"), encoder=Exact(), sampler=MetropolisHastings(**SHORT, seed=seed))
        return model.sampler(model, {"vector": torch.zeros(5, 2)})["samples"]

    assert not torch.equal(of_seed(0), of_seed(1))


def test_predict_runs_free_and_conservative_models_in_inference_mode(make, trainer, toy):
    """autograd.grad fails there even under enable_grad; the slopes are taken by torch.func."""
    for conservative in (False, True):
        objective = Denoising(0.4, "vector", conservative=conservative)
        model = make(objective, sampler=MetropolisHastings(**SHORT))
        results = trainer().predict(model, datamodule=toy(samples=512))
        assert sum(len(r["samples"]) for r in results) == 64
        assert all(torch.isfinite(r["samples"]).all() for r in results)


def test_dropout_is_off_in_chains_and_modes_come_back(make):
    class Dropping(Exact):
        def build(self, spec):
            super().build(spec)
            self.drop = nn.Dropout(0.5)

        def forward(self, batch):
            return VectorCodes(self.drop(super().forward(batch).vector))

    model = make(Denoising(0.5, "vector"), encoder=Dropping(), sampler=MetropolisHastings(**SHORT, step=1.0)).train()
    model.decoder = None
    found = model.sampler(model, {"vector": torch.zeros(5, 2)})
    assert model.encoder.drop.training and found["energy_error"].max() < 1e-5, "a path energy has no noise"


def test_no_graph_grows(make):
    model = make(sampler=MetropolisHastings(**SHORT, kind="mala"))
    with torch.enable_grad():
        assert not model.sampler(model, {"vector": torch.zeros(3, 2)})["samples"].requires_grad


def test_images_walk_through_a_pair_in_a_sum(make, trainer):
    """The one GaussianDenoiser of a Sum serves."""
    from quire.datasets.images import Digits

    objective = Sum([Denoising(0.3, residual=False), Reconstruction()])
    model = make(
        objective,
        IMAGES,
        encoder=MlpVectorEncoder(widths=[32]),
        decoder=MlpVectorDecoder(widths=[32]),
        sampler=MetropolisHastings(**SHORT, step=0.05, box=[-1, 2]),
    )
    results = trainer(limit_predict_batches=1).predict(model, datamodule=Digits(batch_size=16))
    assert results[0]["samples"].shape == (16, 10, 1, 8, 8)


def test_results_can_be_written(make, tmp_path):
    from quire.predictions import write

    (file,) = write([chains(make, 3)], tmp_path)
    assert file.name == "predictions.safetensors"
    assert json.dumps(chains(make, 3)["samples"].tolist())


# ---- bad input
@pytest.mark.parametrize("given", [{"step": 0}, {"step": -1}, {"drift": 0}, {"step": float("nan")}])
def test_a_step_of_nothing_is_refused(given):
    with pytest.raises(ConfigError, match="^MetropolisHastings.step and drift must be positive, got "):
        MetropolisHastings(**given)


@pytest.mark.parametrize("given", [{"steps": 100, "burn_in": 200}, {"steps": 205, "burn_in": 200}, {"thin": 0}])
def test_chains_that_keep_nothing_are_refused(given):
    with pytest.raises(ConfigError, match="^MetropolisHastings keeps nothing with steps="):
        MetropolisHastings(**given)


@pytest.mark.parametrize("given", [{"kind": "hmc"}, {"quadrature": "simpson"}, {"quadrature": 0}, {"box": [1, 0]}])
def test_impossible_arguments_are_refused(given):
    with pytest.raises(ConfigError, match=r"^MetropolisHastings\.(kind|quadrature|box) must be "):
        MetropolisHastings(**given)


def test_a_start_that_is_not_finite_is_named_by_its_index(make):
    model = make(sampler=MetropolisHastings(**SHORT))
    start = torch.zeros(3, 2)
    start[2, 1] = float("nan")
    with pytest.raises(DataError, match="^chain 42 starts at a value that is not finite"):
        model.sampler(model, {"vector": start, "index": torch.tensor([40, 41, 42])})


def test_a_start_of_another_width_is_refused(make):
    model = make(sampler=MetropolisHastings(**SHORT))
    with pytest.raises(ConfigError, match="^x0 has 3 features, model 2$"):
        model.sampler(model, {"vector": torch.zeros(4, 3)})


def test_a_box_without_a_start_is_refused(make):
    model = make(sampler=MetropolisHastings(**SHORT, box=[5, 6]))
    with pytest.raises(DataError, match=r"^box \[5, 6\] excludes all 4 starts, which are in 0..0: widen it$"):
        model.sampler(model, {"vector": torch.zeros(4, 2)})


def test_a_model_trained_otherwise_is_refused(make):
    parts = {"encoder": MlpVectorEncoder(), "decoder": MlpVectorDecoder()}
    said = (
        r"^MetropolisHastings needs a GaussianDenoiser; model.objective is Reconstruction \(core\): only a model "
        "trained to remove Gaussian noise has a score. GaussianDenoisers installed: Contractive, Denoising"
    )
    with pytest.raises(ConfigError, match=said):
        make(Reconstruction(), IMAGES, sampler=MetropolisHastings(), **parts)
    with pytest.raises(ConfigError, match="needs a GaussianDenoiser; model.objective is Sum"):
        make(Sum([Denoising(0.2), Contractive(0.2)]), IMAGES, sampler=MetropolisHastings(), **parts)


def test_an_encoder_without_vector_codes_is_refused(make):
    """Whatever objective stands beside it: here one that could do with tokens."""
    vit = ViTEncoder(patch=2, width=64, depth=1, heads=2)

    class Lenient(Denoising):
        def check(self, model):
            pass

    said = r"^MetropolisHastings needs a VectorEncoder; ViTEncoder gives tokens \[B,T,D\], wrap it in Pooled$"
    with pytest.raises(ConfigError, match=said):
        make(Lenient(0.3), IMAGES, encoder=vit, sampler=MetropolisHastings())
    with pytest.raises(ConfigError, match="^MetropolisHastings needs a VectorEncoder; model.encoder is not set$"):
        make(Lenient(0.3), IMAGES, encoder=None, sampler=MetropolisHastings())
    make(Denoising(0.3), IMAGES, encoder=Pooled(vit), sampler=MetropolisHastings())


def test_moves_along_the_manifold_of_a_large_image_are_refused(make):
    model = make(
        Denoising(0.3, residual=False),
        {"image_size": [28, 28], "channels": 1},
        encoder=MlpVectorEncoder(),
        decoder=MlpVectorDecoder(),
        sampler=MetropolisHastings(**SHORT, kind="jacobian"),
    )
    with pytest.raises(ConfigError, match=r"^d is 784, more than kind=jacobian can take \(64\): use another kind$"):
        model.sampler(model, {"image": torch.rand(2, 1, 28, 28)})
