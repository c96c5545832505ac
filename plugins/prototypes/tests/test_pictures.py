"""PrototypeImages: what is written, when, and what is refused."""

import numpy as np
import pytest
import torch
from PIL import Image

from quire.contracts import Decoder
from quire.errors import ConfigError
from quire.roles.latent.mlp import MlpVectorDecoder
from quire_prototypes.callbacks import PrototypeImages


class Words(Decoder):
    """Decodes to something that isn't pixels."""

    def forward(self, codes):
        return ["a"] * len(codes.vector)


def test_the_layer_brings_its_pictures(make, digits, trainer, tmp_path):
    trainer(2).fit(make(), datamodule=digits())
    files = {f.name for f in (tmp_path / "prototypes").iterdir()}
    assert files == {"prototypes-0002.png", "explanations.png"}
    for file in files:
        pixels = np.asarray(Image.open(tmp_path / "prototypes" / file).convert("L"))
        assert min(pixels.shape) > 200 and pixels.std() > 20, "something is drawn"


def test_one_listed_by_the_user_stands_instead(make, digits, trainer, tmp_path):
    own = PrototypeImages(every=1, path=str(tmp_path / "mine"), examples=2)
    run = trainer(3, callbacks=[own])
    run.fit(make(), datamodule=digits())
    assert [c for c in run.callbacks if isinstance(c, PrototypeImages)] == [own]
    names = sorted(f.name for f in (tmp_path / "mine").iterdir())
    assert names == ["explanations.png", *(f"prototypes-000{i}.png" for i in (1, 2, 3))]
    assert not (tmp_path / "prototypes").exists()


def test_loggers_that_take_pictures_get_them(make, digits, trainer, tmp_path):
    pytest.importorskip("tensorboard")
    from lightning.pytorch.loggers import TensorBoardLogger

    run = trainer(1)
    run.loggers = [TensorBoardLogger(tmp_path)]
    seen = []
    run.loggers[0].experiment.add_image = lambda name, picture, step, dataformats: seen.append((name, picture.shape))
    run.fit(make(), datamodule=digits())
    assert seen and seen[0][0] == "prototypes" and seen[0][1][2] == 3


def test_drawing_changes_nothing_in_training(make, digits, trainer, tmp_path):
    one, two = make(), make()
    trainer(2, callbacks=[PrototypeImages(every=1, path=str(tmp_path / "a"))]).fit(one, datamodule=digits())
    trainer(2).fit(two, datamodule=digits())
    for a, b in zip(one.parameters(), two.parameters()):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("decoder", "have"), [(None, "is not set"), (Words(), "is Words")])
def test_without_a_pixel_decoder_the_role_is_named(make, digits, trainer, decoder, have):
    model = make({"decoder": decoder}, {"reconstruct": 0})
    said = f"PrototypeImages needs a PixelDecoder; model.decoder.decoder {have}. PixelDecoders installed: .*Mlp"
    with pytest.raises(ConfigError, match=said):
        trainer(1, callbacks=[PrototypeImages()]).fit(model, datamodule=digits())


def test_without_a_pixel_decoder_the_layer_brings_no_pictures(make, digits, trainer, tmp_path):
    trainer(1).fit(make({"decoder": Words()}, {"reconstruct": 0}), datamodule=digits())
    assert not (tmp_path / "prototypes").exists()


def test_without_prototypes_the_role_is_named(make, digits, trainer):
    from quire.roles.reconstruction import Reconstruction

    model = make(decoder=MlpVectorDecoder(), objective=Reconstruction())
    with pytest.raises(ConfigError, match="PrototypeImages needs a PrototypeLayer; model.decoder is MlpVectorDecoder"):
        trainer(1, callbacks=[PrototypeImages()]).fit(model, datamodule=digits())


@pytest.mark.parametrize("given", [{"every": 0}, {"examples": 0}])
def test_impossible_arguments_are_refused(given):
    with pytest.raises(ConfigError, match="PrototypeImages needs every >= 1"):
        PrototypeImages(**given)
