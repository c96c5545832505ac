"""Which tokens are keys and values."""

from __future__ import annotations

import math

import pytest
import torch

from quire import ConfigError, DataError
from quire.roles.masking import Masking
from quire.roles.tokens.contract import Layout, Segment, Subset
from quire_mp3 import context
from quire_mp3.context import draw_context


def image(height: int = 4, width: int = 4) -> Layout:
    return Layout.of(Segment("image", (height, width), (2, 2), "image"))


def speech(cells: int = 50) -> Layout:
    return Layout.of(Segment("frames", (cells,), (2,), "frames"))


def draw(how="random", masking=0.5, layout=None, rows=64, mask=None, seed=0, span=5):
    generator = torch.Generator().manual_seed(seed)
    return draw_context(how, masking, span, layout or image(), rows, mask, generator)


@pytest.mark.parametrize("masking", [0.0, 0.3, 0.5, 0.75, 0.99])
@pytest.mark.parametrize("layout", [image(), image(3, 7), image(14, 14)])
def test_every_row_has_n_minus_floor_of_eta_n_unique_tokens(masking, layout):
    subset, kept = draw(masking=masking, layout=layout)
    count = layout.cells - math.floor(masking * layout.cells)
    assert subset.keep.shape == (64, count)
    assert (subset.keep.sort(1).values.diff(dim=1) > 0).all()
    assert (kept.sum(1) == count).all()
    assert kept.gather(1, subset.keep).all()


def test_rows_differ_and_a_seed_decides():
    first, again, other = draw(seed=1)[0].keep, draw(seed=1)[0].keep, draw(seed=2)[0].keep
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert len(first.unique(dim=0)) > 60


def test_spans_leave_out_neighbours():
    subset, kept = draw("span", layout=speech())
    assert subset.keep.shape == (64, 25)
    edges = (kept[:, 1:] != kept[:, :-1]).sum(1)
    assert edges.max() <= 12  # at most 5 spans of 5 left out, and one cut by the ends; random draws have about 25


def test_blocks_leave_out_rectangles_with_an_exact_count():
    subset, kept = draw("block", layout=image(14, 14))
    assert subset.keep.shape == (64, 98)
    edges = (kept.view(64, 14, 14)[:, 1:] != kept.view(64, 14, 14)[:, :-1]).float().mean()
    assert edges < 0.3  # 0.5 for random draws


def test_spans_need_a_sequence_and_blocks_a_grid():
    with pytest.raises(ConfigError, match="SpanMask needs a 1-D grid; segment 'image' is 2-D"):
        draw("span")
    with pytest.raises(ConfigError, match="BlockMask needs a 2-D grid; segment 'frames' is 1-D"):
        draw("block", layout=speech())
    with pytest.raises(ConfigError, match="span_length=30 exceeds the 25 cells to mask"):
        draw("span", layout=speech(), span=30)


@pytest.mark.parametrize("how", ["random", "span"])
def test_with_padding_each_row_counts_its_own_real_tokens(how):
    lengths = torch.tensor([50, 50, 33, 20, 7, 1])
    mask = torch.arange(50) < lengths[:, None]
    subset, kept = draw(how, layout=speech(), rows=6, mask=mask)
    assert kept.sum(1).tolist() == [25, 25, 17, 10, 4, 1]  # n - floor(n / 2)
    assert not (kept & ~mask).any()
    keys = mask.gather(1, subset.keep)  # what attention leaves of `keep`
    assert torch.equal(keys.sum(1), kept.sum(1))
    assert kept.gather(1, subset.keep).equal(keys)
    assert (subset.keep.diff(dim=1) > 0).all()


def test_a_recording_of_padding_only_is_named():
    mask = torch.ones(5, 50, dtype=torch.bool)
    mask[3] = False
    with pytest.raises(DataError, match="sample 3 has no real frames"):
        draw(layout=speech(), rows=5, mask=mask)


def test_an_empty_context_is_refused(monkeypatch):
    class Nothing(Masking):
        def draw(self, layout, batch_size, mask, generator):
            return Subset.ordered(torch.arange(layout.cells).expand(batch_size, -1), 0)

    monkeypatch.setattr(context, "rule", lambda *_: Nothing())  # our own rule leaves at least one
    with pytest.raises(ConfigError, match=r"masking=0.99 leaves 0 context tokens of 16; at least 1 is needed"):
        draw(masking=0.99)
