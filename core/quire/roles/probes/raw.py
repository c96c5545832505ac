"""The input itself as features: the row that a representation has to beat."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from quire.contracts import Batch
from quire.errors import ConfigError
from quire.roles.tokens.contract import TokenEncoder
from quire.roles.tokens.patches import patchify

SIDE = 32
"""Images larger than this many pixels a side are averaged down to it, so the row stays affordable."""
TIMES = 16
"""Stretches of time that frames are averaged over."""
WORDS = 4096
"""Token ids count modulo this."""
SIGNATURE = 256
"""Numbers in the fixed random signature of a token id."""


def raw_vector(batch: Batch) -> Tensor:
    """The input as one vector [B,D].

    Pixels as they are (averaged down to ``SIDE`` a side where larger); a vector as it is; real frames averaged over
    ``TIMES`` stretches of equal length; relative counts of real token ids modulo ``WORDS``.

    Raises:
        ConfigError: a batch with none of these.
    """
    if isinstance(image := batch.get("image"), Tensor):
        return _small(image.float()).flatten(1)
    if isinstance(video := batch.get("video"), Tensor):
        return _small(video.float().flatten(1, 2)).flatten(1)
    if isinstance(vector := batch.get("vector", batch.get("activation")), Tensor) and vector.ndim == 2:
        return vector.float()
    if isinstance(frames := batch.get("frames"), Tensor):
        return _stretches(frames.float(), _real(batch, frames)).flatten(1)
    if isinstance(ids := batch.get("tokens"), Tensor):
        real = _real(batch, ids).float()
        counts = torch.zeros(len(ids), WORDS, device=ids.device, dtype=torch.float)
        return counts.scatter_add_(1, ids % WORDS, real) / real.sum(1, keepdim=True).clamp(min=1)
    raise ConfigError(f"no raw row: a batch has {', '.join(batch)}, none of image, video, vector, frames, tokens")


def raw_tokens(batch: Batch, encoder: TokenEncoder) -> tuple[Tensor, Tensor | None]:
    """The input as tokens [B,T,F] without places, and their mask.

    Image patches where the encoder cuts one image into patches; frames; for token ids a fixed random signature each;
    for anything else the raw vector as one token.
    """
    segments = encoder.layout(batch).segments
    if len(segments) == 1 and segments[0].field == "image" and len(segments[0].patch) == 2:
        return patchify(batch["image"].float(), (segments[0].patch[0], segments[0].patch[1])), None
    if segments[0].field == "frames":
        return batch["frames"].float(), _real(batch, batch["frames"])
    if segments[0].field == "tokens":
        table = torch.randn(WORDS, SIGNATURE, generator=torch.Generator().manual_seed(0), dtype=torch.float)
        return table.to(batch["tokens"].device)[batch["tokens"] % WORDS], _real(batch, batch["tokens"])
    return raw_vector(batch)[:, None], None


def _small(image: Tensor) -> Tensor:
    height, width = image.shape[-2:]
    if max(height, width) <= SIDE:
        return image
    return adaptive_avg_pool2d(image, (min(height, SIDE), min(width, SIDE)))


def _stretches(frames: Tensor, real: Tensor) -> Tensor:
    """[B,T,F] and [B,T] → [B,TIMES,F]: means over equal stretches of each row's own length, at least a frame each."""
    length = real.sum(1, keepdim=True).clamp(min=1)
    place = torch.arange(TIMES, device=frames.device)
    start = place * length // TIMES
    stop = torch.maximum(start + 1, (place + 1) * length // TIMES)
    total = torch.cat([torch.zeros_like(frames[:, :1]), frames.cumsum(1)], 1)

    def upto(end: Tensor) -> Tensor:
        return total.gather(1, end[..., None].expand(-1, -1, frames.shape[2]))

    return (upto(stop) - upto(start)) / (stop - start)[..., None]


def _real(batch: Batch, values: Tensor) -> Tensor:
    mask = batch.get("mask")
    return torch.ones(values.shape[:2], dtype=torch.bool, device=values.device) if mask is None else mask
