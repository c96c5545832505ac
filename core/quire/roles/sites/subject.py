"""A frozen model under study: how it is run, what its loss is, and its fingerprint."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from quire.contracts import Batch, Encoder
from quire.data import mix
from quire.errors import ConfigError
from quire.roles.language.contract import StepModel
from quire.roles.language.rows import left_aligned

log = logging.getLogger(__name__)


class Subject:
    """A frozen model whose inside is studied.

    Its parameters lose their gradients and it stays in eval mode; nothing else about it changes.

    Args:
        part: A Quire language model or encoder, built; or any module called with ``tokens`` (else ``image``).
        name: How records and errors call it.
        tokenizer: Its tokenizer, where it reads text.
        model: The Quire model that ``part`` belongs to; its objective is the loss where ``part`` is no language model.

    Attributes:
        root: The module that site names are resolved in.
        steps: The language model that can be stepped, for generation; None for others.
        sites: The tool that reads and changes it inside.
    """

    def __init__(self, part: nn.Module, name: str, tokenizer: Any = None, model: Any = None) -> None:
        from quire.roles.sites.tool import Sites

        self.part, self.name, self.tokenizer, self.model = part, name, tokenizer, model
        self.steps: StepModel | None = part if isinstance(part, StepModel) else None
        inside = getattr(part, "module", None)  # the adapters to transformers hold the model they adapt
        self.root: nn.Module = inside if self.steps is not None and isinstance(inside, nn.Module) else part
        self.part.requires_grad_(False)
        if model is not None:
            model.requires_grad_(False).eval()
        self.hold_still()
        self.sites = Sites(self)
        self._fingerprint: str | None = None

    # ---- state
    def hold_still(self) -> None:
        """Back to eval mode, and say so, if somebody switched the subject to train mode."""
        if any(m.training for m in self.root.modules()):
            dropout = [n for n, m in self.root.named_modules() if isinstance(m, nn.Dropout) and m.p > 0]
            also = f", which would have run {len(dropout)} dropouts" if dropout else ""
            log.warning("subject %s was in train mode%s: switched to eval", self.name, also)
            self.part.eval()
            self.root.eval()

    def to(self, device: torch.device | str) -> Subject:
        """Move it."""
        if self.device != torch.device(device):
            (self.model if self.model is not None else self.part).to(device)
            self.part.to(device)
        return self

    @property
    def device(self) -> torch.device:
        """Where its parameters lie."""
        first = next(self.part.parameters(), None)
        return torch.device("cpu") if first is None else first.device

    @property
    def language(self) -> bool:
        """Whether it reads ``tokens`` and gives logits of the next one."""
        return self.steps is not None or not isinstance(self.part, Encoder)

    @property
    def context(self) -> int | None:
        """Most tokens that it takes; None: no limit is known."""
        config = getattr(self.root, "config", None)
        if config is not None:  # asking an adapter for all that it can do would cost it a trial
            config = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
            return getattr(config, "max_position_embeddings", None)
        return None if self.steps is None else self.steps.caps().positions_max

    @property
    def fingerprint(self) -> str:
        """Hash of its weights."""
        if self._fingerprint is None:
            self._fingerprint = fingerprint_of(self.root)
        return self._fingerprint

    # ---- running
    def aligned(self, batch: Batch) -> tuple[Batch, Tensor | None]:
        """The batch with its real tokens moved to the left, and where each place went; None when nothing moved.

        So positions count from 0 on every row, whatever side was padded.
        """
        mask = batch.get("mask")
        if not self.language or mask is None or "tokens" not in batch:
            return batch, None
        tokens, counts, back = left_aligned(batch["tokens"], mask, "row")
        if back is None:
            return {**batch, "tokens": tokens}, None
        real = torch.arange(tokens.shape[1], device=tokens.device) < torch.tensor(counts, device=tokens.device)[:, None]
        return {**batch, "tokens": tokens, "mask": real}, back

    def run(self, batch: Batch) -> Any:
        """One forward pass: logits of a language model, codes of an encoder. ``batch`` is aligned."""
        self.hold_still()
        if self.steps is not None:
            codes = None
            if "source" in batch:
                from quire.roles.language.contract import codes_of

                codes = codes_of(self.model if self.model is not None else _Alone(self.steps), batch)
            return self.steps(codes, batch["tokens"], None)  # causal, and padding stands behind: no mask is needed
        if isinstance(self.part, Encoder):
            return self.part(batch)
        field = next((f for f in ("tokens", "image", "vector") if f in batch), None)
        if field is None:
            raise ConfigError(f"subject {self.name} reads tokens, image or vector; the data has {', '.join(batch)}")
        made = self.part(batch[field])
        return getattr(made, "logits", made)

    def logits(self, batch: Batch) -> Tensor:
        """[B,T,V], each place beside its token."""
        if not self.language:
            raise ConfigError(f"subject {self.name} is {type(self.part).__name__}, which gives no logits")
        batch, back = self.aligned(batch)
        made: Tensor = self.run(batch)
        return made if back is None else made.gather(1, back[:, :, None].expand(-1, -1, made.shape[2]))

    def loss(self, batch: Batch) -> tuple[Tensor, Any]:
        """What gradients are taken of, and the output: next-token cross-entropy *summed* over real targets, in nats.

        A subject that is no language model has the loss that it was trained with.
        """
        if self.language:
            output = self.run(batch)
            return next_token_loss(output, batch), output
        objective = getattr(self.model, "objective", None)
        if objective is None:
            raise ConfigError(
                f"with_grad needs a loss: subject {self.name} is no language model and has no objective of its own"
            )
        key = mix(0, *batch["index"].tolist()) if "index" in batch else 0
        torch.manual_seed(key)
        self.model.generator(self.device).manual_seed(key)
        losses = objective(self.model, batch)
        total = sum((objective.weights.get(k, 1.0) * v for k, v in losses.items()), torch.zeros((), device=self.device))
        return total, losses


class _Alone:
    """Stands for a model that is one decoder."""

    encoder = None

    def __init__(self, decoder: StepModel) -> None:
        self.decoder = decoder


def fingerprint_of(module: nn.Module) -> str:
    """First 16 hex digits of a hash over every parameter and buffer; the same on every device."""
    digest = hashlib.blake2b(digest_size=8)
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def next_token_loss(logits: Tensor, batch: Batch) -> Tensor:
    """Cross-entropy of each next real token, summed, in nats.

    Args:
        logits: [B,T,V].
        batch: ``tokens`` [B,T] and ``mask`` [B,T].
    """
    tokens, mask = batch["tokens"], batch.get("mask")
    target = tokens[:, 1:]
    if mask is not None:
        target = target.masked_fill(~(mask[:, 1:] & mask[:, :-1]), -100)
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return cross_entropy(wide[:, :-1].flatten(0, 1), target.flatten(), reduction="sum")


def special_ids(tokenizer: Any) -> Iterable[int]:
    """Special ids of a tokenizer; none without one."""
    return () if tokenizer is None else tokenizer.special
