"""timm's models, unchanged, under the tokens contract."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from quire.contracts import Spec, build, plain
from quire.errors import ConfigError
from quire.roles.tokens.timm import TimmViT

SPEC = Spec(image_size=[32, 48], channels=3)
SMALL = {"depth": 2, "embed_dim": 48, "num_heads": 2}


def made(name: str, positions: str = "keep", spec: Spec = SPEC, **options: Any) -> TimmViT:
    torch.manual_seed(0)
    encoder = TimmViT(name, positions=positions, options={**SMALL, **options})
    build(encoder, spec)
    return encoder.eval()


@pytest.mark.parametrize(
    ("name", "options", "prefix"),
    [
        ("vit_tiny_patch16_224", {}, 1),
        ("vit_tiny_patch16_224", {"qk_norm": True, "init_values": 0.3}, 1),
        ("deit_tiny_distilled_patch16_224", {}, 2),
        ("deit3_small_patch16_224", {}, 1),
        ("vit_small_patch14_reg4_dinov2", {"patch_size": 16}, 5),
        ("vit_xsmall_patch16_clip_224", {}, 1),
        ("vit_base_patch16_siglip_224", {}, 0),
        ("vit_small_patch16_dinov3", {}, 5),
        ("eva02_tiny_patch14_224", {"patch_size": 16}, 1),
        ("vit_small_patch16_rope_mixed_224", {}, 1),
    ],
)
@torch.no_grad()
def test_all_tokens_equal_timm_forward_features(name: str, options: dict[str, Any], prefix: int) -> None:
    """Section 3: within 1e-5, patch tokens and prefix."""
    encoder = made(name, **options)
    batch = {"image": torch.rand(2, 3, 32, 48)}
    want = encoder.vit.forward_features(encoder.normalise(batch["image"]))
    everything = torch.arange(6).expand(2, -1)
    for codes in (encoder(batch), encoder(batch, keep=everything)):
        torch.testing.assert_close(codes.joined(), want, atol=1e-5, rtol=0)
        assert codes.prefix.shape[1] == prefix
    if "context" in encoder.capabilities:
        torch.testing.assert_close(encoder(batch, context=everything).joined(), want, atol=1e-5, rtol=0)


class Chosen(torch.nn.Module):
    """Stands where timm drops patches, and keeps those it is told: its own way to run on a subset."""

    def __init__(self, keep: torch.Tensor, prefix: int, told: bool) -> None:
        super().__init__()
        self.keep, self.prefix, self.told = keep, prefix, told

    def forward(self, x: torch.Tensor) -> Any:
        kept = x[:, self.prefix :].gather(1, self.keep[..., None].expand(-1, -1, x.shape[-1]))
        kept = torch.cat([x[:, : self.prefix], kept], 1)
        return (kept, self.keep) if self.told else kept


@pytest.mark.parametrize(
    ("name", "options", "prefix"),
    [
        ("vit_tiny_patch16_224", {}, 1),
        ("vit_small_patch14_reg4_dinov2", {"patch_size": 16}, 5),
        ("vit_small_patch16_dinov3", {}, 5),
        ("eva02_tiny_patch14_224", {"patch_size": 16}, 1),
        ("vit_small_patch16_rope_224", {}, 1),
        ("vit_small_patch16_rope_mixed_224", {}, 1),
    ],
)
@torch.no_grad()
def test_kept_tokens_equal_timm_s_own_on_a_subset(name: str, options: dict[str, Any], prefix: int) -> None:
    """The prefix stays, and each kept token is turned by the angle of its own place, in an order that isn't sorted."""
    encoder = made(name, **options)
    image, keep = torch.rand(2, 3, 32, 48), torch.tensor([[4, 0, 5], [1, 3, 2]])
    codes = encoder({"image": image}, keep=keep)
    encoder.vit.patch_drop = Chosen(keep, prefix, encoder.rotary)
    want = encoder.vit.forward_features(encoder.normalise(image))
    torch.testing.assert_close(codes.joined(), want, atol=1e-5, rtol=0)
    assert codes.prefix.shape[1] == prefix == encoder.prefix_tokens and torch.equal(codes.index, keep)


