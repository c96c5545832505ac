"""A batch's prompts, and what truly follows them."""

from __future__ import annotations

from quire.contracts import Batch
from quire.roles.language.contract import Caps
from quire.roles.language.rows import prompts_of


def prompts_and_truth(batch: Batch, caps: Caps, prompt: int | None) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts, cut to ``prompt`` tokens where that is given, and each row's real tokens behind its prompt.

    Args:
        batch: ``tokens`` [B,T] with ``mask`` and ``prompt_length`` [B] where there are such, or ``source`` [B,S].
        caps: Of the model.
        prompt: Most tokens of a prompt; None: all.
    """
    prompts = [p[:prompt] for p in prompts_of(batch, caps)]
    if "tokens" not in batch:
        return prompts, [[] for _ in prompts]
    tokens, mask = batch["tokens"], batch.get("mask")
    rows = [t.tolist() if mask is None else t[m].tolist() for t, m in zip(tokens, tokens if mask is None else mask)]
    return prompts, [row[len(p) :] if row[: len(p)] == p else row for p, row in zip(prompts, rows)]
