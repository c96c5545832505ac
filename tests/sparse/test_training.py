"""What training keeps: unit rows, dead counters, starts, warm-up, norms; and recovery of planted directions."""

from __future__ import annotations

import math
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from tests.sparse.toys import D, F, K, N, model_of, rows
from torch import Tensor

from quire import ConfigError, Model
from quire.datasets.planted import PlantedFeatures
from quire.roles.sparse.coherence import PlantedRecovery, coherence, recovery
from quire.roles.sparse.dead import DeadLatents, count
from quire.roles.sparse.decoder import SparseDecoder
from quire.roles.sparse.encoder import SparseEncoder
from quire.roles.sparse.jumprelu import JumpReLU
from quire.roles.sparse.median import geometric_median
from quire.roles.sparse.objective import SparseReconstruction
from quire.roles.sparse.rows import project, renormalise
from quire.roles.sparse.selectors import ReLU, TopK
from quire.schedule import Constant

ADAM = {"class_path": "torch.optim.Adam", "init_args": {"lr": 3e-3}}


def trained(
    steps: int = 5, callbacks: Any = (), data: PlantedFeatures | None = None, options: Any = None, **given: Any
) -> tuple[Model, pl.Trainer]:
    """A small dictionary trained on planted features."""
    pl.seed_everything(0, verbose=False)
    data = data or PlantedFeatures(width=D, features=24, samples=512, batch_size=64)
    objective = given.pop("objective", None) or SparseReconstruction(dead_after=100)
    encoder = SparseEncoder(**{"latents": F, "selector": TopK(K), **given})
    model = Model(encoder, SparseDecoder(), objective, optimizer=ADAM, schedule=Constant())  # type: ignore[arg-type]
    trainer = pl.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        callbacks=list(callbacks),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        **(options or {}),
    )
    trainer.fit(model, datamodule=data)
    return model, trainer


class Look(pl.Callback):
    """Notes the rows' norms before each batch, when all callbacks have done their part."""

    def __init__(self) -> None:
        self.norms: list[float] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.norms.append((pl_module.decoder.W_dec.detach().norm(dim=1) - 1).abs().max().item())


# ---- rows
@pytest.mark.parametrize("accumulate", [1, 2])
def test_rows_have_norm_1_after_every_step(accumulate: int) -> None:
    """Oracle 6."""
    look = Look()
    model, _ = trained(callbacks=[look], options={"accumulate_grad_batches": accumulate})
    assert len(look.norms) >= 5 and max(look.norms) < 1e-6
    assert (model.decoder.W_dec.norm(dim=1) - 1).abs().max().item() < 1e-6


def test_the_projected_gradient_is_orthogonal_to_its_row() -> None:
    """Oracle 6."""
    model = model_of(dtype=torch.float32)
    renormalise(model.decoder.W_dec)
    model.objective(model, {"activation": rows(dtype=torch.float32)})["reconstruct"].backward()
    project(model.decoder.W_dec, model.decoder.W_dec.grad)
    gradient = model.decoder.W_dec.grad
    assert float((gradient * model.decoder.W_dec).sum(1).abs().max()) < 1e-6 * max(
        1.0, float(gradient.norm(dim=1).max())
    )


def test_a_zero_row_is_drawn_anew_the_same_for_the_same_seed(caplog: pytest.LogCaptureFixture) -> None:
    found = []
    for _ in range(2):
        model = model_of(dtype=torch.float32)
        with torch.no_grad():
            model.decoder.W_dec[7] = 0
        renormalise(model.decoder.W_dec, seed=3)
        found.append(model.decoder.W_dec[7])
    assert torch.equal(*found) and abs(float(found[0].norm()) - 1) < 1e-6
    assert "decoder rows [7] had norm 0" in caplog.text


def test_free_rows_stay_free() -> None:
    assert SparseDecoder(unit_norm=False).callbacks() == []
    model = model_of(ReLU(), decoder=SparseDecoder(unit_norm=False), objective=SparseReconstruction(l1=1.0))
    losses = model.objective(model, {"activation": rows()})
    wanted = (losses.outputs["codes"].values * model.decoder.W_dec.norm(dim=1)).sum(1).mean()
    assert torch.allclose(losses["l1"], wanted)


# ---- dead latents
def test_counters_are_reset_by_a_positive_value_only() -> None:
    model = model_of()
    count(model.decoder, torch.tensor([3, 0, 1] + [0] * (F - 3)), 10)
    count(model.decoder, torch.tensor([0, 0, 2] + [0] * (F - 3)), 10)
    assert model.decoder.tokens_since_fired[:4].tolist() == [10, 20, 0, 20]
    assert model.decoder.dead(20)[:4].tolist() == [False, True, False, True]
    model.decoder.tokens_since_fired.fill_(2**31)  # more than int32 holds
    count(model.decoder, torch.zeros(F, dtype=torch.long), 2**31)
    assert int(model.decoder.tokens_since_fired[0]) == 2**32


