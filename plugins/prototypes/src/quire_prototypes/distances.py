"""Squared distances from codes to prototypes, and the paper's two interpretability terms over them."""

from __future__ import annotations

from torch import Tensor


def squared_distances(features: Tensor, prototypes: Tensor) -> Tensor:
    """D_ij = ‖f(x_i) − p_j‖²: [B,D] and [m,D] → [B,m] float32.

    Subtracted directly: expanding the square loses digits and can turn negative near a prototype.
    """
    return (features.float()[:, None] - prototypes.float()[None]).square().sum(-1)


def r1(distances: Tensor) -> Tensor:
    """Mean over prototypes of the distance to the nearest example of the batch: each prototype near some example."""
    return distances.min(dim=0).values.mean()


def r2(distances: Tensor) -> Tensor:
    """Mean over examples of the distance to the nearest prototype: each example near some prototype."""
    return distances.min(dim=1).values.mean()
