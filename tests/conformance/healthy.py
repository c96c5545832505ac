"""The sources of two plugins without a fault. ``NN`` in them stands for a number of the plugin's own."""

from __future__ import annotations

HOOKS = '''
"""A planted plugin. Doe et al. 2024."""

from quire import hookimpl


@hookimpl
def quire_components(register):
    REGISTER
'''

VECTOR_TABLE = {
    "encoder": ("LineNN", "VectorEncoder"),
    "decoder": ("BackNN", "PixelDecoder"),
    "objective": ("RebuildNN", ""),
    "sampler": ("DrawsNN", ""),
    "metric": ("SharpNN", ""),
    "data": ("DotsNN", ""),
    "callback": ("PingNN", ""),
    "part": ("BendNN", "bend"),
}

VECTOR = '''
"""Components. Doe et al. 2024."""

import random
import socket
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback
from torch import nn

from quire import ConfigError, DataModule, Fields, Losses, Metric, Objective, Part, Sampler
from quire.roles.latent import PixelDecoder, VectorCodes, VectorEncoder


def run():
    encoder = {"class_path": "LineNN", "init_args": {"bend": {"class_path": "BendNN", "init_args": {"strength": 0.5}}}}
    model = {"encoder": encoder, "decoder": "BackNN", "objective": "RebuildNN", "sampler": "DrawsNN"}
    return {"model": {**model, "metrics": ["SharpNN"]}, "data": "DotsNN", "trainer": {"callbacks": ["PingNN"]}}


class DotsNN(DataModule):
    """Points in eight dimensions, made on the spot. Doe et al. 2024."""

    fields = ("vector", "label")
    tiny = staticmethod(run)

    def split(self, name):
        generator = torch.Generator().manual_seed(len(name))
        x = torch.randn(256, 8, generator=generator) @ torch.randn(8, 8, generator=generator)
        return Fields(vector=x, label=(x[:, 0] > 0).long())

    def sizes(self):
        return {"features": 8, "classes": 2}


class BendNN(Part):
    """A soft bend of numbers. Doe et al. 2024.

    Args:
        strength: How much, from 0.
    """

    tiny = staticmethod(run)

    def __init__(self, strength: float = 1.0):
        super().__init__()
        self.strength = strength
        self.shift = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return x + self.strength * torch.tanh(x + self.shift)


class LineNN(VectorEncoder):
    """A linear map and a bend. Doe et al. 2024.

    Args:
        out: Width of the code.
        bend: What bends it.

    Returns:
        VectorCodes [B,out].

    Raises:
        ConfigError: a width below 1.
    """

    fields = ("vector",)
    tiny = staticmethod(run)

    def __init__(self, out: int = 4, bend: BendNN | None = None):
        super().__init__()
        if out < 1:
            raise ConfigError(f"out must be at least 1, got {out}")
        self.width, self.bend = out, bend or BendNN()
        self.seen = torch.zeros(1)

    def build(self, spec):
        super().build(spec)
        self.linear = nn.Linear(spec.need("features", self), self.width)

    def forward(self, batch):
        x = batch["vector"]
        code = self.bend(self.linear(x))
        return VectorCodes(code)


class BackNN(PixelDecoder):
    """A linear map from codes to data. Doe et al. 2024.

    Returns:
        The vector [B,D].
    """

    tiny = staticmethod(run)

    def build(self, spec):
        self.linear = nn.Linear(spec.code("width", self), spec.need("features", self))
        self.spare = nn.Parameter(torch.ones(1))

    def forward(self, codes):
        return self.linear(codes.vector) + self.spare


class RebuildNN(Objective):
    """Squared error of the rebuilt data. Doe et al. 2024.

    Returns:
        ``rebuild``: mean over the batch.
    """

    decoder: PixelDecoder
    fields = ("vector",)
    tiny = staticmethod(run)

    def forward(self, model, batch):
        error = (model.decoder(model.encoder(batch)).flatten(1) - batch["vector"]).square().mean()
        terms = {"rebuild": error}
        return Losses(terms, {"error": error.detach()})


class DrawsNN(Sampler):
    """The rebuilt data, row by row. Doe et al. 2024."""

    tiny = staticmethod(run)

    def forward(self, model, batch):
        made = model.decoder(model.encoder(batch)).flatten(1)
        rows = [{"index": int(i), "norm": float(m.norm())} for i, m in zip(batch["index"], made)]
        return rows


class SharpNN(Metric):
    """Mean norm of the codes. Doe et al. 2024."""

    tiny = staticmethod(run)

    def __init__(self):
        super().__init__()
        self.add_state("total", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros(()), dist_reduce_fx="sum")

    def update(self, codes):
        self.total += codes.norm(dim=1).sum()
        self.count += len(codes)

    def observe(self, model, batch, losses):
        self.update(model.encoder(batch).vector)

    def compute(self):
        return self.total / self.count


class PingNN(Callback):
    """Does nothing, on time. Doe et al. 2024."""

    tiny = staticmethod(run)

    def on_validation_end(self, trainer, pl_module):
        pass

    def state_dict(self):
        return {"calls": 1}
'''

VECTOR_CONFIG = """# The planted run.
model:
  encoder: {class_path: LineNN, init_args: {out: 3}}
  decoder: BackNN
  objective: RebuildNN
data: {class_path: DotsNN, init_args: {batch_size: 32}}
trainer: {max_epochs: 1}
"""

