"""What all drafts of a prompt share: one distribution out of the model, one mixed embedding into it."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def superposition(embeds: Tensor, weights: np.ndarray) -> Tensor:
    """x = Σ_j u_j · embeds_j: [P,k,D] and u [P,k] → [P,1,D], summed in fp32."""
    u = torch.from_numpy(weights).to(embeds.device, torch.float32)
    return torch.bmm(u[:, None], embeds.float()).to(embeds.dtype)


def likeliest(logits: Tensor, count: int | None) -> tuple[np.ndarray, np.ndarray]:
    """The ``count`` largest of the last dimension, ids ascending, with their renormalised log-probabilities.

    Of equal logits at the border the lower ids are in. None takes all.
    """
    size = logits.shape[-1]
    if count is None or count >= size:
        ids = np.broadcast_to(np.arange(size), (*logits.shape[:-1], size))
        return ids, torch.log_softmax(logits, -1).double().cpu().numpy()
    top = logits.topk(count + 1, -1)
    values, places = top.values.cpu().numpy(), top.indices.cpu().numpy()
    if (values[..., count - 1] == values[..., count]).any():
        ordered = logits.sort(dim=-1, descending=True, stable=True)
        values, places = ordered.values.cpu().numpy(), ordered.indices.cpu().numpy()
    values, places = values[..., :count].astype(np.float64), places[..., :count]
    with np.errstate(invalid="ignore"):  # -inf throughout, where a processor forbids everything
        values -= values[..., :1]  # the largest, so that no exponent overflows
        values -= np.log(np.exp(values).sum(-1, keepdims=True))
    order = np.argsort(places, axis=-1)
    return np.take_along_axis(places, order, -1), np.take_along_axis(values, order, -1)
