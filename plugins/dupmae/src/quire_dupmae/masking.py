"""Whole-word masks, vectorised: random keys rank the words, a greedy pass takes them (DupMAE, Xiao et al. 2022)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quire.contracts import Part
from quire.errors import ConfigError


def open_share(name: str, value: float) -> float:
    """``value`` if it is in (0, 1). Raises ``ConfigError`` naming the argument and the value."""
    if not 0 < value < 1:
        raise ConfigError(f"{name} must be in (0,1), got {value}")
    return value


def budget(lengths: Tensor, ratio: float) -> Tensor:
    """Tokens to mask of texts with ``lengths`` tokens, specials included: max(1, round half to even)."""
    return (lengths.double() * ratio).round().long().clamp(min=1)


def words(word_ids: Tensor, candidates: Tensor) -> tuple[Tensor, Tensor]:
    """Words numbered anew from 0, and their lengths.

    Args:
        word_ids: [B,T] int64; neighbours with the same number are one word.
        candidates: [B,T] bool, tokens that may be masked.

    Returns:
        The word of each token [B,T] (of others: some word) and the length of each word [B,T], 0 where there is none.
    """
    before = torch.ones_like(candidates)
    before[:, 1:] = (word_ids[:, 1:] != word_ids[:, :-1]) | ~candidates[:, :-1]
    number = ((before & candidates).cumsum(1) - 1).clamp(min=0)
    sizes = torch.zeros_like(number).scatter_add(1, number, candidates.long())
    return number, sizes


def whole_word_masks(
    word_ids: Tensor, candidates: Tensor, count: Tensor, draws: int, generator: torch.Generator
) -> Tensor:
    """Independent masks of whole words.

    Words are tried in random order; one that would exceed the budget is skipped, so at most ``count`` are hidden.

    Args:
        word_ids: [B,T] int64.
        candidates: [B,T] bool, tokens that may be masked: never specials or padding.
        count: [B] int64, the budget of each row in tokens.
        draws: S, masks of each row.
        generator: The only source of randomness.

    Returns:
        [B,S,T] bool, True = hidden.
    """
    number, sizes = words(word_ids, candidates)
    rows, length = number.shape
    keys = torch.rand(rows, draws, length, generator=generator, device=generator.device).to(number.device)
    keys = keys.masked_fill(sizes[:, None] == 0, 2.0)  # words that aren't there come last
    order = keys.argsort(2)
    ordered = sizes[:, None].expand(-1, draws, -1).gather(2, order)
    hidden = torch.zeros(rows, draws, length, dtype=torch.bool, device=number.device)
    total = torch.zeros(rows, draws, dtype=torch.long, device=number.device)
    for rank in range(length):
        size = ordered[..., rank]
        hidden[..., rank] = (size > 0) & (total + size <= count[:, None])
        total = total + size * hidden[..., rank]
    of_word = torch.zeros_like(hidden).scatter(2, order, hidden)
    return of_word.gather(2, number[:, None].expand(-1, draws, -1)) & candidates[:, None]


def row_masks(
    word_ids: Tensor, candidates: Tensor, mask: Tensor, ratio: float, pool: int, generator: torch.Generator
) -> Tensor:
    """What each row of the decoder sees: another mask on every row, the own token never.

    Each text has min(length, pool) whole-word masks; each row takes one at random and then hides its own key. Specials
    are hidden from themselves only, so no row is empty.

    Args:
        word_ids: [B,T] int64.
        candidates: [B,T] bool, the ordinary tokens.
        mask: [B,T] bool, True = real.
        ratio: Share of a text's tokens that a mask hides.
        pool: Most masks of one text.
        generator: The only source of randomness.

    Returns:
        [B,T,T] bool, True = visible; column 0 is the sentence's vector.
    """
    lengths, length = mask.sum(1), mask.shape[1]
    hidden = whole_word_masks(word_ids, candidates, budget(lengths, ratio), min(pool, length), generator)
    chosen = torch.rand(mask.shape, generator=generator, device=generator.device).to(mask.device)
    chosen = (chosen * lengths.clamp(max=pool)[:, None]).long()
    taken = hidden.gather(1, chosen[..., None].expand(-1, -1, length))
    own = torch.eye(length, dtype=torch.bool, device=mask.device)
    return ~taken & mask[:, None] & ~own


class WholeWordMask(Part):
    """Hide whole words, and say what takes the place of their tokens. Devlin et al. 2019; Xiao et al. 2022.

    Args:
        ratio: Share of a text's tokens, in (0, 1); at most max(1, round(ratio x length)) are hidden, specials never.
        replace: Shares of hidden tokens that become the mask token, a random token, or stay; they sum to 1.

    Raises:
        ConfigError: ``ratio`` outside (0, 1), or shares that don't sum to 1.
    """

    def __init__(self, ratio: float = 0.3, replace: tuple[float, float, float] = (0.8, 0.1, 0.1)) -> None:
        super().__init__()
        self.ratio, self.replace = open_share("mask_ratio", ratio), tuple(replace)
        if len(self.replace) != 3 or min(self.replace) < 0 or abs(sum(self.replace) - 1) > 1e-6:
            raise ConfigError(f"WholeWordMask.replace has three shares that sum to 1, got {list(replace)}")

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """Pretraining on docstrings with half of the words hidden."""
        from quire_dupmae.objective import DuplexAutoencoding

        run = DuplexAutoencoding.tiny()
        masking = {"class_path": "WholeWordMask", "init_args": {"ratio": 0.5}}
        run["model"]["objective"] = {"class_path": "DuplexAutoencoding", "init_args": {"masking": masking}}
        return run

    def draw(self, word_ids: Tensor, candidates: Tensor, mask: Tensor, generator: torch.Generator) -> Tensor:
        """[B,T] bool, True = hidden; arguments as in ``row_masks``."""
        count = budget(mask.sum(1), self.ratio)
        return whole_word_masks(word_ids, candidates, count, 1, generator)[:, 0]

    def corrupt(
        self, tokens: Tensor, hidden: Tensor, mask_id: int, vocab_size: int, generator: torch.Generator
    ) -> Tensor:
        """The ids that the encoder sees, [B,T]."""
        draw = torch.rand(tokens.shape, generator=generator, device=generator.device).to(tokens.device)
        other = torch.randint(vocab_size, tokens.shape, generator=generator, device=generator.device).to(tokens.device)
        seen = torch.where(hidden & (draw < self.replace[0]), mask_id, tokens)
        random = hidden & (draw >= self.replace[0]) & (draw < self.replace[0] + self.replace[1])
        return torch.where(random, other, seen)
