"""ScorePictures: what is written, when, and what is refused."""

import numpy as np
import pytest
from PIL import Image

from quire.datasets.images import Digits
from quire.errors import ConfigError
from quire.roles.latent.mlp import MlpVectorDecoder, MlpVectorEncoder
from quire.roles.reconstruction import Reconstruction
from quire_dae_score.callbacks import ScorePictures
from quire_dae_score.objective import Denoising
from quire_dae_score.sampler import MetropolisHastings

IMAGES = {"image_size": [8, 8], "channels": 1, "classes": 10}
SHORT = {"steps": 40, "burn_in": 10, "thin": 2}


def drawn(file):
    pixels = np.asarray(Image.open(file).convert("L"))
    return min(pixels.shape) > 150 and pixels.std() > 15


def test_the_plane_is_drawn_with_its_field_and_its_chains(make, trainer, toy, tmp_path):
    model, data = make(sampler=MetropolisHastings(**SHORT, step=0.5)), toy()
    run = trainer(max_steps=3)
    run.fit(model, datamodule=data)
    assert drawn(tmp_path / "field.png") and not (tmp_path / "chains.png").exists()
    run.predict(model, datamodule=data)
    assert drawn(tmp_path / "chains.png")


def test_images_are_drawn_restored_and_walking(make, trainer, tmp_path):
    parts = {"encoder": MlpVectorEncoder(), "decoder": MlpVectorDecoder()}
    sampler = MetropolisHastings(**SHORT, step=0.05)
    model = make(Denoising(0.3, residual=False), IMAGES, sampler=sampler, **parts)
    data, own = Digits(batch_size=32), ScorePictures(rows=3, columns=5, path=str(tmp_path / "mine"))
    run = trainer(max_steps=3, limit_predict_batches=1, callbacks=[own])
    run.fit(model, datamodule=data)
    run.predict(model, datamodule=data)
    assert sorted(f.name for f in (tmp_path / "mine").iterdir()) == ["chains.png", "restored.png"]
    assert all(drawn(f) for f in (tmp_path / "mine").iterdir())
    assert not (tmp_path / "restored.png").exists(), "the one that the user lists stands"


def test_drawing_changes_nothing_in_training(make, trainer, toy, tmp_path):
    one, two = make(), make()
    two.objective.callbacks = lambda: []
    trainer(max_steps=4).fit(one, datamodule=toy())
    trainer(max_steps=4).fit(two, datamodule=toy())
    assert all((a == b).all() for a, b in zip(one.parameters(), two.parameters()))


def test_another_objective_is_refused(make, trainer):
    model = make(Reconstruction(), IMAGES, encoder=MlpVectorEncoder(), decoder=MlpVectorDecoder())
    with pytest.raises(ConfigError, match="ScorePictures needs a GaussianDenoiser; model.objective is Reconstruction"):
        trainer(max_steps=1, callbacks=[ScorePictures()]).fit(model, datamodule=Digits())


@pytest.mark.parametrize("given", [{"rows": 0}, {"columns": 1}])
def test_impossible_arguments_are_refused(given):
    with pytest.raises(ConfigError, match="ScorePictures needs rows >= 1 and columns >= 2"):
        ScorePictures(**given)
