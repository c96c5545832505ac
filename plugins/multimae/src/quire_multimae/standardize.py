"""Truncated standardisation of depth: invariant to the unit and to the camera's offset. Bachmann et al. 2022."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quire.contracts import Batch, Part
from quire.errors import ConfigError
from quire_multimae.adapters import tiny_run


def truncated_standardize(values: Tensor, valid: Tensor | None = None, trim: float = 0.1, eps: float = 1e-6) -> Tensor:
    """(x - m) / sqrt(v + eps), with mean and unbiased variance of what is left without the extremes of each sample.

    Args:
        values: [B,...] float.
        valid: [B,...] bool, as many as values; pixels that aren't valid count in no statistic and become 0.
        trim: Share dropped at each end, in [0, 0.5).
        eps: Added to the variance.

    Returns:
        As ``values``; 0 for a sample without two valid pixels left.
    """
    flat = values.flatten(1).double()
    real = torch.ones_like(flat, dtype=torch.bool) if valid is None else valid.reshape(flat.shape)
    ordered = torch.where(real, flat, torch.inf).sort(1).values
    count = real.sum(1, keepdim=True)
    drop = (trim * count).long()
    place = torch.arange(flat.shape[1], device=flat.device)
    kept = (place >= drop) & (place < count - drop)
    number = kept.sum(1, keepdim=True)
    ordered = torch.where(kept, ordered, 0.0)
    mean = ordered.sum(1, keepdim=True) / number.clamp(min=1)
    spread = torch.where(kept, ordered - mean, 0.0).square().sum(1, keepdim=True) / (number - 1).clamp(min=1)
    made = torch.where(real & (number > 1), (flat - mean) / (spread + eps).sqrt(), 0.0)
    return made.to(values.dtype).reshape(values.shape)


class TruncatedStandardize(Part):
    """Standardise depth in each sample, by statistics without its nearest and farthest pixels. Bachmann et al. 2022.

    Positive factors and offsets of the depth don't matter afterwards. Pixels that ``<field>_valid`` marks as missing
    count in no statistic and become 0.

    Args:
        trim: Share of pixels dropped at each end, in [0, 0.5).
        eps: Added to the variance, in the field's unit squared.
        field: Batch field [B,C,H,W] that is standardised.

    Raises:
        ConfigError: ``trim`` outside [0, 0.5) or ``eps`` not above 0.
    """

    def __init__(self, trim: float = 0.1, eps: float = 1e-6, field: str = "depth") -> None:
        super().__init__()
        if not 0 <= trim < 0.5 or eps <= 0:
            raise ConfigError(f"TruncatedStandardize needs trim in [0, 0.5) and eps > 0, got {trim} and {eps}")
        self.trim, self.eps, self.field = trim, eps, field

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """MultiMAE on generated scenes with standardised depth."""
        patch = {"patch": 8}
        run = tiny_run({"image": ("PatchAdapter", patch), "depth": ("PatchAdapter", patch)})
        transforms = [{"class_path": "TruncatedStandardize"}]
        data = {"size": 16, "length": 128, "transforms": transforms}
        return {**run, "data": {"class_path": "Shapes", "init_args": data}}

    def forward(self, batch: Batch, generator: torch.Generator) -> Batch:
        """The batch with another depth; unchanged where it has none."""
        if self.field not in batch:
            return batch
        valid = batch.get(f"{self.field}_valid")
        made = truncated_standardize(batch[self.field], valid, self.trim, self.eps)
        return {**batch, self.field: made}
