"""Pure torch of DupMAE (Xiao et al. 2022): the decoder's layer, the bag of words, losses that never hold all logits."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

Head = Callable[[Tensor], Tensor]
"""Hidden states […,D] → logits over the vocabulary […,V]."""

HIDDEN = -1000.0
"""Added to the logits of padding before a maximum, as in the official code."""


class DuplexLayer(nn.Module):
    """One post-norm BERT layer whose queries, keys and values come from different places.

    Args:
        width: D.
        heads: Attention heads; they divide D.
        hidden: Width of the MLP.
        dropout: On attention weights and both branches.
    """

    def __init__(self, width: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.drop = heads, dropout
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)
        self.norm1, self.norm2 = (nn.LayerNorm(width, eps=1e-12) for _ in range(2))
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)
        for part in self.modules():
            if isinstance(part, nn.Linear):
                nn.init.normal_(part.weight, std=0.02 * (768 / width) ** 0.5)  # BERT's at its width [I]
                nn.init.zeros_(part.bias)

    def forward(self, queries: Tensor, contents: Tensor, visible: Tensor) -> Tensor:
        """Attend and transform; the residual is the query itself.

        Args:
            queries: [B,M,D].
            contents: [B,N,D], keys and values.
            visible: [B,M,N] bool, True where a query may look.

        Returns:
            [B,M,D].
        """
        q = self.query(queries).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = (m(contents).unflatten(-1, (self.heads, -1)).transpose(1, 2) for m in (self.key, self.value))
        drop = self.drop if self.training else 0.0
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=visible[:, None], dropout_p=drop)
        x = self.norm1(queries + self._dropped(self.out(x.transpose(1, 2).flatten(2))))
        return self.norm2(x + self._dropped(self.down(F.gelu(self.up(x)))))

    def _dropped(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.drop, self.training)


def chunked_cross_entropy(hidden: Tensor, labels: Tensor, head: Head, chunk: int) -> Tensor:
    """Mean cross-entropy over tokens; at most ``chunk`` rows of logits exist at a time, also in the backward pass.

    Args:
        hidden: [n,D].
        labels: [n] int64.
        head: Gives the logits.
        chunk: Tokens at a time.

    Returns:
        A scalar in nats; 0, still attached, without tokens.
    """

    def part(rows: Tensor, wanted: Tensor) -> Tensor:
        return F.cross_entropy(head(rows).float(), wanted, reduction="sum")

    if not len(hidden):
        return hidden.sum() * 0.0
    rows = zip(hidden.split(chunk), labels.split(chunk))
    return torch.stack([_lean(part, *pair, again=len(hidden) > chunk) for pair in rows]).sum() / len(hidden)


def pooled_logits(hidden: Tensor, keep: Tensor, head: Head, chunk: int) -> Tensor:
    """The maximum over tokens of the logits, as a running maximum over ``chunk`` tokens at a time.

    Args:
        hidden: [B,T,D].
        keep: [B,T] bool; other tokens are ``HIDDEN`` lower.
        head: Gives the logits.
        chunk: Tokens at a time, over the whole batch.

    Returns:
        [B,V] float32.
    """

    def part(columns: Tensor, kept: Tensor) -> Tensor:
        return (head(columns).float() + HIDDEN * (~kept)[..., None]).amax(1)

    width = max(1, chunk // len(hidden))
    best: Tensor | None = None
    for columns, kept in zip(hidden.split(width, 1), keep.split(width, 1)):
        found = _lean(part, columns, kept, again=hidden.shape[1] > width)
        best = found if best is None else torch.maximum(best, found)
    assert best is not None  # T is at least 1
    return best


def _lean(part: Callable[..., Tensor], *given: Tensor, again: bool) -> Tensor:
    """``part``, computed again in the backward pass instead of kept."""
    if again and torch.is_grad_enabled():
        return checkpoint(part, *given, use_reentrant=False)
    return part(*given)


def bag_weights(ids: Tensor, real: Tensor, target: str) -> Tensor:
    """The target distribution over the vocabulary, as a weight for each token of the text.

    Args:
        ids: [B,T] int64.
        real: [B,T] bool, True = an ordinary token.
        target: ``frequency`` (repeats weigh more) or ``set`` (every different token weighs the same).

    Returns:
        [B,T]; rows sum to 1, or to 0 without ordinary tokens.
    """
    weight = real.float()
    if target == "set":
        alike = (ids[:, :, None] == ids[:, None, :]) & real[:, None, :]
        weight = weight / alike.sum(2).clamp(min=1)
    return weight / weight.sum(1, keepdim=True).clamp(min=1e-12)


def bag_loss(logits: Tensor, ids: Tensor, real: Tensor, target: str = "frequency") -> Tensor:
    """Cross-entropy between a text's bag of words and the softmax of its pooled logits, mean over texts.

    The sum over the vocabulary is taken over the text's own tokens: no dense [B,V] target is made.

    Args:
        logits: [B,V].
        ids: [B,T] int64, the text itself.
        real: [B,T] bool, True = an ordinary token.
        target: As in ``bag_weights``.
    """
    logs = logits.float().log_softmax(-1).gather(1, ids.masked_fill(~real, 0))
    return -(bag_weights(ids, real, target) * logs).sum(1).mean()
