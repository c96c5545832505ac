"""Regressor, decoder and mask: oracles of their own."""

from __future__ import annotations

import pytest
import torch

from quire import ConfigError, Spec
from quire.contracts import build
from quire.roles.masking import BlockMask
from quire.roles.tokens.contract import Layout, Segment, Tokens
from quire.roles.tokens.vit import ViTEncoder
from quire_cae.decoder import MaskedTokenDecoder
from quire_cae.places import Places
from quire_cae.regressor import DropPath, LatentRegressor


def codes(width=16, grid=(2, 3), cells=None):
    layout = layout_of(grid)
    return Spec({"codes": {"width": width, "segments": layout.plain(), "cells": layout.cells, "patch_values": 4}})


def layout_of(grid):
    return Layout.of(Segment("image", grid, (2, 2), "image"))


def visible_of(grid=(2, 3), kept=(0, 3, 4), width=16, rows=2):
    torch.manual_seed(0)
    index = torch.tensor(kept).expand(rows, -1)
    return Tokens(torch.randn(rows, len(kept), width), index, layout_of(grid), prefix=torch.randn(rows, 1, width))


def made(part, spec=None):
    torch.manual_seed(0)
    build(part, spec or codes())
    return part.eval()


MASKED = torch.tensor([[1, 2, 5], [1, 2, 5]])


def count(module):
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def test_parameter_counts_are_the_paper_s():
    """ViT-B/16 at 224: computed from the layers' sizes; they agree with mmpretrain's published total."""
    encoder = ViTEncoder(16, 768, 12, 12, class_token=True, key_bias=False, layer_scale=0.1)
    with torch.device("meta"):
        build(encoder, Spec({"image_size": [224, 224], "channels": 3}))
        spec = Spec({"codes": encoder.sizes()})
        regressor, decoder = LatentRegressor(), MaskedTokenDecoder(output_size=8192)
        build(regressor, spec)
        build(decoder, spec)
    assert count(encoder) == 85_656_576
    assert count(regressor) - count_of(regressor.empty) == 28_368_384  # the shared mask token is counted apart
    assert count(decoder) == 34_655_744
    assert round((count(encoder) + count(regressor) + count(decoder)) / 1e6, 2) == 148.68


def count_of(parameter):
    return parameter.numel()


def test_with_zero_layer_scale_every_place_gets_the_normalised_mask_token():
    regressor = made(LatentRegressor(2, heads=2, layer_scale=0.0))
    out = regressor(visible_of(), MASKED)
    expected = regressor.empty
    for norm in (*(b.norm2 for b in regressor.blocks), regressor.norm):
        expected = norm(expected)
    assert torch.allclose(out, expected.expand_as(out), atol=1e-6)


def test_the_second_norm_is_on_the_residual_stream_unless_it_is_asked_not_to_be():
    plain = made(LatentRegressor(1, heads=2, layer_scale=0.0, stream_norm=False))
    out = plain(visible_of(), MASKED)
    assert torch.allclose(out[0, 0], plain.norm(plain.empty), atol=1e-6)
    block, x = plain.blocks[0], torch.randn(1, 2, 16)
    zeros = torch.zeros_like(x)
    torch.nn.init.zeros_(block.proj.weight)
    assert torch.allclose(block(x, x, zeros, zeros), x, atol=1e-6)  # pre-norm: the stream passes
    block.stream_norm = True
    assert torch.allclose(block(x, x, zeros, zeros), block.norm2(x), atol=1e-6)


def test_places_are_on_queries_and_keys_and_never_on_values():
    block = made(LatentRegressor(1, heads=2, layer_scale=1.0)).blocks[0]
    seen = {}
    for name in ("norm_q", "norm_k", "norm_v"):
        getattr(block, name).register_forward_pre_hook(lambda _, x, name=name: seen.__setitem__(name, x[0]))
    m, z, pm, pz = (torch.randn(1, n, 16) for n in (2, 3, 2, 3))
    block(m, z, pm, pz)
    assert torch.equal(seen["norm_q"], m + pm)
    assert torch.equal(seen["norm_k"], torch.cat([z, m], 1) + torch.cat([pz, pm], 1))
    assert torch.equal(seen["norm_v"], torch.cat([z, m], 1))  # the masked queries are among the keys, cls is not


def test_the_regressor_ignores_prefix_tokens_and_leaves_the_visible_latents():
    regressor, visible = made(LatentRegressor(2, heads=2, layer_scale=1.0)), visible_of()
    before = visible.values.clone()
    out = regressor(visible, MASKED)
    other = regressor(visible.with_values(visible.values, torch.randn(2, 1, 16)), MASKED)
    assert torch.equal(out, other)
    assert torch.equal(visible.values, before)


@pytest.mark.parametrize("part", ["regressor", "decoder"])
def test_permuting_masked_tokens_with_their_places_permutes_the_output(part):
    order = torch.tensor([2, 0, 1])
    if part == "regressor":
        module = made(LatentRegressor(2, heads=2, layer_scale=1.0))
        a, b = module(visible_of(), MASKED), module(visible_of(), MASKED[:, order])
    else:
        module = made(MaskedTokenDecoder(2, heads=2, layer_scale=1.0, output_size=5))
        latents = torch.randn(2, 3, 16)
        layout = layout_of((2, 3))
        a, b = module(latents, MASKED, layout), module(latents[:, order], MASKED[:, order], layout)
        still = module(latents, MASKED[:, order], layout)  # other places, same contents
        assert not torch.allclose(a, still, atol=1e-3)
    assert torch.allclose(a[:, order], b, atol=1e-5)


