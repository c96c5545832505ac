"""Which tokens are keys and values: one draw a step, shared by all layers and heads, exact on every row."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from quire.errors import ConfigError
from quire.roles.masking import BlockMask, ContextSubset, Masking, SpanMask
from quire.roles.tokens.contract import Layout, Subset, check_real

CONTEXTS = ("random", "span", "block")


def rule(how: str, masking: float, tokens: int, span_length: int) -> Masking:
    """The masking whose ``keep`` is the context of ``tokens`` real tokens.

    Args:
        how: ``random`` cells; all but ``span``s of neighbours; all but rectangular ``block``s.
        masking: Share of tokens left out, in [0, 1).
        tokens: Real tokens of a sample.
        span_length: Least length of a span.
    """
    count = math.floor(masking * tokens)
    if count == 0 or how == "random":
        return ContextSubset(masking)
    if how == "span":
        return SpanMask(masking, span_length)
    return BlockMask(masking, min_block=max(1, min(16, count // 2)))  # [I] BEIT's 16, less on small grids


def draw_context(
    how: str,
    masking: float,
    span_length: int,
    layout: Layout,
    rows: int,
    mask: Tensor | None,
    generator: torch.Generator,
) -> tuple[Subset, Tensor]:
    """Draw M = n - floor(masking n) of the n real tokens of each row, rows independent.

    Args:
        how: As in ``rule``.
        masking: As in ``rule``.
        span_length: As in ``rule``; a sample with fewer tokens to leave out has shorter spans.
        layout: Places of the N cells.
        rows: B.
        mask: [B,N] bool, True = real; None without padding.
        generator: The only source of randomness; the context lies on its device.

    Returns:
        The subset whose ``keep`` [B,K] are the keys, and [B,N] bool, True in the context. With padding, rows that are
        shorter than others fill ``keep`` up with padding tokens, which attention leaves out.

    Raises:
        ConfigError: a context without tokens, or a rule that the grid can't follow.
        DataError: a sample of padding only.
    """
    if mask is None:
        subset = rule(how, masking, layout.cells, span_length).draw(layout, rows, None, generator)
        _need_one(subset, masking, layout.cells)
        return subset, subset.kept()
    check_real(mask, layout.only().field if len(layout.segments) == 1 else "tokens")
    kept = torch.zeros(rows, layout.cells, dtype=torch.bool, device=generator.device)
    counts = mask.to(generator.device).sum(1)
    for count in counts.unique().tolist():  # rows of one length share their draw, so each row's share is exact
        chosen = (counts == count).nonzero()[:, 0]
        real = None if count == layout.cells else mask.to(generator.device)[chosen]
        short = max(1, min(span_length, math.floor(masking * count)))
        subset = rule(how, masking, count, short).draw(layout, len(chosen), real, generator)
        _need_one(subset, masking, count)
        kept[chosen] = subset.kept()
    return _filled(kept, mask.to(generator.device)), kept


def _need_one(subset: Subset, masking: float, tokens: int) -> None:
    if subset.keep.shape[1] < 1:
        raise ConfigError(f"masking={masking:g} leaves 0 context tokens of {tokens}; at least 1 is needed")


def _filled(kept: Tensor, mask: Tensor) -> Subset:
    """Context first, then padding, then the other real tokens; K is the largest context of the batch.

    There is always padding enough: M grows by at most one with each real token.
    """
    order = torch.argsort(2 * (mask & ~kept).int() + (~mask).int(), dim=1, stable=True)
    return Subset.ordered(order, int(kept.sum(1).max()))
