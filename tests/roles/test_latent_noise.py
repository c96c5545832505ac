"""Noise on coordinates, the inverse of principal components, and transforms that change fields and sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from quire import Model
from quire.contracts import Metric, Spec, build
from quire.data import Transform
from quire.datasets.images import Digits
from quire.errors import ConfigError
from quire.roles.latent.mlp import MlpVectorDecoder, MlpVectorEncoder
from quire.roles.latent.noise import CoordinateNoise
from quire.roles.latent.pca import PCAEncoder
from quire.roles.reconstruction import Reconstruction


def draws(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_noise_has_its_standard_deviation_and_repeats_under_one_generator() -> None:
    part, values = CoordinateNoise(0.3), torch.ones(2000, 5)
    noisy = part(values, draws())
    assert float((noisy - values).std()) == pytest.approx(0.3, rel=0.03)
    assert torch.equal(noisy, part(values, draws())) and not torch.equal(noisy, part(values, draws(1)))


def test_there_is_none_in_eval_mode_and_at_zero() -> None:
    values = torch.rand(3, 4)
    assert CoordinateNoise(0.3).eval()(values, draws()) is values
    assert CoordinateNoise(0.0)(values, draws()) is values and CoordinateNoise(0.3, probability=0)(values) is values
    part = CoordinateNoise(0.3).eval()
    assert not torch.equal(part.corrupt(values, draws()), values), "an objective may ask for it in evaluation"
    assert part.corrupt(values, draws(), std=0.0) is values


def test_rows_keep_their_length_when_asked_to() -> None:
    values = torch.randn(50, 2, 3, generator=draws())
    noisy = CoordinateNoise(0.5, renormalise=True)(values, draws(1))
    torch.testing.assert_close(noisy.flatten(1).norm(dim=1), values.flatten(1).norm(dim=1))
    assert not torch.allclose(noisy, values)


def test_a_share_of_the_rows_gets_noise_the_others_none() -> None:
    values = torch.zeros(4000, 3)
    noisy = CoordinateNoise(1.0, probability=0.25)(values, draws())
    changed = (noisy != 0).any(1)
    assert torch.equal(changed, (noisy != 0).all(1)) and float(changed.float().mean()) == pytest.approx(0.25, abs=0.03)


@pytest.mark.parametrize("given", [{"std": -0.1}, {"std": float("nan")}, {"std": 1.0, "probability": 1.5}])
def test_impossible_noise_is_refused(given: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="CoordinateNoise needs std >= 0 and probability in"):
        CoordinateNoise(**given)  # type: ignore[arg-type]


def test_reconstruction_of_corrupted_images_aims_at_the_clean_ones() -> None:
    seen: list[torch.Tensor] = []

    class Spy(MlpVectorEncoder):
        def forward(self, batch: Any) -> Any:
            seen.append(batch["image"])
            return super().forward(batch)

    objective = Reconstruction(corruption=CoordinateNoise(0.3))
    model = Model(Spy(), MlpVectorDecoder(), objective, spec={"image_size": [8, 8], "channels": 1})
    model.configure_model()
    image = torch.rand(4, 1, 8, 8)
    losses = model.objective(model, {"image": image})
    made = losses.outputs["reconstruction"]
    assert not torch.equal(seen[0], image)
    torch.testing.assert_close(losses["reconstruct"], (made - image).square().mean())


def test_components_come_back_as_data() -> None:
    encoder = PCAEncoder(width=64)
    build(encoder, Spec(image_size=[8, 8], channels=1))
    image = torch.rand(200, 1, 8, 8, generator=draws())
    with pytest.raises(ConfigError, match="never fitted"):
        encoder.inverse(torch.zeros(1, 64))
    encoder.fit([{"image": image}])
    torch.testing.assert_close(encoder.inverse(encoder({"image": image}).vector), image, atol=1e-5, rtol=0)
    assert float(encoder.inverse(torch.zeros(1, 64)).sub(image.mean(0)).abs().max()) < 1e-5


class Halves(Transform):
    """The upper half of an image as a vector instead of the image."""

    def offers(self, fields: tuple[str, ...]) -> tuple[str, ...]:
        return (*(f for f in fields if f != "image"), "vector")

    def resize(self, spec: Spec) -> Spec:
        return Spec(width=spec["image_size"][0] * spec["image_size"][1] // 2, classes=spec["classes"])

    def forward(self, batch: Any, generator: torch.Generator) -> Any:
        rest = {k: v for k, v in batch.items() if k != "image"}
        return {**rest, "vector": batch["image"][:, 0, :4].flatten(1)}


class Seen(Metric):
    """Whether predict's metrics see the batch as the sampler does."""

    def __init__(self) -> None:
        super().__init__()
        self.fields_seen: list[set[str]] = []

    def sampled(self, model: Model, batch: Any, results: Any) -> None:
        self.fields_seen.append(set(batch))

    def update(self) -> None:
        """Nothing to add."""

    def compute(self) -> torch.Tensor:
        """Nothing to say."""
        return torch.tensor(0.0)


def test_a_transform_changes_the_fields_and_sizes_that_the_model_sees(tmp_path: Any) -> None:
    import lightning.pytorch as pl

    from quire.contracts import Sampler

    class Codes(Sampler):
        def forward(self, model: Model, batch: Any) -> torch.Tensor:
            return model.encoder(batch).vector

    data = Digits(transforms=[Halves()], train_samples=128, batch_size=64)
    assert data.spec == {"width": 32, "classes": 10} and data.offered() == ("label", "index", "vector")
    metric = Seen()
    model = Model(MlpVectorEncoder(), MlpVectorDecoder(), Reconstruction(), Codes(), metrics=[metric])
    plain: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(max_steps=2, accelerator="cpu", default_root_dir=str(tmp_path), **plain)
    trainer.fit(model, datamodule=data)
    assert model.encoder.shape == (32,)
    trainer.predict(model, datamodule=data)
    assert metric.fields_seen and all(f == {"label", "index", "vector"} for f in metric.fields_seen)


def test_a_probe_reads_the_fields_that_the_transforms_give(tmp_path: Any) -> None:
    import lightning.pytorch as pl

    from quire.roles.probes.knn import KNNProbe

    class VectorsOnly(MlpVectorEncoder):
        fields = ("vector",)

    data = Digits(transforms=[Halves()], train_samples=128, batch_size=64)
    model = Model(VectorsOnly(), MlpVectorDecoder(), Reconstruction())
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", default_root_dir=str(tmp_path), callbacks=[KNNProbe()], **quiet
    )
    trainer.fit(model, datamodule=data)
    assert float(trainer.callback_metrics["val/knn"]) > 0.5
