"""A k-sparse autoencoder in plain PyTorch, dense as textbooks write it: what the sparse path is measured against."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, normalize


class Dense(nn.Module):
    """Linear, top-k, scatter, matmul; ``forward`` is the loss."""

    def __init__(self, width: int, latents: int, k: int) -> None:
        super().__init__()
        rows = normalize(torch.randn(latents, width), dim=1)
        self.k = k
        self.W_enc, self.W_dec = nn.Parameter(rows.clone()), nn.Parameter(rows)
        self.b_enc, self.b_dec = nn.Parameter(torch.zeros(latents)), nn.Parameter(torch.zeros(width))
        self.register_buffer("since", torch.zeros(latents, dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        z = linear(x - self.b_dec, self.W_enc, self.b_enc).relu()
        values, indices = z.topk(self.k, 1, sorted=False)
        codes = torch.zeros_like(z).scatter(1, indices, values)
        self.fired = torch.zeros_like(self.since).index_add_(0, indices.flatten(), (values > 0).long().flatten())
        return (codes @ self.W_dec + self.b_dec - x).square().sum(1).mean()


def step_of(module: Dense, rate: float) -> Any:
    """A function of a batch that runs one step: loss, projected gradient, Adam, unit rows, dead counters."""
    optimizer = torch.optim.Adam(module.parameters(), lr=rate, fused=True)

    def step(x: Tensor) -> float:
        optimizer.zero_grad()
        loss = module(x)
        loss.backward()
        with torch.no_grad():
            gradient, rows = module.W_dec.grad, module.W_dec
            gradient.addcmul_(rows, torch.linalg.vecdot(gradient, rows)[:, None], value=-1)
            optimizer.step()
            rows.div_(rows.norm(dim=1, keepdim=True))
            module.since = torch.where(module.fired > 0, 0, module.since + len(x))
        return loss.item()

    return step
