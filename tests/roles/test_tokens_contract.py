"""Layouts, tokens and the encoders' lives: sizes, refusals, attached positions, checkpoints."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from quire.contracts import Spec, build, plain
from quire.data import check_batch
from quire.errors import ConfigError, DataError
from quire.roles.tokens import Layout, Segment, Subset, TokenEncoder, Tokens
from quire.roles.tokens.contract import equal_counts
from quire.roles.tokens.frames import FrameEncoder
from quire.roles.tokens.text import TextEncoder
from quire.roles.tokens.vit import ViTEncoder

TRUNK: dict[str, Any] = {"width": 16, "depth": 2, "heads": 2}


def vit(spec: dict[str, Any] | None = None, **args: Any) -> ViTEncoder:
    torch.manual_seed(0)
    encoder = ViTEncoder(**{"patch": 2, **TRUNK, **args})
    build(encoder, Spec(spec or {"image_size": [4, 6], "channels": 1}))
    return encoder.eval()


def test_layouts_are_hashable_plain_data_with_offsets() -> None:
    two = Layout.of(Segment("image", (2, 3), (4, 4), "image"), Segment("speech", (5,), (2,), "frames"))
    assert [s.start for s in two.segments] == [0, 6] and two.cells == 11
    assert Layout.read(two.plain()) == two and hash(Layout.read(two.plain())) == hash(two)
    assert two.coordinates[[0, 4, 6, 10]].tolist() == [[0, 0, 0], [0, 1, 1], [0, 0, 0], [4, 0, 0]]
    assert two.segment_id.tolist() == [0] * 6 + [1] * 5
    video = Layout.of(Segment("video", (2, 2, 3), (1, 4, 4), "video"))
    assert video.coordinates[7].tolist() == [1, 0, 1]
    with pytest.raises(ConfigError, match="one segment of tokens is needed, the layout has 2: image, speech"):
        two.only()


def test_sizes_say_what_a_head_needs() -> None:
    sizes = vit(class_token=True).sizes()
    assert {k: sizes[k] for k in ("width", "cells", "grid", "prefix_tokens", "patch_values")} == {
        "width": 16,
        "cells": 6,
        "grid": [2, 3],
        "prefix_tokens": 1,
        "patch_values": 4,
    }


def test_image_size_may_be_one_number_and_batches_may_have_another_size() -> None:
    encoder = vit({"image_size": 4, "channels": 1})
    assert encoder.sizes()["grid"] == [2, 2]
    assert encoder({"image": torch.rand(1, 1, 8, 6)}).values.shape == (1, 12, 16)


def test_parameters_of_a_base_encoder_without_key_bias() -> None:
    """cae section 3: 85,656,576 with class token and LayerScale."""
    with torch.device("meta"):
        encoder = ViTEncoder(16, 768, 12, 12, class_token=True, positions="sincos", key_bias=False, layer_scale=0.1)
        build(encoder, Spec(image_size=224, channels=3))
    assert sum(p.numel() for p in encoder.parameters()) == 85_656_576


def _linear_flops(run: Any) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run()
    counts = counter.get_flop_counts()["Global"]
    return sum(v for k, v in counts.items() if "mm" in str(k))


def test_cost_falls_as_the_operation_count_predicts() -> None:
    """Section 8's point without a clock: a quarter of the tokens costs a quarter of the products, stem included; a
    context of a quarter saves three quarters of the keys' and values' projections (2 of 12 parts a block)."""
    encoder = vit({"image_size": 32, "channels": 1}, patch=4, width=32, depth=2, heads=2)
    batch = {"image": torch.rand(2, 1, 32, 32)}
    subset = Subset.of(torch.arange(16).expand(2, -1), 64)
    full = _linear_flops(lambda: encoder(batch))
    assert _linear_flops(lambda: encoder(batch, keep=subset)) == full // 4
    blocks = full - 2 * 2 * 64 * 16 * 32
    assert full - _linear_flops(lambda: encoder(batch, context=subset)) == blocks * 2 // 12 * 3 // 4


def test_no_dense_mask_without_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    original = torch.nn.functional.scaled_dot_product_attention

    def spy(*args: Any, attn_mask: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor:
        seen.append(None if attn_mask is None else tuple(attn_mask.shape))
        return original(*args, attn_mask=attn_mask, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    encoder = TextEncoder(**TRUNK)
    build(encoder, Spec(vocab_size=9, length=6))
    tokens, full = torch.randint(9, (2, 6)), torch.ones(2, 6, dtype=torch.bool)
    encoder({"tokens": tokens, "mask": full})
    encoder({"tokens": tokens}, context=torch.tensor([[0, 1]] * 2))
    assert seen == [None] * 4
    seen.clear()
    half = full.clone()
    half[0, 3:] = False
    encoder({"tokens": tokens, "mask": half})
    assert seen == [(2, 1, 1, 6)] * 2


@pytest.mark.parametrize("built", [False, True])
@pytest.mark.parametrize("kind", ["learned", "sincos"])
def test_attached_positions_are_in_the_arguments_and_reload(kind: str, built: bool) -> None:
    encoder = ViTEncoder(patch=2, positions="none", **TRUNK)
    spec = Spec(image_size=[4, 6], channels=1)
    if built:
        build(encoder, spec)
    encoder.attach_positions(kind, "normal")
    if not built:
        build(encoder, spec)
    batch = {"image": torch.rand(2, 1, 4, 6)}
    again = ViTEncoder(**plain(encoder)["init_args"])
    build(again, spec)
    again.load_state_dict(encoder.state_dict())
    assert again.positions == kind and torch.equal(again(batch).values, encoder(batch).values)
    encoder.attach_positions(kind)  # a second time changes nothing
    with pytest.raises(ConfigError, match=f"has {kind} positions already"):
        encoder.attach_positions("sincos" if kind == "learned" else "learned")


def test_attaching_zeros_changes_nothing_and_they_learn() -> None:
    """mp3 oracle 11."""
    encoder, batch = vit(positions="none"), {"image": torch.rand(2, 1, 4, 6)}
    before = encoder(batch).values
    encoder.attach_positions("learned", "zeros")
    after = encoder(batch).values
    assert torch.equal(before, after)
    after.square().sum().backward()
    assert encoder.places is not None and encoder.places.table.grad.abs().sum() > 0


def test_constant_images_give_equal_tokens_without_positions() -> None:
    """mp3 oracle 6's ground."""
    values = vit(positions="none")({"image": torch.full((1, 1, 4, 6), 0.3)}).values
    torch.testing.assert_close(values, values[:, :1].expand(-1, 6, -1), atol=1e-6, rtol=0)


