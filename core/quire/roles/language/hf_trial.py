"""A small trial on the module itself: a capability that its signature promises but its numbers break is not offered."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quire.contracts import Codes
from quire.errors import ConfigError

ROWS = ([3, 10, 17], [5, 12])  # two ragged prompts, as multiples that are taken modulo the vocabulary
TREE, PARENTS = [7, 14, 9, 4], [-1, 0, 0, 2]
PATHS = ([0, 1], [0, 2, 3])


def trial(model: Any) -> dict[str, str]:
    """What ``model`` lacks although its signature has it, with the reason: ``embeds``, ``tree_mask``, ``batch``.

    Args:
        model: An adapter whose ``caps`` already answer by signature.

    Raises:
        ConfigError: even a plain chain over the cache differs from one pass without it.
    """
    caps, kind = model.caps(), model.module.config.model_type
    need = max(len(r) for r in ROWS) + max(len(p) for p in PATHS)
    if caps.positions_max is not None and caps.positions_max < need:
        return {}
    was = model.training
    model.eval()
    try:
        with torch.no_grad():
            codes = model.example_codes(len(ROWS))
            if not _fits(_chain(model, codes, False), model):
                raise ConfigError(f"{type(model).__name__} can't step {kind}: its cache does not repeat a whole pass")
            lacks = {}
            if caps.embeds and not _fits(_chain(model, codes, True), model):
                lacks["embeds"] = f"{kind} does not embed ids as its embedding says"
            if caps.tree_mask and not _fits(_tree(model, codes), model):
                why = f"{kind} does not keep to 4-D masks and given positions: use a chain drafter"
                lacks |= {"tree_mask": why, "batch": why}
            return lacks
    finally:
        model.train(was)


Pairs = list[tuple[Tensor, Tensor]]


def _ids(model: Any, ids: list[int]) -> Tensor:
    return torch.tensor([[i % model.caps().vocab_size for i in ids]], device=model.module.device)


def _row(codes: Codes | None, row: int) -> Codes | None:
    return None if codes is None else type(codes)(codes.values[row : row + 1])  # type: ignore[attr-defined,call-arg]


def _whole(model: Any, codes: Codes | None, row: int, behind: list[int]) -> Tensor:
    return model(_row(codes, row), _ids(model, [*ROWS[row], *behind]))[0, len(ROWS[row]) :].float()


def _chain(model: Any, codes: Codes | None, embedded: bool) -> Pairs:
    state = model.open(_ids(model, ROWS[0]), codes=_row(codes, 0))
    behind = [TREE[i] for i in PATHS[1]]
    ids = _ids(model, behind)
    stepped = model.step(state, None, embeds=model.embed(ids)) if embedded else model.step(state, ids)
    return [(stepped[0], _whole(model, codes, 0, behind))]


def _tree(model: Any, codes: Codes | None) -> Pairs:
    width = max(len(r) for r in ROWS)
    prompt = torch.cat([_ids(model, [*r, *[0] * (width - len(r))]) for r in ROWS])
    mask = torch.tensor([[True] * len(r) + [False] * (width - len(r)) for r in ROWS], device=prompt.device)
    try:
        state = model.open(prompt, mask, codes)
        logits = model.step(state, _ids(model, TREE).expand(len(ROWS), -1), parents=torch.tensor([PARENTS] * len(ROWS)))
    except (TypeError, ValueError, RuntimeError, IndexError):  # its forward refuses what its signature offers
        return []
    pairs = []
    for row in range(len(ROWS)):
        for path in PATHS:
            pairs.append((logits[row, path], _whole(model, codes, row, [TREE[i] for i in path])))
    return pairs


def _fits(pairs: Pairs, model: Any) -> bool:
    allowed = 1e-3 if model.module.dtype == torch.float32 else 0.1
    return bool(pairs) and all(bool((a - b).abs().max() <= allowed * b.std().clamp(min=1e-6)) for a, b in pairs)
