"""Weighted Jaccard similarity of sparse codes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from quire.errors import ConfigError, DataError


def weighted_jaccard(z: Any, p: Any) -> Tensor:
    """Sum of minima over sum of maxima, row by row; 0 where both are zero. Ruzicka; generalised Jaccard.

    The sum of maxima is the two sums less the sum of minima, so only what isn't zero is looked at.

    Args:
        z: [N,F] codes of at least 0: a tensor, an array or a scipy matrix.
        p: [F], or [M,F].

    Returns:
        [N] fp64, or [N,M].

    Raises:
        ConfigError: negative codes, or widths that differ.
        DataError: codes that are not finite.
    """
    left, right = _rows(z), _rows(p)
    if left.shape[1] != right.shape[1]:
        raise ConfigError(f"weighted Jaccard compares codes of one width, got {left.shape[1]} and {right.shape[1]}")
    out = np.zeros((left.shape[0], right.shape[0]))
    sums = np.asarray(left.sum(1)).ravel()
    for column in range(right.shape[0]):
        one = right[column].toarray().ravel()
        least = sparse.csr_matrix((np.minimum(left.data, one[left.indices]), left.indices, left.indptr), left.shape)
        low = np.asarray(least.sum(1)).ravel()
        high = sums + one.sum() - low
        out[:, column] = np.divide(low, high, out=np.zeros_like(low), where=high > 0)
    made = torch.from_numpy(out)
    return made[:, 0] if getattr(p, "ndim", 2) == 1 else made


def _rows(codes: Any) -> Any:
    if isinstance(codes, Tensor):
        codes = codes.detach().cpu().numpy()
    rows = sparse.csr_matrix(codes if sparse.issparse(codes) else np.atleast_2d(codes), dtype=np.float64)
    if not np.isfinite(rows.data).all():
        raise DataError("weighted Jaccard needs finite codes")
    if rows.nnz and rows.data.min() < 0:
        raise ConfigError(
            f"generalised Jaccard needs non-negative codes; minimum is {rows.data.min():.2g}: add ReLU or use cosine"
        )
    return rows
