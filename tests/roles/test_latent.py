"""Vector codes: shapes, mirrors, the fit of the principal components, pooling, and every refusal."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import nn

import quire
from quire import DataModule, Fields, Losses, Model, Objective
from quire.contracts import Spec, build
from quire.datasets.images import Digits
from quire.errors import ConfigError, DataError
from quire.roles.latent import PixelDecoder, VectorCodes, VectorEncoder
from quire.roles.latent.conv import ConvVectorDecoder, ConvVectorEncoder
from quire.roles.latent.mlp import MlpVectorDecoder, MlpVectorEncoder
from quire.roles.latent.pca import PCAEncoder
from quire.roles.latent.plain import FlatPixels, Pooled
from quire.roles.reconstruction import Reconstruction
from quire.roles.sparse.encoder import SparseEncoder
from quire.roles.sparse.selectors import TopK
from quire.roles.tokens.contract import Layout, Segment, TokenEncoder, Tokens
from quire.roles.tokens.vit import ViTEncoder
from quire.testing.assembly import make, parse


def images(size: tuple[int, int] = (28, 28), channels: int = 1, count: int = 3) -> torch.Tensor:
    return torch.rand(count, channels, *size, generator=torch.Generator().manual_seed(0))


def spec(size: tuple[int, int] = (28, 28), channels: int = 1, **more: Any) -> Spec:
    return Spec(image_size=list(size), channels=channels, **more)


def made(part: Any, given: Spec | None = None) -> Any:
    torch.manual_seed(0)
    build(part, given or spec())
    return part


class Patches(TokenEncoder):
    """Tokens that are the rows of the image, with a padding mask and an optional class token."""

    fields = ("image",)

    def __init__(self, class_token: bool = False) -> None:
        super().__init__()
        self.prefix_tokens = int(class_token)

    def build(self, spec: Spec) -> None:
        self.height, self.width = spec.need("image_size", self)
        self.scale = nn.Parameter(torch.ones(self.width))

    def layout(self, source: Any) -> Layout:
        return Layout.of(Segment("image", (self.height,), (1,), "image"))

    def forward(self, batch: Any, *_: Any, **__: Any) -> Tokens:
        values = batch["image"][:, 0] * self.scale
        prefix = values.sum(1, keepdim=True)[:, : self.prefix_tokens]
        index = torch.arange(values.shape[1]).expand(values.shape[:2])
        return Tokens(values, index, self.layout(batch), batch.get("mask"), prefix)


class Head(Objective):
    """A linear head on vectors, so that encoders have something to train."""

    encoder: VectorEncoder
    fields = ("label",)

    def build(self, spec: Spec) -> None:
        self.head = nn.Linear(spec.code("width", self), spec.need("classes", self))

    def forward(self, model: Any, batch: Any) -> Losses:
        logits = self.head(model.encoder(batch).vector)
        return Losses({"classify": nn.functional.cross_entropy(logits, batch["label"])})


class Points(DataModule):
    """Vectors in a plane of five dimensions."""

    fields = ("vector", "label", "index")

    def split(self, name: str) -> Fields:
        plane = torch.randn(2, 5, generator=torch.Generator().manual_seed(1))
        x = torch.randn(64, 2, generator=torch.Generator().manual_seed(2)) @ plane + 3
        return Fields(vector=x, label=(x[:, 0] > 3).long())

    def sizes(self) -> dict[str, Any]:
        return {"width": 5, "classes": 2}


def fitted(model: Model, data: DataModule, folder: Path, resume: Path | None = None, **options: Any) -> pl.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    run = pl.Trainer(default_root_dir=folder, **{"max_steps": 2, "enable_checkpointing": False, **quiet, **options})
    run.fit(model, datamodule=data, ckpt_path=resume)
    return run


# ---- the convolutional pair
def test_sides_are_28_14_7_4_2_and_back_to_28() -> None:
    encoder = made(ConvVectorEncoder())
    assert encoder.sides == [(14, 14), (7, 7), (4, 4), (2, 2)] and encoder.width == 40  # prototypes section 3: q=40
    decoder = made(ConvVectorDecoder(), spec(codes={"width": 40}))
    assert isinstance(decoder.enter, nn.Identity)
    code = encoder({"image": images()})
    assert code.vector.shape == (3, 40) and bool((code.vector >= 0).all())
    assert decoder(code).shape == (3, 1, 28, 28)


@pytest.mark.parametrize("size", [(8, 8), (7, 12), (29, 31), (1, 5)])
def test_the_mirror_restores_any_size(size: tuple[int, int]) -> None:
    encoder = made(ConvVectorEncoder((4, 2)), spec(size, 3))
    decoder = made(ConvVectorDecoder((4, 2)), spec(size, 3, codes=encoder.sizes()))
    assert decoder(encoder({"image": images(size, 3)})).shape == (3, 3, *size)


@pytest.mark.parametrize("side", [5, 6, 7, 28])
def test_transposed_convolution_is_the_adjoint_of_the_same_padded_one(side: int) -> None:
    encoder = made(ConvVectorEncoder((2,), "none", None), spec((side, side)))
    decoder = made(ConvVectorDecoder((2,), "none", None), spec((side, side), codes=encoder.sizes()))
    decoder.convolutions[0].weight.data = encoder.convolutions[0].weight.data
    for layer in (encoder.convolutions[0], decoder.convolutions[0]):
        layer.bias.data.zero_()
    x = images((side, side)).double()
    encoder.double(), decoder.double()
    y = torch.randn(3, encoder.width, generator=torch.Generator().manual_seed(1)).double()
    assert torch.allclose((encoder({"image": x}).vector * y).sum(), (x * decoder(VectorCodes(y))).sum())


def test_same_padding_puts_the_odd_zero_after() -> None:
    encoder = made(ConvVectorEncoder((1,), "none", None), spec((4, 4)))
    nn.init.zeros_(encoder.convolutions[0].bias)
    nn.init.zeros_(encoder.convolutions[0].weight)
    encoder.convolutions[0].weight.data[0, 0, 0, 0] = 1  # the tap before the centre sees pixel 0, not padding
    image = torch.arange(16.0).reshape(1, 1, 4, 4) / 16
    assert encoder({"image": image}).vector.tolist() == [[0, 2 / 16, 8 / 16, 10 / 16]]


def test_convolutions_start_as_asked() -> None:
    small = made(ConvVectorEncoder((64, 64)))
    weight = small.convolutions[1].weight.detach()
    assert float(weight.std()) == pytest.approx(0.01, rel=0.02) and abs(float(weight.mean())) < 3e-4
    assert all(not bool(c.bias.any()) for c in small.convolutions)
    assert float(made(ConvVectorEncoder((64, 64), init_std=None)).convolutions[1].weight.detach().std()) > 0.02


def test_any_vector_code_enters_the_convolutional_decoder() -> None:
    decoder = made(ConvVectorDecoder(), spec(codes={"width": 13}))
    assert decoder(VectorCodes(torch.rand(2, 13))).shape == (2, 1, 28, 28)


# ---- the multilayer pair
def test_multilayer_pair_mirrors_64_128_10_128_64() -> None:
    encoder, sizes = made(MlpVectorEncoder(), spec((8, 8))), spec((8, 8), codes={"width": 10})
    decoder = made(MlpVectorDecoder(), sizes)
    widths = [[layer.in_features for layer in part.net if isinstance(layer, nn.Linear)] for part in (encoder, decoder)]
    assert widths == [[64, 128], [10, 128]]  # prototypes section 5
    code = encoder({"image": images((8, 8))})
    assert code.vector.shape == (3, 10) and bool(((code.vector > 0) & (code.vector < 1)).all())
    image = decoder(code)
    assert image.shape == (3, 1, 8, 8) and bool(((image > 0) & (image < 1)).all())


def test_multilayer_pair_reads_and_writes_vectors() -> None:
    encoder = made(MlpVectorEncoder((7,), 3, "none"), Spec(width=5))
    decoder = made(MlpVectorDecoder((7,)), Spec(width=5, codes=encoder.sizes()))
    out = decoder(encoder({"vector": torch.randn(4, 5)}))
    assert out.shape == (4, 5) and isinstance(decoder.activation, nn.Identity)


@pytest.mark.parametrize(
    ("part", "error"),
    [
        (lambda: MlpVectorEncoder(code=0), "MlpVectorEncoder.widths and code must be positive, got 0"),
        (lambda: MlpVectorEncoder(code_activation="tanh"), "code_activation must be relu, sigmoid, none, got 'tanh'"),
        (lambda: MlpVectorDecoder(output="tanh"), "MlpVectorDecoder.output must be"),
        (lambda: ConvVectorEncoder(()), "ConvVectorEncoder.channels must be positive"),
        (lambda: PCAEncoder(0), "PCAEncoder.width must be positive"),
        (lambda: Pooled(Patches(), "max"), "Pooled.pooling must be mean or class, got 'max'"),
        (lambda: Reconstruction("l3"), "Reconstruction.rec must be"),
    ],
)
def test_impossible_arguments_are_refused(part: Any, error: str) -> None:
    with pytest.raises(ConfigError, match=error):
        part()


# ---- raw pixels and pooling
def test_flat_pixels_are_the_pixels_and_have_no_parameters() -> None:
    encoder, x = made(FlatPixels(), spec((4, 3), 2)), images((4, 3), 2)
    assert torch.equal(encoder({"image": x}).vector, x.flatten(1))
    assert encoder.width == 24 and not list(encoder.parameters())


def test_mean_pooling_leaves_padding_and_prefix_out() -> None:
    encoder, x = made(Pooled(Patches(class_token=True)), spec((4, 6))), images((4, 6))
    mask = torch.tensor([[True, True, False, False]] * 3)
    assert torch.allclose(encoder({"image": x, "mask": mask}).vector, x[:, 0, :2].mean(1))
    assert torch.allclose(encoder({"image": x}).vector, x[:, 0].mean(1))
    assert encoder.sizes()["width"] == 6


def test_class_pooling_takes_the_class_token_or_names_the_encoder() -> None:
    encoder, x = made(Pooled(Patches(class_token=True), "class"), spec((4, 6))), images((4, 6))
    assert torch.allclose(encoder({"image": x}).vector, x[:, 0].sum(1))
    with pytest.raises(ConfigError, match="Patches has no class token"):
        made(Pooled(Patches(), "class"), spec((4, 6)))


def test_sparse_codes_are_pooled_as_dense_rows() -> None:
    encoder = made(Pooled(SparseEncoder(12, TopK(2), init="zeros")), Spec(width=6))
    x, mask = torch.randn(2, 3, 6), torch.tensor([[True, True, False], [True] * 3])
    dense = encoder.encoder({"activation": x}).dense()
    assert torch.allclose(encoder({"activation": x, "mask": mask}).vector[0], dense[0, :2].mean(0))
    assert torch.allclose(encoder({"activation": x}).vector, dense.mean(1))
    assert torch.allclose(encoder({"activation": x[0]}).vector, dense[0])
    assert encoder.sizes()["width"] == 12


def test_pixels_are_not_pooled_and_the_encoder_is_named() -> None:
    with pytest.raises(ConfigError, match="Pooled needs an encoder of tokens or sparse codes; FlatPixels gives none"):
        Pooled(FlatPixels())


def test_a_pretrained_encoder_may_stand_in_pooled_by_yaml(tmp_path: Path) -> None:
    model = Model(encoder=ViTEncoder(2, 16, 1, 2), spec=spec((8, 8)))
    model.configure_model()
    path = str(quire.export(model, tmp_path / "vit"))
    inner = {"class_path": "Pretrained", "init_args": {"path": path}}
    run = {"encoder": {"class_path": "Pooled", "init_args": {"encoder": inner}}, "objective": "Classify"}
    loaded = make(parse({"model": run, "data": "Digits"})).model.encoder
    assert isinstance(loaded.encoder, ViTEncoder) and loaded.encoder.frozen


def test_the_token_encoder_inside_stays_reachable() -> None:
    inner = Patches()
    outer = Pooled(inner)
    assert outer.role(TokenEncoder) is inner and outer.role(VectorEncoder) is outer and outer.role(PixelDecoder) is None


def test_tokens_where_vectors_are_asked_say_how_to_pool_them() -> None:
    said = r"MlpVectorDecoder needs a VectorEncoder; Patches gives tokens \[B,T,D\], wrap it in Pooled"
    with pytest.raises(ConfigError, match=said):
        Model(encoder=Patches(), decoder=MlpVectorDecoder(), objective=Reconstruction())
    decoder, tokens = made(MlpVectorDecoder(), spec((4, 6), codes={"width": 6})), made(Patches(), spec((4, 6)))
    with pytest.raises(ConfigError, match=r"the encoder gives tokens \[B,T,D\], wrap it in Pooled"):
        decoder(tokens({"image": images((4, 6))}))


@pytest.mark.parametrize("encoder", [FlatPixels, MlpVectorEncoder, ConvVectorEncoder, lambda: PCAEncoder(2)])
def test_images_of_bytes_or_another_size_are_refused(encoder: Any) -> None:
    part = made(encoder(), spec((8, 8)))
    if isinstance(part, PCAEncoder):
        part.fit([{"image": images((8, 8))}])
    with pytest.raises(DataError, match=r"image is uint8; convert to float in \[0,1\]"):
        part({"image": torch.zeros(2, 1, 8, 8, dtype=torch.uint8)})
    with pytest.raises(ConfigError, match=r"image is 1x9x8, but \w+ was built for 1x8x8"):
        part({"image": images((9, 8))})


# ---- principal components
def test_components_agree_with_scikit_learn_up_to_sign() -> None:
    from sklearn.decomposition import PCA

    x = images((4, 5), count=50)
    encoder = made(PCAEncoder(6), spec((4, 5)))
    encoder.fit([{"image": x[:20]}, {"image": x[20:]}])
    expected = PCA(6).fit_transform(x.flatten(1).double().numpy())
    found = encoder({"image": x}).vector.numpy()
    assert np.allclose(np.abs(found), np.abs(expected), atol=1e-5)
    peak = encoder.components.gather(1, encoder.components.abs().argmax(1, keepdim=True))
    assert bool((peak > 0).all())


def test_unfitted_components_are_refused() -> None:
    with pytest.raises(ConfigError, match="PCAEncoder was never fitted: run fit or load a checkpoint"):
        made(PCAEncoder(2), spec((4, 5)))({"image": images((4, 5))})


def test_too_many_components_name_both_numbers() -> None:
    with pytest.raises(ConfigError, match="width is 21, but the data has 20 numbers a sample"):
        made(PCAEncoder(21), spec((4, 5)))
    encoder = made(PCAEncoder(9), spec((4, 5)))
    with pytest.raises(ConfigError, match="width is 9, but there are 8 training samples"):
        encoder.fit([{"image": images((4, 5), count=8)}])


def test_fit_happens_once_on_the_training_split_and_is_kept(tmp_path: Path) -> None:
    model = Model(encoder=PCAEncoder(3), objective=Head())
    run = fitted(model, Digits(), tmp_path)
    pixels = Digits().dataset("train").tensors["image"].flatten(1)
    assert torch.allclose(model.encoder.mean, pixels.mean(0), atol=1e-6)
    assert not list(model.encoder.parameters())
    run.save_checkpoint(tmp_path / "x.ckpt")
    loaded, batch = quire.load(tmp_path / "x.ckpt"), {"image": images((8, 8))}
    assert torch.equal(loaded.encoder(batch).vector, model.encoder(batch).vector)
    again = Model(encoder=PCAEncoder(3), objective=Head())
    changed = Digits(split="stratified")
    fitted(again, changed, tmp_path, tmp_path / "x.ckpt", max_steps=3)
    assert torch.equal(again.encoder.mean, model.encoder.mean)  # a resumed run keeps the first fit


def test_fitting_leaves_the_random_stream_alone() -> None:
    from quire.roles.latent.pca import _training

    torch.manual_seed(3)
    list(_training(Points()))
    after = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(after, torch.rand(1))


def test_two_components_hold_a_plane(tmp_path: Path) -> None:
    model = Model(encoder=PCAEncoder(2), objective=Head())
    data = Points()
    fitted(model, data, tmp_path)
    x = data.dataset("train").tensors["vector"]
    back = model.encoder({"vector": x}).vector @ model.encoder.components + model.encoder.mean
    assert torch.allclose(back, x, atol=1e-4)


# ---- training
@pytest.mark.parametrize(
    ("encoder", "decoder"),
    [
        (lambda: MlpVectorEncoder(), lambda: MlpVectorDecoder()),
        (lambda: ConvVectorEncoder((8, 4), init_std=None), lambda: ConvVectorDecoder((8, 4), init_std=None)),
        (lambda: FlatPixels(), lambda: MlpVectorDecoder((16,))),
        (lambda: Pooled(Patches()), lambda: ConvVectorDecoder((8, 4))),
    ],
)
def test_pairs_train_reload_and_reach_every_parameter(tmp_path: Path, encoder: Any, decoder: Any) -> None:
    model = Model(encoder=encoder(), decoder=decoder(), objective=Reconstruction())
    data = Digits()
    run = fitted(model, data, tmp_path, max_steps=2)
    batch = next(iter(data.loader("train")))
    model.zero_grad()
    model.objective(model, batch)["reconstruct"].backward()
    assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in model.parameters())
    run.save_checkpoint(tmp_path / "x.ckpt")
    loaded = quire.load(tmp_path / "x.ckpt")
    expected = model.eval().decoder(model.encoder(batch))
    assert torch.equal(loaded.decoder(loaded.encoder(batch)), expected)


def test_an_autoencoder_learns(tmp_path: Path) -> None:
    pl.seed_everything(0, verbose=False)
    adam = functools.partial(torch.optim.Adam, lr=5e-3)
    parts = {
        "encoder": MlpVectorEncoder(code_activation="none"),
        "decoder": MlpVectorDecoder(),
        "objective": Reconstruction(),
    }
    model, data = Model(**parts, optimizer=adam), Digits()
    fitted(model, data, tmp_path, max_steps=300)
    test = data.dataset("test").tensors
    mean = data.dataset("train").tensors["image"].mean(0)
    error = model.objective(model.eval(), test)["reconstruct"]
    assert error.item() < 0.5 * float((test["image"] - mean).square().mean())  # better than the mean image


@pytest.mark.parametrize(("rec", "value"), [("mse", 1.0), ("l1", 1.0), ("charbonnier", 1.0000005)])
def test_zeros_against_ones(rec: Any, value: float) -> None:
    model = Model(encoder=FlatPixels(), decoder=MlpVectorDecoder((), output="none"), objective=Reconstruction(rec))
    model.spec = spec((3, 3))
    model.configure_model()
    for p in model.decoder.parameters():
        nn.init.zeros_(p)
    loss = model.objective(model, {"image": torch.ones(2, 1, 3, 3)})["reconstruct"]
    assert loss.item() == pytest.approx(value, abs=1e-6)
