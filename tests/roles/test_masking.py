"""Subsets of cells: exact counts, partitions, determinism, and each rule's own shape."""

from __future__ import annotations

import math

import pytest
import torch

from quire.errors import ConfigError, DataError
from quire.roles.masking import BlockMask, ContextSubset, GridMask, Masking, RandomMask, SpanMask
from quire.roles.tokens import Layout, Segment, Subset


def image(*grid: int) -> Layout:
    return Layout.of(Segment("image", grid, (1,) * len(grid), "image"))


def speech(cells: int) -> Layout:
    return Layout.of(Segment("speech", (cells,), (1,), "frames"))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


RULES: list[tuple[Masking, Layout]] = [
    (RandomMask(0.75), image(4, 6)),
    (BlockMask(0.5, min_block=4), image(4, 6)),
    (SpanMask(0.5, 3), speech(24)),
    (GridMask(3), image(4, 6)),
    (ContextSubset(0.5), image(4, 6)),
]


@pytest.mark.parametrize(("rule", "layout"), RULES)
def test_keep_and_rest_partition_the_cells_and_restore_undoes_shuffle(rule: Masking, layout: Layout) -> None:
    subset = rule.draw(layout, 7, None, seeded())
    both = torch.cat([subset.keep, subset.rest], 1)
    assert torch.equal(both.sort(1).values, torch.arange(24).expand(7, -1))
    values = torch.randn(7, 24, 3)
    assert torch.equal(subset.unshuffle(subset.shuffle(values)), values)
    assert torch.equal(subset.keep, subset.keep.sort(1).values)
    assert torch.equal(subset.rest, subset.rest.sort(1).values)
    assert torch.equal(subset.kept().sum(1), torch.full((7,), subset.keep.shape[1]))


