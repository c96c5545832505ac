"""Head, loss, smoothed target and judgement, without a trained model."""

from __future__ import annotations

import math

import pytest
import torch

from quire import ConfigError, Spec
from quire.contracts import build
from quire.roles.tokens.contract import Layout, Segment, Tokens
from quire_mp3.modules import (
    Guesses,
    PositionHead,
    decayed,
    nonconstant,
    position_loss,
    smoothed_target,
    voiced,
)


def grid(*cells: int, patch: int = 2) -> Layout:
    field = "image" if len(cells) == 2 else "frames"
    return Layout.of(Segment(field, cells, (patch,) * len(cells), field))


def tokens(layout: Layout, rows: int = 2, width: int = 8) -> Tokens:
    index = torch.arange(layout.cells).expand(rows, -1)
    return Tokens(torch.randn(rows, layout.cells, width), index, layout)


def head(cells: int, width: int = 8, **kwargs: bool) -> PositionHead:
    made = PositionHead(**kwargs)
    build(made, Spec(codes={"width": width, "cells": cells}))
    return made


@pytest.mark.parametrize(
    ("cells", "nats"),  # ln N, spec section 3
    [(16, 2.7726), (49, 3.8918), (64, 4.1589), (100, 4.6052), (196, 5.27811)],
)
def test_a_zero_head_has_the_loss_of_chance(cells, nats):
    made = head(cells)
    torch.nn.init.zeros_(made.linear.weight)
    torch.nn.init.zeros_(made.linear.bias)
    codes = tokens(grid(cells))
    assert position_loss(made(codes), codes.index).item() == pytest.approx(nats, abs=6e-5)
    assert position_loss(made(codes), codes.index).item() == pytest.approx(math.log(cells), abs=1e-5)


def test_the_head_has_one_row_a_cell_and_optional_norm_and_bias():
    assert head(16).linear.weight.shape == (16, 8)
    bare = head(16, norm=False, bias=False)
    assert [n for n, _ in bare.named_parameters()] == ["linear.weight"]


def test_the_head_refuses_another_grid_and_names_both_numbers():
    said = "the position head has 196 classes but the input gives 256 tokens; rebuild the head or resize the images"
    with pytest.raises(ConfigError, match=said):
        head(196)(tokens(grid(16, 16)))
    with pytest.raises(ConfigError, match="the position head has 16 classes but the input gives 9 tokens"):
        head(16)(tokens(grid(3, 3)))


def test_shorter_sequences_have_only_their_own_cells():
    assert head(50)(tokens(grid(40))).shape == (2, 40, 40)


def test_the_smoothed_target_of_a_corner():
    # 4x4, sigma 1: one axis sums to 1 + e^-1 + e^-4 + e^-9 = 1.386318; the corner has 1/1.386318^2
    rows = smoothed_target(grid(4, 4), 1.0)
    assert rows[0, 0].item() == pytest.approx(0.520324, abs=1e-6)
    assert rows[0, 1].item() == rows[0, 4].item() == pytest.approx(0.191417, abs=1e-6)
    assert torch.allclose(rows.sum(1), torch.ones(16))


def test_smoothing_vanishes_with_sigma_and_becomes_the_hard_target():
    layout = grid(2, 3)
    assert torch.equal(smoothed_target(layout, 0.0), torch.eye(6))
    assert torch.allclose(smoothed_target(layout, 0.05), torch.eye(6))
    logits, cell = torch.randn(3, 6, 6), torch.arange(6).expand(3, 6)
    hard = position_loss(logits, cell)
    assert torch.allclose(position_loss(logits, cell, target=torch.eye(6)), hard, atol=1e-6)
    assert torch.allclose(position_loss(logits, cell, target=smoothed_target(layout, 0.05)), hard, atol=1e-6)
    assert not torch.allclose(position_loss(logits, cell, target=smoothed_target(layout, 1.0)), hard, atol=1e-3)


def test_smoothing_knows_rectangles_sequences_and_segments():
    tall, wide = smoothed_target(grid(3, 2), 0.7), smoothed_target(grid(2, 3), 0.7)
    turn = torch.arange(6).reshape(3, 2).T.flatten()
    assert torch.allclose(wide, tall[turn][:, turn])
    line = smoothed_target(grid(5), 1.0)
    assert line[2, 1] == line[2, 3] > line[2, 4]
    two = Layout.of(grid(2, 2).only(), Segment("depth", (2, 2), (2, 2), "depth"))
    assert smoothed_target(two, 1.0)[:4, 4:].sum() == 0


def test_sigma_falls_linearly_to_zero():
    assert [decayed(2.0, s, 10) for s in (0, 5, 10, 99)] == [2.0, 1.0, 0.0, 0.0]
    assert decayed(2.0, 99, 0) == 2.0


def test_padding_counts_neither_in_the_loss_nor_in_the_accuracy():
    logits, cell = torch.randn(2, 6, 6), torch.arange(6).expand(2, 6)
    real = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    each = -logits.log_softmax(-1).diagonal(dim1=1, dim2=2)
    assert position_loss(logits, cell, real).item() == pytest.approx(each[real].mean().item(), abs=1e-6)
    sure = 9 * torch.eye(6).expand(2, 6, 6).clone()
    sure[1, 5] = sure[1, 0]  # wrong, but padding
    guesses = Guesses(sure, cell, real, real, grid(6), {})
    assert guesses.mean(guesses.right) == 1


def test_distance_is_manhattan_on_the_grid_and_subsets_partition():
    layout = grid(2, 3)
    logits = torch.zeros(1, 6, 6)
    logits[0, :, 5] = 1  # all tokens say cell (1,2)
    context = torch.tensor([[True, False, True, False, True, False]])
    guesses = Guesses(logits, torch.arange(6)[None], torch.ones(1, 6, dtype=torch.bool), context, layout, {})
    assert guesses.distance.tolist() == [[3, 2, 1, 2, 1, 0]]
    assert guesses.mean(guesses.right).item() == pytest.approx(1 / 6)
    assert guesses.mean(guesses.distance, "context") == 5 / 3
    assert torch.equal(guesses.subsets["context"] ^ guesses.subsets["rest"], guesses.subsets["all"])


def test_constant_patches_are_found_in_any_channel_and_grid():
    image = torch.zeros(1, 2, 4, 6)
    image[0, 1, 3, 5] = 1  # last patch, second channel only
    image[0, :, :2, :2] = 0.5  # constant too
    assert nonconstant(image, (2, 2)).tolist() == [[False, False, False, False, False, True]]


def test_a_quarter_of_the_patches_of_digits_are_constant():
    from quire.datasets.images import Digits

    image = torch.cat([Digits().dataset(s).tensors["image"] for s in ("train", "test")])
    assert (~nonconstant(image, (2, 2))).float().mean().item() == pytest.approx(0.27, abs=0.01)  # spec section 9


def test_voiced_tokens_are_near_the_loudest():
    audio = torch.zeros(1, 80)
    audio[0, 20:40] = 0.5
    audio[0, 40:60] = 0.01  # 34 dB below
    audio[0, 60:80] = 0.05  # 20 dB below
    assert voiced(audio, 8, grid(4).only()).tolist() == [[False, True, False, True]]
