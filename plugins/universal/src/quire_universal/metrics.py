"""How right an answer is, and how long it took. The measures of Dehghani et al. 2018."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quire.contracts import Batch, Losses, Metric, Sampler, Spec
from quire.errors import ConfigError
from quire.roles.language.contract import Generated
from quire_universal.objective import tiny_seq2seq


def answers(batch: Batch, eos: int | None) -> list[list[int]]:
    """What each row should have said: ids behind the start token or the prompt, up to the end token."""
    tokens = batch["tokens"]
    mask = batch["mask"] if "mask" in batch else torch.ones_like(tokens, dtype=torch.bool)
    rows = [t[m].tolist() for t, m in zip(tokens, mask)]
    starts = batch["prompt_length"].tolist() if "source" not in batch and "prompt_length" in batch else [1] * len(rows)
    return [until(row[start:], eos) for row, start in zip(rows, starts)]


def until(ids: list[int], eos: int | None) -> list[int]:
    """The ids before the end token."""
    return ids[: ids.index(eos)] if eos in ids else ids


class _Free(Metric):
    """Compares what the sampler says by itself, not teacher-forced; the sampler runs once for all such metrics."""

    sampler: Sampler
    higher_is_better: bool | None = True
    full_state_update = False
    hits: Tensor
    total: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("hits", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.eos: int | None = None

    def build(self, spec: Spec) -> None:
        """The end token."""
        self.eos = spec.get("eos")

    def observe(self, model: Any, batch: Batch, losses: Losses) -> None:
        """Sample the batch, or take what another metric sampled."""
        if "generated" not in losses.outputs:
            losses.outputs["generated"] = model.sampler(model, batch)
        self.sampled(model, batch, losses.outputs["generated"])

    def sampled(self, model: Any, batch: Batch, results: Any) -> None:
        """Compare. Raises ``ConfigError`` for a sampler that does not generate tokens."""
        if not isinstance(results, Generated):
            raise ConfigError(f"{type(self).__name__} needs a sampler of tokens, such as Greedy, as model.sampler")
        for want, got in zip(answers(batch, self.eos), results.tokens):
            self.update(want, until(got[0], self.eos))

    def update(self, want: list[int], got: list[int]) -> None:
        """Count one row."""
        raise NotImplementedError

    def compute(self) -> Tensor:
        """The share of hits."""
        return (self.hits / self.total.clamp(min=1)).float()


class CharAccuracy(_Free):
    """Share of target characters that stand in their place. Dehghani et al. 2018.

    A missing or surplus character counts as wrong.

    Returns:
        A scalar in [0, 1].
    """

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """Reverse three digits."""
        return tiny_seq2seq(metrics=[cls.__name__])

    def update(self, want: list[int], got: list[int]) -> None:
        """Place by place."""
        self.hits += sum(a == b for a, b in zip(want, got))
        self.total += max(len(want), len(got))


class SequenceAccuracy(_Free):
    """Share of answers that are right from first to last. Dehghani et al. 2018.

    Returns:
        A scalar in [0, 1].
    """

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """Reverse three digits."""
        return tiny_seq2seq(metrics=[cls.__name__])

    def update(self, want: list[int], got: list[int]) -> None:
        """The whole row."""
        self.hits += float(want == got)
        self.total += 1


class PonderTime(_Free):
    """Mean steps a decoded token took: what the method calls ponder time. Dehghani et al. 2018.

    Steps are not time: positions that stopped are still computed beside those that run.

    Returns:
        A scalar, from 1 to the decoder's steps; 0 when no token was decoded behind the first one.
    """

    higher_is_better = None

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """Reverse three digits with ACT."""
        return tiny_seq2seq({"class_path": "ACT", "init_args": {"max_steps": 3}}, metrics=[cls.__name__])

    def sampled(self, model: Any, batch: Batch, results: Any) -> None:
        """Steps of the passes behind the prefill. Raises ``ConfigError`` for a sampler that generates no tokens."""
        if not isinstance(results, Generated):
            raise ConfigError("PonderTime needs a sampler of tokens, such as Greedy, as model.sampler")
        self.update(results.stats.layers_used, results.stats.target_forwards)

    def update(self, steps: float, passes: int) -> None:  # type: ignore[override]
        """Add passes and their mean steps."""
        self.hits += steps
        self.total += passes
