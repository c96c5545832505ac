"""Normalisation of activations before a dictionary, and what undoes it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from quire.errors import ConfigError
from quire.roles.sparse.ranks import sum_over_ranks

NORMS = ("none", "layer", "global_rms")
FITTED_ON = 100_000
"""Training rows that ``global_rms`` is fitted on."""


class GlobalRms(nn.Module):
    """One scalar that brings the mean squared norm of the first 100,000 training rows to D; then it stays."""

    squares: Tensor
    rows: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("squares", torch.zeros((), dtype=torch.float64))  # sum of squares per row and width
        self.register_buffer("rows", torch.zeros((), dtype=torch.float64))
        self._seen: float | None = None  # on the host, so that no step waits for the device

    @torch.no_grad()
    def fit(self, rows: Tensor) -> None:
        """Add training rows [N,D] until there are enough; those of all processes count."""
        if self._seen is None or self._seen == 0:
            self._seen = float(self.rows)
        if self._seen < FITTED_ON:
            squares = rows.double().square().mean(1).sum()
            added = sum_over_ranks(torch.stack([squares, squares.new_tensor(len(rows))]))
            self.squares += added[0]
            self.rows += added[1]
            self._seen = float(self.rows)

    @property
    def scale(self) -> Tensor:
        """Scalar to divide by; 1 before any row was seen."""
        found = (self.squares / self.rows.clamp(min=1)).sqrt()
        return torch.where((self.rows > 0) & (found > 0), found, 1.0)

    def forget(self) -> None:
        """As before any row."""
        self.squares.zero_()
        self.rows.zero_()
        self._seen = None

    def set(self, scale: float) -> None:
        """Take a scalar as fitted."""
        self.squares.fill_(scale * scale * FITTED_ON)
        self.rows.fill_(FITTED_ON)
        self._seen = None


def check_norm(norm: str) -> str:
    """``norm`` if it is one. Raises ``ConfigError``."""
    if norm not in NORMS:
        raise ConfigError(f"SparseEncoder.norm must be {', '.join(NORMS)}, got {norm!r}")
    return norm


def layer(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(normalised, mean [N,1], std [N,1]) over the width, unbiased; undone by std without the 1e-5."""
    mean, std = rows.mean(1, keepdim=True), rows.std(1, keepdim=True)
    return (rows - mean) / (std + 1e-5), mean, std
