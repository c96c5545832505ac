"""The official code's rule for sampling: a guess that fails costs a fresh draw, which favours drafts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quire.errors import ConfigError
from quire.roles.language.accept import nucleus, sample, tiny_speculative
from quire.roles.language.contract import Acceptance, Draft


class SampleTwice(Acceptance):
    """Sample each drafted path apart; draw anew behind a mismatch. Biased: the official code's rule. Liu et al. 2024.

    Drafted tokens come out too often: with p = (.3, .5, .2) and token 0 drafted, token 0 has probability
    .3 + .7·.3 = .51. It is here to compare with; ``SampleOnce`` is exact.

    Args:
        temperature: Above 0; lower is sharper.
        top_p: Smallest set of tokens with this probability, in (0, 1].

    Raises:
        ConfigError: an argument out of range.
    """

    lossless = False

    def __init__(self, temperature: float = 1.0, top_p: float = 1.0) -> None:
        super().__init__()
        if temperature <= 0:
            raise ConfigError(f"SampleTwice.temperature must be above 0, got {temperature}: use Exact for the argmax")
        if not 0 < top_p <= 1:
            raise ConfigError(f"SampleTwice.top_p must be in (0, 1], got {top_p}")
        self.temperature, self.top_p = temperature, top_p

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """Prompt lookup with the biased rule."""
        return tiny_speculative({"acceptance": {"class_path": "SampleTwice", "init_args": {"temperature": 0.8}}})

    def probabilities(self, logits: Tensor) -> Tensor:
        """[V] → the law that is sampled, fp32."""
        return nucleus(torch.softmax(logits.float() / self.temperature, -1), self.top_p, 0)

    def first(self, logits: Tensor, generator: torch.Generator) -> int:
        """One sample."""
        return sample(self.probabilities(logits), generator)

    def choose(self, logits: Tensor, draft: Draft, generator: torch.Generator) -> tuple[list[int], int]:
        """The longest path whose own samples all match, the first of equals; its bonus is a fresh sample."""
        laws = [self.probabilities(row) for row in logits]
        best: list[int] = []
        for path in leaves(draft):
            stood = []
            for node, before in zip(path, [-1, *path]):
                if sample(laws[before + 1], generator) != draft.tokens[node]:
                    break
                stood.append(node)
            best = stood if len(stood) > len(best) else best
        return best, sample(laws[best[-1] + 1 if best else 0], generator)


def leaves(draft: Draft) -> list[list[int]]:
    """Node numbers from the root to each leaf."""
    inner = set(draft.parents)
    paths = []
    for leaf in (i for i in range(len(draft.tokens)) if i not in inner):
        path, at = [], leaf
        while at >= 0:
            path.append(at)
            at = draft.parents[at]
        paths.append(path[::-1])
    return paths
