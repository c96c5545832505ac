"""TopK and BatchTopK whose ranking takes gradients in; the values that are kept stay the activations."""

from __future__ import annotations

import logging
from typing import Any, Literal

import torch
from torch import Tensor

from quire.contracts import Spec
from quire.datasets.activations.module import Activations
from quire.errors import ConfigError, DataError
from quire.roles.sparse.codes import SparseCodes, packed
from quire.roles.sparse.selector import Selection, Selector, gathered
from quire.roles.sparse.selectors import BatchTopK, TopK
from quire_gsae.scores import NORMS, SCORES, effect, scores, size

log = logging.getLogger(__name__)

EVALUATIONS = ("plain", "grad")
EVERY = 64
"""On an accelerator one batch in this many is looked at for NaN, since looking waits for the device."""


class GradientOrder(Selector):
    """Order latents by z (1 + beta |g d'|), g the gradient of the subject's loss and d the decoder's rows."""

    needs_fields = ("grad",)
    ranks = True
    beta: float
    grad_norm: str
    norm_mask: bool
    score: str
    select_at_eval: str

    def _settle(self, beta: float, grad_norm: str, norm_mask: bool, score: str, select_at_eval: str) -> None:
        name = type(self).__name__
        if beta < 0:
            raise ConfigError(f"{name}.beta must be at least 0, got {beta:g}")
        options = {"grad_norm": (grad_norm, NORMS), "score": (score, SCORES)}
        options["select_at_eval"] = (select_at_eval, EVALUATIONS)
        for key, (given, known) in options.items():
            if given not in known:
                raise ConfigError(f"{name}.{key} must be {' or '.join(known)}, got {given!r}")
        self.beta, self.grad_norm, self.norm_mask = beta, grad_norm, norm_mask
        self.score, self.select_at_eval = score, select_at_eval
        self.site = "of the data"
        self._warned, self._calls = False, 0

    def build(self, spec: Spec) -> None:
        """As without gradients; remembers the site for refusals."""
        super().build(spec)
        if spec.get("target_width") is not None:
            raise ConfigError(
                f"{type(self).__name__} weighs gradients against the decoder's rows, but a transcoder's rows are at"
                " another site: drop data.target_site, or use TopK"
            )
        self.site = str(spec.get("site") or self.site)

    def reads(self, stage: str) -> tuple[str, ...]:
        """``grad`` in training, and in evaluation with ``select_at_eval: grad``."""
        return self.needs_fields if stage == "fit" or self.select_at_eval == "grad" else ()

    def scores(self, z: Tensor, context: Selection) -> Tensor:
        """[N,F]; constants: no gradient passes through them."""
        if not context.training and self.select_at_eval == "plain":
            return z
        with torch.no_grad():
            a = effect(self._gradient(context), context.rows)
            divisor = size(a, self.grad_norm, self._counting(context), over_ranks=context.training)
            self._look(a, divisor, context)
            return scores(z.detach(), a, divisor, self.beta, self.score)

    def _gradient(self, context: Selection) -> Tensor:
        name = type(self).__name__
        if context.given("grad") is None:
            remedy = "" if context.training else " or select_at_eval: plain"
            where = " (select_at_eval: plain helps in evaluation only)" if context.training else ""
            raise ConfigError(
                f"{name} needs gradients: the batch has no 'grad' field; set data.with_grad: true{remedy}{where}"
            )
        return context.gradient()

    def _counting(self, context: Selection) -> Tensor | None:
        """[N] bool: tokens that ``grad_norm`` averages over; outliers at the first position would rule it."""
        if not self.norm_mask:
            return None
        first, special = context.given("position"), context.given("special")
        counting = torch.ones(len(context.x), dtype=torch.bool, device=context.x.device)
        if first is not None:
            counting = counting & (first != 0)
        return counting if special is None else counting & ~special

    def _look(self, a: Tensor, divisor: Tensor, context: Selection) -> None:
        self._calls += 1
        if a.is_cuda and self._calls % EVERY != 1:
            return
        total = float(a.sum(dtype=torch.float64))
        if total != total or total == float("inf"):
            grad = context.need("grad")
            bad = (~torch.isfinite(grad)).any(1).nonzero()
            if len(bad):
                row = int(bad[0])
                what = "NaN" if bool(grad[row].isnan().any()) else "an infinite value"
                raise DataError(f"field 'grad' has {what} at row {row} (site {self.site})")
        if not self._warned and not float(divisor) > 0:
            self._warned = True
            log.warning("%s: all gradients are 0: latents are kept by activation alone", type(self).__name__)