def test_layers_hold_every_parameter_but_the_last_norm_once() -> None:
    encoder = vit(class_token=True, positions="learned")
    inside = [id(p) for layer in encoder.layers() for p in layer.parameters()]
    assert len(inside) == len(set(inside)) and len(encoder.layers()) == 3
    outside = {n for n, p in encoder.named_parameters() if id(p) not in inside}
    assert outside == {"norm.weight", "norm.bias"}


def test_pooling_leaves_padding_out() -> None:
    layout = Layout.of(Segment("x", (3,), (1,), "x"))
    values, mask = torch.tensor([[[1.0], [3.0], [100.0]]]), torch.tensor([[True, True, False]])
    tokens = Tokens(values, torch.arange(3)[None], layout, mask, torch.tensor([[[7.0]]]))
    assert tokens.pooled().item() == 2.0 and tokens.pooled("class").item() == 7.0
    with pytest.raises(ConfigError, match="needs a class token"):
        Tokens(values, torch.arange(3)[None], layout).pooled("class")


def test_text_reads_source_first_and_ties_its_head() -> None:
    encoder = TextEncoder(vocab_size=9, length=6, **TRUNK)
    build(encoder, Spec())
    assert "lm_head" in encoder.capabilities and encoder.sizes()["vocab_size"] == 9
    batch = {"tokens": torch.zeros(2, 6, dtype=torch.long), "source": torch.ones(2, 4, dtype=torch.long)}
    codes = encoder(batch)
    assert codes.values.shape == (2, 4, 16)
    assert encoder.logits(codes).shape == (2, 4, 9)
    assert "lm_head" not in TextEncoder(lm_head=False).capabilities


def test_a_frame_token_is_real_when_all_its_frames_are() -> None:
    encoder = FrameEncoder(stack=2, **TRUNK)
    build(encoder, Spec(frames=6, bands=3))
    mask = torch.tensor([[True, True, True, False, False, False]])
    assert encoder({"frames": torch.randn(1, 6, 3), "mask": mask}).mask.tolist() == [[True, False, False]]


