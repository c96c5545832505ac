"""Positions for any grid (role-tokens section 4)."""

from __future__ import annotations

import pytest
import torch

from quire.errors import ConfigError
from quire.roles.tokens import Layout, Segment
from quire.roles.tokens.positions import Positions, interpolate, rotary, rotate, sincos


def layout(*grid: int) -> Layout:
    return Layout.of(Segment("x", grid, (1,) * len(grid), "x"))


def test_the_first_cell_is_zeros_and_ones() -> None:
    assert sincos((3, 3), 16)[0].tolist() == [0.0] * 4 + [1.0] * 4 + [0.0] * 4 + [1.0] * 4


def test_cell_1_1_of_a_2x3_grid() -> None:
    """Section 4: row 4 with D=8 is [sin 1, sin .01, cos 1, cos .01] twice."""
    want = torch.tensor([0.841471, 0.0099998, 0.540302, 0.99995] * 2)
    torch.testing.assert_close(sincos((2, 3), 8)[4], want, atol=1e-6, rtol=0)


def test_y_comes_before_x_and_rows_are_y_major() -> None:
    table = sincos((2, 3), 8)
    assert torch.equal(table[0, :4], table[2, :4]) and not torch.equal(table[0, 4:], table[2, 4:])
    assert torch.equal(table[1, 4:], table[4, 4:]) and not torch.equal(table[1, :4], table[4, :4])


def test_transposed_grids_agree_after_exchanging_halves() -> None:
    a, b = sincos((3, 5), 12), sincos((5, 3), 12)
    swapped = torch.cat([b[:, 6:], b[:, :6]], 1).reshape(5, 3, 12).transpose(0, 1).reshape(15, 12)
    assert torch.equal(a, swapped)


@pytest.mark.parametrize(("grid", "width"), [((64, 64), 192), ((64, 17), 16), ((1000,), 64), ((4, 5, 6), 48)])
def test_all_rows_differ_and_have_squared_norm_half_the_width(grid: tuple[int, ...], width: int) -> None:
    table = sincos(grid, width)
    torch.testing.assert_close(table.square().sum(1), torch.full((len(table),), width / 2), rtol=1e-5, atol=0)
    assert len(torch.unique(table, dim=0)) == len(table)


@pytest.mark.parametrize(("grid", "width", "unit"), [((2, 2), 50, 4), ((5,), 7, 2), ((2, 2, 2), 16, 6)])
def test_a_width_that_does_not_split_is_refused(grid: tuple[int, ...], width: int, unit: int) -> None:
    said = f"sincos positions on a {len(grid)}-D grid need width divisible by {unit}, got {width}"
    with pytest.raises(ConfigError, match=said):
        sincos(grid, width)


def test_interpolation_on_the_same_grid_is_the_identity() -> None:
    table = torch.randn(12, 8)
    assert torch.equal(interpolate(table, (3, 4), (3, 4)), table)


def test_interpolation_keeps_a_constant_table_and_the_axes_apart() -> None:
    torch.testing.assert_close(interpolate(torch.ones(12, 8), (3, 4), (6, 2)), torch.ones(12, 8))
    ramp = torch.arange(4.0).repeat(4, 1).reshape(16, 1)  # changes along x only
    wide = interpolate(ramp, (4, 4), (2, 8)).reshape(2, 8)
    assert torch.allclose(wide[0], wide[1]) and bool((wide[0].diff() > 0).all())


def test_a_1d_table_never_gets_a_2d_grid() -> None:
    with pytest.raises(ConfigError, match="a 1-D position table can't be resized to the 3x4-D grid|2-D grid 3x4"):
        interpolate(torch.randn(12, 8), (12,), (3, 4))


def test_learned_tables_follow_the_grid_and_sequences_keep_their_first_places() -> None:
    learned = Positions("learned", layout(4, 4), 8)
    assert learned(layout(4, 4)) is learned.table
    assert learned(layout(2, 8)).shape == (16, 8)
    words = Positions("learned", layout(10), 8)
    assert torch.equal(words(layout(6)), words.table[:6])
    with pytest.raises(ConfigError, match="positions were learned for 10 places, x has 12: cut it shorter"):
        words(layout(12))


def test_fixed_tables_are_computed_for_any_grid_and_not_stored() -> None:
    fixed = Positions("sincos", layout(2, 2), 8)
    assert torch.equal(fixed(layout(3, 5)), sincos((3, 5), 8))
    assert not fixed.state_dict() and not list(fixed.parameters())


def test_each_segment_has_its_own_positions() -> None:
    two = Layout.of(Segment("image", (2, 3), (4, 4), "image"), Segment("depth", (2, 2), (4, 4), "depth"))
    table = Positions("sincos", two, 8)(two)
    assert torch.equal(table, torch.cat([sincos((2, 3), 8), sincos((2, 2), 8)]))


def test_rotated_dot_products_depend_on_the_distance_only() -> None:
    q, k = torch.randn(1, 1, 1, 16), torch.randn(1, 1, 1, 16)

    def dot(i: int, j: int) -> torch.Tensor:
        turned = (rotate(x, rotary(torch.tensor([[p]]), 16)) for x, p in ((q, i), (k, j)))
        return (next(turned) * next(turned)).sum()

    torch.testing.assert_close(dot(3, 7), dot(10, 14), atol=1e-5, rtol=0)
    assert abs(dot(3, 7) - dot(3, 9)) > 1e-3
    assert torch.equal(rotate(q, rotary(torch.zeros(1, 1), 16)), q)
