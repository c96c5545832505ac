"""Sparse codes: which latents are active and how much, as short rows of indices or as whole rows."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from quire.contracts import Codes


@dataclass
class SparseCodes(Codes):
    """The active latents of each token. A kept value that is 0 counts as not active, everywhere.

    Attributes:
        values: [N,K] float, the kept latents in any order; [N,F] of all latents where ``indices`` is None. Tokens of
            [B,T,D] activations give [B,T,K].
        indices: [N,K] int64, or None.
        latents: F.
        shift: [N,1] that the decoder adds after its scale, or None (see ``SparseEncoder.norm``).
        scale: [N,1] that the decoder multiplies by, or None.
        count: [N] float, active latents as a number with a gradient, or None (JumpReLU has it).
        nested: Codes of fewer latents, for selectors that select several times.
    """

    values: Tensor
    indices: Tensor | None
    latents: int
    shift: Tensor | None = None
    scale: Tensor | None = None
    count: Tensor | None = None
    nested: tuple[SparseCodes, ...] = ()

    @property
    def mask(self) -> Tensor:
        """[N,K] bool: which of the kept are active."""
        return self.values > 0

    def l0(self) -> Tensor:
        """[N] int64: active latents of each token."""
        return self.mask.sum(-1)

    def dense(self) -> Tensor:
        """[N,F] with a 0 for every latent that is not kept."""
        if self.indices is None:
            return self.values
        empty = self.values.new_zeros(*self.values.shape[:-1], self.latents)
        return empty.scatter_add(-1, self.indices, self.values)

    def fired(self) -> Tensor:
        """[F] int64: on how many tokens each latent is active."""
        active = self.mask.flatten(0, -2)
        if self.indices is None:
            return active.sum(0)
        counts = torch.zeros(self.latents, dtype=torch.long, device=active.device)
        return counts.index_add_(0, self.indices.flatten(), active.flatten().long())

    def replace(self, **changes: object) -> SparseCodes:
        """The same codes with some fields changed: ``codes.replace(values=...)`` decodes an edit."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]

    def unflatten(self, leading: tuple[int, ...]) -> SparseCodes:
        """Rows [N,·] as [*leading,·]."""
        if len(leading) == 1:
            return self
        shaped = {k: v.unflatten(0, leading) for k, v in self.tensors().items()}
        return self.replace(**shaped, nested=tuple(n.unflatten(leading) for n in self.nested))


def packed(kept: Tensor, latents: int | None = None) -> SparseCodes:
    """Codes with short rows from [N,F] values that are 0 where nothing is kept; K is the longest row, at least 1."""
    longest = max(1, int((kept > 0).sum(-1).max()))
    values, indices = kept.topk(longest, -1, sorted=False)
    return SparseCodes(values, indices, latents or kept.shape[-1])
