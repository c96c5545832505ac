"""A readout that may choose which tokens to look at."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

from quire.contracts import Encoder
from quire.errors import ConfigError
from quire.roles.probes.features import Features, Read, codes_of, read_tokens
from quire.roles.probes.linear import sgd
from quire.roles.probes.probe import TINY_VIT, Probe, tiny_run
from quire.roles.probes.raw import raw_tokens
from quire.roles.probes.subject import Subject
from quire.roles.tokens.contract import TokenEncoder

WARMUP = 1 / 9


class AttentiveReadout(nn.Module):
    """One learned query attends once over tokens; a BatchNorm without weights and a linear layer follow.

    The query starts at zero. Query, keys and values have a norm each; there are no positions, no residual, no MLP.

    Args:
        width: D.
        classes: K.
        heads: Attention heads; they divide the width.
    """

    def __init__(self, width: int, classes: int, heads: int = 1) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Parameter(torch.zeros(1, 1, width))
        self.norm_q, self.norm_k, self.norm_v = (nn.LayerNorm(width) for _ in range(3))
        self.to_q, self.to_k, self.to_v, self.proj = (nn.Linear(width, width) for _ in range(4))
        self.norm = nn.BatchNorm1d(width, affine=False)
        self.head = nn.Linear(width, classes)

    def attend(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """[B,T,D] and [B,T] (True = real) → [B,D]."""
        q = self._split(self.to_q(self.norm_q(self.query))).expand(len(tokens), -1, -1, -1)
        k, v = self._split(self.to_k(self.norm_k(tokens))), self._split(self.to_v(self.norm_v(tokens)))
        keys = None if mask is None else mask[:, None, None, :]
        return self.proj(scaled_dot_product_attention(q, k, v, attn_mask=keys).transpose(1, 2).flatten(1))

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """[B,T,D] → logits [B,K]."""
        return self.head(self.norm(self.attend(tokens, mask)))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    @torch.no_grad()
    def settle(self, attended: Tensor) -> None:
        """Set the BatchNorm's statistics to those of all training samples, [N,D]."""
        assert self.norm.running_mean is not None and self.norm.running_var is not None
        self.norm.running_mean.copy_(attended.mean(0))
        self.norm.running_var.copy_(attended.var(0, unbiased=False))


class AttentiveProbe(Probe):
    """Accuracy of one cross-attention over the frozen tokens. The protocol of Chen et al. 2022 (CAE), arXiv 2202.03026.

    SGD with momentum 0.9, batch 256, a ninth of the steps as warm-up, then a cosine. All tokens of the training
    samples are kept in memory: samples x tokens x width x 4 bytes.

    Args:
        heads: Attention heads; they divide the encoder's width.
        lr: Learning rate.
        epochs: Passes over the training samples.
        every: Epochs between two measurements; 0 is only at the end of ``fit``, in ``validate`` and ``test``.
        max_train: At most this many training samples; null takes all.
        layer: Hidden states of this layer before the final norm, null for the encoder's output.
        label: Name in the log.

    Needs:
        encoder: TokenEncoder; prefix and content tokens are keys and values, padding is not.

    Returns:
        Logs ``val/attentive`` in [0,1], ``val/attentive_random`` (the same encoder untrained) and
        ``val/attentive_raw`` (raw patches, frames or words without their places); writes ``probe_attentive.csv``
        and ``.json``.

    Raises:
        ConfigError: no TokenEncoder, ``heads`` that don't divide the width, ``epochs`` below 1, ``lr`` not above 0.
    """

    encoder: TokenEncoder

    def __init__(
        self,
        heads: int = 1,
        lr: float = 0.4,
        epochs: int = 90,
        every: int = 0,
        max_train: int | None = None,
        layer: int | None = None,
        label: str = "attentive",
    ) -> None:
        super().__init__(label, every, max_train, "mean", layer)
        if heads < 1 or epochs < 1 or not lr > 0:
            raise ConfigError(
                f"AttentiveProbe needs heads and epochs of at least 1 and lr above 0, got {heads}, {epochs} and {lr}"
            )
        self.heads, self.lr, self.epochs = heads, lr, epochs

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """Judge a small ViT that learnt digits."""
        return tiny_run("AttentiveProbe", TINY_VIT, epochs=5)

    def reader(self, encoder: Encoder) -> Read:
        """All tokens."""
        tokens = encoder.role(TokenEncoder)
        assert tokens is not None  # setup has refused others
        return lambda batch: read_tokens(codes_of(tokens, batch, self.layer, self))

    def raw(self, encoder: Encoder) -> Read:
        """Raw patches, frames or words as tokens."""
        tokens = encoder.role(TokenEncoder)
        assert tokens is not None
        return lambda batch: raw_tokens(batch, tokens)

    def fits(self, encoder: Encoder) -> None:
        """The heads divide the width."""
        tokens = encoder.role(TokenEncoder)
        if tokens is not None and tokens.width % self.heads:
            raise ConfigError(f"AttentiveProbe.heads {self.heads} does not divide the encoder's width {tokens.width}")

    def predict(
        self, train: Features, judged: Features, classes: int, subject: Subject
    ) -> tuple[Tensor, dict[str, Any]]:
        """Train the readout and answer."""
        if len(train) < 2:
            raise ConfigError(f"AttentiveProbe needs at least 2 training samples, got {len(train)}")
        where, width = subject.device, train.values.shape[-1]
        heads = self.heads if width % self.heads == 0 else 1  # raw patches have a width of their own
        readout = AttentiveReadout(width, classes, heads).to(where)
        labels = train.need_label(self)
        with torch.enable_grad():
            for rows in sgd(readout, len(train), self.epochs, self.lr, WARMUP, subject.seed):
                cross_entropy(readout(*_take(train, rows, where)), labels[rows.cpu()].to(where)).backward()
        readout.eval()
        readout.settle(torch.cat([readout.attend(*_take(train, rows, where)) for rows in _blocks(train)]))
        found = torch.cat([readout(*_take(judged, rows, where)).argmax(1) for rows in _blocks(judged)])
        return found, {"heads": heads, "epochs": self.epochs, "lr": self.lr}


def _take(features: Features, rows: Tensor, device: torch.device) -> tuple[Tensor, Tensor | None]:
    rows = rows.cpu()
    mask = None if features.mask is None else features.mask[rows].to(device)
    return features.values[rows].to(device), mask


def _blocks(features: Features) -> tuple[Tensor, ...]:
    return torch.arange(len(features)).split(1024)
