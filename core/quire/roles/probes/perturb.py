"""A slightly changed copy of a batch: the second view of each sample, without knowing what the data is."""

from __future__ import annotations

import torch
from torch import Tensor

from quire.contracts import Batch

RANGES: dict[str, tuple[float, float] | None] = {
    "image": (0.0, 1.0),
    "depth": None,
    "edges": (0.0, 1.0),
    "video": (0.0, 1.0),
    "audio": (-1.0, 1.0),
    "frames": None,
    "vector": None,
    "activation": None,
}
"""Float fields that get noise, with the range they are kept in."""


def perturb(batch: Batch, noise: float, generator: torch.Generator) -> Batch | None:
    """The batch with a little noise in its inputs.

    Args:
        batch: On one device.
        noise: Float fields get Gaussian noise of this many of their own standard deviations; of ``tokens`` this
            share of the real, not special ones is replaced by other tokens of the batch.
        generator: On that device.

    Returns:
        A new batch, None when it has no field that can be changed.
    """
    changed: Batch = {}
    for name, limits in RANGES.items():
        if isinstance(value := batch.get(name), Tensor) and value.is_floating_point():
            jitter = torch.randn(value.shape, generator=generator, device=value.device, dtype=value.dtype)
            made = value + noise * value.std() * jitter
            changed[name] = made if limits is None else made.clamp(*limits)
    if isinstance(ids := batch.get("tokens"), Tensor):
        changed["tokens"] = _replaced(ids, batch, noise, generator)
    return {**batch, **changed} if changed else None


def _replaced(ids: Tensor, batch: Batch, share: float, generator: torch.Generator) -> Tensor:
    free = torch.ones_like(ids, dtype=torch.bool)
    if isinstance(mask := batch.get("mask"), Tensor):
        free = free & mask
    if isinstance(special := batch.get("special"), Tensor):
        free = free & ~special.bool()
    words = ids[free]
    if not len(words):
        return ids
    others = words[torch.randint(len(words), ids.shape, generator=generator, device=ids.device)]
    swap = free & (torch.rand(ids.shape, generator=generator, device=ids.device) < share)
    return torch.where(swap, others, ids)
