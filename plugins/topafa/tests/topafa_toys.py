"""Small dictionaries and feeds for the tests."""

import torch

from quire import Model
from quire.datasets.activations.module import Activations
from quire.roles.language.models import CausalLM
from quire.roles.sparse.decoder import SparseDecoder
from quire.roles.sparse.encoder import SparseEncoder
from quire.roles.sparse.objective import SparseReconstruction
from quire.roles.sparse.selector import Selection

D, F, N = 16, 64, 9


def noise(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def unit_rows(latents=F, width=D, seed=9):
    return torch.nn.functional.normalize(noise(latents, width, seed=seed), dim=1)


def context(u, rows=None, training=True, **fields):
    """What a selector sees."""
    return Selection(u, u, {"activation": u, **fields}, training, decoder_rows=rows, asker="TopAFA")


def model_of(selector, width=D, latents=F, **given):
    torch.manual_seed(0)
    objective = given.pop("objective", None) or SparseReconstruction()
    decoder = given.pop("decoder", None) or SparseDecoder()
    model = Model(SparseEncoder(latents, selector, **given), decoder, objective, spec={"width": width})
    model.configure_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.train()


def feed(**given):
    small = CausalLM(width=D, depth=2, heads=2, rope=False)
    plain = {"site": "blocks.0.resid", "source": "stdlib:docs", "length": 16, "train_samples": 64}
    return Activations(**{"subject": small, **plain, "batch_size": 64, "buffer": 512, **given})
