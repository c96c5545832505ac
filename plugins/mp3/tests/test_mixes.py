"""With other parts: timm's encoders, text, other objectives, a frozen encoder."""

from __future__ import annotations

import pytest
import torch

from quire import ConfigError, Model, Sum
from quire.roles.probes.classify import Classify
from quire.roles.tokens.timm import TimmViT
from quire.roles.tokens.vit import ViTEncoder
from quire_mp3.modules import PositionHead
from quire_mp3.objective import PositionPrediction

DIGITS = {"image_size": [8, 8], "channels": 1, "classes": 10}
SMALL = {"patch_size": 2, "embed_dim": 16, "depth": 2, "num_heads": 2}


def test_timm_without_positions_learns_places_and_has_no_position_parameter():
    encoder = TimmViT("vit_tiny_patch16_224", positions="none", options=SMALL)
    model = Model(encoder=encoder, objective=PositionPrediction(), spec=DIGITS)
    model.configure_model()
    batch = {"image": torch.rand(3, 1, 8, 8)}
    losses = model.objective(model, batch)
    losses["position"].backward()
    assert losses.outputs["position"].logits.shape == (3, 16, 16)  # the class token has no place
    assert not [n for n, _ in model.named_parameters() if "pos_embed" in n]


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("vit_tiny_patch16_224", SMALL, r"encoder TimmViT adds positions \(learned\); set positions: none"),
        (
            "swin_tiny_patch4_window7_224",
            {},
            r"PositionPrediction needs 'context'; TimmViT \(swin_tiny.*window attention",
        ),
        ("resnet18", {}, "PositionPrediction needs 'context'; TimmViT .*convolutional"),
        ("vit_small_r26_s32_224", {}, "mixes neighbouring patches"),
        ("vit_base_patch16_rope_reg1_gap_256", {}, "rotary positions"),
    ],
)
def test_encoders_that_tell_places_are_refused_by_name_and_reason(name, options, said):
    with pytest.raises(ConfigError, match=said):
        Model(encoder=TimmViT(name, options=options), objective=PositionPrediction())


def test_a_sum_trains_one_encoder_with_a_head_for_each():
    encoder = ViTEncoder(patch=2, width=16, depth=1, heads=2, positions="none")
    both = Sum([PositionPrediction(), Classify()], weights=[1.0, 0.5])
    model = Model(encoder=encoder, objective=both, spec=DIGITS)
    model.configure_model()
    batch = {"image": torch.rand(3, 1, 8, 8), "label": torch.tensor([1, 2, 3])}
    losses = model.objective(model, batch)
    assert set(losses) == {"position", "classify"}
    assert {"accuracy", "Classify.accuracy"} <= set(losses.metrics)  # neither hides the other
    sum(losses.values()).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


def test_the_head_probes_a_frozen_encoder_and_only_it_is_trained():
    encoder = ViTEncoder(patch=2, width=16, depth=1, heads=2, positions="sincos")
    encoder.frozen = True
    model = Model(encoder=encoder, decoder=PositionHead(), objective=PositionPrediction(masking=0.0), spec=DIGITS)
    model.configure_model()
    encoder.requires_grad_(False)
    model.objective(model, {"image": torch.rand(3, 1, 8, 8)})["position"].backward()
    assert [n for n, p in model.named_parameters() if p.grad is not None] == [
        "decoder.norm.weight",
        "decoder.norm.bias",
        "decoder.linear.weight",
        "decoder.linear.bias",
    ]
