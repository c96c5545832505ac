"""Acceptance rules: which drafted tokens stand."""

from __future__ import annotations

import torch
from torch import Tensor

from quire.errors import ConfigError
from quire.roles.language.contract import Acceptance, Draft


class Exact(Acceptance):
    """Keep a drafted token only where it is the argmax: the output is plain greedy decoding's.

    Ties go to the lower id, as in ``Tensor.argmax``.
    """

    lossless = True

    @classmethod
    def tiny(cls) -> dict:
        """Prompt lookup on the standard library's text."""
        return tiny_speculative({"acceptance": "Exact"})

    def first(self, logits: Tensor, generator: torch.Generator) -> int:
        """The argmax."""
        return int(logits.argmax())

    def choose(self, logits: Tensor, draft: Draft, generator: torch.Generator) -> tuple[list[int], int]:
        """The longest path whose tokens are each the argmax behind their parent, and the argmax behind its end."""
        return walk(draft, logits.argmax(-1).tolist().__getitem__)


class SampleOnce(Acceptance):
    """Sample one token at each visited node; follow the draft where it guessed it. The law is plain sampling's.

    Args:
        temperature: Above 0; lower is sharper.
        top_p: Smallest set of tokens with this probability, in (0, 1].
        top_k: Most tokens considered; 0 for all.

    Raises:
        ConfigError: an argument out of range.
    """

    lossless = True

    def __init__(self, temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0) -> None:
        super().__init__()
        if temperature <= 0:
            raise ConfigError(f"SampleOnce.temperature must be above 0, got {temperature}: use Exact for the argmax")
        if not 0 < top_p <= 1:
            raise ConfigError(f"SampleOnce.top_p must be in (0, 1], got {top_p}")
        if top_k < 0:
            raise ConfigError(f"SampleOnce.top_k must be at least 0, got {top_k}")
        self.temperature, self.top_p, self.top_k = temperature, top_p, top_k

    @classmethod
    def tiny(cls) -> dict:
        """Sampling with prompt lookup."""
        return tiny_speculative({"acceptance": {"class_path": "SampleOnce", "init_args": {"temperature": 0.8}}})

    def probabilities(self, logits: Tensor) -> Tensor:
        """[V] → the law that is sampled, fp32."""
        return nucleus(torch.softmax(logits.float() / self.temperature, -1), self.top_p, self.top_k)

    def first(self, logits: Tensor, generator: torch.Generator) -> int:
        """One sample."""
        return sample(self.probabilities(logits), generator)

    def choose(self, logits: Tensor, draft: Draft, generator: torch.Generator) -> tuple[list[int], int]:
        """Follow the sampled tokens through the tree; the first that is not a child is the bonus."""
        return walk(draft, lambda slot: sample(self.probabilities(logits[slot]), generator))


def walk(draft: Draft, token_behind: object) -> tuple[list[int], int]:
    """Descend from the root: slot 0 is behind the pending token, slot i+1 behind node i."""
    children: dict[tuple[int, int], int] = {}
    for node, (token, parent) in enumerate(zip(draft.tokens, draft.parents)):
        children.setdefault((parent, token), node)
    nodes: list[int] = []
    at = -1
    while True:
        token = token_behind(at + 1)  # type: ignore[operator]
        child = children.get((at, token))
        if child is None:
            return nodes, token
        nodes.append(child)
        at = child


def nucleus(probabilities: Tensor, top_p: float, top_k: int) -> Tensor:
    """Keep the ``top_k`` likeliest tokens, then the smallest set that reaches ``top_p``; renormalise."""
    if top_k and top_k < probabilities.shape[-1]:
        least = probabilities.topk(top_k, -1).values[..., -1:]
        probabilities = probabilities.where(probabilities >= least, probabilities.new_zeros(()))
    if top_p < 1:
        ordered, places = torch.sort(probabilities, dim=-1, descending=True, stable=True)
        before = ordered.cumsum(-1) - ordered
        ordered = ordered.where(before < top_p * ordered.sum(-1, keepdim=True), ordered.new_zeros(()))
        probabilities = torch.zeros_like(probabilities).scatter(-1, places, ordered)
    return probabilities / probabilities.sum(-1, keepdim=True)


def sample(probabilities: Tensor, generator: torch.Generator) -> int:
    """One draw from a law [V]. The generator lives on the CPU, so a stream does not depend on the device."""
    return int(torch.multinomial(probabilities.cpu(), 1, generator=generator))


def tiny_speculative(arguments: dict, drafter: object = "PromptCopy", decoder: object = None) -> dict:
    """A complete small run of Speculative on the standard library's text."""
    small = {"class_path": "CausalLM", "init_args": {"width": 32, "depth": 1, "heads": 2}}
    return {
        "model": {
            "decoder": decoder or small,
            "objective": "NextToken",
            "sampler": {
                "class_path": "Speculative",
                "init_args": {"drafter": drafter, "max_new_tokens": 8, **arguments},
            },
        },
        "data": {
            "class_path": "TextTokens",
            "init_args": {"source": "stdlib:docs", "length": 32, "batch_size": 8, "train_samples": 64},
        },
    }
