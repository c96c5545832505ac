"""What k drafts of each prompt are worth: how often they hold the truth, how likely and how different they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from quire.contracts import Batch, Metric
from quire.errors import ConfigError
from quire.roles.language.contract import Generated, StepModel, codes_of, device_of
from quire.roles.language.rows import padded, select
from quire_superposed.diversity import distinct, self_bleu
from quire_superposed.prompts import prompts_and_truth

NAMES = (
    "coverage",
    "exact",
    "perplexity_best",
    "perplexity_mean",
    "self_bleu",
    "distinct_1",
    "distinct_2",
    "distinct_3",
)


class DraftSet(Metric):
    """Drafts of ``predict`` against what truly follows, against the model alone, and against each other.

    After Shen et al. 2024. The perplexity is the base model's own, by a pass of its own over prompt and draft, never
    the decoder's score.

    Args:
        report: The number that ``compute`` gives, which goes into the log: ``coverage``, ``exact``,
            ``perplexity_best``, ``perplexity_mean``, ``self_bleu``, ``distinct_1``, ``distinct_2`` or ``distinct_3``.
            ``table`` has them all; ``Superposed`` writes it into the last line of the predictions.
        next_tokens: True next tokens that ``coverage`` looks at.

    Returns:
        One number, 0 before any prompt. ``coverage``: share of the true next tokens that the best draft has before its
        first error, over prompts with a truth. ``exact``: share of these prompts where some draft is the truth
        throughout. ``perplexity_best``, ``perplexity_mean``: exp of the mean over prompts of the best and of the mean
        draft's nats per token. ``self_bleu``: 4-gram BLEU of each draft against the others, on ids. ``distinct_n``:
        different n-grams over all n-grams of a prompt's drafts.

    Raises:
        ConfigError: an unknown ``report``, or ``next_tokens`` below 1.
    """

    full_state_update = False
    sums: Tensor
    counts: Tensor

    def __init__(self, report: str = "coverage", next_tokens: int = 3) -> None:
        super().__init__()
        if report not in NAMES:
            raise ConfigError(f"DraftSet.report is one of {', '.join(NAMES)}, got {report!r}")
        if next_tokens < 1:
            raise ConfigError(f"DraftSet.next_tokens must be at least 1, got {next_tokens}")
        self.report, self.next_tokens = report, next_tokens
        self.add_state("sums", torch.zeros(len(NAMES), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("counts", torch.zeros(len(NAMES), dtype=torch.float64), dist_reduce_fx="sum")

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """Drafts on the standard library's text."""
        from quire_superposed.sampler import Superposed

        run = Superposed.tiny()
        run["model"]["metrics"] = ["DraftSet"]
        return run

    def sampled(self, model: Any, batch: Batch, results: Any) -> None:
        """Read a language sampler's results; others have no drafts."""
        if not isinstance(results, Generated):
            return
        caps = model.decoder.role(StepModel).caps()
        prompts, truths = prompts_and_truth(batch, caps, getattr(model.sampler, "prompt", None))
        self.update(results.tokens, truths, nats(model, batch, prompts, results.tokens))

    def update(  # type: ignore[override]
        self,
        drafts: Sequence[Sequence[Sequence[int]]],
        truths: Sequence[Sequence[int]],
        losses: Sequence[Sequence[float]],
    ) -> None:
        """Add prompts.

        Args:
            drafts: P prompts of n drafts of ids.
            truths: P true continuations of ids, empty where there is none.
            losses: The drafts' nats per token under the base model.
        """
        for several, truth, own in zip(drafts, truths, losses):
            several = [d for d in several if d]
            if not several:
                continue
            values: dict[str, float] = {"perplexity_best": min(own), "perplexity_mean": sum(own) / len(own)}
            if truth:
                want = truth[: self.next_tokens]
                values["coverage"] = max(agreeing(d, want) for d in several) / len(want)
                values["exact"] = float(any(list(truth[: len(d)]) == list(d) for d in several))
            if len(several) > 1:
                values["self_bleu"] = self_bleu(several)
            for order in (1, 2, 3):
                if max(len(d) for d in several) >= order:
                    values[f"distinct_{order}"] = distinct(several, order)
            for name, value in values.items():
                self.sums[NAMES.index(name)] += value
                self.counts[NAMES.index(name)] += 1

    def compute(self) -> Tensor:
        """The number of ``report``."""
        return torch.tensor(self.table()[self.report])

    def table(self) -> dict[str, float]:
        """Every number by name; of this process unless ``compute`` has gathered all."""
        means = (self.sums / self.counts.clamp(min=1)).tolist()
        counts = self.counts.tolist()
        found = dict(zip(NAMES, means))
        for i, name in enumerate(NAMES):
            if name.startswith("perplexity") and counts[i]:
                found[name] = float(torch.tensor(means[i]).exp())
        return found


def agreeing(draft: Sequence[int], truth: Sequence[int]) -> int:
    """Tokens before the first that differs."""
    return next((i for i, (a, b) in enumerate(zip(draft, truth)) if a != b), min(len(draft), len(truth)))


@torch.no_grad()
def nats(
    model: Any, batch: Batch, prompts: Sequence[Sequence[int]], drafts: Sequence[Sequence[Sequence[int]]]
) -> list[list[float]]:
    """Mean nats per token of each draft behind its prompt, by one pass of the model over whole texts."""
    target: StepModel = model.decoder.role(StepModel)
    flat = [(i, list(d)) for i, several in enumerate(drafts) for d in several if d]
    found: list[list[float]] = [[] for _ in drafts]
    if not flat:
        return found
    rows = [[*prompts[i], *d] for i, d in flat]
    ids, mask = padded(rows, target.caps().pad_id, device_of(target))
    codes = codes_of(model, batch)
    if codes is not None:
        codes = select(codes, [i for i, _ in flat], len(drafts))
    logits = target(codes, ids[:, :-1], None if mask is None else mask[:, :-1]).float()
    losses = cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    for (i, draft), row, own in zip(flat, rows, losses):
        found[i].append(float(own[len(row) - len(draft) - 1 : len(row) - 1].mean()))
    return found
