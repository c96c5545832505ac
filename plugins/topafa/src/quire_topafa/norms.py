"""Norms of inputs and codes, and the least epsilon that could make the two consistent: the theory of Lee et al. 2025.

With unit rows that overlap by at most eps, and x = sum f_i d_i over h latents, | |x|² - |f|² | <= eps (h-1) |f|². So a
code that breaks this for a small eps can't be quasi-orthogonal: eps_LBO is the least eps that it leaves possible.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quire.contracts import Batch
from quire.errors import ConfigError
from quire.roles.sparse.card import as_codes
from quire.roles.sparse.codes import SparseCodes
from quire_topafa.selector import check_rows


@torch.no_grad()
def norms(batch: Batch, codes: Any, decoder: Any) -> tuple[Tensor, Tensor]:
    """(|x| [N], |f~| [N]), f~ being the latents times their rows' norms and the bias as one latent that is always on.

    Both are in the encoder's units: the activation itself, or x~ where the encoder normalises.

    Args:
        batch: ``activation`` [N,D], or [B,T,D]; ``target`` of a transcoder.
        codes: Of it: SparseCodes, or a tensor [N,F].
        decoder: With ``W_dec`` [F,D] and, where it has a bias, ``b_dec``.

    Raises:
        ConfigError: a decoder without rows.
        DataError: a row of zeros.
    """
    rows = getattr(decoder, "W_dec", None)
    if not isinstance(rows, Tensor):
        raise ConfigError(f"eps_LBO needs the decoder's rows; {type(decoder).__name__} has no W_dec")
    codes = as_codes(codes)
    x: Tensor = batch["target"] if "target" in batch else batch["activation"]
    x = x.reshape(-1, x.shape[-1]).to(torch.float32 if x.dtype != torch.float64 else x.dtype)
    if codes.scale is not None:
        scale = codes.scale.reshape(-1, 1)
        x = x / scale if codes.shift is None else (x - codes.shift.reshape(-1, 1)) / (scale + 1e-5)
    lengths = rows.detach().to(x.dtype).norm(dim=1)
    check_rows(lengths)
    squares = _squares(codes, lengths)
    bias = getattr(decoder, "b_dec", None)
    if isinstance(bias, Tensor):
        squares = squares + bias.detach().to(x.dtype).square().sum()
    return x.norm(dim=1), squares.sqrt()


def _squares(codes: SparseCodes, lengths: Tensor) -> Tensor:
    values = codes.values.detach().reshape(-1, codes.values.shape[-1]).to(lengths.dtype)
    if codes.indices is not None:
        lengths = lengths[codes.indices.reshape(-1, codes.indices.shape[-1])]
    return (values * lengths).square().sum(1)


def eps_lbo(x: Tensor, f: Tensor, latents: int) -> Tensor:
    """| |x|² - |f|² | / ((h-1) |f|²) of norms [N]; infinite where f is 0.

    Args:
        x: [N] norms of inputs.
        f: [N] norms of codes.
        latents: h.

    Raises:
        ConfigError: fewer than 2 latents.
    """
    if latents < 2:
        raise ConfigError(f"EpsLBO needs at least 2 latents, got {latents}")
    squared = f.square()
    found = (x.square() - squared).abs() / ((latents - 1) * squared)
    return torch.where(squared > 0, found, torch.inf)
