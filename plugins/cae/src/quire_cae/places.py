"""Where cells are, for the regressor and the decoder: fixed sin-cos, and a learned vector a segment if several."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from quire.roles.tokens.contract import Layout
from quire.roles.tokens.positions import Positions


class Places(nn.Module):
    """One row of width D for each cell.

    Cells of different segments share their sin-cos rows, so with several segments each adds a learned vector.

    Args:
        layout: The layout it is made for; others are computed when they come.
        width: D.
    """

    def __init__(self, layout: Layout, width: int) -> None:
        super().__init__()
        self.positions = Positions("sincos", layout, width)
        several = len(layout.segments) > 1
        self.segments = nn.Parameter(torch.randn(len(layout.segments), width) * 0.02) if several else None

    def forward(self, layout: Layout) -> Tensor:
        """[N,D]."""
        rows = self.positions(layout)
        return rows if self.segments is None else rows + self.segments[layout.segment_id.to(rows.device)]
