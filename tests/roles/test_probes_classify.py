"""Classify: whose logits, what is mixed, and fine-tuning a pretrained encoder."""

from __future__ import annotations

import math

import lightning.pytorch as pl
import pytest
import torch
from tests.core.toys import Toy
from torch import nn
from torch.nn.functional import cross_entropy

from quire import ConfigError, DataError, Model, Pretrained
from quire.datasets.images import Digits
from quire.roles.latent import Classifier
from quire.roles.latent.mlp import MlpVectorEncoder
from quire.roles.latent.plain import FlatPixels
from quire.roles.probes.classify import Classify, mixed
from quire.roles.probes.subject import Subject
from quire.roles.tokens.vit import ViTEncoder


class Head(Classifier):
    """A linear classifier on vector codes."""

    def build(self, spec):
        self.linear = nn.Linear(spec.code("width", self), spec.need("classes", self))

    def forward(self, codes):
        return self.linear(codes.vector)


class Batchy(MlpVectorEncoder):
    """An MLP with a BatchNorm in front."""

    def build(self, spec):
        super().build(spec)
        self.batch = nn.BatchNorm1d(64)

    def forward(self, batch):
        flat = self.batch(batch["image"].flatten(1)).reshape(batch["image"].shape)
        return super().forward({"image": flat})


def vit(**kwargs):
    return ViTEncoder(patch=4, width=16, depth=3, heads=2, **kwargs)


def built(encoder, objective, decoder=None):
    torch.manual_seed(0)
    model = Model(encoder=encoder, decoder=decoder, objective=objective, spec=dict(Digits().spec))
    model.configure_model()
    return model


def digits(count=20):
    return {k: v[:count] for k, v in Digits().dataset("train").tensors.items()}


def fit(tmp_path, model, **kwargs):
    options = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    made = pl.Trainer(default_root_dir=tmp_path, **{**options, "max_epochs": 1, **kwargs})
    made.fit(model, datamodule=Digits(batch_size=100, train_samples=400))
    return made


def test_an_uninformed_head_costs_ln_of_the_classes():
    # ln 10 = 2.302585
    model = built(FlatPixels(), Classify())
    nn.init.zeros_(model.objective.head.weight), nn.init.zeros_(model.objective.head.bias)
    assert model.objective(model, digits())["classify"].item() == pytest.approx(2.302585, rel=1e-6)


def test_the_term_is_cross_entropy_and_accuracy_is_only_computed_when_asked():
    model = built(FlatPixels(), Classify())
    losses = model.objective(model, digits())
    logits = losses.outputs["logits"]
    assert torch.equal(losses["classify"], cross_entropy(logits, digits()["label"]))
    assert callable(losses.metrics["accuracy"])
    assert losses.metrics["accuracy"]() == (logits.argmax(1) == digits()["label"]).float().mean()


@pytest.mark.parametrize(("pooling", "encoder"), [("mean", vit()), ("class", vit(class_token=True))])
def test_tokens_are_pooled(pooling, encoder):
    model = built(encoder, Classify(pooling=pooling)).eval()
    tokens = model.encoder(digits())
    expected = tokens.values.mean(1) if pooling == "mean" else tokens.prefix[:, 0]
    logits = model.objective(model, digits()).outputs["logits"]
    assert torch.allclose(logits, model.objective.head(expected), atol=1e-6)


def test_a_hidden_layer_makes_the_head_deeper():
    model = built(FlatPixels(), Classify(hidden=7))
    assert [tuple(p.shape) for p in model.objective.parameters()] == [(7, 64), (7,), (10, 7), (10,)]


def test_a_decoder_that_gives_logits_is_taken_and_no_head_is_made():
    model = built(FlatPixels(), Classify(), Head())
    assert not list(model.objective.parameters())
    losses = model.objective(model, digits())
    assert torch.equal(losses.outputs["logits"], model.decoder(model.encoder(digits())))


def test_a_hidden_layer_beside_a_decoder_that_gives_logits_is_refused():
    with pytest.raises(ConfigError, match="Classify.hidden is 5, but model.decoder Head gives the logits: drop one"):
        Model(encoder=FlatPixels(), decoder=Head(), objective=Classify(hidden=5))


def test_smoothing_counts_in_training_only():
    model = built(FlatPixels(), Classify(label_smoothing=0.2))
    logits = model.objective(model.train(), digits()).outputs["logits"]
    label = digits()["label"]
    smooth = model.objective(model, digits())["classify"]
    assert smooth.item() == pytest.approx(cross_entropy(logits, label, label_smoothing=0.2).item(), rel=1e-6)
    assert model.objective(model.eval(), digits())["classify"].item() == pytest.approx(
        cross_entropy(logits, label).item(), rel=1e-6
    )


def test_mixup_mixes_inputs_and_losses_by_one_share_and_is_off_in_validation():
    model = built(FlatPixels(), Classify(mixup=1.0))
    batch = digits()
    model._key = 7
    model.generator("cpu").manual_seed(7)
    losses = model.objective(model.train(), batch)
    model.generator("cpu").manual_seed(7)
    share, other = model.objective._draw(model, 20)
    logits = model.objective.logits(model, mixed(batch, share, other))
    label = batch["label"]
    expected = share * cross_entropy(logits, label) + (1 - share) * cross_entropy(logits, label[other])
    assert 0 < share < 1
    assert losses["classify"].item() == pytest.approx(expected.item(), rel=1e-6)
    plain = model.objective(model.eval(), batch)
    assert torch.equal(plain.outputs["logits"], model.objective.logits(model, batch))