TOKENS_TABLE = {"encoder": ("StripNN", "TokenEncoder"), "objective": ("SortNN", ""), "part": ("DrawNN", "masking")}

TOKENS = '''
"""Components. Doe et al. 2024."""

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from quire import DataModule, Fields, Losses, Objective
from quire.roles.masking import Masking
from quire.roles.tokens.contract import Layout, Segment, Subset, TokenEncoder, Tokens, gather, indices


class GridNN(DataModule):
    """Small noisy pictures, made on the spot. Doe et al. 2024."""

    fields = ("image", "label")

    def split(self, name):
        generator = torch.Generator().manual_seed(len(name))
        label = torch.randint(0, 2, (128,), generator=generator)
        noise = torch.rand(128, 1, 4, 8, generator=generator)
        return Fields(image=(noise + label[:, None, None, None]) / 2, label=label)

    def sizes(self):
        return {"image_size": [4, 8], "channels": 1, "classes": 2}


def run():
    model = {"encoder": "StripNN", "objective": {"class_path": "SortNN", "init_args": {"masking": "DrawNN"}}}
    return {"model": model, "data": "quire_planted_NN.parts.GridNN"}


class DrawNN(Masking):
    """Half of the cells at random. Doe et al. 2024."""

    tiny = staticmethod(run)

    def draw(self, layout, batch_size, mask, generator):
        order = torch.rand(batch_size, layout.cells, generator=generator).argsort(1)
        return Subset.ordered(order, layout.cells // 2)


class StripNN(TokenEncoder):
    """One attention layer over patches of 2x2. Doe et al. 2024.

    Returns:
        Tokens: values [B,N,8].
    """

    fields = ("image",)
    width = 8
    capabilities = frozenset({"subset", "context", "features"})
    positions = "none"
    prefix_tokens = 1
    tiny = staticmethod(run)

    def build(self, spec):
        self.stem = nn.Linear(4, 8)
        self.table = nn.Parameter(torch.zeros(64, 8))
        self.query, self.key, self.value = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.start = nn.Parameter(torch.randn(1, 8))
        self.table.requires_grad_(False)

    def layout(self, source):
        height, width = source["image"].shape[-2:] if "image" in source else source["image_size"]
        return Layout.of(Segment("image", (height // 2, width // 2), (2, 2), "image"))

    def embed(self, batch):
        image, layout = batch["image"], self.layout(batch)
        rows, cells = layout.grid
        patches = image[:, 0].unflatten(1, (rows, 2)).unflatten(3, (cells, 2)).transpose(2, 3).flatten(3).flatten(1, 2)
        values = self.stem(patches)
        values = values + self.table[: values.shape[1]] * (self.positions != "none")
        index = torch.arange(layout.cells).expand(len(image), -1)
        return Tokens(values, index, layout, None, self.start.expand(len(image), -1, -1))

    def encode(self, tokens, keep=None, context=None, context_update=True):
        if keep is not None:
            tokens = tokens.take(indices(keep, tokens.values.shape[1]))
        seen = tokens.mask
        if context is not None:
            chosen = indices(context, tokens.values.shape[1], "context")
            seen = seen & torch.zeros_like(seen).scatter(1, chosen, True)
        seen = torch.cat([torch.ones_like(seen[:, :1]), seen], 1)
        x = tokens.joined()
        scores = self.query(x) @ self.key(x).transpose(1, 2) / 8**0.5
        scores = scores.masked_fill(~seen[:, None, :], float("-inf"))
        x = self.norm(x + scores.softmax(-1) @ self.value(x))
        return tokens.with_values(x[:, 1:], x[:, :1])

    def features(self, batch, layer=-1):
        tokens = self.embed(batch)
        return tokens if layer == 0 else self.encode(tokens)


class SortNN(Objective):
    """Classify from a random half of the tokens. Doe et al. 2024.

    Args:
        masking: Chooses the half.

    Returns:
        ``sort``: cross-entropy in nats.
    """

    encoder: TokenEncoder
    fields = ("image", "label")
    tiny = staticmethod(run)

    def __init__(self, masking: Masking | None = None):
        super().__init__()
        self.masking = masking or DrawNN()

    def build(self, spec):
        self.head = nn.Linear(spec.code("width", self), spec.need("classes", self))

    def forward(self, model, batch):
        layout = model.encoder.layout(batch)
        subset = self.masking.draw(layout, len(batch["image"]), None, model.generator())
        tokens = model.encoder(batch, keep=subset)
        return Losses({"sort": cross_entropy(self.head(tokens.pooled()), batch["label"])})
'''


def table(components: dict[str, tuple[str, str]]) -> str:
    """The lines of a hook that registers these."""
    rows = [
        f'register("quire_planted_NN.parts.{name}", "{kind}", "{role}")' for kind, (name, role) in components.items()
    ]
    return "\n    ".join(rows)


def vector_plugin() -> dict[str, str]:
    """Files of a healthy plugin with a component of every kind."""
    hooks = HOOKS.replace("REGISTER", table(VECTOR_TABLE))
    return {"__init__.py": hooks, "parts.py": VECTOR, "configs/tiny.yaml": VECTOR_CONFIG}


def token_plugin() -> dict[str, str]:
    """Files of a healthy plugin with a token encoder."""
    return {"__init__.py": HOOKS.replace("REGISTER", table(TOKENS_TABLE)), "parts.py": TOKENS}
