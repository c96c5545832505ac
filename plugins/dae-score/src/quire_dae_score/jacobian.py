"""Jacobians of maps of a field to itself: exact by ``torch.func``, Hutchinson's estimate, and finite differences."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import jacrev, vjp

from quire.errors import ConfigError

Map = Callable[[Tensor], Tensor]
"""States [B,…] → [B,…]; a row depends on its own row alone."""

LARGEST = 64
"""Numbers a sample up to which the whole Jacobian is made."""


def check_size(size: int, remedy: str = "use jacobian=hutchinson") -> None:
    """Raise ``ConfigError`` when a whole Jacobian of ``size`` columns is too much."""
    if size > LARGEST:
        raise ConfigError(f"d is {size}, {remedy}")


def exact(function: Map, x: Tensor) -> Tensor:
    """∂r/∂x of each row, [B,D,D]: one backward pass an output, all rows and outputs together.

    Raises:
        ConfigError: more than 64 numbers a row.
    """
    check_size(x[0].numel())
    rows = jacrev(lambda z: function(z).flatten(1).sum(0))(x)  # rows don't mix, so the sum keeps them apart: [D,B,…]
    return rows.flatten(2).transpose(0, 1)


def exact_norm(function: Map, x: Tensor) -> Tensor:
    """‖∂r/∂x‖²_F of each row, [B]."""
    return exact(function, x).square().sum((1, 2))


def signs(x: Tensor, generator: torch.Generator | None) -> Tensor:
    """Random signs of the shape of ``x``: E vvᵀ = I with the least variance."""
    draw = torch.rand(x.shape, generator=generator, device=x.device, dtype=x.dtype)
    return torch.where(draw < 0.5, -1.0, 1.0).to(x.dtype)


def hutchinson_norm(function: Map, x: Tensor, probes: int, generator: torch.Generator | None = None) -> Tensor:
    """An unbiased estimate of ‖∂r/∂x‖²_F of each row, [B]: the mean of ‖Jᵀv‖² over ``probes`` random signs v."""
    out, pull = vjp(function, x)  # type: ignore[misc]
    found = [pull(signs(out, generator))[0].flatten(1).square().sum(1) for _ in range(probes)]
    return torch.stack(found).mean(0)


def difference_norm(
    function: Map, x: Tensor, probes: int, length: float, generator: torch.Generator | None = None
) -> Tensor:
    """The same from finite steps, ‖r(x + hv) − r(x)‖²/h², [B]: biased by O(h²) where r bends; no backward pass."""
    here = function(x)
    found = [
        (function(x + length * signs(x, generator)) - here).flatten(1).square().sum(1) / length**2
        for _ in range(probes)
    ]
    return torch.stack(found).mean(0)


def asymmetry(jacobian: Tensor) -> Tensor:
    """‖J − Jᵀ‖/‖J‖ of each row, [B]: 0 where the map is a gradient, up to 2."""
    apart = (jacobian - jacobian.transpose(1, 2)).flatten(1).norm(dim=1)
    return apart / jacobian.flatten(1).norm(dim=1).clamp_min(1e-30)