def test_unequal_counts_are_refused() -> None:
    kept = torch.ones(2, 196, dtype=torch.bool)
    kept[0, 99:] = False
    kept[1, 97:] = False
    with pytest.raises(ConfigError, match=r"rows keep 97\.\.99 tokens; equal counts are needed"):
        equal_counts(kept)
    kept[1, 97:99] = True
    assert equal_counts(kept).shape == (2, 99)


def _batch(*size: int) -> dict[str, Any]:
    return {"image": torch.rand(1, *size)}


@pytest.mark.parametrize(
    ("make", "error", "said"),
    [
        (
            lambda: vit({"image_size": 8, "channels": 1}, patch=4)(_batch(1, 30, 30)),
            ConfigError,
            "image 30x30 is not divisible by patch 4x4; pad or resize",
        ),
        (lambda: vit({"image_size": 30, "channels": 1}, patch=4), ConfigError, "image 30x30 is not divisible"),
        (lambda: vit(width=50), ConfigError, "2-D grid need width divisible by 4, got 50"),
        (lambda: vit(heads=3), ConfigError, "width=16, not divisible by heads=3"),
        (lambda: vit(positions="rope"), ConfigError, "positions must be one of none, sincos, learned, got 'rope'"),
        (lambda: vit(patch=0), ConfigError, "patch must be a positive integer"),
        (lambda: vit()(_batch(3, 4, 6)), DataError, "image has 3 channels, ViTEncoder was built for 1"),
        (lambda: vit()({"image": torch.zeros(1, 1, 4, 6, dtype=torch.uint8)}), DataError, "image is uint8"),
        (lambda: check_batch({"image": torch.full((1, 1, 4, 6), 255.0)}), DataError, "0..255; the field is float in"),
        (
            lambda: vit()(_batch(1, 4, 6), keep=torch.tensor([[0, 6]])),
            ConfigError,
            "keep has index 6 but the layout has 6 cells",
        ),
        (
            lambda: vit()(_batch(1, 4, 6), context=torch.tensor([[1, 1]])),
            ConfigError,
            "context repeats an index in row 0",
        ),
        (
            lambda: vit().features(_batch(1, 4, 6), 3),
            ConfigError,
            r"features has layer 3; ViTEncoder has layers 0\.\.2",
        ),
        (lambda: vit().attach_positions("none"), ConfigError, "one of learned, sincos"),
        (
            lambda: build(FrameEncoder(**TRUNK), Spec(frames=101, bands=3)),
            ConfigError,
            "101 frames are not divisible by stack 2; pad or cut",
        ),
        (
            lambda: build(TextEncoder(vocab_size=5, **TRUNK), Spec(vocab_size=6, length=4)),
            ConfigError,
            "TextEncoder has vocab_size=5, the data has vocab_size=6",
        ),
    ],
)
def test_bad_input_is_refused_in_one_sentence(make: Any, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        make()


def test_ids_outside_the_vocabulary_are_refused() -> None:
    encoder = TextEncoder(vocab_size=5, length=4, **TRUNK)
    build(encoder, Spec())
    with pytest.raises(DataError, match="tokens has id 5 but vocab_size=5"):
        encoder({"tokens": torch.tensor([[0, 5]])})


def test_the_contract_names_are_exported() -> None:
    assert issubclass(ViTEncoder, TokenEncoder)


@pytest.mark.parametrize("key_bias", [True, False])
def test_weights_start_as_asked(key_bias):
    spec = Spec(image_size=[8, 8], channels=1)
    for start, small in (("normal", True), ("xavier", False)):
        torch.manual_seed(0)
        encoder = ViTEncoder(patch=2, width=96, depth=1, heads=4, key_bias=key_bias, start=start)
        encoder.build(spec)
        block = encoder.blocks[0]
        for weight in (block.mlp.fc1.weight, block.attn.qkv.weight):
            assert (abs(weight.std().item() - 0.02) < 1e-3) is small
        if not small:  # three matrices: uniform up to sqrt(6 / (96 + 96))
            assert block.attn.qkv.weight.abs().max().item() == pytest.approx((6 / 192) ** 0.5, rel=0.01)
    with pytest.raises(ConfigError, match="start='zeros'; it takes normal or xavier"):
        ViTEncoder(start="zeros")
