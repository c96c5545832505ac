"""Masking: which cells of a layout are kept. Exact counts on every row; one generator is the only randomness."""

from __future__ import annotations

import math
import random
from typing import Any

import torch
from torch import Tensor

from quire.contracts import Part
from quire.errors import ConfigError, DataError
from quire.roles.tokens.contract import Layout, Subset


class Masking(Part):
    """A rule that chooses cells. A part, not a Sampler: nothing is drawn from a trained model."""

    def draw(self, layout: Layout, batch_size: int, mask: Tensor | None, generator: torch.Generator) -> Subset:
        """Choose for each row the cells that are kept.

        Args:
            layout: Places of the N cells.
            batch_size: Rows, B.
            mask: [B,N] bool, True = real; None when no cell is padding. Padding is never kept, and all rows keep as
                many cells as the rule gives the row with the fewest real ones.
            generator: The only source of randomness; the subset lies on its device.

        Raises:
            ConfigError: a rule that the layout can't follow.
            DataError: a row of padding only.
        """
        raise NotImplementedError

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """Masked reconstruction of digits with this rule's defaults."""
        return tiny_with(cls.__name__)


def tiny_with(name: str, **init_args: Any) -> dict[str, Any]:
    """The smallest run of a masking: a masked autoencoder on digits."""
    trunk = {"width": 16, "depth": 1, "heads": 2}
    masking = {"class_path": name, "init_args": init_args}
    return {
        "model": {
            "encoder": {"class_path": "ViTEncoder", "init_args": {"patch": 2, **trunk}},
            "decoder": {"class_path": "GridDecoder", "init_args": trunk},
            "objective": {"class_path": "MaskedReconstruction", "init_args": {"masking": masking}},
        },
        "data": "Digits",
    }


def share(name: str, value: float) -> float:
    """``value`` if it is in [0, 1). Raises ``ConfigError`` naming the argument, the value and the range."""
    if not 0 <= value < 1:
        raise ConfigError(f"{name} must be in [0,1), got {value:g}")
    return value


def real_order(
    mask: Tensor | None, batch_size: int, cells: int, device: torch.device
) -> tuple[Tensor, Tensor | None, int]:
    """Real cells first on every row.

    Returns:
        [B,N] cell indices, real ones first and ascending; [B] real counts, None without padding; the smallest count.

    Raises:
        DataError: a row of padding only.
    """
    if mask is None:
        return torch.arange(cells, device=device).expand(batch_size, cells), None, cells
    mask = mask.to(device)
    counts = mask.sum(1)
    fewest = int(counts.min())
    if fewest == 0:
        raise DataError(f"sample {int((counts == 0).nonzero()[0])} has no real tokens")
    return torch.argsort(mask, dim=1, descending=True, stable=True), counts, fewest


class RandomMask(Masking):
    """Keep a uniformly random subset of the cells, independently per row.

    Keeps K = N - floor(ratio N) cells on every row; with padding N is the smallest real count of the batch.

    Args:
        ratio: Share of cells left out, in [0, 1).

    Raises:
        ConfigError: ``ratio`` outside [0, 1).
    """

    def __init__(self, ratio: float = 0.75) -> None:
        super().__init__()
        self.ratio = share("ratio", ratio)

    def draw(self, layout: Layout, batch_size: int, mask: Tensor | None, generator: torch.Generator) -> Subset:
        """A subset with K = N - floor(ratio N) on every row."""
        return _uniform(layout, batch_size, mask, generator, self.ratio)


class ContextSubset(Masking):
    """Choose the tokens that are keys and values: M = N - floor(masking N), rows independent. Zhai et al. 2022.

    Args:
        masking: Share of tokens left out of the context, in [0, 1).

    Raises:
        ConfigError: ``masking`` outside [0, 1), or no token left in the context.
    """

    def __init__(self, masking: float = 0.5) -> None:
        super().__init__()
        self.masking = share("masking", masking)

    def draw(self, layout: Layout, batch_size: int, mask: Tensor | None, generator: torch.Generator) -> Subset:
        """A subset whose ``keep`` is the context."""
        return _uniform(layout, batch_size, mask, generator, self.masking)


