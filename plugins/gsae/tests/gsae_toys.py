"""Small dictionaries with gradients, and a subject with random weights."""

import torch

from quire import Model
from quire.datasets.activations.module import Activations
from quire.roles.language.models import CausalLM
from quire.roles.sparse.decoder import SparseDecoder
from quire.roles.sparse.encoder import SparseEncoder
from quire.roles.sparse.objective import SparseReconstruction
from quire.roles.sparse.selector import Selection

D, F, K, N = 16, 64, 4, 7


def noise(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def unit_rows(latents=F, width=D, seed=9):
    return torch.nn.functional.normalize(noise(latents, width, seed=seed), dim=1)


def context(grad=None, rows=None, training=True, count=N, **fields):
    """What a selector sees: N tokens, decoder rows, and the batch's fields."""
    x = noise(count, D, seed=3)
    batch = {"activation": x, **fields}
    if grad is not None:
        batch["grad"] = grad
    return Selection(x, x, batch, training, decoder_rows=unit_rows() if rows is None else rows, asker="the selector")


def kept(selector, z, seen):
    """The kept latents of each row, sorted."""
    return selector.select(z, seen).indices.sort(1).values


def model_of(selector, width=D, latents=F, **given):
    torch.manual_seed(0)
    objective = given.pop("objective", None) or SparseReconstruction()
    model = Model(SparseEncoder(latents, selector, **given), SparseDecoder(), objective, spec={"width": width})
    model.configure_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.train()


def feed(**given):
    small = CausalLM(width=D, depth=2, heads=2, rope=False)
    plain = {"site": "blocks.0.resid", "source": "stdlib:docs", "length": 16, "train_samples": 64}
    return Activations(**{"subject": small, **plain, "batch_size": 64, "buffer": 512, "with_grad": True, **given})
