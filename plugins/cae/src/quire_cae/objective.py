"""ContextAutoencoding: the whole method, in the paper's order."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy

from quire.contracts import Batch, Losses, Objective
from quire.errors import ConfigError
from quire.roles.masking import BlockMask, Masking, RandomMask
from quire.roles.tokens.contract import Subset, TokenEncoder, Tokens, gather
from quire.roles.tokens.reconstruct import Target
from quire_cae.decoder import MaskedTokenDecoder
from quire_cae.examples import tiny_run
from quire_cae.kmeans import KMeansPatches
from quire_cae.regressor import LatentRegressor

if TYPE_CHECKING:
    from quire.model import Model

EMPTY = "the mask must leave at least one visible and one masked patch"


class ContextAutoencoding(Objective):
    """Represent the visible patches, regress the latents of the masked ones, decode those. Chen et al. 2022 (CAE).

    The encoder sees visible patches only and never fills in anything: that is the regressor's work. Its predictions
    are aligned with what the same encoder says of the masked patches alone, and decoded to targets.

    Args:
        regressor: Predicts the masked latents; null is the paper's.
        masking: Which cells are masked; a number is the ratio of ``RandomMask``, null is ``BlockMask``.
        target: What the decoder predicts for each masked cell; null is ``KMeansPatches`` (the paper's is
            ``DalleTokenizer``). Ids give a cross-entropy, vectors a squared error, or what the target says.
        align_weight: Factor of the alignment; 0 leaves it out.
        target_drop_path: Whether the encoder drops paths while it makes the alignment target, as the paper's code does.
        reconstruct: False has no decoder: alignment alone, with the collapse monitor on.
        pictures: Images drawn as the decoder completes them, at the end of fit; 0 for none.

    Needs:
        encoder: TokenEncoder that takes a subset. decoder: MaskedTokenDecoder, unless ``reconstruct`` is false.

    Returns:
        ``reconstruct``: mean over masked cells, ln V nats at chance for ids. ``align``: mean squared error over the
        elements of the masked latents [B,M,D]. Logged beside them: ``accuracy`` and ``majority``, the share of the
        commonest id; ``target_std``, the mean standard deviation of the latents aimed at, and
        ``align_over_variance``, 1 when the regressor is no better than their mean.

    Raises:
        ConfigError: nothing visible or masked, rows that mask different numbers, no decoder, nothing to learn.
    """

    encoder: TokenEncoder
    requires = {"encoder": frozenset({"subset"})}

    def __init__(
        self,
        regressor: LatentRegressor | None = None,
        masking: Masking | float | None = None,
        target: Target | None = None,
        align_weight: float = 2.0,
        target_drop_path: bool = False,
        reconstruct: bool = True,
        pictures: int = 6,
    ) -> None:
        super().__init__()
        if align_weight < 0 or pictures < 0:
            raise ConfigError(f"align_weight and pictures must be at least 0, got {align_weight:g} and {pictures}")
        if not reconstruct and not align_weight:
            raise ConfigError("ContextAutoencoding has nothing to learn: reconstruct is false and align_weight is 0")
        if not reconstruct and target is not None:
            raise ConfigError("target is what the decoder predicts, but reconstruct is false: drop one of them")
        self.regressor = regressor or LatentRegressor()
        rule = BlockMask() if masking is None else masking
        self.masking = rule if isinstance(rule, Masking) else RandomMask(rule)
        self.target = (target or KMeansPatches()) if reconstruct else None
        self.align_weight, self.target_drop_path, self.pictures = align_weight, target_drop_path, pictures
        self.weights = {"align": align_weight}
        self.chance: dict[str, float] = {}

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """A context autoencoder on digits."""
        return tiny_run()

    # ---- life
    def check(self, model: Model) -> None:
        """Ask for the decoder, and tell it what it predicts."""
        if self.target is None:
            return
        decoder = None if model.decoder is None else model.decoder.role(MaskedTokenDecoder)
        if decoder is None:
            have = "is not set" if model.decoder is None else f"is {type(model.decoder).__name__}"
            raise ConfigError(
                f"ContextAutoencoding needs a MaskedTokenDecoder; model.decoder {have}: set one, or reconstruct: false"
            )
        decoder.predicts(self.target, self.regressor.width)

    def bind(self, model: Model) -> None:
        """Know the accuracy of guessing."""
        super().bind(model)
        if self.target is not None and self.target.gives_ids:
            self.chance = {"accuracy": 1 / model.decoder.role(MaskedTokenDecoder).head.out_features}

    def callbacks(self) -> list[Callback]:
        """The collapse monitor where alignment is all there is; the picture where the target can be painted."""
        from quire.roles.probes.health import Health
        from quire_cae.pictures import CompletedImages

        if self.target is None:
            return [Health()]
        return [CompletedImages(self.pictures)] if self.pictures and hasattr(self.target, "paint") else []

    # ---- use
    def forward(self, model: Model, batch: Batch) -> Losses:
        """One draw, one pass over the visible cells, one without gradient over the masked ones."""
        encoder = model.encoder.role(TokenEncoder)
        subset = self.draw(model, batch)
        visible = encoder(batch, keep=subset)  # [B,K,D]
        latents = self.regressor(visible, subset.rest)  # [B,M,D]
        terms: dict[str, Tensor] = {}
        metrics: dict[str, Any] = {}
        outputs: dict[str, Any] = {"codes": visible, "subset": subset, "latents": latents}
        if self.target is not None:
            predicted = model.decoder.role(MaskedTokenDecoder)(latents, subset.rest, visible.layout).float()
            wanted = gather(self.target(batch, visible.layout), subset.rest)
            terms["reconstruct"] = distance(predicted, wanted, self.target)
            outputs |= {"prediction": predicted, "target": wanted}
            if self.target.gives_ids:
                metrics["accuracy"] = lambda: (predicted.argmax(-1) == wanted).float().mean()
                metrics["majority"] = lambda: (wanted == wanted.flatten().mode().values).float().mean()
        if self.align_weight:
            aim = self.aim(encoder, batch, subset)
            terms["align"] = (latents.float() - aim.float()).square().mean()
            outputs["aim"] = aim
            metrics["target_std"] = lambda: _spread(aim).mean()
            metrics["align_over_variance"] = lambda: terms["align"].detach() / _spread(aim).square().mean()
        return Losses(terms, metrics, outputs)

    def draw(self, model: Model, batch: Batch, generator: torch.Generator | None = None) -> Subset:
        """Visible and masked cells of a batch; ``rest`` holds real cells only.

        Raises:
            ConfigError: nothing visible, nothing masked, or rows that mask different numbers.
        """
        encoder = model.encoder.role(TokenEncoder)
        layout, mask = encoder.layout(batch), encoder.token_mask(batch)
        first = next(v for k in dict.fromkeys(s.field for s in layout.segments) if (v := batch.get(k)) is not None)
        subset = self.masking.draw(layout, len(first), mask, generator or model.generator(first.device))
        if mask is not None:
            subset = real_only(subset, mask)
        if not subset.rest.shape[1] or not subset.keep.shape[1]:
            raise ConfigError(f"{type(self.masking).__name__} masks {subset.rest.shape[1]} of {layout.cells}: {EMPTY}")
        return subset

    @torch.no_grad()
    def aim(self, encoder: TokenEncoder, batch: Batch, subset: Subset) -> Tensor:
        """[B,M,D]: what the encoder says of the masked cells, seeing nothing else; without a gradient."""
        whole = subset.keep.shape[1] + subset.rest.shape[1] == subset.cells
        masked = Subset.split(subset.rest, subset.keep) if whole else subset.rest
        with calm(encoder, self.target_drop_path):
            tokens: Tokens = encoder(batch, keep=masked)
        return self.regressor.project(tokens.values)

    def health_targets(self, model: Model, batch: Batch) -> dict[str, Tensor]:
        """What the alignment aims at, for the collapse monitor."""
        encoder = model.encoder.role(TokenEncoder)
        generator = torch.Generator(model.device).manual_seed(model.seed)
        return {"aim": self.aim(encoder, batch, self.draw(model, batch, generator)).flatten(0, 1)}


def distance(predicted: Tensor, wanted: Tensor, target: Target) -> Tensor:
    """Cross-entropy for ids, 1 - cosine or the mean squared error for vectors: a scalar."""
    if target.gives_ids:
        return cross_entropy(predicted.flatten(0, 1), wanted.flatten())
    if getattr(target, "distance", "mse") == "cosine":
        return 1 - cosine_similarity(predicted, wanted, dim=-1).mean()
    return (predicted - wanted).square().mean()


def real_only(subset: Subset, mask: Tensor) -> Subset:
    """The subset without padding among its masked cells.

    Raises:
        ConfigError: rows that mask different numbers of real cells.
    """
    real = mask.gather(1, subset.rest)
    counts = real.sum(1)
    low, high = int(counts.min()), int(counts.max())
    if low != high:
        raise ConfigError(f"rows mask {low}..{high} tokens; ContextAutoencoding needs equal counts")
    order = torch.argsort(real, dim=1, descending=True, stable=True)[:, :low]
    return Subset(subset.keep, subset.rest.gather(1, order), subset.restore)


@contextmanager
def calm(module: nn.Module, as_it_is: bool = False) -> Iterator[None]:
    """Eval mode inside, every mode as before after it; nothing changes with ``as_it_is``."""
    training = [] if as_it_is else [m for m in module.modules() if m.training]
    try:
        for part in training:
            part.training = False
        yield
    finally:
        for part in training:
            part.training = True


def _spread(latents: Tensor) -> Tensor:
    return latents.float().flatten(0, 1).std(0, unbiased=False)