def test_state_dicts_convert_both_ways_without_a_loss() -> None:
    import timm

    encoder = made("vit_tiny_patch16_224")
    plain_timm = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=(32, 48), **SMALL)
    plain_timm.load_state_dict(encoder.vit.state_dict())
    encoder.vit.load_state_dict(plain_timm.state_dict())


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("swin_tiny_patch4_window7_224", "has window attention"),
        ("vit_relpos_base_patch16_224", "has relative position bias"),
        ("beit_base_patch16_224", "has relative position bias"),
        ("vit_base_r50_s16_224", "stem, which mixes neighbouring patches"),
        ("resnet18", "convolutional"),
        ("vit_small_patch16_dinov3", "has rotary positions"),
    ],
)
def test_models_without_a_context_say_why(name: str, reason: str) -> None:
    encoder = TimmViT(name)
    assert "context" not in encoder.capabilities
    assert f"({name})" in encoder.lacks("context") and reason in encoder.lacks("context")


def test_models_that_cannot_serve_are_refused_when_built() -> None:
    with pytest.raises(ConfigError, match=r"TimmViT\(swin_tiny_patch4_window7_224\) has window attention"):
        build(TimmViT("swin_tiny_patch4_window7_224"), SPEC)


def test_an_overlapping_stem_is_refused() -> None:
    from functools import partial

    from timm.layers import PatchEmbed
    from timm.models.vision_transformer import VisionTransformer

    from quire.roles.tokens.timm import refusals

    vit = VisionTransformer(img_size=32, embed_layer=partial(PatchEmbed), **SMALL)
    assert refusals(vit) == ("", "")
    vit.patch_embed.proj = torch.nn.Conv2d(3, 48, 16, stride=8)
    assert "overlapping stem" in refusals(vit)[0]


@torch.no_grad()
def test_taking_positions_away_leaves_no_table_and_keeps_the_prefix() -> None:
    kept, bare = made("vit_tiny_patch16_224"), made("vit_tiny_patch16_224", "none")
    assert bare.positions == "none" and not [n for n in bare.state_dict() if "pos" in n]
    batch = {"image": torch.rand(2, 3, 32, 48)}
    assert torch.allclose(kept.embed(batch).prefix, bare.embed(batch).prefix, atol=1e-6)


@pytest.mark.parametrize("kind", ["learned", "sincos"])
@torch.no_grad()
def test_attached_positions_reload(kind: str) -> None:
    encoder = made("vit_tiny_patch16_224", "none")
    encoder.attach_positions(kind, "normal")
    again = TimmViT(**plain(encoder)["init_args"])
    build(again, SPEC)
    again.load_state_dict(encoder.state_dict())
    batch = {"image": torch.rand(2, 3, 32, 48)}
    assert again.positions == kind
    assert torch.equal(again.eval()(batch).values, encoder(batch).values)


@torch.no_grad()
def test_resampled_positions_take_any_grid() -> None:
    encoder = made("vit_tiny_patch16_224", "resample")
    assert encoder({"image": torch.rand(1, 3, 64, 32)}).values.shape == (1, 8, 48)
    with pytest.raises(ConfigError, match="image is 64x32, .* built for 32x48: set positions: resample"):
        made("vit_tiny_patch16_224")({"image": torch.rand(1, 3, 64, 32)})


def test_names_are_suggested_and_rotary_positions_stay() -> None:
    with pytest.raises(ConfigError, match="did you mean vit_tiny_patch16_224"):
        TimmViT("vit_tiny_patch16_22")
    with pytest.raises(ConfigError, match="rotary positions in every block; use positions: keep"):
        TimmViT("vit_small_patch16_dinov3", positions="none")
    with pytest.raises(ConfigError, match="positions must be one of keep, none, resample"):
        TimmViT("vit_tiny_patch16_224", positions="rope")
    with pytest.raises(ConfigError, match="has positions for 224x224 images, the data has 32x48"):
        build(TimmViT("vit_tiny_patch16_224", pretrained=True), SPEC)