def test_mixing_shares_are_beta_distributed():
    # Beta(a, a): mean 1/2, variance 1 / (4 (2a + 1)) = 1/12 for a = 1
    model = built(FlatPixels(), Classify(mixup=1.0))
    shares = torch.tensor([model.objective._draw(model, 2)[0] for _ in range(2000)])
    assert shares.mean().item() == pytest.approx(0.5, abs=3 * math.sqrt(1 / 12 / 2000))
    assert shares.var().item() == pytest.approx(1 / 12, rel=0.1)


def test_mixing_keeps_integers_and_the_union_of_real_tokens():
    batch = {
        "frames": torch.tensor([[[1.0], [1.0]], [[3.0], [0.0]]]),
        "mask": torch.tensor([[True, True], [True, False]]),
        "label": torch.tensor([0, 1]),
    }
    made = mixed(batch, 0.75, torch.tensor([1, 0]))
    assert made["frames"][0].flatten().tolist() == [1.5, 0.75]
    assert made["mask"].all() and made["label"] is batch["label"]


def test_mixing_words_is_refused():
    with pytest.raises(ConfigError, match="mixup mixes float fields; the batch has only tokens, label: set mixup: 0"):
        mixed({"tokens": torch.ones(2, 3, dtype=torch.long), "label": torch.tensor([0, 1])}, 0.5, torch.tensor([1, 0]))


def test_a_label_that_is_no_class_is_named():
    model = built(FlatPixels(), Classify())
    batch = digits(4)
    batch["label"] = torch.tensor([0, 1, 12, 3])
    with pytest.raises(DataError, match="label of sample 2 is 12; there are 10 classes"):
        model.objective(model, batch)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"pooling": "max"}, "Classify.pooling must be mean or class, got 'max'"),
        ({"hidden": -1}, "Classify.hidden and mixup must be at least 0"),
        ({"mixup": -0.5}, "Classify.hidden and mixup must be at least 0"),
        ({"label_smoothing": 1.0}, r"Classify.label_smoothing must be in \[0, 1\), got 1.0"),
    ],
)
def test_values_out_of_range_are_refused(given, said):
    with pytest.raises(ConfigError, match=said):
        Classify(**given)


def test_class_pooling_without_a_class_token_is_refused_when_built():
    with pytest.raises(ConfigError, match="Classify.pooling is class, but the encoder has no class token"):
        built(vit(), Classify(pooling="class"))


def test_data_without_classes_is_refused():
    model = Model(encoder=FlatPixels(), objective=Classify(), spec={"image_size": [8, 8], "channels": 1})
    with pytest.raises(ConfigError, match="Classify needs 'classes' from the data's spec"):
        model.configure_model()
    assert "label" in Classify.fields and "label" in Toy.fields


# ---- fine-tuning
@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A checkpoint of a ViT, and one of an encoder with BatchNorm."""
    folder = tmp_path_factory.mktemp("pretraining")
    paths = {}
    for name, encoder in (("vit", vit(class_token=True)), ("batchy", Batchy(widths=(16,), code=8))):
        pl.seed_everything(1)
        made = fit(folder / name, Model(encoder=encoder, objective=Classify()))
        paths[name] = made.checkpoint_callback.best_model_path
    return paths


def test_fine_tuning_scales_the_learning_rate_by_depth(tmp_path, trained):
    # layer_decay 0.75, four layers (embedding, three blocks): rates 0.75^4 … 0.75^1, the head's own is 1
    encoder = Pretrained(trained["vit"], freeze=False, layer_decay=0.75)
    model = Model(encoder=encoder, objective=Classify(pooling="class"))
    made = fit(tmp_path, model, max_steps=1, enable_checkpointing=False)
    base = model.optimizer.keywords["lr"]
    groups = made.optimizers[0].param_groups
    rate = {id(p): g["initial_lr"] / base for g in groups for p in g["params"]}
    assert rate[id(encoder.stem.proj.weight)] == pytest.approx(0.75**4)
    assert rate[id(encoder.blocks[0].attn.qkv.weight)] == pytest.approx(0.75**3)
    assert rate[id(encoder.blocks[2].attn.qkv.weight)] == pytest.approx(0.75)
    assert rate[id(model.objective.head.weight)] == 1
    assert {round(g["initial_lr"] / base, 6) for g in groups} == {round(0.75**i, 6) for i in range(5)}


def test_fine_tuning_moves_the_encoder_and_starts_from_the_checkpoint(tmp_path, trained):
    encoder = Pretrained(trained["vit"], freeze=False)
    assert encoder.training and encoder.blocks[0].training  # a loaded model is in eval mode; drop path must be live
    before = encoder.blocks[0].attn.qkv.weight.detach().clone()
    fit(tmp_path, Model(encoder=encoder, objective=Classify()), enable_checkpointing=False)
    assert not torch.equal(before, encoder.blocks[0].attn.qkv.weight)


def test_the_random_row_of_a_pretrained_encoder_has_none_of_its_weights(trained):
    encoder = Pretrained(trained["vit"])
    twin = Subject(encoder, Digits(), torch.device("cpu")).untrained()
    assert not torch.equal(twin.blocks[0].attn.qkv.weight, encoder.blocks[0].attn.qkv.weight)


def test_a_frozen_encoder_stays_bit_equal_with_its_batchnorm_statistics(tmp_path, trained):
    encoder = Pretrained(trained["batchy"])
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    model = Model(encoder=encoder, objective=Classify(hidden=4))
    pl.seed_everything(0)
    made = fit(tmp_path, model, enable_checkpointing=False)
    assert all(torch.equal(v, before[k]) for k, v in model.encoder.state_dict().items())
    assert before["batch.num_batches_tracked"] > 0
    optimised = {id(p) for g in made.optimizers[0].param_groups for p in g["params"]}
    assert optimised == {id(p) for p in model.objective.parameters()}
