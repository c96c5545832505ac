"""A multilayer perceptron from data to a vector code, and its mirror."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn

from quire.contracts import Batch, Spec
from quire.roles.latent.contract import (
    PixelDecoder,
    VectorCodes,
    VectorEncoder,
    activation,
    check_positive,
    data_shape,
    need_vectors,
    read_data,
    vector_of,
)

if TYPE_CHECKING:
    from quire.model import Model


class MlpVectorEncoder(VectorEncoder):
    """A multilayer perceptron from pixels or a vector to a code.

    Args:
        widths: Hidden layers, each with a ReLU.
        code: Width of the code.
        code_activation: ``"relu"``, ``"sigmoid"`` or ``"none"`` on the code.

    Returns:
        VectorCodes of width ``code``.

    Raises:
        ConfigError: a width below 1, or an unknown activation.
    """

    fields = ("image|vector",)

    def __init__(
        self,
        widths: tuple[int, ...] = (128,),
        code: int = 10,
        code_activation: Literal["relu", "sigmoid", "none"] = "sigmoid",
    ) -> None:
        super().__init__()
        check_positive(self, "widths and code", *widths, code)
        self.widths, self.width = tuple(widths), code
        self.code_activation = activation(code_activation, self)

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """Classify a code of ten."""
        return {"model": {"encoder": "MlpVectorEncoder", "objective": "Classify"}, "data": "Digits"}

    def build(self, spec: Spec) -> None:
        """Make the layers."""
        self.shape = data_shape(spec, self)
        self.net = _layers([math.prod(self.shape), *self.widths, self.width])

    def forward(self, batch: Batch) -> VectorCodes:
        """Image [B,C,H,W] or vector [B,D] → [B,code]."""
        return VectorCodes(self.code_activation(self.net(read_data(batch, self.shape, self).flatten(1))))


class MlpVectorDecoder(PixelDecoder):
    """The mirror of ``MlpVectorEncoder``: from any vector code back to pixels or a vector.

    Args:
        widths: As the encoder's, from data to code; used in reverse.
        output: ``"sigmoid"`` or ``"none"``; null is sigmoid for images and none for vectors.

    Returns:
        Image [B,C,H,W], or vector [B,D] where the data has no images.

    Raises:
        ConfigError: a width below 1, or an encoder that gives no vectors.
    """

    def __init__(self, widths: tuple[int, ...] = (128,), output: Literal["sigmoid", "none"] | None = None) -> None:
        super().__init__()
        check_positive(self, "widths", *widths)
        activation(output or "none", self, "output")
        self.widths, self.output = tuple(widths), output

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """Reconstruct digits."""
        model = {"encoder": "MlpVectorEncoder", "decoder": "MlpVectorDecoder", "objective": "Reconstruction"}
        return {"model": model, "data": "Digits"}

    def check(self, model: Model) -> None:
        """The codes must be vectors."""
        if model.decoder is self:
            need_vectors(model.encoder, self)

    def build(self, spec: Spec) -> None:
        """Make the layers for the encoder's width."""
        self.shape = data_shape(spec, self)
        self.net = _layers([spec.code("width", self), *reversed(self.widths), math.prod(self.shape)])
        output = self.output or ("sigmoid" if len(self.shape) == 3 else "none")
        self.activation = activation(output, self, "output")

    def forward(self, codes: VectorCodes) -> Tensor:
        """[B,D] → the data's shape."""
        return self.activation(self.net(vector_of(codes, self))).unflatten(1, self.shape)


def _layers(widths: list[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])
