"""The arithmetic of Träuble et al. 2023: heads, lookup, fetching values, and keys by moving averages or k-means.

Shapes: features [n,D], heads h [n,C,d], keys K [C,M,d], values V [C,M,V]; n counts tokens of all samples.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import embedding_bag, normalize

from quire.roles.sparse.ranks import ranks, sum_over_ranks

HELD = 2**21
"""Distances held at once: with the paper's sizes all of a batch's would be a gigabyte."""
EPSILON = 1e-5


def random_heads(width: int, codebooks: int, key_width: int) -> Tensor:
    """R [D,C,d]: Gaussian, each column of unit length along D."""
    return normalize(torch.randn(width, codebooks, key_width), dim=0)


# ---- lookup
@torch.no_grad()
def nearest(heads: Tensor, keys: Tensor, top_k: int = 1, allowed: Tensor | None = None) -> Tensor:
    """[n,C,k] int64: the nearest keys of each head vector; of equals the lowest index.

    Differences are squared directly, in float32: a product of matrices is half a time faster, but loses digits, breaks
    ties by place, and depends on the batch.

    Args:
        heads: [n,C,d].
        keys: [C,M,d].
        top_k: How many.
        allowed: [C,M] bool; keys that are not are infinitely far.
    """
    rows, codebooks, count = len(heads), keys.shape[0], keys.shape[1]
    found = torch.empty(codebooks, rows, top_k, dtype=torch.long, device=keys.device)
    heads, keys = heads.float().transpose(0, 1), keys.float()
    height = max(1, min(rows, HELD // count))
    step = max(1, HELD // (height * count))
    with torch.autocast(keys.device.type, enabled=False):
        for c in range(0, codebooks, step):
            books = slice(c, c + step)
            for start in range(0, rows, height):
                part = slice(start, start + height)
                gaps = torch.cdist(heads[books, part], keys[books], compute_mode="donot_use_mm_for_euclid_dist")
                if allowed is not None:
                    gaps = gaps.masked_fill(~allowed[books, None], torch.inf)
                if top_k == 1:
                    found[books, part, 0] = gaps.argmin(-1)
                else:
                    found[books, part] = gaps.topk(top_k, dim=-1, largest=False).indices
    return found.transpose(0, 1)


def softly(heads: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """[n,C,V]: values weighed by exp(-distance²/t), t the mean squared distance to the nearest key.

    Ours, for its derivative by the heads alone: the lookup has none, and the paper trains without one.
    """
    gaps = torch.cdist(heads.transpose(0, 1), keys).square()
    scale = gaps.detach().amin(-1).mean().clamp(min=1e-12)
    return ((-gaps / scale).softmax(-1) @ values).transpose(0, 1)


class _Bag(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, table: Tensor, rows: Tensor, weights: Tensor | None) -> Tensor:
        ctx.save_for_backward(rows, weights)
        ctx.size = table.shape
        return embedding_bag(rows, table, mode="sum", per_sample_weights=weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        rows, weights = ctx.saved_tensors
        each = grad[:, None].expand(*rows.shape, grad.shape[-1])
        if weights is not None:
            each = each * weights[..., None]
        moved = grad.new_zeros(ctx.size)  # dense: as fast as a sparse one here, and every optimizer and DDP takes it
        moved.index_put_((rows.flatten(),), each.reshape(-1, grad.shape[-1]), accumulate=True)
        return moved, None, None


def bag(table: Tensor, rows: Tensor, weights: Tensor | None = None) -> Tensor:
    """[b,V]: weighted sums of the table's rows. Rows that are not fetched get a gradient of exactly 0.

    Args:
        table: [R,V].
        rows: [b,L] int64.
        weights: [b,L], or None for 1 each.
    """
    weights = None if weights is None else weights.to(table.dtype)
    return _Bag.apply(table, rows, weights)


# ---- keys
@dataclass
class Averages:
    """Moving averages of what each key was nearest to.

    Attributes:
        size: [C,M], how many. total: [C,M,d], their sum.
    """

    size: Tensor
    total: Tensor

    @classmethod
    def start(cls, keys: Tensor, weight: float) -> Averages:
        """Averages that say ``keys``, as if each had been nearest to ``weight`` head vectors of a batch."""
        size = keys.new_full(keys.shape[:2], weight)
        return cls(size, keys * weight)


@torch.no_grad()
def ema_step(
    keys: Tensor, averages: Averages, heads: Tensor, decay: float, dead_factor: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Move the keys towards what they are nearest to, in place; replace dead ones by head vectors of the batch.

    Counts and sums are those of all processes, and so is the batch that replacements are drawn from. A replaced key's
    averages are set too, else the next step would undo it.

    Args:
        keys: [C,M,d].
        averages: As ``keys`` stand.
        heads: [n,C,d] of this process, in the same order of processes on all.
        decay: gamma.
        dead_factor: A key is dead below this share of the mean count n/M.
        generator: On the CPU, in the same state on all processes.

    Returns:
        The keys' places [n,C] before the step, and the number of keys replaced.
    """
    codebooks, count, width = keys.shape
    chosen = nearest(heads, keys)[..., 0]
    flat = (chosen + count * torch.arange(codebooks, device=keys.device)).flatten()
    size = keys.new_zeros(codebooks * count).index_add_(0, flat, keys.new_ones(len(flat)))
    total = keys.new_zeros(codebooks * count, width).index_add_(0, flat, heads.reshape(-1, width).to(keys.dtype))
    size, total = sum_over_ranks(size).view(codebooks, count), sum_over_ranks(total).view_as(keys)
    averages.size.mul_(decay).add_(size, alpha=1 - decay)
    averages.total.mul_(decay).add_(total, alpha=1 - decay)
    everything = averages.size.sum(1, keepdim=True)
    smooth = (averages.size + EPSILON) / (everything + count * EPSILON) * everything  # Laplace
    keys.copy_(torch.where((averages.size > 0)[..., None], averages.total / smooth[..., None], keys))
    first, rows = _place(len(heads), keys.device)
    threshold = dead_factor * rows / count
    books, places = (averages.size < threshold).nonzero(as_tuple=True)
    if len(books):
        drawn = torch.randint(rows, (len(books),), generator=generator).to(keys.device) - first
        mine = (drawn >= 0) & (drawn < len(heads))
        here = heads[drawn.clamp(0, len(heads) - 1), books].to(keys.dtype)
        fresh = sum_over_ranks(torch.where(mine[:, None], here, 0.0))
        keys[books, places] = fresh
        averages.size[books, places] = threshold
        averages.total[books, places] = fresh * threshold
    return chosen, torch.tensor(len(books))


