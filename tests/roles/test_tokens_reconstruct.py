"""Masked reconstruction: the targets, the decoder over the full grid, and what the loss may see."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor

import quire
from quire.contracts import Batch, Spec, build, plain
from quire.errors import ConfigError
from quire.model import Model
from quire.roles.masking import BlockMask, RandomMask
from quire.roles.tokens import Layout, Segment, Subset
from quire.roles.tokens.frames import FrameEncoder
from quire.roles.tokens.patches import patchify, unpatchify
from quire.roles.tokens.reconstruct import GridDecoder, MaskedReconstruction, PatchPixels, Target, TokenIds
from quire.roles.tokens.text import TextEncoder
from quire.roles.tokens.vit import ViTEncoder

TRUNK: dict[str, Any] = {"width": 16, "depth": 1, "heads": 2}
SPEC = Spec(image_size=[8, 12], channels=3)


class BrightCells(Target):
    """Ids: how bright a cell is, in ten steps."""

    gives_ids: ClassVar[bool] = True

    def size(self, spec: Spec) -> int:
        return 10

    def forward(self, batch: Batch, layout: Layout) -> Tensor:
        return (patchify(batch["image"], layout.only().patch).mean(-1) * 10).long().clamp(max=9)  # type: ignore[arg-type]


def model(objective: MaskedReconstruction | None = None, **encoder: Any) -> Model:
    torch.manual_seed(0)
    made = Model(
        encoder=ViTEncoder(**{"patch": 4, **TRUNK, **encoder}),
        decoder=GridDecoder(**TRUNK),
        objective=objective or MaskedReconstruction(0.5),
        spec=SPEC,
    )
    made.configure_model()
    return made


def image() -> Batch:
    return {"image": torch.rand(4, 3, 8, 12, generator=torch.Generator().manual_seed(1))}


def test_patches_are_row_major_and_come_back() -> None:
    picture = torch.arange(2 * 3 * 4 * 6.0).reshape(2, 3, 4, 6)
    patches = patchify(picture, (2, 3))
    assert patches.shape == (2, 4, 18)
    assert patches[0, 1, :3].tolist() == picture[0, 0, 0, 3:].tolist()
    assert torch.equal(unpatchify(patches, (2, 2), (2, 3)), picture)


def test_normalised_pixels() -> None:
    """multimae section 7: patch 0..11 starts with -1.5254, -1.2481, -0.9707; a constant patch is finite."""
    layout = Layout.of(Segment("image", (1, 2), (2, 2), "image"))
    picture = torch.zeros(1, 3, 2, 4)
    picture[0, :, :, :2] = torch.arange(12.0).reshape(3, 2, 2)
    got = PatchPixels()({"image": picture}, layout)
    torch.testing.assert_close(got[0, 0, :3], torch.tensor([-1.5254, -1.2481, -0.9707]), atol=1e-4, rtol=0)
    assert torch.equal(got[0, 1], torch.zeros(12))
    assert torch.equal(PatchPixels(normalize=False)({"image": picture}, layout)[0, 0], torch.arange(12.0))


def test_frames_are_targets_too() -> None:
    encoder = FrameEncoder(**TRUNK)
    build(encoder, Spec(frames=6, bands=4))
    batch = {"frames": torch.randn(2, 6, 4)}
    got = PatchPixels(normalize=False)(batch, encoder.layout(batch))
    assert torch.equal(got, batch["frames"].reshape(2, 3, 8))


def test_the_decoder_puts_every_token_in_its_place() -> None:
    made, batch = model(), image()
    subset = RandomMask(0.5).draw(made.encoder.layout(batch), 4, None, torch.Generator().manual_seed(0))
    codes = made.encoder(batch, keep=subset)
    rest, whole = made.decoder(codes, subset), made.decoder(codes)
    assert rest.shape == (4, 3, 48) and whole.shape == (4, 6, 48)
    want = whole.gather(1, subset.rest[..., None].expand(-1, -1, 48))
    torch.testing.assert_close(rest, want, atol=1e-5, rtol=0)
    flipped = Subset.of(subset.keep.flip(1), 6)  # the order in which tokens were kept doesn't matter
    again = made.decoder(made.encoder(batch, keep=flipped), flipped)
    torch.testing.assert_close(again, rest, atol=1e-5, rtol=0)


def test_masked_pixels_never_reach_the_encoder_and_visible_ones_never_the_target() -> None:
    made, batch = model(), image()
    patches = patchify(batch["image"], (4, 4))
    noise = torch.rand_like(patches)

    def again(changed: Tensor) -> dict[str, Any]:
        mixed = torch.where(changed[..., None], noise, patches)
        made.generator().manual_seed(made._key)
        return made.objective(made, {"image": unpatchify(mixed, (2, 3), (4, 4))}).outputs

    made.generator().manual_seed(made._key)
    first = made.objective(made, batch).outputs
    blind = again(~first["subset"].kept())
    assert torch.equal(blind["codes"].values, first["codes"].values)
    assert torch.equal(blind["prediction"], first["prediction"])
    seen = again(first["subset"].kept())
    assert torch.equal(seen["target"], first["target"])


def test_the_loss_is_the_mean_over_masked_cells() -> None:
    for loss, power in (("mse", 2), ("l1", 1)):
        made = model(MaskedReconstruction(RandomMask(0.5), PatchPixels(), loss))  # type: ignore[arg-type]
        losses = made.objective(made, image())
        difference = (losses.outputs["prediction"] - losses.outputs["target"]).abs() ** power
        torch.testing.assert_close(losses["reconstruction"], difference.mean())


def test_ids_are_predicted_with_cross_entropy_and_start_near_chance() -> None:
    made = model(MaskedReconstruction(BlockMask(0.5, 2), BrightCells(), "ce"))
    made.decoder.head.weight.data.zero_()
    losses = made.objective(made, image())
    assert losses.outputs["prediction"].shape == (4, 3, 10)
    torch.testing.assert_close(losses["reconstruction"], torch.tensor(10.0).log())  # ln V at a zero head
    assert 0 <= losses.metrics["accuracy"]() <= 1  # type: ignore[operator]


def test_padding_is_out_of_the_loss() -> None:
    torch.manual_seed(0)
    spec = Spec(frames=12, bands=4)
    made = Model(
        encoder=FrameEncoder(**TRUNK), decoder=GridDecoder(**TRUNK), objective=MaskedReconstruction(0.5), spec=spec
    )
    made.configure_model()
    mask = torch.arange(12).expand(3, -1) < torch.tensor([[12], [8], [4]])
    frames = torch.randn(3, 12, 4)
    values = []
    for fill in (0.0, 9.0):
        made.generator().manual_seed(5)
        batch = {"frames": torch.where(mask[..., None], frames, fill), "mask": mask}
        values.append(made.objective(made, batch)["reconstruction"])
    assert torch.equal(values[0], values[1])


def test_a_stub_model_is_enough() -> None:
    encoder, decoder, objective = ViTEncoder(patch=4, **TRUNK), GridDecoder(**TRUNK), MaskedReconstruction()
    build(encoder, SPEC)
    build(decoder, Spec(**SPEC, codes=encoder.sizes()))
    stub = SimpleNamespace(encoder=encoder, decoder=decoder, generator=torch.Generator)
    assert objective(stub, image())["reconstruction"].isfinite()


def test_gradients_reach_every_parameter() -> None:
    made = model(class_token=True, positions="learned")
    made.objective(made, image())["reconstruction"].backward()
    for name, p in made.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), name


def test_training_lowers_the_loss_and_the_checkpoint_reloads_without_the_yaml(tmp_path: Any) -> None:
    from quire.datasets.images import Digits

    torch.manual_seed(0)
    made = Model(
        encoder=ViTEncoder(patch=2, **TRUNK),
        decoder=GridDecoder(**TRUNK),
        objective=MaskedReconstruction(0.5, PatchPixels(normalize=False)),
    )
    made.spec = Spec(Digits(batch_size=64).spec)
    made.configure_model()
    first = made.objective(made, next(iter(Digits(batch_size=64).train_dataloader())))["reconstruction"].detach()
    trainer = Trainer(
        max_steps=40, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, limit_val_batches=0, log_every_n_steps=5,
    )  # fmt: skip
    trainer.fit(made, Digits(batch_size=64))
    assert trainer.callback_metrics["train/reconstruction"] < 0.5 * first
    trainer.save_checkpoint(tmp_path / "m.ckpt")
    again = quire.load(tmp_path / "m.ckpt")
    batch = {"image": torch.rand(2, 1, 8, 8)}
    made.eval(), again.eval()
    assert torch.equal(made.encoder(batch).values, again.encoder(batch).values)
    assert torch.equal(made.decoder(made.encoder(batch)), again.decoder(again.encoder(batch)))


def test_words_are_targets_by_their_ids() -> None:
    torch.manual_seed(0)
    made = Model(
        encoder=TextEncoder(lm_head=False, **TRUNK),
        decoder=GridDecoder(**TRUNK),
        objective=MaskedReconstruction(0.3, TokenIds(), "ce"),
        spec=Spec(vocab_size=20, length=10),
    )
    made.configure_model()
    losses = made.objective(made, {"tokens": torch.randint(20, (4, 10))})
    assert losses.outputs["prediction"].shape == (4, 3, 20)
    with pytest.raises(ConfigError, match="PatchPixels needs numbers; tokens holds ids"):
        PatchPixels()({"tokens": torch.zeros(1, 4, dtype=torch.long)}, made.encoder.built_layout)


def test_predict_returns_tokens_with_their_layout() -> None:
    from quire.datasets.images import Digits

    made = Model(encoder=ViTEncoder(patch=2, **TRUNK))
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, limit_predict_batches=1
    )  # fmt: skip
    (codes,) = trainer.predict(made, Digits(batch_size=8)) or []
    assert codes.values.shape == (8, 16, 16) and codes.layout == made.encoder.built_layout


def test_a_decoder_rebuilds_without_its_objective() -> None:
    made = model(MaskedReconstruction(0.5, BrightCells(), "ce"))
    again = GridDecoder(**plain(made.decoder)["init_args"])
    build(again, Spec(**SPEC, codes=made.encoder.sizes()))
    again.load_state_dict(made.decoder.state_dict())


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: MaskedReconstruction(1.2), r"ratio must be in \[0,1\), got 1.2"),
        (lambda: MaskedReconstruction(0.5, loss="huber"), "loss must be mse, l1 or ce, got 'huber'"),  # type: ignore[arg-type]
        (lambda: MaskedReconstruction(0.5, loss="ce"), "loss=ce doesn't fit the target PatchPixels: use mse or l1"),
        (lambda: MaskedReconstruction(0.5, BrightCells()), "loss=mse doesn't fit the target BrightCells: use ce"),
        (lambda: GridDecoder(positions="none"), "positions must be one of sincos, learned, got 'none'"),
        (lambda: GridDecoder(width=10, heads=3), "width=10, not divisible by heads=3"),
        (lambda: (m := model(MaskedReconstruction(0.01))).objective(m, image()), "nothing of 6 cells is masked"),
        (
            lambda: Model(encoder=ViTEncoder(patch=4, **TRUNK), objective=MaskedReconstruction()),
            "MaskedReconstruction needs a GridDecoder; model.decoder is not set",
        ),
    ],
)
def test_bad_input_is_refused_in_one_sentence(make: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        make()


def test_a_head_of_another_size_than_the_target_is_refused() -> None:
    """cae section 8's sentence."""
    made = Model(
        encoder=ViTEncoder(patch=4, **TRUNK),
        decoder=GridDecoder(**TRUNK, output_size=1024),
        objective=MaskedReconstruction(0.5, BrightCells(), "ce"),
        spec=SPEC,
    )
    with pytest.raises(ConfigError, match="target has 10 codes but the head has 1024"):
        made.configure_model()
