"""Batches of sentences as rows of ids from the first word to the end token, and what is refused on the way."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from quire.errors import DataError
from quire.roles.language.contract import Caps
from quire.roles.language.rows import left_aligned

Say = Callable[[list[int]], str]


def sentences(tokens: Tensor, mask: Tensor | None, caps: Caps, ended: bool, add_eos: bool) -> tuple[Tensor, Tensor]:
    """Ids [B,T] from the left without the start token, and lengths [B].

    Args:
        tokens: [B,T] int64, padded on either side, with or without the start token.
        mask: [B,T] bool, True = real.
        caps: Of the language model: its vocabulary, start and end tokens.
        ended: Whether each must end with an end token.
        add_eos: Put the end token behind those without one.

    Raises:
        DataError: a token outside the vocabulary, an empty sentence, no end token, or one inside.
    """
    ids, counts, _ = left_aligned(tokens, mask, "sentence")
    lengths = torch.tensor(counts, device=ids.device)
    places = torch.arange(ids.shape[1], device=ids.device)
    real = places < lengths[:, None]
    stray = real & ((ids < 0) | (ids >= caps.vocab_size))
    if bool(stray.any()):
        row, place = stray.nonzero()[0].tolist()
        raise DataError(
            f"token {int(ids[row, place])} (sentence {row}, place {place}) is outside the vocabulary of"
            f" {caps.vocab_size} tokens: use the language model's own tokenizer"
        )
    opened = (ids[:, 0] == caps.start_id).long() if caps.start_id is not None else torch.zeros_like(lengths)
    if caps.start_id in caps.eos_ids:
        opened = opened * (lengths > 1)  # one token that is both: the empty sentence
    if add_eos:
        ids = torch.nn.functional.pad(ids, (0, 1))
    ids = ids.gather(1, (torch.arange(ids.shape[1], device=ids.device) + opened[:, None]).clamp(max=ids.shape[1] - 1))
    lengths = lengths - opened
    if bool((lengths == 0).any()) and not add_eos:
        raise DataError(f"sentence {int((lengths == 0).nonzero()[0])} is empty: it needs an end token at least")
    if ended:
        ids, lengths = _ended(ids, lengths, caps, add_eos)
    return ids[:, : int(lengths.max())], lengths


def _ended(ids: Tensor, lengths: Tensor, caps: Caps, add_eos: bool) -> tuple[Tensor, Tensor]:
    ends = torch.isin(ids, torch.tensor(caps.eos_ids, device=ids.device))
    last = ends.gather(1, (lengths - 1).clamp(min=0)[:, None])[:, 0] & (lengths > 0)
    if add_eos:
        open_ = (~last).nonzero()[:, 0]
        ids[open_, lengths[open_]] = caps.eos_ids[0]
        lengths = lengths + ~last
    elif not bool(last.all()):
        raise DataError(f"sentence {int((~last).nonzero()[0])} has no EOS; pass add_eos=true")
    inside = ends & (torch.arange(ids.shape[1], device=ids.device) < lengths[:, None] - 1)
    if bool(inside.any()):
        row, place = inside.nonzero()[0].tolist()
        raise DataError(f"sentence {row} goes on behind its end token at place {place}: cut it there")
    return ids, lengths


def chunks(order: Tensor, cost: int, most: int, budget: int) -> Sequence[Tensor]:
    """Rows in parts of at most ``most``, each with at most ``budget`` numbers where a row takes ``cost``."""
    return order.split(max(1, min(most, budget // max(1, cost))))


def quoted(ids: Sequence[int], say: Say | None) -> str:
    """Ids as a user knows them: text where there is a tokenizer."""
    return repr(say(list(ids))) if say is not None else str(list(ids))