@pytest.mark.parametrize(("rule", "layout"), RULES)
def test_the_same_generator_state_gives_the_same_draw_and_another_rank_differs(rule: Masking, layout: Layout) -> None:
    first, again, other = (rule.draw(layout, 7, None, seeded(s)).keep for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert isinstance(rule, GridMask) == torch.equal(first, other)


@pytest.mark.parametrize(("rule", "layout"), RULES)
def test_the_global_random_stream_is_left_alone(rule: Masking, layout: Layout) -> None:
    before = torch.random.get_rng_state()
    rule.draw(layout, 3, None, seeded())
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("cells", [16, 49, 196])
@pytest.mark.parametrize("ratio", [0.0, 0.33, 0.5, 0.75, 0.99])
def test_random_and_context_counts_are_exact(cells: int, ratio: float) -> None:
    for rule in (RandomMask(ratio), ContextSubset(ratio)):
        keep = rule.draw(image(1, cells), 5, None, seeded()).keep
        assert keep.shape == (5, cells - math.floor(ratio * cells))
        assert keep.shape[1] >= 1
        assert all(len(set(row)) == len(row) for row in keep.tolist())


def test_rows_differ_and_cells_are_kept_equally_often() -> None:
    kept = RandomMask(0.75).draw(image(4, 4), 8000, None, seeded()).kept().float()
    assert not torch.equal(kept[0], kept[1])
    assert (kept.mean(0) - 0.25).abs().max() < 4 * math.sqrt(0.25 * 0.75 / 8000)


def test_block_mask_count_and_centre_bias_on_14x14() -> None:
    """role-tokens section 5: 98 of 14x14, corner 0.06-0.09, centre 0.83-0.88."""
    hidden = ~BlockMask(98).draw(image(14, 14), 3000, None, seeded()).kept()
    assert hidden.sum(1).unique().tolist() == [98]
    share = hidden.float().mean(0).reshape(14, 14)
    assert 0.06 < share[[0, 0, -1, -1], [0, -1, 0, -1]].mean() < 0.09
    assert 0.83 < share[6:8, 6:8].mean() < 0.88


@pytest.mark.parametrize(
    ("grid", "masked", "min_block", "corner", "centre"),
    [((8, 12), 48, 8, 0.111, 0.835), ((7, 7), 24, 4, 0.167, 0.800)],
)
def test_block_mask_bias_on_other_grids(
    grid: tuple[int, int], masked: int, min_block: int, corner: float, centre: float
) -> None:
    """role-tokens section 5, 1000 draws; the numbers' own noise is about 0.01."""
    hidden = ~BlockMask(masked, min_block).draw(image(*grid), 2000, None, seeded()).kept()
    assert hidden.sum(1).unique().tolist() == [masked]
    share, (h, w) = hidden.float().mean(0).reshape(grid), grid
    assert abs(share[[0, 0, -1, -1], [0, -1, 0, -1]].mean() - corner) < 0.03
    assert abs(share[(h - 1) // 2 : h // 2 + 1, (w - 1) // 2 : w // 2 + 1].mean() - centre) < 0.03


def test_block_mask_takes_a_share_or_a_count_and_always_ends() -> None:
    assert BlockMask(0.5).draw(image(14, 14), 2, None, seeded()).rest.shape == (2, 98)
    assert BlockMask(3, min_block=3).draw(image(2, 2), 20, None, seeded()).rest.shape == (20, 3)
    assert BlockMask(5, min_block=5).draw(image(1, 6), 20, None, seeded()).rest.shape == (20, 5)


def _runs(row: list[bool]) -> list[tuple[int, int]]:
    runs, start = [], None
    for i, hidden in enumerate([*row, False]):
        if hidden and start is None:
            start = i
        if not hidden and start is not None:
            runs.append((start, i))
            start = None
    return runs


@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.75])
def test_span_mask_counts_are_exact_and_inner_spans_long_enough(ratio: float) -> None:
    hidden = ~SpanMask(ratio, 5).draw(speech(50), 500, None, seeded()).kept()
    assert hidden.sum(1).unique().tolist() == [math.floor(ratio * 50)]
    for row in hidden.tolist():
        assert all(stop - start >= 5 for start, stop in _runs(row) if start > 0 and stop < 50)


def test_span_mask_hides_every_cell_equally_often() -> None:
    share = (~SpanMask(0.5, 5).draw(speech(50), 10000, None, seeded()).kept()).float().mean(0)
    assert (share - 0.5).abs().max() < 0.025


def test_grid_mask_keeps_every_kth_cell() -> None:
    assert GridMask(3).draw(speech(8), 2, None, seeded()).keep.tolist() == [[0, 3, 6]] * 2


@pytest.mark.parametrize("rule", [RandomMask(0.5), ContextSubset(0.5), SpanMask(0.5, 2), GridMask(2)])
def test_padding_is_never_kept_and_ragged_rows_keep_what_the_shortest_gives(rule: Masking) -> None:
    mask = torch.arange(20).expand(3, -1) < torch.tensor([[20], [9], [13]])
    subset = rule.draw(speech(20), 3, mask, seeded())
    assert subset.keep.shape[1] == 5  # 9 - floor(0.5 * 9), and ceil(9 / 2)
    assert bool(mask.gather(1, subset.keep).all())
    assert torch.equal(torch.cat([subset.keep, subset.rest], 1).sort(1).values, torch.arange(20).expand(3, -1))


def test_spans_of_ragged_rows_stay_long_and_inside_the_real_part() -> None:
    counts = torch.randint(12, 30, (200, 1), generator=seeded(3))
    mask = torch.arange(30).expand(200, -1) < counts
    hidden = ~SpanMask(0.5, 3).draw(speech(30), 200, mask, seeded()).kept() & mask
    for row, count in zip(hidden.tolist(), counts.flatten().tolist()):
        assert all(stop - start >= 3 for start, stop in _runs(row) if start > 0 and stop < count)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: RandomMask(1.2), r"ratio must be in \[0,1\), got 1.2"),
        (lambda: ContextSubset(1.2), r"masking must be in \[0,1\), got 1.2"),
        (lambda: SpanMask(-0.1), r"ratio must be in \[0,1\), got -0.1"),
        (lambda: SpanMask(0.5, 0), "span_length must be at least 1, got 0"),
        (lambda: GridMask(0), "every must be at least 1, got 0"),
        (lambda: BlockMask(0.0), "at least one masked patch"),
        (lambda: BlockMask(4).draw(image(2, 2), 1, None, seeded()), "at least one visible and one masked patch"),
        (lambda: BlockMask(0.01).draw(image(4, 4), 1, None, seeded()), "at least one visible and one masked patch"),
        (lambda: BlockMask(8).draw(image(4, 4), 1, None, seeded()), "min_block=16 exceeds the 8 cells to mask"),
        (
            lambda: BlockMask().draw(speech(50), 1, None, seeded()),
            "BlockMask needs a 2-D grid; segment 'speech' is 1-D",
        ),
        (
            lambda: SpanMask().draw(image(4, 4), 1, None, seeded()),
            "SpanMask needs a 1-D grid; segment 'image' is 2-D",
        ),
        (lambda: SpanMask(0.25, 5).draw(speech(16), 1, None, seeded()), "span_length=5 exceeds the 4 cells to mask"),
        (
            lambda: BlockMask(2, 1).draw(image(2, 2), 1, torch.tensor([[True, True, True, False]]), seeded()),
            "without padding",
        ),
    ],
)
def test_bad_input_is_refused_in_one_sentence(make: object, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        make()  # type: ignore[operator]


def test_a_row_of_padding_is_named() -> None:
    mask = torch.ones(5, 8, dtype=torch.bool)
    mask[3] = False
    for rule in (RandomMask(0.5), SpanMask(0.5, 2)):
        with pytest.raises(DataError, match="sample 3 has no real tokens"):
            rule.draw(speech(8), 5, mask, seeded())


def test_subsets_refuse_bad_indices() -> None:
    with pytest.raises(ConfigError, match="keep has index 196 but the layout has 196 cells"):
        Subset.of(torch.tensor([[0, 196]]), 196)
    with pytest.raises(ConfigError, match="keep repeats an index in row 2"):
        Subset.of(torch.tensor([[0, 1], [2, 3], [4, 4]]), 6)
