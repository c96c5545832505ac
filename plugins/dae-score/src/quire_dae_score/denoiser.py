"""The role of an autoencoder that was trained to remove Gaussian noise: reconstruction, score, energy."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch import Callback
from torch import Tensor, nn
from torch.func import grad

from quire.contracts import Batch, Objective, Spec
from quire.errors import ConfigError, DataError
from quire.model import Model
from quire.roles.latent import LatentEncoder, PixelDecoder, VectorEncoder, need_vectors, vector_of
from quire.roles.latent.contract import data_shape

Field = Literal["image", "vector"]


class GaussianDenoiser(Objective):
    """Role of an objective that leaves a denoiser: r(y) ≈ E[x | y] for y = x + σξ, so that (r(y) − y)/σ² is a score.

    Sampler, metrics and pictures ask for this role and read σ, the field and the reconstruction from it.

    Args:
        sigma: σ, or a falling schedule of them that training goes through in equal parts.
        field: The batch field that is denoised.
        residual: r(x) = x + σ²·net(x), else r(x) = net(x).

    Raises:
        ConfigError: a σ that isn't positive, a schedule that doesn't fall, or a network that can't be r.
    """

    advice: ClassVar[str] = "only a model trained to remove Gaussian noise has a score"
    conservative = False
    level: Tensor

    def __init__(self, sigma: float | list[float] = 0.2, field: Field = "image", residual: bool = True) -> None:
        super().__init__()
        name = type(self).__name__
        levels = [float(s) for s in sigma] if isinstance(sigma, Sequence) else [float(sigma)]
        if not levels or not all(s > 0 and math.isfinite(s) for s in levels):
            raise ConfigError(f"{name}.sigma must be positive, got {sigma}")
        if any(a <= b for a, b in itertools.pairwise(levels)):
            raise ConfigError(f"{name}.sigma must fall from stage to stage, got {levels}")
        if field not in ("image", "vector"):
            raise ConfigError(f"{name}.field must be image or vector, got {field!r}")
        self.levels, self.field, self.residual = levels, field, residual
        self.fields = (field,)  # type: ignore[misc]
        # in the checkpoint, for chains need the σ that training reached; bits, since half precision rounds floats
        self.register_buffer("level", _bits(levels[0]))

    # ---- life
    def check(self, model: Model) -> None:
        """One vector or latent code a sample, so that the network maps each sample by itself."""
        check_codes(model, self)

    def build(self, spec: Spec) -> None:
        """Note the shape of what is denoised."""
        self.shape = (int(spec.need("width", self)),) if self.field == "vector" else data_shape(spec, self, "image")
        super().build(spec)

    def bind(self, model: Model) -> None:
        """Refuse a network that can't be r."""
        super().bind(model)
        name, size = type(self).__name__, math.prod(self.shape)
        if model.decoder is None:
            width = model.encoder.sizes().get("width")
            if width != size:
                raise ConfigError(
                    f"{name} without a decoder needs codes of the data's size {size}, "
                    f"{type(model.encoder).__name__} gives {width}: set model.decoder"
                )
            return
        decoder = decoder_of(model)
        if self.residual and any(isinstance(m, nn.Sigmoid) for m in decoder.children()):
            raise ConfigError(
                f"{name}.residual is true, but {type(decoder).__name__} ends in a sigmoid, which no score does: "
                "set residual: false, or the decoder's output: none"
            )

    def callbacks(self) -> list[Callback]:
        """Pictures of what was learnt, and of the chains."""
        from quire_dae_score.callbacks import ScorePictures

        return [ScorePictures()]

    # ---- use
    @property
    def sigma(self) -> float:
        """σ now: in training the stage's, afterwards the one that training ended with.

        Raises:
            ConfigError: the checkpoint was trained with a σ that this run doesn't have.
        """
        value = float(self.level.cpu().view(torch.double))
        if value not in self.levels:
            said = self.levels[0] if len(self.levels) == 1 else self.levels
            raise ConfigError(
                f"the checkpoint was trained with sigma {value:g}, but {type(self).__name__}.sigma is {said}: "
                "training and sampling need the same"
            )
        return value

    def advance(self, model: Model) -> float:
        """σ of this step; a schedule is spread evenly over the run."""
        if self.training and len(self.levels) > 1:
            total = float(model.trainer.estimated_stepping_batches)
            if not math.isfinite(total):
                raise ConfigError("a schedule of sigma needs an end: set trainer.max_steps or max_epochs")
            stage = int(len(self.levels) * model.global_step / max(1.0, total))
            self.level.copy_(_bits(self.levels[min(stage, len(self.levels) - 1)]))
        return self.sigma

    def clean(self, batch: Batch) -> Tensor:
        """The batch's field, checked.

        Raises:
            DataError: numbers that are no floats.
            ConfigError: another shape than the model was built for.
        """
        x: Tensor = batch[self.field]
        if not x.is_floating_point():
            kind = str(x.dtype).removeprefix("torch.")
            raise DataError(f"{self.field} is {kind}; {type(self).__name__} needs floats")
        if tuple(x.shape[1:]) != self.shape:
            if len(self.shape) == 1 and x.ndim == 2:
                raise ConfigError(f"x0 has {x.shape[1]} features, model {self.shape[0]}")
            found, built = ("x".join(map(str, s)) for s in (x.shape[1:], self.shape))
            raise ConfigError(f"x0 is {found}, model {built}")
        return x

    def network(self, model: Model, batch: Batch) -> Tensor:
        """decoder(encoder(batch)) in the shape of the batch's field."""
        x = batch[self.field]
        codes = (model.encoder.role(VectorEncoder) or model.encoder)(batch)
        if model.decoder is None:
            return vector_of(codes, self).view_as(x)
        made = decoder_of(model)(codes)
        if made.shape != x.shape:
            found, wanted = ("x".join(map(str, t.shape[1:])) for t in (made, x))
            raise ConfigError(f"{type(self).__name__} needs a decoder back to {self.field} {wanted}, got {found}")
        return made

    def energy(self, model: Model, batch: Batch, sigma: float) -> Tensor:
        """E of a conservative model, [B]: ½‖net(x)‖², or ½‖x − net(x)‖²/σ² without ``residual``."""
        made = self.network(model, batch)
        away = made if self.residual else (batch[self.field] - made) / sigma
        return away.flatten(1).square().sum(1) / 2

    def restore(self, model: Model, batch: Batch, sigma: float) -> Tensor:
        """r of the batch's field: x + σ²·net(x), net(x), or x − σ²∇E(x)."""
        x = batch[self.field]
        if self.conservative:
            return x - sigma**2 * self._slope(model, batch, sigma)
        made = self.network(model, batch)
        return x + sigma**2 * made if self.residual else made

    def score(self, model: Model, x: Tensor, sigma: float | None = None) -> Tensor:
        """(r(x) − x)/σ² of states [N,…]; what is the score already isn't added and subtracted again."""
        sigma = self.sigma if sigma is None else sigma
        batch = {self.field: x}
        if self.conservative:
            return -self._slope(model, batch, sigma)
        made = self.network(model, batch)
        return made if self.residual else ((made.double() - x.double()) / sigma**2).to(x.dtype)

    def _slope(self, model: Model, batch: Batch, sigma: float) -> Tensor:
        def total(x: Tensor) -> Tensor:
            return self.energy(model, {**batch, self.field: x}, sigma).sum()

        return grad(total)(batch[self.field])  # torch.func works in inference mode, autograd.grad doesn't


def _bits(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.double).view(torch.int64)


def decoder_of(model: Model) -> Any:
    """The decoder that gives data: the model's own, or the PixelDecoder inside it."""
    return model.decoder.role(PixelDecoder) or model.decoder


def check_codes(model: Model, asker: object) -> None:
    """Raise ``ConfigError`` unless ``model.encoder`` gives vectors, or latents that a decoder takes."""
    if model.encoder is None:
        raise ConfigError(f"{type(asker).__name__} needs a VectorEncoder; model.encoder is not set")
    latents = model.decoder is not None and model.encoder.role(LatentEncoder) is not None
    if not latents:
        need_vectors(model.encoder, asker)


def denoiser_of(model: Model, asker: object) -> GaussianDenoiser:
    """The model's denoiser. Raises ``ConfigError`` when it has none."""
    found = model.find(GaussianDenoiser)
    if found is None:
        have = "is not set" if model.objective is None else f"is {type(model.objective).__name__}"
        raise ConfigError(f"{type(asker).__name__} needs a GaussianDenoiser objective; model.objective {have}")
    return found


@contextmanager
def evaluating(model: Model) -> Iterator[None]:
    """Every module in eval mode (dropout would change the density from step to step), and back to its own mode."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
