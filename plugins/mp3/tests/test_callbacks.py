"""Positions attached for fine-tuning; shuffled images put back."""

from __future__ import annotations

import lightning.pytorch as pl
import matplotlib.image
import pytest
import torch

import quire
from quire import ConfigError, Model, Pretrained
from quire.datasets.images import Digits
from quire.datasets.speech import SpeechTones
from quire.roles.probes.classify import Classify
from quire.roles.tokens.contract import Segment
from quire.roles.tokens.frames import FrameEncoder
from quire.roles.tokens.vit import ViTEncoder
from quire_mp3.callbacks import AttachPositions, PutBackPictures
from quire_mp3.jigsaw import one_to_one, rearrange
from quire_mp3.objective import PositionPrediction


def vit(**kwargs) -> ViTEncoder:
    return ViTEncoder(**{"patch": 2, "width": 16, "depth": 2, "heads": 2, "positions": "none", **kwargs})


def fitted(tmp_path, model, data=None, steps=1, **kwargs) -> pl.Trainer:
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=steps,
        limit_val_batches=1,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        **kwargs,
    )
    trainer.fit(model, datamodule=data or Digits(train_samples=128))
    return trainer


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mp3")
    trainer = fitted(folder, Model(encoder=vit(), objective=PositionPrediction()))
    trainer.save_checkpoint(folder / "mp3.ckpt")
    return folder / "mp3.ckpt"


# ---- positions for fine-tuning
def test_zero_positions_change_no_output_until_they_have_learned(pretrained, tmp_path):
    plain, encoder = Pretrained(str(pretrained)), Pretrained(str(pretrained), freeze=False)
    batch = {"image": torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))}
    model = Model(encoder=encoder, objective=Classify())
    callback = AttachPositions()
    callback.setup(None, model, "fit")
    assert torch.equal(plain(batch).values, encoder.eval()(batch).values)
    assert encoder.positions == "learned"
    fitted(tmp_path, model, callbacks=[callback], steps=3)  # setup again: acts once
    tables = [p for n, p in encoder.named_parameters() if n.startswith("places")]
    assert [tuple(t.shape) for t in tables] == [(16, 16)]
    assert tables[0].abs().max() > 0


def test_a_normal_start_and_fixed_positions_change_outputs(pretrained):
    batch = {"image": torch.rand(2, 1, 8, 8)}
    plain = Pretrained(str(pretrained))(batch).values
    for callback in (AttachPositions(init="normal"), AttachPositions(kind="sincos")):
        encoder = Pretrained(str(pretrained), freeze=False)
        callback.setup(None, Model(encoder=encoder, objective=Classify()), "fit")
        assert not torch.allclose(plain, encoder.eval()(batch).values, atol=1e-3)


def test_a_fine_tuned_checkpoint_reloads_with_its_positions(pretrained, tmp_path):
    model = Model(encoder=Pretrained(str(pretrained), freeze=False), objective=Classify())
    trainer = fitted(tmp_path, model, callbacks=[AttachPositions()], steps=3)
    trainer.save_checkpoint(tmp_path / "tuned.ckpt")
    batch = {"image": torch.rand(2, 1, 8, 8)}
    again = quire.load(tmp_path / "tuned.ckpt")
    assert again.encoder.positions == "learned"
    assert torch.equal(model.eval().encoder(batch).values, again.encoder(batch).values)


def test_positions_are_refused_where_they_make_no_sense(pretrained):
    with pytest.raises(ConfigError, match="positions that PositionPrediction asks it for"):
        AttachPositions().setup(None, Model(encoder=vit(), objective=PositionPrediction()), "fit")
    with pytest.raises(ConfigError, match="frozen encoder never learns; set freeze: false"):
        AttachPositions().setup(None, Model(encoder=Pretrained(str(pretrained)), objective=Classify()), "fit")
    with pytest.raises(ConfigError, match="ViTEncoder has sincos positions already"):
        AttachPositions().setup(None, Model(encoder=vit(positions="sincos"), objective=Classify()), "fit")
    with pytest.raises(ConfigError, match="std must be at least 0"):
        AttachPositions(std=-1.0)


# ---- pictures
SEGMENT = Segment("image", (2, 3), (2, 2), "image")


def test_rearranging_there_and_back_is_the_identity():
    image = torch.rand(4, 3, 4, 6)
    order = torch.rand(4, 6).argsort(1)
    shuffled = rearrange(image, order, SEGMENT)
    assert not torch.equal(shuffled, image)
    assert torch.equal(rearrange(shuffled, order.argsort(1), SEGMENT), image)


def test_every_cell_is_used_once_and_sure_logits_put_all_back():
    order = torch.rand(5, 6).argsort(1)  # cell i of the shuffled image holds patch order[i]
    sure = torch.nn.functional.one_hot(order, 6).float() * 9
    assert torch.equal(one_to_one(sure), order.argsort(1))
    same = one_to_one(torch.zeros(1, 6, 6))
    assert same.sort(1).values.tolist() == [[0, 1, 2, 3, 4, 5]]
    greedy = torch.tensor([[[2.0, 1.9], [2.0, 0.0]]])  # both want cell 0; together 1.9 + 2.0 is best
    assert one_to_one(greedy).tolist() == [[1, 0]]


def test_fit_on_images_ends_with_the_picture_and_says_where(tmp_path, capsys):
    fitted(tmp_path, Model(encoder=vit(), objective=PositionPrediction(pictures=3)))
    picture = matplotlib.image.imread(tmp_path / "put_back.png")
    assert picture.std() > 0.1
    said = capsys.readouterr().out
    assert str(tmp_path / "put_back.png") in said
    assert "(chance 6.2 %)" in said


def test_pictures_can_be_left_out_and_other_data_draws_none(tmp_path):
    fitted(tmp_path, Model(encoder=vit(), objective=PositionPrediction(pictures=0)))
    ears = FrameEncoder(width=16, depth=1, heads=2, positions="none")
    fitted(tmp_path, Model(encoder=ears, objective=PositionPrediction()), SpeechTones(length=64, batch_size=16))
    assert not list(tmp_path.glob("*.png"))
    with pytest.raises(ConfigError, match="images must be at least 1"):
        PutBackPictures(images=0)


def test_drawing_changes_neither_weights_nor_mode(tmp_path):
    weights = []
    for pictures in (0, 2):
        torch.manual_seed(0)
        model = Model(encoder=vit(), objective=PositionPrediction(pictures=pictures))
        fitted(tmp_path, model, steps=2)
        weights.append(torch.cat([p.flatten() for p in model.parameters()]))
    assert torch.equal(*weights)


def test_a_listed_callback_takes_the_place_of_the_one_that_comes_along(tmp_path):
    model = Model(encoder=vit(), objective=PositionPrediction())
    fitted(tmp_path, model, callbacks=[PutBackPictures(images=1, file="one.png")])
    assert [f.name for f in tmp_path.glob("*.png")] == ["one.png"]
