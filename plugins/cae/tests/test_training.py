"""Beside the loop: clusters found before the first step, and the picture at the end."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import Trainer

from quire import ConfigError, Model
from quire.datasets.images import Digits
from quire.roles.masking import BlockMask
from quire.roles.probes.classify import Classify
from quire.roles.tokens.reconstruct import PatchPixels
from quire.roles.tokens.vit import ViTEncoder
from quire_cae.decoder import MaskedTokenDecoder
from quire_cae.kmeans import KMeansPatches
from quire_cae.objective import ContextAutoencoding
from quire_cae.pictures import CompletedImages, draw
from quire_cae.regressor import LatentRegressor


def model_of(target=None, pictures=0):
    objective = ContextAutoencoding(
        LatentRegressor(1, heads=2), BlockMask(8, 2), target or KMeansPatches(16, 256), pictures=pictures
    )
    encoder = ViTEncoder(2, 16, 1, 2, class_token=True)
    return Model(encoder=encoder, decoder=MaskedTokenDecoder(1, heads=2), objective=objective)


def fit(model, folder, steps=2, callbacks=(), **more):
    trainer = Trainer(
        accelerator="cpu", max_epochs=-1, max_steps=steps, logger=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=folder, callbacks=list(callbacks), limit_val_batches=0, **more,
    )  # fmt: skip
    trainer.fit(model, datamodule=Digits(batch_size=32))
    return trainer


def test_clusters_are_found_before_the_first_step_and_once(tmp_path, monkeypatch):
    model = model_of()
    trainer = fit(model, tmp_path, enable_checkpointing=False)
    target = model.objective.target
    assert bool(target.fitted)
    assert len(target.centres.unique(dim=0)) == 16
    assert 0 <= target.centres.min() <= target.centres.max() <= 1
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    again = model_of()
    monkeypatch.setattr(KMeansPatches, "fit", lambda *_: pytest.fail("fitted twice"))
    trainer = Trainer(
        accelerator="cpu", max_epochs=-1, max_steps=3, logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, default_root_dir=tmp_path, limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(again, datamodule=Digits(batch_size=32), ckpt_path=tmp_path / "two.ckpt", weights_only=True)
    assert torch.equal(again.objective.target.centres, target.centres)


def test_clusters_need_a_data_module(tmp_path):
    model = model_of()
    model.spec = None
    trainer = Trainer(accelerator="cpu", max_steps=1, logger=False, default_root_dir=tmp_path)
    model = Model(
        encoder=model.encoder, decoder=model.decoder, objective=model.objective, spec={"image_size": 8, "channels": 1}
    )
    loader = torch.utils.data.DataLoader([{"image": torch.rand(1, 8, 8)}])
    with pytest.raises(ConfigError, match="KMeansPatches is fitted on the training split of a data module"):
        trainer.fit(model, loader)


def test_the_picture_shows_each_stage_and_says_how_many_tokens_are_right(tmp_path, capsys):
    fit(model_of(pictures=2), tmp_path, enable_checkpointing=False)
    assert (tmp_path / "completed.png").stat().st_size > 1000
    assert "% of the masked tokens are right" in capsys.readouterr().out


def test_only_masked_cells_change_between_the_columns(tmp_path):
    model = model_of()
    fit(model, tmp_path, enable_checkpointing=False)
    image = torch.rand(3, 1, 8, 8)
    picture = CompletedImages()
    with torch.no_grad():
        columns, right = picture.complete(model.eval(), model.objective, image, model.encoder.built_layout.only())
    hidden = columns[1] != image
    assert hidden.sum((1, 2, 3)).tolist() == [32, 32, 32]  # 8 of 16 patches of 2x2
    assert all(torch.equal(c[~hidden], image[~hidden]) for c in columns)
    assert 0 <= right <= 1
    draw(tmp_path / "x" / "y.png", "title", columns)
    assert (tmp_path / "x" / "y.png").is_file()


def test_targets_that_can_t_be_painted_draw_nothing(tmp_path, capsys):
    model = model_of(PatchPixels(), pictures=2)
    assert model.objective.callbacks() == []
    fit(model, tmp_path, enable_checkpointing=False)
    assert not list(tmp_path.glob("*.png"))


def test_another_objective_and_no_images_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="CompletedImages.images must be at least 1"):
        CompletedImages(0)
    other = Model(encoder=ViTEncoder(2, 16, 1, 2), objective=Classify())
    with pytest.raises(ConfigError, match="CompletedImages needs a ContextAutoencoding"):
        CompletedImages().setup(None, other, "fit")
