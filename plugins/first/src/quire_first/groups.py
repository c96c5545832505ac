"""Rows of one batch with different routings, each group stepped by itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quire.roles.language.contract import DecodeState
from quire_first.routing import Routing

if TYPE_CHECKING:
    from quire_first.model import RoutedModel

Parts = list[tuple[list[int], DecodeState]]
"""Each group's rows in the batch, and its own state."""


def patterns(on: Tensor) -> list[list[int]]:
    """Rows by equal routing [B,N], in order of first appearance."""
    found: dict[tuple[bool, ...], list[int]] = {}
    for row, pattern in enumerate(on.tolist()):
        found.setdefault(tuple(pattern), []).append(row)
    return list(found.values())


def grouped(state: DecodeState) -> bool:
    """Whether the state is several."""
    return "groups" in state.extras


def joined(parts: Parts, routing: Routing) -> DecodeState:
    """One state over the groups' states."""
    state = DecodeState(torch.empty(0), torch.empty(0), None, extras={"groups": parts, "routing": routing})
    state.logits = _gathered([(rows, part.logits) for rows, part in parts])
    return _settled(state)


def step(
    model: RoutedModel,
    state: DecodeState,
    ids: Tensor | None,
    embeds: Tensor | None,
    parents: Tensor | None,
    valid: Tensor | None,
) -> Tensor:
    """One pass a group."""
    made = []
    for rows, part in state.extras["groups"]:
        own = [None if t is None else t[rows] for t in (ids, embeds, parents, valid)]
        made.append((rows, model.step(part, *own)))
    state.pending = max(part.pending for _, part in state.extras["groups"])
    _settled(state)
    return _gathered(made)


def keep(model: RoutedModel, state: DecodeState, chosen: Tensor) -> None:
    """Each group its rows'."""
    for rows, part in state.extras["groups"]:
        model.keep(part, chosen[rows])
    state.pending = 0
    _settled(state)


def cut(model: RoutedModel, state: DecodeState, lengths: Tensor) -> None:
    """Each group its rows'."""
    for rows, part in state.extras["groups"]:
        model.cut(part, lengths[rows])
    state.pending = 0
    _settled(state)


def rows(model: RoutedModel, state: DecodeState, order: Tensor) -> None:
    """Select, repeat or permute; a group without rows goes."""
    wanted, left = order.tolist(), []
    for held, part in state.extras["groups"]:
        place = {row: i for i, row in enumerate(held)}
        new = [i for i, row in enumerate(wanted) if row in place]
        if new:
            model.rows(part, torch.tensor([place[wanted[i]] for i in new], device=order.device))
            left.append((new, part))
    state.extras["groups"] = left
    state.logits = state.logits[order]
    _settled(state)


def _settled(state: DecodeState) -> DecodeState:
    parts: Parts = state.extras["groups"]
    state.lengths = _gathered([(rows, part.lengths) for rows, part in parts])
    total = sum(len(rows) for rows, _ in parts)
    used = sum(len(rows) * part.extras["layers_used"] for rows, part in parts)
    state.extras["layers_used"] = used / max(1, total)  # each group runs its own
    state.extras["cache_bytes"] = sum(int(part.extras.get("cache_bytes", 0)) for _, part in parts)
    return state


def _gathered(parts: list[tuple[list[int], Tensor]]) -> Tensor:
    order = torch.tensor([row for rows, _ in parts for row in rows])
    whole = torch.cat([values for _, values in parts])
    return whole[order.argsort().to(whole.device)]
