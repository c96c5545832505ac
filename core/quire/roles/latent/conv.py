"""Strided convolutions from an image to a vector code, and their mirror."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

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


class ConvVectorEncoder(VectorEncoder):
    """3x3 convolutions of stride 2 with 'SAME' padding and ReLU, flattened: 28-14-7-4-2 pixels a side.

    The network of the prototype paper (Li et al. 2018, arXiv 1710.04806), by default with its official code's
    settings.

    Args:
        channels: Channels of each convolution; each halves the side, rounding up.
        code_activation: ``"relu"``, ``"sigmoid"`` or ``"none"`` after the last convolution.
        init_std: Standard deviation of the weights at the start, biases 0; null is torch's own start.

    Returns:
        VectorCodes of width channels[-1] * h * w: 40 for images of 28x28.

    Raises:
        ConfigError: no channels, or an unknown activation.
    """

    fields = ("image",)

    def __init__(
        self,
        channels: tuple[int, ...] = (32, 32, 32, 10),
        code_activation: Literal["relu", "sigmoid", "none"] = "relu",
        init_std: float | None = 0.01,
    ) -> None:
        super().__init__()
        check_positive(self, "channels", *channels, len(channels))
        self.channels, self.init_std = tuple(channels), init_std
        self.code_activation = activation(code_activation, self)

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """Classify digits by a code of eight."""
        encoder = {"class_path": "ConvVectorEncoder", "init_args": {"channels": [8, 2], "init_std": None}}
        return {"model": {"encoder": encoder, "objective": "Classify"}, "data": "Digits"}

    def build(self, spec: Spec) -> None:
        """Make the convolutions."""
        self.shape = data_shape(spec, self, "image")
        self.sides = _halved(self.shape[1:], len(self.channels))
        chain = [self.shape[0], *self.channels]
        self.convolutions = nn.ModuleList(nn.Conv2d(a, b, 3, 2) for a, b in pairwise(chain))
        _start(self.convolutions, self.init_std)
        self.width = self.channels[-1] * math.prod(self.sides[-1])

    def forward(self, batch: Batch) -> VectorCodes:
        """Image [B,C,H,W] → [B,width]."""
        image = read_data(batch, self.shape, self)
        for i, convolution in enumerate(self.convolutions):
            (top, bottom), (left, right) = map(_same, image.shape[2:])
            image = convolution(pad(image, [left, right, top, bottom]))
            image = torch.relu(image) if i + 1 < len(self.convolutions) else self.code_activation(image)
        return VectorCodes(image.flatten(1))


class ConvVectorDecoder(PixelDecoder):
    """The mirror of ``ConvVectorEncoder``: transposed convolutions back to exactly the image's size.

    A code of another width than the mirror's own enters through one linear layer, so any VectorEncoder fits.

    Args:
        channels: As the encoder's, from image to code; used in reverse.
        output: ``"sigmoid"`` or ``"none"`` on the pixels.
        init_std: Standard deviation of the weights at the start, biases 0; null is torch's own start.

    Returns:
        Image [B,C,H,W], in [0,1] with the sigmoid.

    Raises:
        ConfigError: no channels, an unknown output, or an encoder that gives no vectors.
    """

    def __init__(
        self,
        channels: tuple[int, ...] = (32, 32, 32, 10),
        output: Literal["sigmoid", "none"] = "sigmoid",
        init_std: float | None = 0.01,
    ) -> None:
        super().__init__()
        check_positive(self, "channels", *channels, len(channels))
        self.channels, self.init_std = tuple(channels), init_std
        self.activation = activation(output, self, "output")

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """Reconstruct digits from a code of eight."""
        given = {"channels": [8, 2], "init_std": None}
        encoder = {"class_path": "ConvVectorEncoder", "init_args": given}
        decoder = {"class_path": "ConvVectorDecoder", "init_args": given}
        return {"model": {"encoder": encoder, "decoder": decoder, "objective": "Reconstruction"}, "data": "Digits"}

    def check(self, model: Model) -> None:
        """The codes must be vectors."""
        if model.decoder is self:
            need_vectors(model.encoder, self)

    def build(self, spec: Spec) -> None:
        """Make the transposed convolutions, and the linear layer if the code needs one."""
        shape = data_shape(spec, self, "image")
        self.sides = [shape[1:], *_halved(shape[1:], len(self.channels))]
        chain = [*reversed(self.channels), shape[0]]
        own, given = self.channels[-1] * math.prod(self.sides[-1]), int(spec.code("width", self))
        self.enter = nn.Identity() if own == given else nn.Linear(given, own)
        self.convolutions = nn.ModuleList(nn.ConvTranspose2d(a, b, 3, 2) for a, b in pairwise(chain))
        _start(self.convolutions, self.init_std)

    def forward(self, codes: VectorCodes) -> Tensor:
        """[B,D] → [B,C,H,W]."""
        image = self.enter(vector_of(codes, self)).unflatten(1, (self.channels[-1], *self.sides[-1]))
        for i, convolution in enumerate(self.convolutions):
            height, width = self.sides[-2 - i]
            top, left = _same(height)[0], _same(width)[0]
            image = convolution(image)[:, :, top : top + height, left : left + width]
            image = torch.relu(image) if i + 1 < len(self.convolutions) else self.activation(image)
        return image


def _same(side: int) -> tuple[int, int]:
    """Zeros before and after one axis so that a 3-wide, stride-2 convolution gives ceil(side / 2)."""
    total = max(0, (math.ceil(side / 2) - 1) * 2 + 3 - side)
    return total // 2, total - total // 2


def _halved(sides: tuple[int, ...], times: int) -> list[tuple[int, ...]]:
    found = []
    for _ in range(times):
        sides = tuple(math.ceil(side / 2) for side in sides)
        found.append(sides)
    return found


def _start(layers: nn.ModuleList, std: float | None) -> None:
    if std is not None:
        for name, parameter in layers.named_parameters():
            nn.init.zeros_(parameter) if name.endswith("bias") else nn.init.normal_(parameter, std=std)
