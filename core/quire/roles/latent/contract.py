"""The contract of vector and latent codes, and the checks that every user of them makes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from quire.contracts import Batch, Codes, Decoder, Encoder, Spec
from quire.errors import ConfigError, DataError
from quire.roles.tokens.contract import TokenEncoder, Tokens

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "sigmoid": nn.Sigmoid, "none": nn.Identity}


@dataclass
class VectorCodes(Codes):
    """One vector a sample.

    Attributes:
        vector: [B,D] float.
    """

    vector: Tensor


@dataclass
class LatentCodes(Codes):
    """A grid of latents a sample.

    Attributes:
        latents: [B,L,c] float.
        grid: Cells per axis; their product is L.
        mean: [B,L,c] of the distribution that ``latents`` were drawn from, or None.
        logvar: [B,L,c], its log variance, or None.
        loss: The bottleneck's own term, a scalar, or None.
    """

    latents: Tensor
    grid: tuple[int, ...]
    mean: Tensor | None = None
    logvar: Tensor | None = None
    loss: Tensor | None = None


class VectorEncoder(Encoder):
    """batch → VectorCodes.

    Attributes:
        width: D, once built.
        advice: Added to the refusal of an encoder that is none.
    """

    width: int
    advice: ClassVar[str] = "wrap a token encoder in Pooled"

    def forward(self, batch: Batch) -> VectorCodes:
        """The vectors of one batch."""
        raise NotImplementedError

    def sizes(self) -> dict[str, Any]:
        """``width``."""
        return {"width": self.width}


class LatentEncoder(Encoder):
    """batch → LatentCodes.

    Attributes:
        width: c, the channels of a latent, once built.
    """

    width: int

    def forward(self, batch: Batch) -> LatentCodes:
        """The latents of one batch."""
        raise NotImplementedError

    def sizes(self) -> dict[str, Any]:
        """``width``."""
        return {"width": self.width}


class PixelDecoder(Decoder):
    """codes → image [B,C,H,W]: what callbacks that draw pictures ask for."""


class Classifier(Decoder):
    """codes → logits [B,K] over the classes."""


def data_shape(spec: Spec, asker: object, field: str | None = None) -> tuple[int, ...]:
    """(C,H,W) of the data's images, or (D,) of its vectors (spec ``width``) where there are no images.

    Raises:
        ConfigError: the spec says neither.
    """
    if field != "image" and spec.get("image_size") is None and spec.get("width") is not None:
        return (int(spec["width"]),)
    size = spec.need("image_size", asker)
    height, width = (size, size) if isinstance(size, int) else size
    return int(spec.need("channels", asker)), int(height), int(width)


def read_data(batch: Batch, shape: tuple[int, ...], asker: object) -> Tensor:
    """The batch's image or vector, whichever ``shape`` tells.

    Raises:
        DataError: an image of bytes.
        ConfigError: another shape than the one ``asker`` was built for.
    """
    name = "image" if len(shape) == 3 else "vector"
    data = batch[name]
    if not data.is_floating_point():
        raise DataError(f"{name} is {str(data.dtype).removeprefix('torch.')}; convert to float in [0,1]")
    if tuple(data.shape[1:]) != shape:
        found, built = ("x".join(map(str, s)) for s in (data.shape[1:], shape))
        raise ConfigError(f"{name} is {found}, but {type(asker).__name__} was built for {built}: resize the data")
    return data


def need_vectors(encoder: Encoder | None, asker: object) -> None:
    """Raise ``ConfigError`` when ``encoder`` gives no vectors, with the remedy."""
    if encoder is None or encoder.role(VectorEncoder) is not None:
        return
    name = type(encoder).__name__
    gives = "gives tokens [B,T,D], wrap it in Pooled" if isinstance(encoder, TokenEncoder) else "gives none"
    raise ConfigError(f"{type(asker).__name__} needs a VectorEncoder; {name} {gives}")


def vector_of(codes: Codes, asker: object) -> Tensor:
    """``codes.vector``, or ``ConfigError`` when these are other codes."""
    vector = getattr(codes, "vector", None)
    if vector is None:
        what = "tokens [B,T,D], wrap it in Pooled" if isinstance(codes, Tokens) else type(codes).__name__
        raise ConfigError(f"{type(asker).__name__} needs vectors [B,D]; the encoder gives {what}")
    return vector


def activation(name: str, asker: object, key: str = "code_activation") -> nn.Module:
    """The module of an activation's name. Raises ``ConfigError`` naming ``asker``'s ``key``."""
    if name not in ACTIVATIONS:
        raise ConfigError(f"{type(asker).__name__}.{key} must be {', '.join(ACTIVATIONS)}, got {name!r}")
    return ACTIVATIONS[name]()


def check_positive(asker: object, what: str, *numbers: int) -> None:
    """Raise ``ConfigError`` naming ``asker``'s arguments when one of ``numbers`` is below 1."""
    if min(numbers, default=1) < 1:
        raise ConfigError(f"{type(asker).__name__}.{what} must be positive, got {min(numbers)}")
