"""Small dictionaries, built, and the same computed densely by plain autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quire import Model
from quire.roles.sparse.decoder import SparseDecoder
from quire.roles.sparse.encoder import SparseEncoder
from quire.roles.sparse.objective import SparseReconstruction
from quire.roles.sparse.selectors import TopK

D, F, K, N = 16, 96, 4, 50


def model_of(selector: Any = None, width: int = D, latents: int = F, dtype: Any = torch.float64, **given: Any) -> Model:
    """A built dictionary with weights away from their start; ``given`` goes to SparseEncoder."""
    objective = given.pop("objective", None) or SparseReconstruction()
    decoder = given.pop("decoder", None) or SparseDecoder()
    spec = {"width": width, **given.pop("spec", {})}
    torch.manual_seed(0)
    encoder = SparseEncoder(latents, selector or TopK(K), **given)
    model = Model(encoder, decoder, objective, spec=spec)
    model.configure_model()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model.to(dtype).train()


def rows(count: int = N, width: int = D, dtype: Any = torch.float64, seed: int = 1) -> Tensor:
    """[N,D] noise."""
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def dense_codes(model: Model, x: Tensor, indices: Tensor) -> Tensor:
    """[N,F] of the latents at ``indices``, in plain autograd."""
    encoder = model.encoder
    z = torch.relu((x - encoder.b_dec) @ encoder.W_enc.T + encoder.b_enc)
    return torch.zeros_like(z).scatter(1, indices, z.gather(1, indices))


def gradients(model: Model, loss: Tensor, *more: Tensor) -> dict[str, Tensor]:
    """Gradients of a loss by parameter name, and of ``more`` by number."""
    names = [n for n, _ in model.named_parameters()]
    found = torch.autograd.grad(loss, [*model.parameters(), *more], allow_unused=True)
    keys = [*names, *map(str, range(len(more)))]
    return {k: g if g is not None else torch.zeros(()) for k, g in zip(keys, found)}