def _place(rows: int, device: torch.device) -> tuple[int, int]:
    """(number of rows on the processes before this one, on all)."""
    if ranks() == 1:
        return 0, rows
    every = torch.zeros(ranks(), dtype=torch.long, device=device)
    rank = torch.distributed.get_rank()
    every[rank] = rows
    counts = sum_over_ranks(every).tolist()
    return sum(counts[:rank]), sum(counts)


@torch.no_grad()
def kmeans(heads: Tensor, count: int, generator: torch.Generator, rounds: int = 10) -> Tensor:
    """[C,count,d]: k-means centres of each codebook's head vectors [n,C,d], n at least ``count``; k-means++ starts."""
    points = heads.float().transpose(0, 1).cpu()
    codebooks, rows, width = points.shape
    books = torch.arange(codebooks)
    place = torch.randint(rows, (codebooks,), generator=generator)
    centres = [points[books, place]]
    gap = (points - centres[0][:, None]).square().sum(-1)
    for _ in range(1, count):
        weights = torch.where(gap.sum(1, keepdim=True) > 0, gap, 1.0)  # all points are centres: any will do
        place = torch.multinomial(weights, 1, generator=generator)[:, 0]
        centres.append(points[books, place])
        gap = torch.minimum(gap, (points - centres[-1][:, None]).square().sum(-1))
    keys = torch.stack(centres, 1)
    for _ in range(rounds):
        chosen = nearest(heads.cpu(), keys)[..., 0].T  # [C,n]
        size = torch.zeros(codebooks, count).scatter_add_(1, chosen, torch.ones(codebooks, rows))
        total = torch.zeros_like(keys).scatter_add_(1, chosen[..., None].expand(-1, -1, width), points)
        keys = torch.where(size[..., None] > 0, total / size[..., None].clamp(min=1), keys)
    return keys.to(heads.device)


def distortion(heads: Tensor, keys: Tensor) -> Tensor:
    """Mean squared distance from a head vector to its nearest key, over the heads' variance; 1 says nothing is kept."""
    chosen = nearest(heads, keys)[..., 0]
    fetched = keys[torch.arange(keys.shape[0], device=keys.device), chosen]
    return (heads - fetched).square().mean() / heads.var(0, correction=0).mean().clamp(min=1e-12)
