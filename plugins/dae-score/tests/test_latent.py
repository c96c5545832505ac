"""LatentField: codes in the place of the data, the sizes that follow, and the way back."""

import pytest
import torch

from quire.checkpoint import Pretrained, export
from quire.datasets.images import Digits
from quire.errors import ConfigError
from quire.model import Model
from quire.roles.latent.mlp import MlpVectorDecoder, MlpVectorEncoder
from quire.roles.latent.pca import PCAEncoder
from quire.roles.tokens.vit import ViTEncoder
from quire_dae_score.latent import LatentField
from quire_dae_score.modules import ScoreMlp
from quire_dae_score.objective import Denoising
from quire_dae_score.sampler import MetropolisHastings


@pytest.fixture
def kept(tmp_path):
    """The folder of an exported autoencoder of digits with codes of ten."""
    torch.manual_seed(0)
    model = Model(
        encoder=MlpVectorEncoder(widths=[16]),
        decoder=MlpVectorDecoder(widths=[16]),
        spec={"image_size": [8, 8], "channels": 1},
    )
    model.configure_model()
    return str(export(model, tmp_path / "kept"))


def digits(field, **given):
    return Digits(transforms=[field], batch_size=64, train_samples=256, **given)


def test_the_model_sees_vectors_where_images_were(kept):
    data = digits(LatentField(Pretrained(kept)))
    assert data.spec == {"width": 10, "classes": 10}
    assert data.offered() == ("label", "index", "vector")
    batch = next(iter(data.train_dataloader()))
    seen = data.transform(batch, torch.Generator(), training=True)
    assert set(seen) == {"label", "index", "vector"} and seen["vector"].shape == (64, 10)
    assert not seen["vector"].requires_grad


def test_the_encoder_is_frozen_and_not_in_the_models_checkpoint(kept, trainer):
    field = LatentField(Pretrained(kept, freeze=False))
    before = [p.clone() for p in field.encoder.parameters()]
    model = Model(
        encoder=ScoreMlp(widths=[16]),
        objective=Denoising(0.1, "vector"),
        sampler=MetropolisHastings(steps=20, burn_in=5, thin=5, step=0.05, box=[0, 1]),
    )
    run, data = trainer(max_steps=5), digits(field)
    run.fit(model, datamodule=data)
    assert all(torch.equal(a, b) and not b.requires_grad for a, b in zip(before, field.encoder.parameters()))
    assert model.encoder.width == 10 and all("LatentField" not in k for k in model.state_dict())
    found = run.predict(model, datamodule=data)
    assert found[0]["samples"].shape == (64, 3, 10)
    assert found[0]["samples"].min() >= 0 and found[0]["samples"].max() <= 1, "the walk stays in the box"


def test_codes_come_back_through_a_decoder(kept):
    field = LatentField(Pretrained(kept), Pretrained(kept, part="decoder"))
    data = digits(field)
    assert data.spec["width"] == 10
    images = data.dataset("train").tensors["image"][:4]
    codes = field({"image": images})["vector"]
    assert field.decode(codes).shape == (4, 1, 8, 8)
    assert LatentField(Pretrained(kept)).decode(codes) is None


def test_principal_components_come_back_by_their_inverse():
    encoder = PCAEncoder(width=64)
    field = LatentField(encoder)
    data = digits(field)
    assert data.spec["width"] == 64
    images = data.dataset("train").tensors["image"]
    with pytest.raises(ConfigError, match="PCAEncoder was never fitted"):
        field({"image": images})
    encoder.fit([{"image": images}])
    torch.testing.assert_close(field.decode(field({"image": images})["vector"]), images, atol=1e-4, rtol=0)


def test_an_encoder_without_vector_codes_is_refused():
    with pytest.raises(ConfigError, match="^LatentField needs a VectorEncoder; ViTEncoder gives tokens .*Pooled$"):
        LatentField(ViTEncoder(patch=2, width=16, depth=1, heads=2))