def test_the_decoder_takes_masked_tokens_only_on_any_grid():
    decoder = made(MaskedTokenDecoder(1, heads=2, output_size=7), codes(grid=(3, 5)))
    out = decoder(torch.randn(2, 4, 16), torch.tensor([[0, 7, 9, 14], [1, 2, 3, 4]]), layout_of((3, 5)))
    assert out.shape == (2, 4, 7)


def test_another_width_goes_through_one_map_and_norm_without_a_gradient_to_the_target():
    regressor = made(LatentRegressor(1, width=8, heads=2))
    latents = torch.randn(2, 3, 16, requires_grad=True)
    aim = regressor.project(latents)
    assert aim.shape == (2, 3, 8)
    assert not aim.requires_grad
    assert torch.equal(aim, regressor.inlet(latents))
    out = regressor(visible_of(), MASKED)
    out.square().sum().backward()
    assert out.shape == (2, 3, 8)
    assert regressor.inlet[0].weight.grad.abs().sum() > 0
    same = made(LatentRegressor(1, heads=2))
    assert torch.equal(same.project(latents), latents)


def test_segments_that_share_a_grid_are_told_apart():
    one = Layout.of(Segment("image", (2, 2), (2, 2), "image"))
    two = Layout.of(Segment("image", (2, 2), (2, 2), "image"), Segment("depth", (2, 2), (2, 2), "depth"))
    assert not list(Places(one, 16).parameters())
    rows = Places(two, 16)(two)
    assert rows.shape == (8, 16)
    assert (rows[:4] - rows[4:]).abs().sum(1).min() > 0


def test_dropped_paths_keep_the_mean_and_are_off_in_eval_mode():
    torch.manual_seed(0)
    drop, x = DropPath(0.25), torch.ones(4000, 1, 1)
    found = drop(x)
    assert found.unique().tolist() == pytest.approx([0, 1 / 0.75])
    assert found.mean().item() == pytest.approx(1, abs=0.04)
    assert torch.equal(drop.eval()(x), x)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: made(LatentRegressor(1, heads=5)), "LatentRegressor has width=16, not divisible by heads=5"),
        (lambda: LatentRegressor(0), "LatentRegressor.depth must be at least 1, got 0"),
        (lambda: LatentRegressor(drop_path=1.0), r"LatentRegressor.drop_path must be in \[0,1\), got 1"),
        (lambda: made(LatentRegressor(1, width=10, heads=2)), "sincos positions on a 2-D grid need width divisible by"),
        (lambda: made(MaskedTokenDecoder(1, heads=2)), "has no target to predict: set decoder.output_size"),
        (lambda: made(MaskedTokenDecoder(1, heads=5, output_size=3)), "width=16 is not divisible by heads=5"),
    ],
)
def test_wrong_sizes_are_one_sentence(make, said):
    with pytest.raises(ConfigError, match=said):
        make()


# ---- the mask, core's
def test_the_paper_s_mask_is_exact_and_centre_biased():
    """196 cells, 98 masked: corner 0.078 and 0.071, centre 0.856 and 0.852 in two independent implementations."""
    rule, layout = BlockMask(), layout_of((14, 14))
    drawn = rule.draw(layout, 1000, None, torch.Generator().manual_seed(0))
    assert drawn.rest.shape == (1000, 98)
    hidden = (~drawn.kept()).float().mean(0).view(14, 14)
    assert 0.06 <= hidden[[0, 0, -1, -1], [0, -1, 0, -1]].mean() <= 0.09
    assert 0.83 <= hidden[6:8, 6:8].mean() <= 0.88
    assert hidden.mean() == pytest.approx(0.5)


@pytest.mark.slow
def test_the_mask_count_is_98_in_ten_thousand_draws():
    drawn = BlockMask().draw(layout_of((14, 14)), 10_000, None, torch.Generator().manual_seed(1))
    assert ((~drawn.kept()).sum(1) == 98).all()


def test_a_mask_of_one_block_is_one_rectangle():
    drawn = BlockMask(masked=6, min_block=6, attempts=50).draw(
        layout_of((8, 8)), 64, None, torch.Generator().manual_seed(0)
    )
    hidden = ~drawn.kept().view(64, 8, 8)
    tall, wide = hidden.any(2).sum(1), hidden.any(1).sum(1)
    whole = tall * wide == 6  # the first block aims at all six cells; rounding may leave some to a second one
    assert whole.float().mean() > 0.4
    assert (hidden.sum((1, 2)) == 6).all()


def test_a_sequence_is_refused_by_its_name():
    speech = Layout.of(Segment("speech", (50,), (2,), "frames"))
    with pytest.raises(ConfigError, match="BlockMask needs a 2-D grid; segment 'speech' is 1-D"):
        BlockMask().draw(speech, 2, None, torch.Generator())
