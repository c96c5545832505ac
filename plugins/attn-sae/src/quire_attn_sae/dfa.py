"""Direct feature attribution: a latent's pre-activation as a sum over heads and source tokens (arXiv 2406.17759).

z at a token is, head by head, a weighted sum of the sources' values, and a latent's pre-activation is linear in z. So
with the attention pattern held fixed it splits exactly into one term for each head and source, and a constant. What the
pattern itself depends on, queries and keys, is not explained by this.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quire.errors import ConfigError
from quire.roles.sparse.encoder import SparseEncoder


@dataclass
class Firings:
    """M places where a latent is looked at.

    Attributes:
        rows: [M] int64, sample in the batch.
        places: [M] int64, position.
        latents: [M] int64.
    """

    rows: Tensor
    places: Tensor
    latents: Tensor

    def __len__(self) -> int:
        return len(self.rows)


def repeated(value: Tensor, heads: int) -> Tensor:
    """[B,S,H,d_h] of values [B,S,H_kv,d_h]: query heads h·H/H_kv and on share value head h under grouped queries."""
    return value.repeat_interleave(heads // value.shape[2], 2)


def entries(pattern: Tensor, value: Tensor, directions: Tensor, at: Firings) -> Tensor:
    """[M,H,S] terms of each firing: A[h,t,s] · (v[s,h] · w[h]).

    Args:
        pattern: [B,H,T,S].
        value: [B,S,H_kv,d_h].
        directions: [M,H*d_h] encoder rows of the firings' latents.
        at: Where.
    """
    heads = pattern.shape[1]
    slices = directions.unflatten(-1, (heads, -1))  # [M,H,d]
    spoken = torch.einsum("mshd,mhd->mhs", repeated(value, heads)[at.rows], slices)
    return pattern[at.rows, :, at.places] * spoken


@dataclass
class Linear:
    """A latent's pre-activation as a linear function of z at each firing: ``scale * (w · z) + constant``.

    Attributes:
        directions: [M,D] encoder rows, times the scale that the token is normalised by.
        constant: [M]: b_enc - b_dec · w, and what a normalisation's mean takes off.
    """

    directions: Tensor
    constant: Tensor


@torch.no_grad()
def linear(encoder: SparseEncoder, activation: Tensor, at: Firings) -> Linear:
    """The pre-activations of firings as linear functions of z, a normalisation held where it is.

    Args:
        encoder: Trained at the z site.
        activation: [B,T,D] z.
        at: Where.
    """
    rows = encoder.W_enc[at.latents]
    constant = rows.new_zeros(len(at)) if encoder.b_enc is None else encoder.b_enc[at.latents].clone()
    if encoder.b_dec is not None:
        constant -= rows @ encoder.b_dec
    if encoder.norm == "global_rms":
        rows = rows / encoder.rms.scale.to(rows.dtype)
    if encoder.norm == "layer":
        x = activation[at.rows, at.places].to(rows.dtype)
        rows = rows / (x.std(1, keepdim=True) + 1e-5)
        constant -= rows.sum(1) * x.mean(1)
    return Linear(rows, constant)


def strongest(codes: Tensor, mask: Tensor, wanted: list[int] | int) -> Firings:
    """The place in each sample where each wanted latent is largest, samples in order.

    Args:
        codes: [B,T,F].
        mask: [B,T] bool, True = real.
        wanted: Latents; or how many of each sample's largest, those that fire at all.

    Raises:
        ConfigError: a latent that there is not.
    """
    peak, place = codes.masked_fill(~mask[..., None], -1.0).max(1)  # [B,F]
    if isinstance(wanted, int):
        values, latents = peak.topk(min(wanted, codes.shape[-1]), 1)
        rows, columns = (values > 0).nonzero(as_tuple=True)
        latents = latents[rows, columns]
    else:
        bad = [i for i in wanted if not 0 <= i < codes.shape[-1]]
        if bad:
            raise ConfigError(f"latent {bad[0]} is not there: the dictionary has {codes.shape[-1]}")
        rows = torch.arange(len(codes), device=codes.device).repeat_interleave(len(wanted))
        latents = torch.tensor(wanted, device=codes.device).repeat(len(codes))
    return Firings(rows, place[rows, latents], latents)