class GradTopK(GradientOrder, TopK):
    """Keep each token's k latents that matter most for the subject's loss. Olmo et al. 2024, arXiv 2411.10397.

    A latent's score is its activation times 1 + beta a, a = |g d'| the first-order change of the loss per unit of the
    latent. The kept values are the activations themselves. Gradients know the labels that the subject is asked to
    predict, so results with ``select_at_eval: grad`` are optimistic: report both.

    Args:
        k: Latents kept per token.
        beta: Weight of the gradient, 0 and up; 0 is TopK.
        grad_norm: What a is divided by: ``"batch_mean"``, its mean over the batch; ``"rms"``; ``"none"``.
        norm_mask: Leave special tokens and first positions out of that mean.
        score: ``"additive"`` z (1 + beta a), or ``"attribution"`` z a, where beta tends to.
        select_at_eval: ``"plain"`` ranks by activation in evaluation, ``"grad"`` as in training.

    Needs:
        encoder: SparseEncoder. decoder: SparseDecoder. Field ``grad`` [N,D]: the derivative of the summed loss.

    Returns:
        Codes with K = k; a kept 0 is not active.

    Raises:
        ConfigError: k below 1 or above the latents, beta below 0, an unknown option, no ``grad``, or a transcoder.
        DataError: a gradient that is not finite.
    """

    def __init__(
        self,
        k: int,
        beta: float = 1.0,
        grad_norm: Literal["batch_mean", "rms", "none"] = "batch_mean",
        norm_mask: bool = True,
        score: Literal["additive", "attribution"] = "additive",
        select_at_eval: Literal["plain", "grad"] = "plain",
    ) -> None:
        super().__init__(k)
        self._settle(beta, grad_norm, norm_mask, score, select_at_eval)

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """k = 2 on a small language model with random weights."""
        return tiny_gradient_run({"class_path": cls.__name__, "init_args": {"k": 2}})


class GradBatchTopK(GradientOrder, BatchTopK):
    """Keep the batch's k * N latents that matter most for the subject's loss. Olmo et al. 2024, arXiv 2411.10397.

    As GradTopK, but tokens differ in number (Bussmann et al. 2024). In evaluation a token is cut at BatchTopK's fixed
    threshold on activations; ``select_at_eval: grad`` takes the k * N highest scores of each evaluated batch.

    Args:
        k: Latents kept per token, on average.
        beta: Weight of the gradient, 0 and up; 0 is BatchTopK.
        grad_norm: What a is divided by: ``"batch_mean"``, its mean over the batch; ``"rms"``; ``"none"``.
        norm_mask: Leave special tokens and first positions out of that mean.
        score: ``"additive"`` z (1 + beta a), or ``"attribution"`` z a.
        select_at_eval: ``"plain"`` or ``"grad"``.

    Returns:
        Codes with K the most that one token of the batch has.

    Raises:
        ConfigError: as GradTopK.
        DataError: a gradient that is not finite.
    """

    def __init__(
        self,
        k: int,
        beta: float = 1.0,
        grad_norm: Literal["batch_mean", "rms", "none"] = "batch_mean",
        norm_mask: bool = True,
        score: Literal["additive", "attribution"] = "additive",
        select_at_eval: Literal["plain", "grad"] = "plain",
    ) -> None:
        super().__init__(k)
        self._settle(beta, grad_norm, norm_mask, score, select_at_eval)

    def select(self, z: Tensor, context: Selection) -> SparseCodes:
        """As BatchTopK; in evaluation by gradient the whole batch is ranked again."""
        if context.training or self.select_at_eval == "plain":
            return super().select(z, context)
        with torch.no_grad():
            values = z.detach()
            ranked = self.scores(values, context) * (values > 0)
            cut = ranked.flatten().topk(self.k * len(z), sorted=False).values.min()
            kept = (ranked >= cut) & (values > 0)
            indices = packed(values * kept).indices
            assert indices is not None
            kept = kept.gather(1, indices)
        codes = gathered(z, indices)
        return codes.replace(values=codes.values * kept)

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """k = 2 on a small language model with random weights."""
        return tiny_gradient_run({"class_path": cls.__name__, "init_args": {"k": 2}})


def tiny_gradient_run(selector: Any) -> dict[str, Any]:
    """A dictionary of 32 latents on a small language model with random weights, gradients included."""
    run = Activations.tiny()
    run["model"]["encoder"]["init_args"]["selector"] = selector
    run["model"]["optimizer"] = {"class_path": "torch.optim.Adam", "init_args": {"lr": 0.01}}
    run["model"]["schedule"] = "Constant"
    run["data"]["init_args"]["with_grad"] = True
    return run
