"""Parts of other homes round the layer, and the layer in other objectives' company."""

import pytest
import torch

from quire import Sum
from quire.checkpoint import Pretrained, export, load
from quire.roles.latent.conv import ConvVectorDecoder, ConvVectorEncoder
from quire.roles.latent.mlp import MlpVectorDecoder, MlpVectorEncoder
from quire.roles.latent.pca import PCAEncoder
from quire.roles.latent.plain import FlatPixels, Pooled
from quire.roles.reconstruction import Reconstruction
from quire_prototypes.metrics import R1Full
from quire_prototypes.modules import PrototypeLayer
from quire_prototypes.objective import CaseBasedReasoning
from quire_prototypes.sampler import ExplainByPrototypes


def vit():
    tokens = pytest.importorskip("quire.roles.tokens.vit")
    return tokens.ViTEncoder(patch=2, width=16, depth=1, heads=2)


def learns(model, data, trainer, epochs=6):
    """The loss of a fixed batch falls."""
    batch = data.dataset("train").__getitems__(list(range(64)))
    model.configure_model() if not isinstance(model.encoder, PCAEncoder) else None
    before = None
    if not isinstance(model.encoder, PCAEncoder):
        with torch.no_grad():
            before = loss_of(model, batch)
    trainer(epochs).fit(model, datamodule=data)
    with torch.no_grad():
        after = loss_of(model, batch)
    assert after == after and (before is None or after < before)


def loss_of(model, batch):
    losses = model.objective(model, batch)
    return float(sum(model.objective.weights.get(k, 1.0) * v for k, v in losses.items()))


@pytest.mark.parametrize("encoder", ["pooled", "pixels", "conv", "mlp", "pca"])
def test_any_vector_encoder_with_any_pixel_decoder(make, digits, trainer, encoder):
    encoders = {
        "pooled": lambda: Pooled(vit()),
        "pixels": FlatPixels,
        "conv": lambda: ConvVectorEncoder(channels=[8, 4], init_std=None),
        "mlp": lambda: MlpVectorEncoder(widths=[16], code=6, code_activation="relu"),
        "pca": lambda: PCAEncoder(width=8),
    }
    for decoder in (MlpVectorDecoder(widths=[16]), ConvVectorDecoder(channels=[8, 2], init_std=None)):
        model = make({"decoder": decoder}, encoder=encoders[encoder](), metrics=[R1Full()])
        learns(model, digits(), trainer, 3)


def test_frozen_pooled_features_of_a_pretrained_encoder(make, digits, trainer, tmp_path):
    first = make(encoder=Pooled(vit()))
    export(first, tmp_path / "first")
    frozen = Pretrained(str(tmp_path / "first"), part="encoder")
    model = make(encoder=frozen)
    before = [p.clone() for p in frozen.parameters()]
    learns(model, digits(), trainer)
    assert all(torch.equal(a, b) for a, b in zip(before, model.encoder.parameters()))


def test_two_objectives_share_the_encoder(make, digits, trainer):
    probes = pytest.importorskip("quire.roles.probes.classify")
    model = make(objective=Sum([CaseBasedReasoning(), probes.Classify()], weights=[1.0, 0.5]))
    learns(model, digits(), trainer)


def test_an_objective_that_asks_for_pixels_gets_the_inner_decoder(make, digits, trainer):
    model = make(objective=Sum([CaseBasedReasoning(), Reconstruction()]))
    learns(model, digits(), trainer)


def test_a_checkpoint_reloads_without_yaml_and_answers_the_same(make, digits, trainer, tmp_path, batch):
    model = make({"init": "kmeans"}, sampler=ExplainByPrototypes(), metrics=[R1Full()])
    run = trainer(1)
    run.fit(model, datamodule=digits())
    run.save_checkpoint(tmp_path / "a.ckpt")
    again = load(tmp_path / "a.ckpt")
    assert bool(again.decoder.started), "a trained layer isn't started again"
    model.eval()
    ours, theirs = (m.decoder.explain(m.encoder(batch)) for m in (model, again))
    assert torch.equal(ours.logits, theirs.logits) and torch.equal(ours.prototype, theirs.prototype)
    kept = load(export(again, tmp_path / "exported"))
    assert torch.equal(kept.decoder(kept.encoder(batch)), theirs.logits)


def test_a_trained_layer_goes_on_with_another_data_run(make, digits, trainer, tmp_path):
    model = make({"init": "examples"})
    run = trainer(1)
    run.fit(model, datamodule=digits())
    export(model, tmp_path / "a")
    layer = Pretrained(str(tmp_path / "a"), part="decoder", freeze=False)
    kept = layer.prototypes.clone()
    other = make(encoder=Pretrained(str(tmp_path / "a")), decoder=layer)
    trainer(1, limit_train_batches=0).fit(other, datamodule=digits())
    assert isinstance(other.decoder, PrototypeLayer) and torch.equal(other.decoder.prototypes, kept)
