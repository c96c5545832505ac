"""The four terms, who gets whose gradient, and what is refused."""

import warnings

import pytest
import torch
from torch.nn.functional import cross_entropy

from quire.contracts import Batch
from quire.errors import ConfigError, DataError
from quire.roles.latent.mlp import MlpVectorDecoder
from quire_prototypes.distances import r1, r2
from quire_prototypes.modules import codes_of
from quire_prototypes.objective import CaseBasedReasoning


def total(model, batch):
    losses = model.objective(model, batch)
    return sum(model.objective.weights[k] * v for k, v in losses.items())


def test_terms_are_raw_and_the_weights_are_those_of_the_official_code(make, batch: Batch):
    model = make()
    losses = model.objective(model, batch)
    codes = codes_of(model, batch)
    distances = model.decoder.distances(codes)
    assert set(losses) == {"classify", "reconstruct", "r1", "r2"}
    torch.testing.assert_close(losses["classify"], cross_entropy(model.decoder(codes), batch["label"]))
    torch.testing.assert_close(losses["r1"], r1(distances))
    torch.testing.assert_close(losses["r2"], r2(distances))
    error = (model.decoder.decoder(codes) - batch["image"]).square().sum() / 8
    torch.testing.assert_close(losses["reconstruct"], error)
    assert dict(model.objective.weights) == {"classify": 20, "reconstruct": 1, "r1": 1, "r2": 1}
    assert 0 <= losses.metrics["accuracy"]() <= 1


def test_without_r1_and_r2_prototypes_follow_the_cross_entropy_alone(make, batch: Batch):
    """Oracle 5."""
    model = make(objective={"r1": 0, "r2": 0})
    total(model, batch).backward()
    ours = model.decoder.prototypes.grad.clone()
    model.zero_grad()
    (20 * cross_entropy(model.decoder(codes_of(model, batch)), batch["label"])).backward()
    torch.testing.assert_close(ours, model.decoder.prototypes.grad, atol=0, rtol=0)


def test_with_r1_prototypes_are_pulled_to_examples(make, batch: Batch):
    model = make(objective={"classify": 0, "reconstruct": 0, "r2": 0})
    total(model, batch).backward()
    distances = model.decoder.distances(codes_of(model, batch))
    nearest = codes_of(model, batch).vector[distances.argmin(0)]
    pull = -model.decoder.prototypes.grad * (nearest - model.decoder.prototypes)
    assert (pull.sum(1) > 0).all()


def test_the_target_is_the_batch_as_it_came_deformed_or_not(make, batch: Batch):
    model = make()
    other = {**batch, "image": batch["image"].flip(-1)}
    drawn = model.decoder.reconstruct(codes_of(model, other))
    expected = (drawn - other["image"]).square().sum() / 8
    torch.testing.assert_close(model.objective(model, other)["reconstruct"], expected)


def test_frozen_features_train_prototypes_by_r1_and_r2_alone(make, batch: Batch):
    model = make({"decoder": None}, {"classify": 0, "reconstruct": 0})
    model.encoder.requires_grad_(False)
    losses = model.objective(model, batch)
    assert set(losses) == {"classify", "r1", "r2"}
    total(model, batch).backward()
    assert model.decoder.prototypes.grad.abs().sum() > 0
    assert model.decoder.class_weights.grad is None


# ---- bad input
@pytest.mark.parametrize("given", [{"r1": -1}, {"classify": 0, "reconstruct": 0, "r1": 0, "r2": 0}])
def test_impossible_weights_are_refused(given):
    with pytest.raises(ConfigError, match="needs weights >= 0, not all of them 0, got classify="):
        CaseBasedReasoning(**given)


def test_reconstruction_without_a_decoder_is_refused_before_anything_is_built(make):
    with pytest.raises(ConfigError, match="PrototypeLayer.decoder, which is not set"):
        make({"decoder": None}, build=False)


def test_another_decoder_is_refused_by_role(make):
    with pytest.raises(
        ConfigError, match="^CaseBasedReasoning needs a PrototypeLayer; model.decoder is MlpVectorDecoder"
    ):
        make(decoder=MlpVectorDecoder(), build=False)


def test_tokens_are_refused_with_the_remedy(make):
    vit = pytest.importorskip("quire.roles.tokens.vit")
    encoder = vit.ViTEncoder(patch=2, width=16, depth=1, heads=2)
    with pytest.raises(ConfigError, match=r"PrototypeLayer needs a VectorEncoder; ViTEncoder gives tokens \[B,T,D\]"):
        make(encoder=encoder, build=False)


def test_a_layer_without_an_encoder_is_refused(make):
    with pytest.raises(ConfigError, match="needs a VectorEncoder; model.encoder is not set"):
        make(encoder=None, build=False)


@pytest.mark.parametrize("label", [10, 137, -1])
def test_a_label_outside_the_classes_names_both(make, batch: Batch, label):
    model = make()
    batch["label"][3] = label
    with pytest.raises(DataError, match=f"^label {label} is outside the 10 classes 0..9$"):
        model.objective(model, batch)


def test_non_finite_codes_name_the_first_bad_sample(make, batch: Batch):
    model = make()
    batch["image"][5] = float("nan")
    with pytest.raises(DataError, match=r"not finite, first for sample 5 \(index 5\)"):
        model.objective(model, batch)


def test_a_batch_smaller_than_the_prototypes_warns_once(make, batch: Batch):
    model = make()
    with pytest.warns(UserWarning, match="a batch of 8 is smaller than the 15 prototypes: R1 sees few candidates"):
        model.objective(model, batch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.objective(model, batch)


def test_images_outside_the_range_are_refused_with_the_range(make, digits, trainer):
    data = digits()
    data.dataset("train").tensors["image"].mul_(3)
    with pytest.raises(DataError, match=r"image is in 0\.\.\d"):
        trainer(1).fit(make(build=False), datamodule=data)