def test_selected_zeros_do_not_hide_dead_latents() -> None:
    model = model_of(TopK(F // 8))
    with torch.no_grad():
        model.encoder.b_enc.fill_(-100.0)  # nothing is active, all of K is selected
    losses = model.objective(model, {"activation": rows()})
    assert int(losses.outputs["fired"].sum()) == 0
    assert torch.isfinite(losses["reconstruct"])


def test_training_counts_tokens_and_auxk_starts_when_a_latent_is_dead() -> None:
    seen: list[bool] = []

    class Terms(pl.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            pl_module.objective.register_forward_hook(lambda m, a, losses: seen.append("auxk" in losses))

    model, _ = trained(callbacks=[Terms()])
    assert seen == [False, False, True, True, True]  # 64, 128 tokens counted before the second and third step
    assert model.decoder.counted == 5 * 64 >= int(model.decoder.tokens_since_fired.max()) > 64


def test_a_window_the_user_lists_stands() -> None:
    _, trainer = trained(steps=1, callbacks=[DeadLatents(7)])
    assert [c.window for c in trainer.callbacks if isinstance(c, DeadLatents)] == [7]


# ---- start
def test_geometric_median_of_symmetric_points_is_their_centre() -> None:
    """Oracle 10."""
    square = torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, -1]]) + 3
    assert torch.allclose(geometric_median(square), torch.tensor([3.0, 3.0]), atol=1e-5)
    assert torch.allclose(geometric_median(torch.tensor([[0.0], [0.0], [10.0]])), torch.zeros(1), atol=1e-4)
    assert geometric_median(square.bfloat16()).dtype == torch.float32


