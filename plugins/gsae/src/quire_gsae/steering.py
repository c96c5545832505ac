"""What adding a latent's direction does to the logits: whether latents steer (Olmo et al. 2024)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from quire.contracts import Batch, Losses, Metric
from quire.errors import ConfigError
from quire.roles.sites.subject import Subject
from quire.roles.sparse.decoder import SparseDecoder
from quire_gsae.selectors import tiny_gradient_run


@torch.no_grad()
def steering_effect(
    subject: Subject, site: str, directions: Tensor, batch: Batch, alpha: float = 1.0, top: int = 10
) -> Tensor:
    """[M] mean |change of logit|, over the contexts that did not choose the tokens, at each direction's top tokens.

    The top tokens of a direction are those whose logits it raises most, on average, in the first half of the contexts;
    the effect is read in the other half, so it is not the largest of many noisy numbers.

    Args:
        subject: A language model.
        site: Where.
        directions: [M,D]; each is scaled to norm 1.
        batch: ``tokens`` [B,T], B of 2 and more, and ``mask``.
        alpha: Length of what is added, in mean norms of the activation at the site.
        top: Tokens per direction.

    Raises:
        ConfigError: one context only, or a subject without logits.
    """
    if len(batch["tokens"]) < 2:
        raise ConfigError("steering needs at least 2 contexts: one half chooses the tokens, the other is measured")
    batch = subject.aligned(batch)[0]
    clean = subject.logits(batch).float()
    mask = batch.get("mask")
    real = torch.ones_like(batch["tokens"], dtype=torch.bool) if mask is None else mask
    held = subject.sites.read(batch, [site]).values[site].float()
    length = alpha * float(held[real].norm(dim=-1).mean())
    half = len(clean) // 2
    found = []
    for direction in normalize(directions.float(), dim=1):
        with subject.sites.steer(site, direction, length):
            moved = subject.logits(batch).float() - clean
        chosen = moved[:half][real[:half]].mean(0).topk(min(top, moved.shape[-1])).indices
        found.append(moved[half:][real[half:]][:, chosen].abs().mean())
    return torch.stack(found)


def spread_latents(fired: Tensor, count: int) -> Tensor:
    """At most ``count`` latents that fired, evenly over their ranks by frequency, so that two dictionaries match."""
    alive = int((fired > 0).sum())
    if not alive:
        return torch.zeros(0, dtype=torch.long, device=fired.device)
    ranked = fired.argsort(descending=True, stable=True)[:alive]
    places = torch.linspace(0, alive - 1, min(count, alive), device=fired.device).round().long()
    return ranked[places]


class SteeringEffect(Metric):
    """How much a latent's direction, added at the site, moves its top tokens' logits. Olmo et al. 2024.

    Latents are taken evenly over the frequencies of those that fired in validation, so dictionaries are compared at
    matched frequency; contexts are the first rows of the validation split.

    Args:
        alpha: Length of what is added, in mean norms of the activation at the site.
        contexts: Rows of the source; half of them choose the tokens.
        latents: Latents that are steered, one forward pass of the subject each.
        top: Tokens per latent.

    Needs:
        decoder: SparseDecoder at the site of Activations; a subject that gives logits.

    Returns:
        Mean |change of logit|; NaN when no latent fired.

    Raises:
        ConfigError: a number below its least, a transcoder, or data without a language model as subject.
    """

    full_state_update = False
    decoder: SparseDecoder
    fired: Tensor
    model: Any

    def __init__(self, alpha: float = 1.0, contexts: int = 64, latents: int = 64, top: int = 10) -> None:
        super().__init__()
        if contexts < 2 or latents < 1 or top < 1:
            raise ConfigError("SteeringEffect needs contexts of at least 2, and latents and top of at least 1")
        self.alpha, self.contexts, self.latents, self.top = alpha, contexts, latents, top
        self.refer("model", None)

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """Two latents in four contexts."""
        run = tiny_gradient_run({"class_path": "GradTopK", "init_args": {"k": 2}})
        run["model"]["metrics"] = [{"class_path": cls.__name__, "init_args": {"contexts": 4, "latents": 2}}]
        return run

    def build(self, spec: Any) -> None:
        """One counter a latent."""
        if spec.get("target_width") is not None:
            raise ConfigError("SteeringEffect steers at the site that was read: drop data.target_site")
        self.add_state("fired", torch.zeros(int(spec.code("latents", self))), dist_reduce_fx="sum")

    def bind(self, model: Any) -> None:
        """Know the model."""
        self.refer("model", model)

    def update(self, fired: Tensor) -> None:
        """On how many tokens each latent fired, [F]."""
        self.fired += fired

    def observe(self, model: Any, batch: Batch, losses: Losses) -> None:
        """Count what fired."""
        if model.subject is None or not hasattr(model.datamodule, "forwards") or not model.subject.language:
            raise ConfigError("SteeringEffect needs a language model as subject: data such as Activations")
        self.update(losses.outputs["fired"])

    def compute(self) -> Tensor:
        """Steer."""
        chosen = spread_latents(self.fired, self.latents)
        if not len(chosen):
            return self.fired.new_tensor(float("nan"))
        data, decoder = self.model.datamodule, self.model.decoder.role(SparseDecoder)
        batch = contexts_of(data, self.contexts, self.model.device)
        rows = decoder.W_dec.detach()[chosen]
        return steering_effect(self.model.subject, data.sites[0], rows, batch, self.alpha, self.top).mean()


def contexts_of(data: Any, count: int, device: Any) -> Batch:
    """The first rows of the validation split, at most ``count``."""
    from quire.datasets.activations.forwards import moved

    rows = data.forwards("val").rows
    rows.contexts = count
    return moved(rows.batch(rows.plan(0, False)[0]), device)
