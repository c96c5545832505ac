"""Positions for any grid: fixed sin-cos tables, learned tables with interpolation, rotary angles for sequences."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from quire.errors import ConfigError
from quire.roles.tokens.contract import POSITIONS, Layout, Segment, TokenEncoder


def check_kind(kind: str, allowed: tuple[str, ...] = POSITIONS) -> str:
    """``kind`` if it is one of ``allowed``. Raises ``ConfigError`` with the words there are."""
    if kind not in allowed:
        raise ConfigError(f"positions must be one of {', '.join(allowed)}, got {kind!r}")
    return kind


def attached(encoder: TokenEncoder, kind: str, init: str, own: str) -> bool:
    """Note that an encoder has positions from now on; its ``init_args`` say so, so a checkpoint rebuilds with them.

    Args:
        encoder: What gets them.
        kind: ``learned`` or ``sincos``.
        init: ``zeros`` or ``normal``.
        own: The kind that ``attach_positions`` can give and it has.

    Returns:
        False when it has this kind already.

    Raises:
        ConfigError: another word, or other positions already.
    """
    check_kind(kind, ("learned", "sincos"))
    if init not in ("zeros", "normal"):
        raise ConfigError(f"positions start with zeros or normal, got {init!r}")
    if own == kind:
        return False
    if encoder.positions != "none":
        name = type(encoder).__name__
        raise ConfigError(f"{name} has {encoder.positions} positions already; it can't get {kind} ones")
    encoder.positions = encoder.init_args["positions"] = kind
    return True


def sincos(grid: tuple[int, ...], width: int) -> Tensor:
    """Fixed table [N,D] for a grid of 1, 2 or 3 axes, row-major.

    Each axis has an equal part of the width, in the grid's order (y then x on a 2-D grid); a coordinate p gives
    [sin(p w), cos(p w)] with w_j = 10000^(-j / n) for the n frequencies of the part.

    Raises:
        ConfigError: a width that 2 x axes doesn't divide.
    """
    axes = len(grid)
    if width % (2 * axes):
        raise ConfigError(f"sincos positions on a {axes}-D grid need width divisible by {2 * axes}, got {width}")
    count = width // (2 * axes)
    omega = 10000.0 ** (-torch.arange(count, dtype=torch.float64) / count)
    parts = []
    for axis, size in enumerate(grid):
        angle = torch.arange(size, dtype=torch.float64)[:, None] * omega
        part = torch.cat([angle.sin(), angle.cos()], 1)
        shape = [1] * axes
        shape[axis] = size
        parts.append(part.reshape(*shape, -1).expand(*grid, -1))
    return torch.cat(parts, -1).reshape(-1, width).float()


def interpolate(table: Tensor, old: tuple[int, ...], new: tuple[int, ...]) -> Tensor:
    """A learned table [N,D] on another grid: bicubic on 2-D, linear on 1-D, trilinear on 3-D; equal grids give it back.

    Raises:
        ConfigError: grids with different numbers of axes.
    """
    if old == new:
        return table
    if len(old) != len(new):
        raise ConfigError(
            f"a {len(old)}-D position table can't be resized to the {len(new)}-D grid {'x'.join(map(str, new))}"
        )
    field = table.float().reshape(*old, -1).movedim(-1, 0)[None]
    mode = {1: "linear", 2: "bicubic", 3: "trilinear"}[len(old)]
    resized = nn.functional.interpolate(field, size=new, mode=mode, align_corners=False)
    return resized[0].movedim(0, -1).reshape(-1, table.shape[1]).to(table.dtype)


class Positions(nn.Module):
    """One row of width D for each cell, fixed or learned; prefix tokens have none.

    Args:
        kind: ``sincos`` or ``learned``.
        layout: The layout it is made for. On others a sin-cos table is computed, a learned one is interpolated; a
            shorter sequence takes the first rows.
        width: D.
        std: Standard deviation of a learned table's start; 0 is zeros.
    """

    def __init__(self, kind: str, layout: Layout, width: int, std: float = 0.02) -> None:
        super().__init__()
        self.kind, self.layout, self.width = kind, layout, width
        if kind == "learned":
            self.table = nn.Parameter(torch.zeros(layout.cells, width))
            if std > 0:
                nn.init.trunc_normal_(self.table, std=std)
        else:
            self.register_buffer("table", torch.cat([sincos(s.grid, width) for s in layout.segments]), persistent=False)

    def forward(self, layout: Layout) -> Tensor:
        """[N,D] for ``layout``."""
        if [(s.name, s.grid) for s in layout.segments] == [(s.name, s.grid) for s in self.layout.segments]:
            return self.table
        return torch.cat([self._rows(segment) for segment in layout.segments])

    def _rows(self, segment: Segment) -> Tensor:
        home = next((s for s in self.layout.segments if s.name == segment.name), None)
        if home is not None and len(segment.grid) == len(home.grid) == 1 and segment.cells <= home.cells:
            return self.table[home.start : home.start + segment.cells]  # a shorter sequence keeps its places
        if self.kind == "sincos":
            return sincos(segment.grid, self.width).to(self.table)
        if home is None:
            raise ConfigError(f"no positions were learned for the segment {segment.name!r}")
        if len(segment.grid) == 1:
            raise ConfigError(
                f"positions were learned for {home.cells} places, {segment.field} has {segment.cells}: cut it shorter"
            )
        return interpolate(self.table[home.start : home.stop], home.grid, segment.grid)


def rotary(index: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines [B,1,T,width/2] of the angles of places ``index`` [B,T], for heads of ``width``."""
    omega = 10000.0 ** (-torch.arange(width // 2, device=index.device).float() / (width // 2))
    angle = index[:, None, :, None].float() * omega
    return angle.cos(), angle.sin()


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Turn queries or keys [B,H,T,width] by ``rotary``'s angles; dimension j is paired with j + width/2."""
    cos, sin = rotation[0].to(x.dtype), rotation[1].to(x.dtype)
    left, right = x.chunk(2, -1)
    return torch.cat([left * cos - right * sin, right * cos + left * sin], -1)
