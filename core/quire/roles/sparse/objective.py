"""Rebuild activations from sparse codes: the objective of sparse dictionaries and transcoders."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from quire.contracts import Batch, Losses, Objective
from quire.errors import ConfigError
from quire.roles.sparse.codes import SparseCodes
from quire.roles.sparse.decoder import SparseDecoder, restored
from quire.roles.sparse.encoder import Reading, SparseEncoder
from quire.roles.sparse.ranks import sum_over_ranks
from quire.roles.sparse.selector import gathered, largest, tiny_run

if TYPE_CHECKING:
    from lightning.pytorch import Callback

    from quire.model import Model


class SparseReconstruction(Objective):
    """Mean squared error of the decoded codes, with penalties on the codes and a term that revives dead latents.

    AuxK lets the largest dead latents rebuild what the live ones left over (Gao et al. 2024, arXiv 2406.04093). Batches
    with a field ``target`` are rebuilt to that (a transcoder); a field ``weight`` [N] weighs the tokens of
    ``reconstruct``.

    Args:
        reduction: ``"sum"`` or ``"mean"`` over the width; an l1 that was tuned under one is wrong under the other.
        l1: Weight of the sum of the codes, each times the norm of its decoder row where rows are not unit.
        l0: Weight of the number of active latents; the selector must give it a gradient (JumpReLU).
        auxk: Weight of the AuxK term; 0 turns it off.
        aux_latents: Most dead latents of a token that AuxK uses; null is half the width.
        aux_norm: ``"residual"`` divides AuxK by the variance of what was left over; ``"none"`` doesn't, and averages
            over the width.
        aux_detach: Whether AuxK's target is a constant; false lets its gradient reach the live latents too.
        dead_after: Tokens without firing after which a latent is dead.
        sparsity_warmup: Steps over which l1 and l0 rise to their weights.

    Needs:
        encoder: SparseEncoder. decoder: SparseDecoder.

    Returns:
        ``reconstruct``: mean over tokens, in squared normalised units, of the sum or mean over the width. ``nested``:
        the same for each shorter prefix (Matryoshka), averaged. ``l1``: mean sum of codes. ``l0``: mean number of
        active latents. ``auxk``: a share of the residual's variance.

    Raises:
        ConfigError: an unknown reduction, a negative weight, or an l0 that the selector gives no gradient to.
    """

    encoder: SparseEncoder
    decoder: SparseDecoder
    fields = ("activation",)

    def __init__(
        self,
        reduction: Literal["sum", "mean"] = "sum",
        l1: float = 0.0,
        l0: float = 0.0,
        auxk: float = 1 / 32,
        aux_latents: int | None = None,
        aux_norm: Literal["residual", "none"] = "residual",
        aux_detach: bool = True,
        dead_after: int = 10_000_000,
        sparsity_warmup: int = 0,
    ) -> None:
        super().__init__()
        if reduction not in ("sum", "mean"):
            raise ConfigError(f"SparseReconstruction.reduction must be sum or mean, got {reduction!r}")
        if aux_norm not in ("residual", "none"):
            raise ConfigError(f"SparseReconstruction.aux_norm must be residual or none, got {aux_norm!r}")
        for name, value in {"l1": l1, "l0": l0, "auxk": auxk, "sparsity_warmup": sparsity_warmup}.items():
            if value < 0:
                raise ConfigError(f"SparseReconstruction.{name} must be at least 0, got {value}")
        if min(dead_after, 1 if aux_latents is None else aux_latents) < 1:
            raise ConfigError("SparseReconstruction.dead_after and aux_latents must be at least 1")
        self.reduction, self.l1, self.l0, self.auxk = reduction, l1, l0, auxk
        self.aux_latents, self.aux_norm, self.aux_detach = aux_latents, aux_norm, aux_detach
        self.dead_after, self.sparsity_warmup = dead_after, sparsity_warmup
        self.weights = {}

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """Planted features, ReLU with an l1 term, latents dead after two batches."""
        return tiny_run("ReLU", {"class_path": "SparseReconstruction", "init_args": {"l1": 0.01, "dead_after": 64}})

    def check(self, model: Model) -> None:
        """The selector must give an l0 term its gradient."""
        if self.l0 and not (selector := model.encoder.role(SparseEncoder).selector).counts:
            raise ConfigError(
                f"SparseReconstruction.l0 needs a count with a gradient; {type(selector).__name__} has none: "
                "use JumpReLU, or l1"
            )

    def callbacks(self) -> list[Callback]:
        """``DeadLatents`` with this window."""
        from quire.roles.sparse.dead import DeadLatents

        return [DeadLatents(self.dead_after)]

    def forward(self, model: Model, batch: Batch) -> Losses:
        """The terms of one batch."""
        encoder, decoder = model.encoder.role(SparseEncoder), model.decoder.role(SparseDecoder)
        reading = encoder.read(batch)
        codes, target = reading.codes, encoder.target(batch, reading.x)
        made = decoder.decode(codes, reading.plan)
        weight = reading.context.given("weight")
        terms = {"reconstruct": self.error(made, target, weight)}
        if codes.nested:
            parts = [self.error(decoder.decode(n), target, weight) for n in codes.nested]
            terms["nested"] = torch.stack(parts).mean()
        if self.l1:
            terms["l1"] = self.magnitude(codes, decoder)
        if self.l0:
            assert codes.count is not None
            terms["l0"] = codes.count.mean()
        if self.auxk and (aux := self.revive(encoder, decoder, reading, target, made)) is not None:
            terms["auxk"] = aux
        rising = self.warmed(model.global_step)
        self.weights = {"l1": self.l1 * rising, "l0": self.l0 * rising, "auxk": self.auxk}
        with torch.no_grad():
            outputs = {"codes": codes, "fired": codes.fired(), "tokens": len(target)}
            outputs |= {"x": reading.x, "errors": (made - target).square().sum(1)}
            outputs |= {"reconstruction": restored(codes, made.detach()), "target": restored(codes, target)}
        metrics = {"active": lambda: codes.l0().float().mean(), "fvu": lambda: _unexplained(made, target)}
        return Losses(terms, metrics, outputs)

    # ---- terms
    def error(self, made: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
        """Mean over tokens of the squared error, summed or averaged over the width."""
        error = (made - target).square()
        rows = error.sum(1) if self.reduction == "sum" else error.mean(1)
        return (rows if weight is None else rows * weight).mean()

    def magnitude(self, codes: SparseCodes, decoder: SparseDecoder) -> Tensor:
        """Mean over tokens of the sum of the codes, times their rows' norms where these are free."""
        if decoder.unit_norm:
            return codes.values.sum(-1).mean()
        norms = decoder.norms if codes.indices is None else decoder.norms[codes.indices]
        return (codes.values * norms).sum(-1).mean()

    def warmed(self, step: int) -> float:
        """Share of l1 and l0 that counts at a step."""
        return min(1.0, (step + 1) / self.sparsity_warmup) if self.sparsity_warmup else 1.0

    def revive(
        self, encoder: SparseEncoder, decoder: SparseDecoder, reading: Reading, target: Tensor, made: Tensor
    ) -> Tensor | None:
        """The AuxK term; None where no latent is dead, as far as that is known without waiting for the device."""
        if not decoder.may_have_dead(self.dead_after):
            return None
        dead = decoder.dead(self.dead_after)
        most = self.aux_latents or max(1, decoder.width // 2)
        most = min(most, decoder.latents if dead.is_cuda else int(dead.sum()))
        if not most:
            return None
        z = reading.z * dead
        codes = gathered(z, largest(z, most))  # where fewer are dead, the rest are kept with 0: not active, no gradient
        plan = None
        if reading.plan is not None:
            codes, plan = encoder.attached(reading.x, codes)
        rest = target - made
        rest = rest.detach() if self.aux_detach else rest
        error = (rest - decoder.decode(codes, plan, bias=False)).square()
        if self.aux_norm == "none":
            return error.mean()
        variance = _variance(rest.detach())
        return error.sum(1).mean() * torch.where(variance > 0, 1 / variance, 0.0)  # one token leaves no variance


@torch.no_grad()
def _variance(rows: Tensor) -> Tensor:
    """Mean over the tokens of all processes of the squared distance to their mean."""
    sums = sum_over_ranks(torch.cat([rows.sum(0), rows.new_tensor([len(rows)])]))
    mean, count = sums[:-1] / sums[-1], sums[-1]
    return sum_over_ranks((rows - mean).square().sum()) / count


@torch.no_grad()
def _unexplained(made: Tensor, target: Tensor) -> Tensor:
    """Share of this batch's variance that is not rebuilt; the card has that of the whole set."""
    return (made - target).square().sum() / (target - target.mean(0)).square().sum()
