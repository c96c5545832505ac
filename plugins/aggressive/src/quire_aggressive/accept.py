"""Accept near misses: a drafted token stands if the model likes it nearly as well as its first choice."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from quire.errors import ConfigError
from quire.roles.language.accept import tiny_speculative
from quire.roles.language.contract import Acceptance, Draft


class Tolerance(Acceptance):
    """Keep a drafted token among the model's ``beta`` likeliest, at most ``tau`` below the first. Ge et al. 2022.

    With ``beta: 1`` or ``tau: 0`` the output is plain greedy decoding's. Otherwise it may differ, so measure how often
    (``EditScores`` with ``greedy: true``). Several children that may stand: the likeliest does.

    Args:
        beta: How many of the likeliest tokens may stand, at least 1.
        tau: Largest gap to the first one's logit, which is the gap of log-probabilities, in nats; at least 0.

    Raises:
        ConfigError: an argument out of range.
    """

    def __init__(self, beta: int = 1, tau: float = 0.0) -> None:
        super().__init__()
        if beta < 1:
            raise ConfigError(f"Tolerance.beta must be at least 1, got {beta}")
        if math.isnan(tau) or tau < 0:
            raise ConfigError(f"Tolerance.tau must be at least 0, got {tau}")
        self.beta, self.tau = beta, float(tau)

    @property
    def lossless(self) -> bool:  # type: ignore[override]
        """Whether nothing but the argmax can stand; at ``tau`` 0 ties go to the argmax too."""
        return self.beta == 1 or self.tau == 0

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """Prompt lookup with near misses."""
        return tiny_speculative({"acceptance": {"class_path": "Tolerance", "init_args": {"beta": 3, "tau": 1.0}}})

    def first(self, logits: Tensor, generator: torch.Generator) -> int:
        """The argmax."""
        return int(logits.argmax())

    def choose(self, logits: Tensor, draft: Draft, generator: torch.Generator) -> tuple[list[int], int]:
        """From the root on, the likeliest child that may stand; the argmax behind the last."""
        best = logits.argmax(-1).tolist()
        if self.lossless or not draft.tokens:
            gaps = [math.inf] * len(draft.tokens)
        else:
            gaps = self._gaps(logits, draft).tolist()
        children: dict[int, list[int]] = {}
        for node, parent in enumerate(draft.parents):
            children.setdefault(parent, []).append(node)
        nodes: list[int] = []
        at = -1
        while True:
            token = best[at + 1]
            stands = [(-1.0 if draft.tokens[c] == token else gaps[c], c) for c in children.get(at, ())]
            gap, child = min(stands, default=(math.inf, -1))
            if child < 0 or gap == math.inf:
                return nodes, token
            nodes.append(child)
            at = child

    def _gaps(self, logits: Tensor, draft: Draft) -> Tensor:
        """[N]: how far each drafted token lies below the first choice; infinite where it may not stand."""
        above = torch.tensor(draft.parents, device=logits.device) + 1
        tokens = torch.tensor(draft.tokens, device=logits.device)
        top = logits.topk(min(self.beta, logits.shape[-1]), -1)
        own = logits[above, tokens]
        gap = top.values[above, 0] - own
        among = (top.indices[above] == tokens[:, None]).any(1)
        stands = among & (gap <= self.tau) & own.isfinite()  # a processor's -inf is a prohibition
        return torch.where(stands, gap, gap.new_full((), math.inf))
