"""What the subject does without a latent, or with one held at a value."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from quire.contracts import Batch, Sampler, Spec
from quire.errors import ConfigError
from quire.roles.sparse.card import needs_grad
from quire.roles.sparse.codes import SparseCodes
from quire.roles.sparse.decoder import SparseDecoder
from quire.roles.sparse.encoder import SparseEncoder
from quire_attn_sae.runs import tiny_run


class LatentIntervention(Sampler):
    """Take a latent out, or pin it, at the dictionary's site, and run the subject. Kissane, Krzyzanowski et al. 2024.

    The site becomes the rebuild with the changed latent plus the dictionary's error on the clean input (arXiv
    2406.17759), so latents that are left alone change nothing. Other sites than z do as well.

    Args:
        mode: ``"zero"`` or ``"pin"``.
        latent: Its number, or several.
        value: What ``pin`` holds it at, at every token, in the units of the codes.
        keep_error: Keep the dictionary's error; false lets the rebuild alone stand.

    Needs:
        encoder: SparseEncoder. decoder: SparseDecoder. data: Activations with a language model as subject.

    Returns:
        By name, [B]: ``loss_clean`` and ``loss`` (nats per next token), ``kl`` (clean to changed, mean over tokens that
        predict one), ``activation`` (the latents' largest, clean), ``index``.

    Raises:
        ConfigError: an unknown mode, a latent that is not there, or data without a subject.
    """

    encoder: SparseEncoder
    decoder: SparseDecoder
    fields = ("activation", "tokens")

    def __init__(
        self,
        mode: Literal["zero", "pin"] = "zero",
        latent: int | list[int] = 0,
        value: float = 0.0,
        keep_error: bool = True,
    ) -> None:
        super().__init__()
        if mode not in ("zero", "pin"):
            raise ConfigError(f"LatentIntervention.mode must be zero or pin, got {mode!r}")
        if mode == "pin" and value < 0:
            raise ConfigError(f"LatentIntervention.value must be at least 0, as latents are, got {value}")
        self.mode, self.value, self.keep_error = mode, value, keep_error
        self.latents = [latent] if isinstance(latent, int) else list(latent)

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """Latent 1 pinned, at the z site of a small language model with random weights."""
        sampler = {"class_path": "LatentIntervention", "init_args": {"mode": "pin", "latent": 1, "value": 2.0}}
        return tiny_run(analysis=True, sampler=sampler)

    def build(self, spec: Spec) -> None:
        """Check the latents and know the site."""
        self.site = str(spec.need("site", self))
        known = int(spec.code("latents", self))
        for i in self.latents:
            if not 0 <= i < known:
                raise ConfigError(f"latent {i} is not there: the dictionary has {known}")

    def edit(self, codes: SparseCodes) -> SparseCodes:
        """The codes with the latents changed; those left alone stay as they are."""
        dense = codes.dense().clone()
        dense[..., self.latents] = self.value if self.mode == "pin" else 0.0
        return codes.replace(values=dense, indices=None, count=None)

    @torch.no_grad()
    def logits(self, model: Any, batch: Batch, edit: Callable[[Any], Any] | None = None) -> Tensor:
        """[B,T,V] of the subject under the intervention, or under another edit of the codes."""
        subject = self._subject(model)
        encoder, decoder = model.encoder.role(SparseEncoder), model.decoder.role(SparseDecoder)
        batch, back = subject.aligned({k: batch[k] for k in ("tokens", "mask") if k in batch})
        fields = None
        if needs_grad(encoder, model.datamodule):
            fields = {"grad": subject.sites.read(batch, [self.site], grad=True).grads[self.site].float()}
        keep = self.keep_error
        with subject.sites.splice(self.site, encoder, decoder, edit or self.edit, keep, fields=fields):
            made: Tensor = subject.run(batch)
        return made if back is None else made.gather(1, back[:, :, None].expand(-1, -1, made.shape[2]))

    @torch.no_grad()
    def forward(self, model: Any, batch: Batch) -> dict[str, Tensor]:
        """Run one batch of whole samples clean and changed."""
        if batch["activation"].ndim != 3:
            raise ConfigError("LatentIntervention runs whole samples: set data.analysis: true")
        clean = self._subject(model).logits({k: batch[k] for k in ("tokens", "mask") if k in batch})
        changed = self.logits(model, batch)
        counts = batch["mask"][:, 1:] & batch["mask"][:, :-1]
        p, q = clean[:, :-1].float().log_softmax(-1), changed[:, :-1].float().log_softmax(-1)
        active = model.encoder.role(SparseEncoder)(batch).dense()[..., self.latents].amax(-1)
        return {
            "loss_clean": _mean(_loss(p, batch["tokens"]), counts),
            "loss": _mean(_loss(q, batch["tokens"]), counts),
            "kl": _mean((p.exp() * (p - q)).sum(-1), counts),
            "activation": active.masked_fill(~batch["mask"], 0).amax(1),
            "index": batch["index"],
        }

    def _subject(self, model: Any) -> Any:
        if model.subject is None:
            raise ConfigError("LatentIntervention needs the subject itself: give data as Activations with a subject")
        return model.subject


def _loss(logs: Tensor, tokens: Tensor) -> Tensor:
    return cross_entropy(logs.transpose(1, 2), tokens[:, 1:], reduction="none")


def _mean(values: Tensor, counts: Tensor) -> Tensor:
    return (values * counts).sum(1) / counts.sum(1).clamp(min=1)
