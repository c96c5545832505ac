"""What vector and latent encoders, pixel decoders and classifiers must keep."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from quire.contracts import Batch
from quire.roles.latent import Classifier, LatentCodes, LatentEncoder, PixelDecoder, VectorCodes, VectorEncoder
from quire.testing.quiet import quietly
from quire.testing.subject import Subject
from quire.testing.trial import copied, size_of
from quire.testing.verdict import Fault, Skip


@torch.no_grad()
def vector_codes(subject: Subject) -> None:
    """VectorCodes [B,D], D as its width and sizes say; a sample's vector does not depend on its batch."""
    encoder, batch = _encoder(subject, VectorEncoder)
    codes = encoder(copied(batch))
    if not isinstance(codes, VectorCodes):
        raise Fault(f"{subject.name} is a VectorEncoder but returns {type(codes).__name__}: return VectorCodes")
    wanted = (size_of(batch), encoder.width)
    if tuple(codes.vector.shape) != wanted or encoder.sizes().get("width") != encoder.width:
        raise Fault(f"{subject.name}'s vector is {list(codes.vector.shape)}; batch and width say {list(wanted)}")
    _alone(subject.name, encoder, batch, codes.vector, lambda c: c.vector)


@torch.no_grad()
def latent_codes(subject: Subject) -> None:
    """LatentCodes [B,L,c]: L is the product of the grid, c the width; mean and logvar alike, the loss a scalar."""
    encoder, batch = _encoder(subject, LatentEncoder)
    codes = encoder(copied(batch))
    if not isinstance(codes, LatentCodes):
        raise Fault(f"{subject.name} is a LatentEncoder but returns {type(codes).__name__}: return LatentCodes")
    wanted = (size_of(batch), math.prod(codes.grid), encoder.width)
    for name in ("latents", "mean", "logvar"):
        value = getattr(codes, name)
        if value is not None and tuple(value.shape) != wanted:
            raise Fault(f"{subject.name}'s {name} is {list(value.shape)}; batch, grid and width say {list(wanted)}")
    if codes.loss is not None and codes.loss.ndim:
        raise Fault(f"{subject.name}'s own loss is {list(codes.loss.shape)}: it must be a scalar")


@torch.no_grad()
def pixels(subject: Subject) -> None:
    """The decoded image has the shape of the data's images."""
    decoder, model, batch = _decoder(subject, PixelDecoder)
    image = decoder(model.encoder(copied(batch)))
    target = batch.get("image", batch.get("vector"))
    if target is not None and (not isinstance(image, Tensor) or image.shape != target.shape):
        have = list(image.shape) if isinstance(image, Tensor) else type(image).__name__
        raise Fault(f"{subject.name} decodes to {have}; the data is {list(target.shape)}")


@torch.no_grad()
def logits(subject: Subject) -> None:
    """One logit a class, [B,K]."""
    decoder, model, batch = _decoder(subject, Classifier)
    found = decoder(model.encoder(copied(batch)))
    wanted = (size_of(batch), (model.spec or {}).get("classes"))
    if not isinstance(found, Tensor) or tuple(found.shape) != wanted:
        have = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise Fault(f"{subject.name} is a Classifier but returns {have}; batch and classes say {list(wanted)}")


def _encoder(subject: Subject, role: type) -> tuple[Any, Batch]:
    encoder = subject.trained().role(role)
    if encoder is None:
        raise Skip("not reached: see registered")
    encoder.eval()
    return encoder, subject.trial.ran().batch


def _decoder(subject: Subject, role: type) -> tuple[Any, Any, Batch]:
    decoder = subject.trained().role(role)
    ran = subject.trial.ran()
    model = ran.made.model
    if decoder is None or model.encoder is None:
        raise Skip("no encoder beside it in its tiny run" if decoder is not None else "not reached: see registered")
    model.eval()
    return decoder, model, ran.batch


def _alone(name: str, encoder: Any, batch: Batch, together: Tensor, read: Callable[[Any], Tensor]) -> None:
    one = {k: v[:1] if isinstance(v, (Tensor, list)) else v for k, v in batch.items()}
    with quietly():
        alone = read(encoder(copied(one)))
    difference = float((alone - together[:1]).abs().max() / max(1.0, float(alone.abs().max())))
    if difference > 1e-5:
        raise Fault(f"{name}: a sample's vector changes by {difference:.1e} when it is encoded alone")


CHECKS: dict[str, tuple[Callable[[Subject], None], ...]] = {
    "VectorEncoder": (vector_codes,),
    "LatentEncoder": (latent_codes,),
    "PixelDecoder": (pixels,),
    "Classifier": (logits,),
}
