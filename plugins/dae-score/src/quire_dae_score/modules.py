"""A small network on vectors whose output has the input's shape."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any, Literal

from torch import nn

from quire.contracts import Batch, Spec
from quire.errors import ConfigError
from quire.roles.latent.contract import VectorCodes, VectorEncoder, check_positive, data_shape, read_data

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
    "softplus": nn.Softplus,
    "relu": nn.ReLU,
}


class ScoreMlp(VectorEncoder):
    """A multilayer perceptron from a vector or an image's pixels to as many numbers. After Alain and Bengio 2012.

    With ``Denoising(residual: true)`` and no decoder its output is the score itself.

    Args:
        widths: Hidden layers.
        activation: ``"silu"``, ``"tanh"``, ``"softplus"`` or ``"relu"`` after each; a conservative model or a
            contractive penalty wants a smooth one.

    Returns:
        VectorCodes [B,D] of the data's own D, C*H*W for images.

    Raises:
        ConfigError: a width below 1, or an unknown activation.
    """

    fields = ("vector|image",)

    def __init__(
        self,
        widths: tuple[int, ...] = (128, 128),
        activation: Literal["silu", "tanh", "softplus", "relu"] = "silu",
    ) -> None:
        super().__init__()
        check_positive(self, "widths", *widths)
        if activation not in ACTIVATIONS:
            raise ConfigError(f"ScoreMlp.activation must be {', '.join(ACTIVATIONS)}, got {activation!r}")
        self.widths, self.activation = tuple(widths), activation

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """Denoise points of two modes."""
        return tiny_run()

    def build(self, spec: Spec) -> None:
        """Make the layers."""
        self.shape = data_shape(spec, self)
        self.width = math.prod(self.shape)
        layers: list[nn.Module] = []
        for before, after in pairwise([self.width, *self.widths, self.width]):
            layers += [nn.Linear(before, after), ACTIVATIONS[self.activation]()]
        self.net = nn.Sequential(*layers[:-1])

    def forward(self, batch: Batch) -> VectorCodes:
        """Vector [B,D] or image [B,C,H,W] → [B,D]."""
        return VectorCodes(self.net(read_data(batch, self.shape, self).flatten(1)))


def tiny_run(
    objective: dict[str, Any] | None = None, sampler: dict[str, Any] | None = None, **model: Any
) -> dict[str, Any]:
    """A run on two modes in the plane, for the tiny examples: arguments of Denoising and of MetropolisHastings."""
    given = {"sigma": 0.4, "field": "vector", **(objective or {})}
    parts: dict[str, Any] = {
        "encoder": {"class_path": "ScoreMlp", "init_args": {"widths": [16]}},
        "objective": {"class_path": "Denoising", "init_args": given},
        **model,
    }
    if sampler is not None:
        chain = {"steps": 60, "burn_in": 20, "thin": 2, "step": 0.5, **sampler}
        parts["sampler"] = {"class_path": "MetropolisHastings", "init_args": chain}
    return {"model": parts, "data": {"class_path": "ToyDensity", "init_args": {"samples": 512, "batch_size": 64}}}
