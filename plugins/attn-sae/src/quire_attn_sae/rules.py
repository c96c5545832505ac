"""A latent judged by a rule on tokens: how specific to it, how sensitive to it (arXiv 2406.17759)."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from quire.contracts import Batch, Losses, Metric, Spec
from quire.errors import ConfigError
from quire.roles.sparse.card import CardRow, Seen
from quire.roles.sparse.ranks import sum_over_ranks
from quire_attn_sae.runs import tiny_run

Rule = Callable[[Tensor, Any], Tensor]
"""Ids [T] of one sample, and the tokenizer or None → [T] bool."""


def induction(tokens: Tensor, alike: Tensor | None = None) -> Tensor:
    """[T] bool: an earlier occurrence of this token was followed by what follows now.

    Args:
        tokens: [T] ids of one sample.
        alike: [V] a number for each id, the same for ids that count as one token; None compares ids.
    """
    ids = (tokens if alike is None else alike[tokens]).tolist()
    seen: set[tuple[int, int]] = set()
    found = torch.zeros(len(ids), dtype=torch.bool)
    for t, pair in enumerate(pairwise(ids)):
        found[t] = pair in seen
        seen.add(pair)
    return found.to(tokens.device)


def normalised(tokenizer: Any) -> Tensor | None:
    """[V] a number for each id, the same for tokens that differ in case and outer spaces only; None without one."""
    if tokenizer is None:
        return None
    numbers: dict[str, int] = {}
    made = []
    for i in range(tokenizer.vocab_size):
        text = tokenizer.decode([i])
        key = text.strip().lower() or repr(text)
        made.append(numbers.setdefault(key if text and "\ufffd" not in text else f"id {i}", len(numbers)))
    return torch.tensor(made)


def rule_of(name: str) -> Rule | None:
    """A rule by the path of its function; None for ``induction``. Raises ``ConfigError`` where there is none."""
    if name == "induction":
        return None
    module, _, function = name.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), function) if module else None
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"ProxyRule.rule {name!r} can't be imported: {error}") from error
    if not callable(found):
        raise ConfigError(f"ProxyRule.rule must be induction or the path of a function, got {name!r}")
    made: Rule = found
    return made


class ProxyRule(Metric, CardRow):
    """How well a latent follows a rule on tokens. Kissane, Krzyzanowski et al. 2024.

    Specificity is the share of the tokens on which the latent is above a threshold where the rule holds; sensitivity
    the share of the rule's tokens on which it is above it (arXiv 2406.17759). Samples may be whole, or rows in the
    source's order, as validation gives them.

    Args:
        rule: ``induction`` (an earlier occurrence of the same token, but for case and outer spaces, was followed by
            what follows now), or the path of a function (ids [T], tokenizer) → [T] bool.
        latent: Which; null is the one whose harmonic mean of the two is highest at the first threshold.
        thresholds: Values of the codes above which a latent counts as firing.

    Needs:
        encoder: SparseEncoder, by an objective that gives ``codes``. data: tokens.

    Returns:
        The harmonic mean at the first threshold, in [0, 1]; a SparseCard gets both at each threshold.

    Raises:
        ConfigError: no such rule or latent, or no threshold at 0 or above.
    """

    full_state_update = False
    fields = ("tokens|token",)
    hits: Tensor
    fired: Tensor
    held: Tensor
    model: Any
    given: Rule | None
    built_with: Spec
    _card: Any

    def __init__(
        self, rule: str = "induction", latent: int | None = None, thresholds: list[float] | None = None
    ) -> None:
        super().__init__()
        self.thresholds = [0.0] if thresholds is None else list(thresholds)
        if not self.thresholds or min(self.thresholds) < 0:
            raise ConfigError(f"ProxyRule.thresholds must be at least 0, one or more, got {thresholds}")
        self.rule, self.latent = rule, latent
        self.refer("given", rule_of(rule))
        self._alike: Tensor | None = None
        self._known = False
        self._tail: tuple[int, Tensor, Tensor] | None = None

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """Which latent of a small language model with random weights fires on repeats."""
        return tiny_run(metrics=["ProxyRule"])

    def build(self, spec: Spec) -> None:
        """Make the counts [thresholds,F]."""
        known = int(spec.code("latents", self)) if spec.get("codes") else 0
        if self.latent is not None and not 0 <= self.latent < max(known, 1):
            raise ConfigError(f"latent {self.latent} is not there: the dictionary has {known}")
        for name in ("hits", "fired"):
            self.add_state(name, torch.zeros(len(self.thresholds), known, dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("held", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def bind(self, model: Any) -> None:
        """Know the model, for its tokenizer."""
        self.refer("model", model)

    # ---- counting
    def update(self, codes: Tensor, rule: Tensor) -> None:
        """Count tokens.

        Args:
            codes: [N,F].
            rule: [N] bool, where the rule holds.
        """
        for k, threshold in enumerate(self.thresholds):
            fires = codes > threshold
            self.fired[k] += fires.sum(0)
            self.hits[k] += (fires & rule[:, None]).sum(0)
        self.held += rule.sum()

    def observe(self, model: Any, batch: Batch, losses: Losses) -> None:
        """Count one batch of ``validate`` or ``test``."""
        found = losses.outputs.get("codes")
        if found is None:
            raise ConfigError("ProxyRule needs an objective that gives codes, such as SparseReconstruction")
        self._see(found.dense(), batch)

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """As in torchmetrics, which calls it before each result; the last sample is complete by then."""
        self._flush()
        super().sync(*args, **kwargs)

    def _see(self, codes: Tensor, batch: Batch) -> None:
        if "tokens" in batch and batch["tokens"].ndim == 2:
            tokens, mask = batch["tokens"], batch["mask"]
            codes = codes.reshape(*tokens.shape, -1)
            for row, values, real in zip(tokens, codes, mask):
                self._sample(row[real], values[real])
            return
        token, instance = batch["token"] if "token" in batch else batch["tokens"], batch["instance"]
        edges = (instance[1:] != instance[:-1]).nonzero().flatten() + 1
        cuts = [0, *edges.tolist(), len(token)]
        for start, end in pairwise(cuts):
            number, ids, values = int(instance[start]), token[start:end], codes[start:end]
            if self._tail is not None and self._tail[0] == number:  # a sample that two batches share
                ids, values = torch.cat([self._tail[1], ids]), torch.cat([self._tail[2], values])
                self._tail = None
            self._flush()
            self._tail = number, ids, values

    def _flush(self) -> None:
        if self._tail is not None:
            _, ids, values = self._tail
            self._tail = None
            self._sample(ids, values)

    def _sample(self, ids: Tensor, codes: Tensor) -> None:
        if not self._known:
            self._alike = normalised(getattr(self.model, "tokenizer", None)) if self.rule == "induction" else None
            self._known = True
        if self.given is None:
            alike = None if self._alike is None else self._alike.to(ids.device)
            self.update(codes, induction(ids, alike))
        else:
            self.update(codes, self.given(ids, getattr(self.model, "tokenizer", None)))

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self._tail = None

    # ---- results
    def specificity(self) -> Tensor:
        """[thresholds,F] share of firing tokens where the rule holds; 0 where none fires."""
        return self.hits / self.fired.clamp(min=1)

    def sensitivity(self) -> Tensor:
        """[thresholds,F] share of the rule's tokens on which a latent fires."""
        return self.hits / self.held.clamp(min=1)

    def chosen(self) -> int:
        """The latent that is judged."""
        return int(self._together()[0].argmax()) if self.latent is None else self.latent

    def _together(self) -> Tensor:
        a, b = self.specificity(), self.sensitivity()
        return 2 * a * b / (a + b).clamp(min=1e-12)

    def compute(self) -> Tensor:
        """The harmonic mean of both at the first threshold."""
        return self._together()[0, self.chosen()]

    # ---- the card, which has counts of its own
    def card_begin(self) -> None:
        """Count anew."""
        own = type(self)(self.rule, self.latent, self.thresholds)
        own.build(self.built_with)
        own.bind(self.model)
        self.refer("_card", own.to(self.hits.device))

    def card_see(self, seen: Seen) -> None:
        """Count one batch of the card."""
        self._card._see(seen.codes.dense(), seen.batch)

    def card_rows(self) -> dict[str, float]:
        """Both at each threshold, and the latent's number."""
        own = self._card
        own._flush()
        own.hits, own.fired, own.held = map(sum_over_ranks, (own.hits, own.fired, own.held))
        latent, made = own.chosen(), {}
        for k, threshold in enumerate(self.thresholds):
            made[f"rule_specificity@{threshold:g}"] = float(own.specificity()[k, latent])
            made[f"rule_sensitivity@{threshold:g}"] = float(own.sensitivity()[k, latent])
        return {**made, "rule_latent": float(latent)}