def _uniform(layout: Layout, rows: int, mask: Tensor | None, generator: torch.Generator, ratio: float) -> Subset:
    cells = layout.cells
    noise = torch.rand(rows, cells, generator=generator, device=generator.device)
    fewest = cells
    if mask is not None:
        _, _, fewest = real_order(mask, rows, cells, generator.device)
        noise = noise.masked_fill(~mask.to(generator.device), 2.0)  # padding sorts last
    return Subset.ordered(noise.argsort(1), fewest - math.floor(ratio * fewest))


class SpanMask(Masking):
    """Leave out contiguous spans of a sequence; the visible count is exact.

    Spans lie on a circle that is cut at a random place, so every cell is left out equally often and only spans at
    the ends of the sequence are shorter than ``span_length``.

    Args:
        ratio: Share of cells left out, in [0, 1).
        span_length: Least length of a span, in cells.

    Raises:
        ConfigError: ``ratio`` outside [0, 1), a 2-D segment, or fewer cells to mask than one span.
    """

    def __init__(self, ratio: float = 0.5, span_length: int = 5) -> None:
        super().__init__()
        if span_length < 1:
            raise ConfigError(f"span_length must be at least 1, got {span_length}")
        self.ratio, self.span_length = share("ratio", ratio), span_length

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """Masked reconstruction of generated speech frames."""
        run = tiny_with("SpanMask")
        run["model"]["encoder"] = {"class_path": "FrameEncoder", "init_args": {"width": 16, "depth": 1, "heads": 2}}
        return {**run, "data": "SpeechTones"}

    def draw(self, layout: Layout, batch_size: int, mask: Tensor | None, generator: torch.Generator) -> Subset:
        """A subset whose ``rest`` is made of spans (and padding)."""
        segment = layout.only()
        if len(segment.grid) != 1:
            raise ConfigError(f"SpanMask needs a 1-D grid; segment {segment.name!r} is {len(segment.grid)}-D")
        device, cells = generator.device, layout.cells
        order, counts, fewest = real_order(mask, batch_size, cells, device)
        masked = math.floor(self.ratio * fewest)
        if masked == 0:
            return Subset.ordered(order, fewest)
        if masked < self.span_length:
            raise ConfigError(f"span_length={self.span_length} exceeds the {masked} cells to mask")
        visible, spans = fewest - masked, masked // self.span_length
        real = torch.full((batch_size,), cells, device=device) if counts is None else counts
        extra = _cut(real - visible - spans * self.span_length, spans, generator)
        gaps = _cut(torch.full_like(real, visible), spans, generator)
        ends = torch.stack([self.span_length + extra, gaps], 2).flatten(1).cumsum(1)  # span, gap, span, gap…
        place = torch.arange(cells, device=device).expand(batch_size, cells)
        turn = (torch.rand(batch_size, generator=generator, device=device) * real).long()
        turned = (place + turn[:, None]) % real[:, None]
        in_gap = torch.searchsorted(ends, turned.contiguous(), right=True) % 2 == 1
        kept = in_gap & (place < real[:, None])
        chosen = torch.argsort(kept, dim=1, descending=True, stable=True)
        return Subset.ordered(order.gather(1, chosen), visible)


def _cut(total: Tensor, pieces: int, generator: torch.Generator) -> Tensor:
    """[B] totals → [B,pieces] non-negative integers with these sums, cut at uniform places."""
    noise = torch.rand(len(total), pieces - 1, generator=generator, device=generator.device)
    cuts = (noise * (total[:, None] + 1)).long().sort(1).values
    return torch.diff(torch.cat([torch.zeros_like(total)[:, None], cuts, total[:, None]], 1), dim=1)


class GridMask(Masking):
    """Keep every k-th cell, counted along the layout; nothing is random.

    Args:
        every: k, at least 1; ceil(N / k) cells are kept.

    Raises:
        ConfigError: ``every`` below 1.
    """

    def __init__(self, every: int = 2) -> None:
        super().__init__()
        if every < 1:
            raise ConfigError(f"every must be at least 1, got {every}")
        self.every = every

    def draw(self, layout: Layout, batch_size: int, mask: Tensor | None, generator: torch.Generator) -> Subset:
        """Cells 0, k, 2k… of the real ones, the same on every call."""
        order, _, fewest = real_order(mask, batch_size, layout.cells, generator.device)
        place = torch.arange(layout.cells, device=generator.device)
        chosen = (place % self.every == 0) & (place < fewest)
        first = torch.argsort(chosen, descending=True, stable=True)
        return Subset.ordered(order[:, first], math.ceil(fewest / self.every))


