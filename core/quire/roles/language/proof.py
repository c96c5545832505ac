"""Proof that a sampler is lossless, with the evidence where it is not."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch

from quire.errors import ConfigError
from quire.roles.language.accept import Exact
from quire.roles.language.contract import StepModel, codes_of, device_of
from quire.roles.language.loop import Greedy, Speculative
from quire.roles.language.rows import padded


def assert_lossless(
    model: Any, sampler: Speculative, prompts: Sequence[Sequence[int]], batch: int | None = None, **fields: Any
) -> None:
    """Raise ``AssertionError`` unless the sampler emits plain greedy decoding's ids for every prompt.

    Args:
        model: A Model, or a StepModel alone.
        sampler: What is to be proven; its acceptance must be ``Exact``.
        prompts: Lists of ids, run in batches of ``batch`` (default: all at once).
        fields: Further batch fields [B,…], ``source`` for one.

    Raises:
        ConfigError: a sampler that does not claim to be lossless.
        AssertionError: prompt, position, both ids, both logits and their gap at the first divergence.
    """
    if not sampler.lossless:
        raise ConfigError(f"{type(sampler.acceptance).__name__} declares lossless=False: nothing to prove")
    if not isinstance(sampler.acceptance, Exact):
        raise ConfigError("assert_lossless compares ids with greedy decoding: use Exact, and chi_square for sampling")
    whole = model if not isinstance(model, StepModel) else SimpleNamespace(decoder=model, encoder=None)
    plain = Greedy(sampler.max_new_tokens, sampler.max_total, sampler.strings)
    plain.processors = sampler.processors
    size = batch or len(prompts)
    for start in range(0, len(prompts), size):
        rows = [list(p) for p in prompts[start : start + size]]
        part = {k: v[start : start + size] for k, v in fields.items()}
        given = batch_of(rows, whole.decoder, part)
        want, got = plain(whole, given), sampler(whole, given)
        for i, (a, b) in enumerate(zip(want.tokens, got.tokens)):
            if a != b:
                raise AssertionError(
                    report(whole, rows[i], a[0], b[0], start + i, {k: v[i : i + 1] for k, v in part.items()})
                )
        if want.finish != got.finish:
            raise AssertionError(f"the ids agree but rows end differently: {want.finish} and {got.finish}")


def batch_of(rows: list[list[int]], decoder: torch.nn.Module, fields: dict[str, Any]) -> dict[str, Any]:
    """A padded batch of prompts."""
    ids, mask = padded(rows, 0, device_of(decoder))
    return {"tokens": ids, "mask": torch.ones_like(ids, dtype=torch.bool) if mask is None else mask, **fields}


def report(model: Any, prompt: list[int], want: list[int], got: list[int], place: int, fields: dict[str, Any]) -> str:
    """Where two continuations part, and how close the logits were there."""
    at = next((i for i, (a, b) in enumerate(zip(want, got)) if a != b), min(len(want), len(got)))
    if at >= min(len(want), len(got)):
        return f"prompt {place}: greedy emits {len(want)} tokens, the sampler {len(got)}, equal up to there"
    prefix = prompt + want[:at]
    target: StepModel = model.decoder.role(StepModel)
    with torch.no_grad():
        codes = codes_of(model, fields)
        logits = target.open(torch.tensor([prefix], device=device_of(target)), None, codes).logits[0]
    a, b = float(logits[want[at]]), float(logits[got[at]])
    return (
        f"prompt {place} differs at new token {at}: greedy {want[at]} (logit {a:.6g}),"
        f" the sampler {got[at]} (logit {b:.6g}), gap {a - b:.3g}"
    )


def chi_square(
    model: Any, sampler: Speculative, prompt: Sequence[int], law: Sequence[float], draws: int = 20000
) -> float:
    """p-value that the sampler's first new tokens behind ``prompt`` follow ``law`` [V]; each draw is its own row."""
    from scipy.stats import chisquare

    whole = model if not isinstance(model, StepModel) else SimpleNamespace(decoder=model, encoder=None)
    counts = torch.zeros(len(law), dtype=torch.float64)
    for start in range(0, draws, 500):
        rows = [list(prompt)] * min(500, draws - start)
        given = batch_of(rows, whole.decoder, {"index": torch.arange(start, start + len(rows))})
        for (tokens,) in sampler(whole, given).tokens:
            counts[tokens[0]] += 1
    expected = torch.tensor(law, dtype=torch.float64)
    possible = expected > 0
    if bool(counts[~possible].any()):
        return 0.0
    return float(chisquare(counts[possible].numpy(), (expected[possible] / expected.sum() * draws).numpy()).pvalue)
