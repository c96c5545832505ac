"""The loss term, and the official rules around it."""

import pytest
import torch
from topafa_toys import D, model_of, noise

from quire import ConfigError
from quire.datasets.planted import PlantedFeatures
from quire.reproduce import arm_trainer, quiet
from quire.roles.sparse.decoder import SparseDecoder
from quire.roles.sparse.objective import SparseReconstruction
from quire.roles.sparse.selectors import ReLU, TopK
from quire.sum import Sum
from quire_topafa.loss import AFALoss, norm_of
from quire_topafa.selector import TopAFA

X = noise(20, D, seed=3)


def test_the_term_is_the_mean_squared_difference_of_norms():
    model = model_of(TopK(5), decoder=SparseDecoder(unit_norm=False), objective=AFALoss(0.5))
    losses = model.objective(model, {"activation": X})
    f = (losses.outputs["codes"].dense() * model.decoder.W_dec.norm(dim=1)).norm(dim=1)
    x = (X - model.decoder.b_dec).norm(dim=1)
    assert torch.allclose(losses["afa"], (f - x).square().mean(), atol=1e-6)
    assert model.objective.weights == {"afa": 0.5}


def test_official_norms_are_unscaled_and_hold_the_bias():
    model = model_of(TopK(5), decoder=SparseDecoder(unit_norm=False), objective=AFALoss(compat="official"))
    losses = model.objective(model, {"activation": X})
    f = losses.outputs["codes"].dense().norm(dim=1)
    assert torch.allclose(losses["afa"], (f - X.norm(dim=1)).square().mean(), atol=1e-6)


def test_oracle_the_gradient_is_finite_where_no_latent_is_active():
    values = torch.zeros(3, 4, requires_grad=True)
    (norm_of(values) - 2).square().mean().backward()
    assert bool(torch.isfinite(values.grad).all())


def test_a_step_down_the_term_brings_norms_nearer():
    model = model_of(TopAFA(), objective=AFALoss(1.0))
    before = model.objective(model, {"activation": X})["afa"]
    before.backward()
    with torch.no_grad():
        for p in model.parameters():
            p -= 1e-3 * (0 if p.grad is None else p.grad)
    assert float(model.objective(model, {"activation": X.clone()})["afa"].detach()) < float(before.detach())
    assert model.decoder.W_dec.grad is None or float(model.decoder.W_dec.grad.abs().max()) == 0


def test_the_numbers_of_kept_latents_are_logged():
    model = model_of(TopAFA(), objective=AFALoss())
    losses = model.objective(model, {"activation": X})
    kept = losses.outputs["codes"].l0()
    found = {k: float(v()) for k, v in losses.metrics.items()}
    assert (found["l0_min"], found["l0_max"]) == (int(kept.min()), int(kept.max()))
    assert found["l0_mean"] == pytest.approx(float(kept.float().mean()))


@pytest.mark.parametrize("selector", [ReLU(), TopK(4), TopAFA()])
def test_it_joins_a_reconstruction_of_any_selector(selector):
    model = model_of(selector, objective=Sum([SparseReconstruction(reduction="mean"), AFALoss(1 / 16)]))
    losses = model.objective(model, {"activation": X})
    assert {"reconstruct", "afa"} <= set(losses) and model.objective.weights["afa"] == 1 / 16
    assert "errors" in losses.outputs and "fired" in losses.outputs


def test_what_cannot_work_is_refused_in_a_sentence():
    with pytest.raises(ConfigError, match=r"AFALoss.weight must be at least 0, got -1"):
        AFALoss(-1)
    with pytest.raises(ConfigError, match="compat must be official or null"):
        AFALoss(compat="old")
    with pytest.raises(ConfigError, match="set decoder.unit_norm: false"):
        model_of(TopAFA(), objective=AFALoss(compat="official"))


@pytest.mark.filterwarnings("ignore")
def test_official_rows_are_unit_before_the_step_and_a_little_off_behind_it():
    objective = Sum([SparseReconstruction(reduction="mean"), AFALoss(compat="official")])
    free = SparseDecoder(unit_norm=False)
    model = model_of(TopAFA(compat="official"), decoder=free, objective=objective, norm="layer")
    data = PlantedFeatures(width=D, features=24, samples=256, batch_size=32)
    with quiet():
        arm_trainer(max_steps=4).fit(model, datamodule=data)
    off = (model.decoder.W_dec.norm(dim=1) - 1).abs().max()
    assert 0 < float(off) < 0.05