class BlockMask(Masking):
    """Leave out overlapping rectangles until an exact number of cells is masked. Bao et al. 2022 (BEiT); CAE.

    A block has an area between ``min_block`` and what is still to mask, a log-uniform aspect ratio and a random
    place. The middle of the grid is masked far more often than the corners: with 98 of 14x14 cells about 0.85 in the
    centre and 0.08 in a corner. That is the method's own bias and is kept.

    Args:
        masked: Share of cells in (0, 1), or their number when it is 1 or more.
        min_block: Least area that is aimed at, in cells.
        aspect: Least height / width of a block, in (0, 1]; the greatest is 1 / aspect.
        attempts: Tries for each block.

    Raises:
        ConfigError: a segment that isn't 2-D, padding, nothing masked or visible, or ``min_block`` above the number
            of masked cells.
    """

    def __init__(self, masked: float = 0.5, min_block: int = 16, aspect: float = 0.3, attempts: int = 10) -> None:
        super().__init__()
        if masked <= 0:
            raise ConfigError(f"masked must be above 0, got {masked:g}: the mask must leave at least one masked patch")
        if masked > 1 and masked != int(masked):
            raise ConfigError(f"masked must be a share in (0,1) or a whole number of cells, got {masked:g}")
        if min_block < 1 or attempts < 1:
            raise ConfigError(f"min_block and attempts must be at least 1, got {min_block} and {attempts}")
        if not 0 < aspect <= 1:
            raise ConfigError(f"aspect must be in (0,1], got {aspect:g}")
        self.masked, self.min_block, self.aspect, self.attempts = masked, min_block, aspect, attempts

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """Masked reconstruction of digits with small blocks."""
        return tiny_with("BlockMask", min_block=2)

    def draw(self, layout: Layout, batch_size: int, mask: Tensor | None, generator: torch.Generator) -> Subset:
        """A subset whose ``rest`` is the union of blocks. One number is drawn from ``generator``, on its device."""
        segment = layout.only()
        if len(segment.grid) != 2:
            raise ConfigError(f"BlockMask needs a 2-D grid; segment {segment.name!r} is {len(segment.grid)}-D")
        if mask is not None and not bool(mask.all()):
            raise ConfigError("BlockMask needs grids without padding; use RandomMask")
        cells = layout.cells
        count = math.floor(self.masked * cells) if self.masked < 1 else int(self.masked)
        if not 0 < count < cells:
            raise ConfigError(
                f"{count} of {cells} are masked; the mask must leave at least one visible and one masked patch"
            )
        if self.min_block > count:
            raise ConfigError(f"min_block={self.min_block} exceeds the {count} cells to mask")
        seed = int(torch.randint(2**62, (1,), generator=generator, device=generator.device))
        rng = random.Random(seed)
        height, width = segment.grid
        rows = [self._one(height, width, count, rng) for _ in range(batch_size)]
        hidden = torch.tensor(rows, dtype=torch.bool, device=generator.device)
        return Subset.ordered(torch.argsort(hidden, dim=1, stable=True), cells - count)

    def _one(self, height: int, width: int, count: int, rng: random.Random) -> list[int]:
        grid = [0] * (height * width)
        low, high = math.log(self.aspect), -math.log(self.aspect)
        left, idle = count, 0
        while left:
            fresh: list[int] = []
            for _ in range(self.attempts):
                area, ratio = rng.uniform(min(self.min_block, left), left), math.exp(rng.uniform(low, high))
                h, w = max(1, round(math.sqrt(area * ratio))), max(1, round(math.sqrt(area / ratio)))
                if h >= height or w >= width:
                    continue
                top, side = rng.randint(0, height - h), rng.randint(0, width - w)
                block = (c for r in range(top, top + h) for c in range(r * width + side, r * width + side + w))
                fresh = [c for c in block if not grid[c]]
                if 0 < len(fresh) <= left:
                    break
                fresh = []
            idle = 0 if fresh else idle + 1
            if idle > 100:  # grids too small for any block: one cell, so it always ends
                fresh = [rng.choice([c for c, hidden in enumerate(grid) if not hidden])]
            for c in fresh:
                grid[c] = 1
            left -= len(fresh)
        return grid
