"""What a latent's direction does behind its site: to the logits by the direct path, and which heads it lies in."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from quire.roles.sites.anatomy import Place, slices
from quire.roles.sites.subject import Subject

HEADS = ("lm_head", "head", "embed_out", "output")
FINALS = ("ln_f", "norm", "final_layer_norm", "final_layernorm", "final", "ln_final", "norm_f")


@torch.no_grad()
def residual_rows(rows: Tensor, place: Place) -> Tensor:
    """Decoder rows [n,D] as what they add to the residual stream: those at a ``z`` site go through the projection."""
    if place.heads and place.side == "input":
        whole = slices(place.module, place.heads).flatten(0, 1)
        return rows.to(whole) @ whole
    return rows


@torch.no_grad()
def logit_effects(rows: Tensor, subject: Subject) -> Tensor | None:
    """[n,V] what each residual direction adds to the logits by the direct path, less its mean over the vocabulary.

    The final norm's gain is folded in; its scale, which differs from token to token, is left out. None where the
    subject has no unembedding that fits.
    """
    matrix = unembedding(subject)
    if matrix is None or matrix.shape[1] != rows.shape[1]:
        return None
    gain = _final_gain(subject, rows.shape[1])
    made = (rows.to(matrix) * (1 if gain is None else gain.to(matrix))) @ matrix.T
    return (made - made.mean(1, keepdim=True)).float()


def unembedding(subject: Subject) -> Tensor | None:
    """[V,D]; None where none is found."""
    if not subject.language:
        return None
    ask = getattr(subject.root, "get_output_embeddings", None)
    found: Any = ask() if callable(ask) else None
    for name in HEADS:
        found = found if found is not None else getattr(subject.root, name, None)
    weight = getattr(found, "weight", None)
    return weight if isinstance(weight, Tensor) and weight.ndim == 2 else None


def _final_gain(subject: Subject, width: int) -> Tensor | None:
    """The final norm's gain: the last module of a fitting name that lies in no block."""
    inside = {id(m) for block in subject.sites.anatomy.blocks for m in block.modules()}
    gain = None
    for name, module in subject.root.named_modules():
        if name.rpartition(".")[2] in FINALS and id(module) not in inside:
            weight = getattr(module, "weight", None)
            if isinstance(weight, nn.Parameter) and weight.shape == (width,):
                gain = weight
    return gain


@torch.no_grad()
def head_shares(rows: Tensor, heads: int) -> Tensor:
    """[n,H]: norm of each head's slice of a row at a ``z`` site, over their sum. Kissane et al. 2024."""
    norms = rows.unflatten(1, (heads, -1)).norm(dim=2)
    return norms / norms.sum(1, keepdim=True).clamp(min=1e-12)
