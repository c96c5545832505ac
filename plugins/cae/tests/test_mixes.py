"""With other parts: other encoders, several segments, a Sum, padding, other objectives' targets."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from quire import ConfigError, Model, Sum
from quire.contracts import Spec
from quire.plugins import load
from quire.recipe import instantiate
from quire.roles.masking import BlockMask, RandomMask
from quire.roles.probes.classify import Classify
from quire.roles.tokens.contract import Layout, Segment
from quire.roles.tokens.frames import FrameEncoder
from quire.roles.tokens.patches import patchify
from quire.roles.tokens.reconstruct import GridDecoder, MaskedReconstruction, PatchPixels
from quire.roles.tokens.timm import TimmViT
from quire.roles.tokens.trunk import TrunkEncoder
from quire.roles.tokens.vit import ViTEncoder
from quire_cae.decoder import MaskedTokenDecoder
from quire_cae.hog import HogTarget
from quire_cae.objective import ContextAutoencoding
from quire_cae.regressor import LatentRegressor

DIGITS = {"image_size": [8, 8], "channels": 1, "classes": 10}
SMALL = {"patch_size": 2, "embed_dim": 16, "depth": 2, "num_heads": 2}
BATCH = {"image": torch.rand(3, 1, 8, 8), "label": torch.tensor([1, 2, 3])}


def objective(**more):
    return ContextAutoencoding(LatentRegressor(1, heads=2), more.pop("masking", 0.5), pictures=0, **more)


def run(encoder, objective, decoder=None, spec=None, batch=None):
    model = Model(encoder=encoder, decoder=decoder, objective=objective, spec=spec or DIGITS)
    model.configure_model()
    losses = model.objective(model, batch or BATCH)
    sum(losses.values()).backward()
    return model, losses


def vit(**more):
    return ViTEncoder(2, 16, 1, 2, **more)


def test_alignment_on_an_encoder_without_class_token_and_on_timm_s():
    for encoder in (vit(), TimmViT("vit_tiny_patch16_224", options=SMALL)):
        model, losses = run(encoder, objective(target=PatchPixels()), MaskedTokenDecoder(1, heads=2))
        assert losses.outputs["latents"].shape == (3, 8, 16)
        assert [n for n, p in model.named_parameters() if p.grad is None] == []


class TwoPictures(TrunkEncoder):
    """A toy encoder with two segments, as MultiMAE's: an image and its depth."""

    def __init__(self):
        super().__init__(16, 1, 2, 4.0, False, "sincos", True, None, 0.0, True, "normal")

    def layout(self, source):
        return Layout.of(*(Segment(name, (4, 4), (2, 2), name) for name in ("image", "depth")))

    def cut(self, batch):
        return torch.cat([patchify(batch[k], (2, 2)) for k in ("image", "depth")], 1)

    def make_stem(self, spec):
        return nn.Linear(4, 16)


def test_latents_of_another_modality_s_masked_tokens_are_regressed():
    batch = {"image": torch.rand(2, 1, 8, 8), "depth": torch.rand(2, 1, 8, 8)}
    model, losses = run(TwoPictures(), objective(reconstruct=False), batch=batch)
    assert losses.outputs["latents"].shape == (2, 16, 16)
    assert model.objective.regressor.places.segments.grad.abs().sum() > 0
    rest = losses.outputs["subset"].rest
    assert bool((rest < 16).any())
    assert bool((rest >= 16).any())


def test_dirichlet_masks_serve_when_they_are_installed():
    if load().registry.get("DirichletMask") is None:
        pytest.skip("multimae is not installed")
    batch = {"image": torch.rand(2, 1, 8, 8), "depth": torch.rand(2, 1, 8, 8)}
    rule = instantiate({"class_path": "DirichletMask"})
    _, losses = run(TwoPictures(), objective(reconstruct=False, masking=rule), batch=batch)
    assert losses["align"] > 0


def test_a_sum_with_classification_trains_one_encoder():
    both = Sum([objective(target=HogTarget()), Classify()])
    _, losses = run(vit(class_token=True), both, MaskedTokenDecoder(1, heads=2))
    assert set(losses) == {"reconstruct", "align", "classify"}
    assert both.weights["align"] == 2.0


def test_a_sum_with_position_prediction_leaves_places_to_the_regressor():
    if load().registry.get("PositionPrediction") is None:
        pytest.skip("mp3 is not installed")
    mp3 = instantiate({"class_path": "PositionPrediction", "init_args": {"pictures": 0}})
    both = Sum([objective(target=PatchPixels()), mp3])
    model, losses = run(vit(positions="none"), both, MaskedTokenDecoder(1, heads=2))
    assert {"reconstruct", "align", "position"} <= set(losses)
    assert model.encoder.places is None


def test_our_targets_serve_the_masked_autoencoder_too():
    run(vit(), MaskedReconstruction(BlockMask(8, 2), HogTarget()), GridDecoder(16, 1, 2))


def test_frames_with_equal_lengths_train_and_ragged_ones_are_refused():
    encoder = FrameEncoder(width=16, depth=1, heads=2)
    spec = Spec({"frames": 20, "bands": 4, "frame_size": 4})
    frames, mask = torch.rand(2, 20, 4), torch.ones(2, 20, dtype=torch.bool)
    made = objective(masking=RandomMask(0.5), reconstruct=False)
    try:
        model = Model(encoder=encoder, objective=made, spec=spec)
        model.configure_model()
    except ConfigError as error:
        pytest.fail(str(error))
    mask[:, 12:] = False
    losses = model.objective(model, {"frames": frames, "mask": mask})
    assert losses.outputs["subset"].rest.max() < 6  # real cells only
    mask[1, 8:] = False
    with pytest.raises(ConfigError, match=r"rows mask \d..\d tokens; ContextAutoencoding needs equal counts"):
        model.objective(model, {"frames": frames, "mask": mask})


def test_an_encoder_that_takes_no_subset_is_refused_by_name():
    with pytest.raises(ConfigError, match="ContextAutoencoding needs 'subset'; TimmViT"):
        Model(encoder=TimmViT("swin_tiny_patch4_window7_224"), objective=objective(reconstruct=False))
