"""Chains as predictions: the rows of a batch are where they start."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.func import jacrev

from quire.contracts import Batch, Sampler
from quire.data import mix
from quire.errors import ConfigError
from quire.model import Model
from quire.roles.latent import VectorEncoder
from quire_dae_score.chains import KINDS, Walk, run
from quire_dae_score.denoiser import GaussianDenoiser, check_codes, denoiser_of, evaluating
from quire_dae_score.energy import Quadrature, check_quadrature
from quire_dae_score.jacobian import check_size
from quire_dae_score.mixing import effective_of_each
from quire_dae_score.modules import tiny_run


class MetropolisHastings(Sampler):
    """Chains that sample the density a denoiser has learnt, started at the batch's rows. Alain and Bengio 2012.

    With s(x) = (r(x) − x)/σ² and E(y) − E(x) = −∫ s·dx along the straight path, a move from x to y is taken with
    probability min(1, exp(E(x) − E(y))·q(x|y)/q(y|x)); the chain then samples p_σ ∝ exp(−E), the data's density
    convolved with noise of σ. The moves:

    ``random_walk``: y = x + step·ξ. ``mala``: y = x + λs(x) + √(2λ)ξ with λ = drift·σ². ``langevin``: the same, never
    refused: its covariance is too large. ``alternate``: y = r(x + √2·σξ), never refused: its covariance is too
    small. ``jacobian``: y = x + C(x)^½ ξ, C = step²·(k·JᵀJ/‖J‖² + 0.01·I), J the encoder's Jacobian with k rows, so
    moves keep to the manifold; for at most 64 numbers a sample.

    Args:
        kind: Which of these.
        step: Of ``random_walk`` and ``jacobian``, in the data's unit.
        steps: Moves of a chain.
        burn_in: Moves before anything is kept or counted.
        thin: Moves between kept states.
        quadrature: Of the path integral. ``"scaled"``: ⌈4·length/σ⌉ points, 5 to 64; ``"adaptive"``; a number of
            points; ``"trapezoid"``; ``"first"``: the score at x alone, a biased control.
        box: Least and greatest coordinate: moves out of it are refused and counted. Far from data a score is not learnt
            and may hold spurious modes.
        seed: Of the chains; batches draw different numbers.
        drift: Of ``mala`` and ``langevin``: λ/σ²; at 1 the proposal is r(x) + √2·σξ, less suits many dimensions.

    Needs:
        objective: GaussianDenoiser (σ, field and reconstruction are read from it; in a ``Sum`` the one member that is
        one). encoder: VectorEncoder, or LatentEncoder with a decoder.

    Returns:
        A dict of tensors, a row a chain: ``samples`` [B,K,…]; ``acceptance`` [B]; ``effective`` [B], independent draws
        that the kept states are worth in their worst coordinate; ``outside`` [B] moves refused for the box;
        ``energy_error`` [B], estimated error of an energy difference, NaN where the rule has no estimate.

    Raises:
        ConfigError: impossible arguments, an encoder without vector codes, starts of another width.
        DataError: a start or an energy that is not finite, or a box without a start in it.
    """

    objective: GaussianDenoiser

    def __init__(
        self,
        kind: Literal["random_walk", "mala", "langevin", "alternate", "jacobian"] = "random_walk",
        step: float = 0.1,
        steps: int = 1000,
        burn_in: int = 200,
        thin: int = 10,
        quadrature: Quadrature = "scaled",
        box: tuple[float, float] | None = None,
        seed: int = 0,
        drift: float = 1.0,
    ) -> None:
        super().__init__()
        if kind not in KINDS:
            raise ConfigError(f"MetropolisHastings.kind must be {', '.join(KINDS)}, got {kind!r}")
        if not step > 0 or not drift > 0:
            raise ConfigError(f"MetropolisHastings.step and drift must be positive, got {step} and {drift}")
        if burn_in < 0 or thin < 1 or steps < burn_in + thin:
            raise ConfigError(
                f"MetropolisHastings keeps nothing with steps={steps}, burn_in={burn_in}, thin={thin}: "
                "steps must be at least burn_in + thin, and thin at least 1"
            )
        check_quadrature(quadrature, self)
        if box is not None and (len(box) != 2 or not box[0] < box[1]):
            raise ConfigError(f"MetropolisHastings.box must be a least and a greatest coordinate, got {list(box)}")
        self.kind, self.step, self.drift, self.quadrature = kind, step, drift, quadrature
        self.steps, self.burn_in, self.thin, self.seed = steps, burn_in, thin, seed
        self.box = None if box is None else (float(box[0]), float(box[1]))

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """Short chains on two modes in the plane."""
        return tiny_run(sampler={})

    def check(self, model: Model) -> None:
        """The network must map each sample by itself."""
        check_codes(model, self)
        if self.kind == "jacobian" and model.encoder.role(VectorEncoder) is None:
            raise ConfigError("kind=jacobian needs a VectorEncoder: use another kind")

    def forward(self, model: Model, batch: Batch) -> dict[str, Tensor]:
        """One chain a row."""
        denoiser = denoiser_of(model, self)
        start, sigma = denoiser.clean(batch), denoiser.sigma
        key = torch.randint(1 << 62, (), generator=model.generator("cpu"))
        generator = torch.Generator(start.device).manual_seed(mix(self.seed, int(key)))
        names = batch["index"].tolist() if isinstance(batch.get("index"), Tensor) else None
        with evaluating(model):
            found = run(
                self.walk(model, denoiser, sigma),
                start,
                steps=self.steps,
                burn_in=self.burn_in,
                thin=self.thin,
                box=self.box,
                generator=generator,
                names=names,
            )
        return {
            "samples": found.samples,
            "acceptance": found.accepted.float(),
            "effective": effective_of_each(found.samples).float(),
            "outside": found.outside,
            "energy_error": found.energy_error.float(),
        }

    def walk(self, model: Model, denoiser: GaussianDenoiser, sigma: float) -> Walk:
        """How the chains of this model move."""

        def codes(x: Tensor) -> Tensor:
            return model.encoder.role(VectorEncoder)({denoiser.field: x}).vector.sum(0)

        def tangent(x: Tensor) -> Tensor:
            check_size(x[0].numel(), "more than kind=jacobian can take (64): use another kind")
            return jacrev(codes)(x).flatten(2).transpose(0, 1)

        return Walk(
            score=lambda x: denoiser.score(model, x, sigma),
            sigma=sigma,
            kind=self.kind,
            step=self.step,
            drift=self.drift,
            quadrature=self.quadrature,
            tangent=tangent if self.kind == "jacobian" else None,
        )
