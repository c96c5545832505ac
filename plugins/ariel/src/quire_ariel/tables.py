"""Probabilities as integer tables, so that encoding and decoding see the same numbers. For Celotti et al. 2020."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from quire.errors import DataError

CHUNK = 1 << 16
"""Numbers of a table that a CPU makes at a time."""


def frequencies(logits: Tensor, banned: Tensor, bits: int) -> Tensor:
    """Softmax as integers that sum to 2^bits: largest remainders, at least 1 wherever the probability is above 0.

    A row whose probabilities are all at least 2^-bits has shares of 2^bits; in another each token gets 1 first.

    Args:
        logits: [N,V] floating.
        banned: Ids [K] that get 0.
        bits: 2^bits must be at least V.

    Returns:
        [N,V] int64.

    Raises:
        DataError: logits that are not a number, or a row without any token left.
    """
    if logits.is_cuda or logits.numel() <= CHUNK:
        return _frequencies(logits, banned, bits)
    found = torch.empty(logits.shape, dtype=torch.int64)  # a dozen passes over what stays in a core's own cache
    for part, table in zip(logits.split(rows := max(1, CHUNK // logits.shape[1])), found.split(rows)):
        table.copy_(_frequencies(part, banned, bits))
    return found


def _frequencies(logits: Tensor, banned: Tensor, bits: int) -> Tensor:
    total = 1 << bits
    p = torch.softmax(logits.index_fill(1, banned, -torch.inf), -1, dtype=torch.float64)
    live = p > 0
    alive = live.sum(-1, keepdim=True)
    small = (p < 1 / total).sum(-1, keepdim=True)  # those of probability 0 among them
    first = alive * (small > p.shape[1] - alive)
    p *= total - first
    f = p.long()
    p = p.frac()  # what is left over
    f += (live & (first > 0)).long()  # of one type: mixed ones add slowly
    missing = total - f.sum(-1, keepdim=True)
    if not bool(((missing >= 0) & (missing <= alive)).all()):
        raise DataError("the language model's logits are not finite: train it again, or lower the learning rate")
    p.masked_fill_(~live, -1.0)
    return f.add_(_largest(p, missing))


def _largest(rest: Tensor, count: Tensor) -> Tensor:
    """[N,V] bool: the ``count`` [N,1] largest of each row; of equal ones the lower ids."""
    # numpy sorts short rows ten times faster
    short = rest.device.type == "cpu"
    ordered = torch.from_numpy(np.sort(rest.numpy(), axis=-1)) if short else rest.sort(dim=-1).values
    size = rest.shape[-1]
    border = ordered.gather(-1, (size - count).clamp(max=size - 1))
    border = border.masked_fill(count == 0, torch.inf)
    chosen = rest >= border
    over = chosen.sum(-1, keepdim=True) - count
    if bool((over > 0).any()):  # equal remainders at the border
        tied = rest == border
        chosen &= ~tied | (tied.cumsum(-1) <= tied.sum(-1, keepdim=True) - over)
    return chosen
