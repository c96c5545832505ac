"""The paper's two regularised autoencoders: denoising, and contraction of the whole reconstruction."""

from __future__ import annotations

import math
from typing import Any, Literal

from torch import Tensor

from quire.contracts import Batch, Losses, Spec
from quire.errors import ConfigError
from quire.model import Model
from quire.roles.latent.noise import CoordinateNoise
from quire_dae_score.denoiser import Field, GaussianDenoiser
from quire_dae_score.jacobian import check_size, difference_norm, exact_norm, hutchinson_norm
from quire_dae_score.modules import tiny_run


class Denoising(GaussianDenoiser):
    """Reconstruct what Gaussian noise was added to. Alain and Bengio 2012, arXiv 1211.4246.

    L = E‖r(x + ε) − x‖², ε ~ N(0, σ²I). At the optimum, for every σ, r(y) = y + σ²∇log p_σ(y) with p_σ the data's
    density convolved with the noise: the model is the score of p_σ.

    Args:
        sigma: σ in the data's own unit (after any normalisation), or a falling schedule of them: training goes
            through it in equal parts, and chains use the last.
        field: The batch field: ``"image"`` or ``"vector"``.
        residual: r(x) = x + σ²·net(x), so the network is the score and small σ is no harder; false: r(x) = net(x), what
            a decoder that ends in a sigmoid needs and what other reconstruction terms in a ``Sum`` mean.
        conservative: r(x) = x − σ²∇E(x) with E = ½‖net(x)‖² (½‖x − net(x)‖²/σ² without ``residual``): then the
            score is a gradient and path energies don't depend on the path.

    Needs:
        encoder: VectorEncoder with a decoder back to the field, or one whose codes have the field's size.

    Returns:
        ``denoise``: squared error summed over features, mean over the batch.

    Raises:
        ConfigError: a σ that isn't positive, a schedule that doesn't fall, or a network that can't be r.
        DataError: data that are no floats.
    """

    def __init__(
        self,
        sigma: float | list[float] = 0.2,
        field: Field = "image",
        residual: bool = True,
        conservative: bool = False,
    ) -> None:
        super().__init__(sigma, field, residual)
        self.conservative = conservative
        self.corruption = CoordinateNoise(self.levels[0])

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """Two modes in the plane."""
        return tiny_run()

    def forward(self, model: Model, batch: Batch) -> Losses:
        """The term of one batch; validation is corrupted too."""
        sigma, x = self.advance(model), self.clean(batch)
        noisy = self.corruption.corrupt(x, model.generator(x.device), sigma)
        made = self.restore(model, {**batch, self.field: noisy}, sigma)
        return Losses({"denoise": summed(made - x)}, outputs={"noisy": noisy, "reconstruction": made})


class Contractive(GaussianDenoiser):
    """Reconstruct while the whole reconstruction contracts. Alain and Bengio 2012, arXiv 1211.4246.

    L = E‖r(x) − x‖² + σ²‖∂r/∂x‖²_F, the limit of the denoising loss for small σ, and the same loss for a linear r.
    Unlike the contractive autoencoder of 2011 it is r that contracts, not the encoder alone.

    Args:
        sigma: σ in the data's own unit, or a falling schedule of them.
        jacobian: ``"exact"``, for at most 64 numbers a sample; ``"hutchinson"``: backward passes with random signs;
            ``"difference"``: finite steps of σ/10 with random signs, no second derivatives.
        probes: Random vectors of the last two.
        field: The batch field: ``"image"`` or ``"vector"``.
        residual: r(x) = x + σ²·net(x); false: r(x) = net(x).

    Needs:
        encoder: VectorEncoder with a decoder back to the field, or one whose codes have the field's size;
        differentiable twice unless ``jacobian`` is difference.

    Returns:
        ``reconstruct``: squared error summed over features, mean over the batch. ``contract``: σ²‖∂r/∂x‖²_F, mean over
        the batch. Another reduction would change their ratio.

    Raises:
        ConfigError: what ``Denoising`` refuses, an unknown ``jacobian``, no probes, or an exact one of over 64 columns.
        DataError: data that are no floats.
    """

    def __init__(
        self,
        sigma: float | list[float] = 0.2,
        jacobian: Literal["exact", "hutchinson", "difference"] = "exact",
        probes: int = 1,
        field: Field = "image",
        residual: bool = True,
    ) -> None:
        super().__init__(sigma, field, residual)
        if jacobian not in ("exact", "hutchinson", "difference"):
            raise ConfigError(f"Contractive.jacobian must be exact, hutchinson or difference, got {jacobian!r}")
        if probes < 1:
            raise ConfigError(f"Contractive.probes must be at least 1, got {probes}")
        self.jacobian, self.probes = jacobian, probes

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """Two modes in the plane."""
        run = tiny_run()
        run["model"]["objective"]["class_path"] = "Contractive"
        return run

    def build(self, spec: Spec) -> None:
        """Refuse a Jacobian that is too large."""
        super().build(spec)
        if self.jacobian == "exact":
            check_size(math.prod(self.shape))

    def forward(self, model: Model, batch: Batch) -> Losses:
        """The two terms of one batch."""
        sigma, x = self.advance(model), self.clean(batch)

        def function(at: Tensor) -> Tensor:
            return self.restore(model, {**batch, self.field: at}, sigma)

        made, draws = function(x), model.generator(x.device)
        if self.jacobian == "exact":
            norm = exact_norm(function, x)
        elif self.jacobian == "hutchinson":
            norm = hutchinson_norm(function, x, self.probes, draws)
        else:
            norm = difference_norm(function, x, self.probes, sigma / 10, draws)
        terms = {"reconstruct": summed(made - x), "contract": sigma**2 * norm.float().mean()}
        return Losses(terms, outputs={"reconstruction": made})


def summed(difference: Tensor) -> Tensor:
    """Squares summed over features, mean over the batch."""
    return difference.float().square().flatten(1).sum(1).mean()
