"""The geometric median: the point with the least sum of distances to all rows."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def geometric_median(rows: Tensor, iterations: int = 100, shift: float = 1e-5) -> Tensor:
    """Weiszfeld's iteration in float32, started at the mean.

    Args:
        rows: [N,D]; half precision is raised to float32, double stays.
        iterations: Most iterations.
        shift: Stop when the point moves less than this.

    Returns:
        [D], in the precision it was computed in.
    """
    rows = rows if rows.dtype == torch.float64 else rows.float()
    point = rows.mean(0)
    for _ in range(iterations):
        weights = 1 / (rows - point).norm(dim=1).clamp(min=1e-12)
        moved = weights @ rows / weights.sum()
        near = (moved - point).norm() < shift
        point = moved
        if near:
            break
    return point
