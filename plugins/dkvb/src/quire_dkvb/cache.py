"""Where each training sample landed, kept once it is known: keys and encoder are frozen (Träuble et al. 2023)."""

from __future__ import annotations

import torch
from torch import Tensor


class Lookups:
    """Indices of training samples by ``index``, filled as samples are first seen; 16 bits each where they fit.

    Args:
        samples: Training samples.
        keys: Keys a codebook.
    """

    def __init__(self, samples: int, keys: int) -> None:
        self.samples, self.kind = samples, torch.int16 if keys <= 2**15 else torch.int32
        self.held: Tensor | None = None
        self.full = self.pending = False

    def get(self, index: Tensor) -> Tensor | None:
        """Indices [B,N,C,k] int64 of these samples, and counts them as seen; None when some aren't known yet."""
        if self.held is None or not (self.full or bool(self.known[index].all())):
            return None
        self.seen.index_add_(0, index, torch.ones_like(index))
        self.pending = True
        return self.held[index].long()

    def put(self, index: Tensor, indices: Tensor) -> None:
        """Keep [B,N,C,k]."""
        if self.held is None:
            device = indices.device
            self.held = torch.empty(self.samples, *indices.shape[1:], dtype=self.kind, device=device)
            self.known = torch.zeros(self.samples, dtype=torch.bool, device=device)
            self.seen = torch.zeros(self.samples, dtype=torch.long, device=device)
        self.held[index] = indices.to(self.kind)
        self.known[index] = True
        self.full = bool(self.known.all())

    def settle(self, usage: Tensor) -> None:
        """Add to ``usage`` [C,M] what ``get`` has handed out since the last time."""
        if not self.pending:
            return
        assert self.held is not None
        for places in self.seen.nonzero()[:, 0].split(4096):
            count(usage, self.held[places].long(), self.seen[places])
        self.seen.zero_()
        self.pending = False


def count(usage: Tensor, indices: Tensor, times: Tensor | None = None) -> None:
    """Count the keys [B,N,C,k] in ``usage`` [C,M]; each sample, or each token of [B,N], ``times``."""
    rows = flat(indices, usage.shape[1])
    if times is None:
        each = torch.ones_like(rows)
    else:
        each = times.view(*times.shape, *[1] * (rows.ndim - times.ndim)).to(rows.dtype).expand_as(rows)
    usage.view(-1).index_add_(0, rows.flatten(), each.reshape(-1))


def flat(indices: Tensor, keys: int) -> Tensor:
    """Places [B,N,C,k] in all codebooks' keys behind each other."""
    books = torch.arange(indices.shape[2], device=indices.device)
    return indices + keys * books[:, None]