def test_the_start_is_tied_unit_rows_and_the_median_of_the_first_batch() -> None:
    firsts: list[Tensor] = []

    class First(pl.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            firsts.append(batch["activation"])
            self.bias = pl_module.decoder.b_dec.detach().clone() if len(firsts) == 1 else self.bias
            self.tied = torch.allclose(pl_module.decoder.W_dec, pl_module.encoder.W_enc) if len(firsts) == 1 else True

    first = First()
    model, _ = trained(steps=1, callbacks=[first])
    assert model.decoder.b_dec is model.encoder.b_dec and first.tied
    moved = float((model.decoder.b_dec - geometric_median(firsts[0])).abs().max())
    assert moved < 2 * 3e-3  # one step of Adam from there
    untied, _ = trained(steps=1, init="zeros")
    assert float(untied.decoder.b_dec.abs().max()) < 2 * 3e-3


def test_kaiming_start_has_zero_biases_and_unit_decoder_rows() -> None:
    torch.manual_seed(0)
    model = Model(SparseEncoder(F, TopK(K), init="kaiming"), SparseDecoder(), SparseReconstruction(), spec={"width": D})
    model.configure_model()
    assert torch.allclose(model.decoder.W_dec.norm(dim=1), torch.ones(F))
    cosine = (model.decoder.W_dec * model.encoder.W_enc).sum(1) / model.encoder.W_enc.norm(dim=1)
    assert torch.allclose(cosine, torch.ones(F)) and float(model.encoder.W_enc.norm(dim=1).std()) > 0


# ---- norms
def test_layer_norm_makes_every_token_as_long() -> None:
    model = model_of(norm="layer", latents=F, width=768, dtype=torch.float32).eval()
    x = 5 * rows(8, 768, torch.float32) + 2
    reading = model.encoder.read({"activation": x})
    assert torch.allclose(reading.x.norm(dim=1), torch.full((8,), math.sqrt(767)), atol=3e-4)
    back = reading.x * reading.codes.scale + reading.codes.shift
    assert torch.allclose(back, x, atol=1e-4)


def test_global_rms_is_fitted_on_training_rows_and_kept() -> None:
    model = model_of(norm="global_rms")
    x = 7 * rows()
    reading = model.encoder.read({"activation": x})
    assert torch.allclose(reading.x.square().sum(1).mean(), torch.tensor(float(D), dtype=torch.float64))
    scale = model.encoder.rms.scale.clone()
    model.eval()
    model.encoder.read({"activation": 100 * x})
    assert torch.equal(model.encoder.rms.scale, scale)
    model.train()
    model.encoder.rms.set(2.0)
    model.encoder.read({"activation": 100 * x})
    assert float(model.encoder.rms.scale) == pytest.approx(2.0)
    x.requires_grad_()
    losses = model.objective(model, {"activation": x})
    made = model.decoder(losses.outputs["codes"])
    assert torch.allclose(made, losses.outputs["reconstruction"])
    assert torch.allclose(losses.outputs["target"], x)


# ---- terms
def test_warm_up_raises_the_sparsity_weights_only() -> None:
    objective = SparseReconstruction(l1=2.0, sparsity_warmup=4, reduction="mean")
    model = model_of(ReLU(), objective=objective)
    losses = objective(model, {"activation": rows()})
    assert objective.weights["l1"] == 0.5 and objective.weights["auxk"] == 1 / 32
    assert [objective.warmed(s) for s in (0, 1, 3, 10)] == [0.25, 0.5, 1.0, 1.0]
    made = losses.outputs["reconstruction"]
    assert torch.allclose(losses["reconstruct"], (made - rows()).square().mean())


def test_l0_counts_active_latents() -> None:
    model = model_of(JumpReLU(0.5, 0.5), objective=SparseReconstruction(l0=0.1))
    losses = model.objective(model, {"activation": rows()})
    assert torch.allclose(losses["l0"], losses.outputs["codes"].l0().double().mean())
    losses["l0"].backward()
    assert float(model.encoder.selector.log_threshold.grad.abs().sum()) > 0


def test_token_weights_weigh_the_error() -> None:
    model = model_of()
    weight = torch.zeros(N, dtype=torch.float64)
    weight[3] = N
    losses = model.objective(model, {"activation": rows(), "weight": weight})
    alone = model.objective(model, {"activation": rows()[3:4]})
    assert torch.allclose(losses["reconstruct"], alone["reconstruct"])


def test_a_transcoder_rebuilds_the_target() -> None:
    model = model_of(spec={"target_width": 10}, norm="global_rms")
    assert model.decoder.W_dec.shape == (F, 10) and model.encoder.b_dec.shape == (D,)
    assert model.decoder.b_dec is not model.encoder.b_dec
    target = 3 * rows(width=10, seed=9)
    losses = model.objective(model, {"activation": rows(), "target": target})
    assert losses.outputs["reconstruction"].shape == (N, 10)
    assert torch.allclose(losses.outputs["target"], target)
    assert torch.allclose(model.decoder(losses.outputs["codes"]), losses.outputs["reconstruction"])


# ---- numbers about rows, and the planted truth
def test_coherence_in_blocks_is_that_of_the_whole_matrix() -> None:
    made = rows(37, 8, torch.float32)
    unit = made / made.norm(dim=1, keepdim=True)
    wanted = ((unit @ unit.T).abs() - torch.eye(37)).max()
    for block in (1, 5, 36, 1024):
        assert torch.allclose(coherence(made, block), wanted, atol=1e-6)
    assert float(coherence(made[:1])) == 0


def test_planted_rows_are_sums_of_few_directions() -> None:
    data = PlantedFeatures(width=8, features=12, active=2, noise=0.0, samples=64, batch_size=16)
    x = next(iter(data.train_dataloader()))["activation"]
    assert x.shape == (16, 8) and torch.allclose(data.directions.norm(dim=1), torch.ones(12))
    best = min(
        float((x[0] - w @ data.directions[[i, j]]).norm())
        for i in range(12)
        for j in range(i)
        for w in [torch.linalg.lstsq(data.directions[[i, j]].T, x[0]).solution]
    )
    assert best < 1e-5
    again = PlantedFeatures(width=8, features=12, active=2, noise=0.0, samples=64, batch_size=16, seed=5)
    assert torch.equal(again.directions, data.directions)
    with pytest.raises(ConfigError, match=r"active \(13\) exceeds features \(12\)"):
        PlantedFeatures(features=12, active=13)


def test_planted_directions_are_found() -> None:
    """Oracle 11, shortened."""
    data = PlantedFeatures(width=16, features=24, active=2, samples=16384, batch_size=512)
    model, _ = trained(
        steps=400, data=data, latents=48, selector=TopK(2), objective=SparseReconstruction(dead_after=5000)
    )
    found = recovery(model.decoder.W_dec, data.directions)
    assert float(found.mean()) > 0.9


def test_recovery_needs_a_truth() -> None:
    class Unknown:
        directions = None

    class Holder:
        datamodule = Unknown()

    with pytest.raises(ConfigError, match="PlantedRecovery needs data with known directions; Unknown has none"):
        PlantedRecovery().observe(Holder(), {}, None)  # type: ignore[arg-type]
