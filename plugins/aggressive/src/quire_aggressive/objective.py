"""Train a block drafter: guess the block behind a random prefix, with part of the answer shown where it is hard."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from quire.contracts import Batch, Losses, Objective
from quire.errors import ConfigError
from quire.roles.language.rows import left_aligned
from quire_aggressive.block import BlockDrafter


class BlockPrediction(Objective):
    """Cross-entropy of the next ``block`` tokens behind a random prefix of the target, all guessed at once.

    Ge et al. 2022. A first pass without gradient counts the wrong guesses of each row; a share of that many masked
    places is then shown as gold, and the rest is scored (glancing).

    Args:
        glancing: That share at the start of training, in [0, 1].
        glancing_drop: By how much it falls linearly over the run, at most ``glancing``.
        smoothing: Label smoothing, in [0, 1).

    Needs:
        decoder: BlockDrafter. Fields source, source_mask, tokens (start token, target, end token), mask.

    Returns:
        ``block``: mean over the places guessed, in nats; ln V at chance. Also logged: their accuracy, and the share of
        places shown.

    Raises:
        ConfigError: an argument out of range.
    """

    decoder: BlockDrafter
    fields = ("source", "tokens")

    def __init__(self, glancing: float = 0.5, glancing_drop: float = 0.2, smoothing: float = 0.1) -> None:
        super().__init__()
        if not 0 <= glancing_drop <= glancing <= 1:
            raise ConfigError(
                "BlockPrediction needs 0 <= glancing_drop <= glancing <= 1,"
                f" got glancing {glancing} and glancing_drop {glancing_drop}"
            )
        if not 0 <= smoothing < 1:
            raise ConfigError(f"BlockPrediction.smoothing must be in [0, 1), got {smoothing}")
        self.glancing, self.glancing_drop, self.smoothing = glancing, glancing_drop, smoothing

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """Learn to reverse three digits, three at once."""
        return BlockDrafter.tiny()

    def forward(self, model: Any, batch: Batch) -> Losses:
        """Score the block behind one random prefix a row."""
        drafter = model.decoder.role(BlockDrafter)
        if self.training:
            drafter.trained.fill_(True)
        source = drafter.read(batch["source"], batch.get("source_mask"))
        target, counts, _ = left_aligned(batch["tokens"], batch.get("mask"), "target")
        lengths = torch.tensor(counts, device=target.device) - 1
        chance = model.generator(target.device)
        prefix = prefixes(lengths, chance)
        tokens, real, guess, gold = noised(target[:, 1:], lengths, prefix, drafter.block, drafter.mask_id)
        share = torch.zeros((), device=target.device)
        if self.glancing:
            with torch.no_grad():
                wrong = (guess & (drafter(source, tokens, real).argmax(-1) != gold)).sum(1)
            shown = revealed(guess, (self._share(model) * wrong).floor().long(), chance)
            share = shown.sum() / guess.sum().clamp(min=1)
            tokens, guess = tokens.where(~shown, gold), guess & ~shown
        logits = drafter(source, tokens, real)
        flat, wanted = logits[guess].float(), gold[guess]
        left = guess.sum().clamp(min=1)  # all of a small batch may be shown
        loss = cross_entropy(flat, wanted, label_smoothing=self.smoothing, reduction="sum") / left
        accuracy = (flat.argmax(-1) == wanted).sum() / left
        return Losses({"block": loss}, {"accuracy": accuracy, "shown": share}, {"logits": logits, "guess": guess})

    def _share(self, model: Any) -> float:
        trainer = getattr(model, "_trainer", None)
        steps = float(trainer.estimated_stepping_batches) if trainer is not None and self.training else math.inf
        return self.glancing - self.glancing_drop * min(1.0, model.global_step / steps if trainer is not None else 0.0)


def prefixes(lengths: Tensor, chance: torch.Generator) -> Tensor:
    """How much of each target is given: len - (1 + floor(U · len)), even over 0 … len - 1. [B] int64."""
    drawn = torch.rand(lengths.shape, generator=chance, device=lengths.device)
    return lengths - 1 - (drawn * lengths).long().clamp(max=lengths - 1)


def noised(
    target: Tensor, lengths: Tensor, prefix: Tensor, block: int, mask_id: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A prefix of each target with ``block`` masks behind it.

    Args:
        target: [B,L] ids behind the start token, end token included, padding on the right.
        lengths: [B] real ids of each.
        prefix: [B] ids given of each.

    Returns:
        Ids [B,T]; [B,T] bool, what is not padding; [B,T] bool, masks over real ids, which are scored; gold ids [B,T].
    """
    places = torch.arange(int(prefix.max()) + block, device=target.device)[None]
    real = places < prefix[:, None] + block
    gold = target.gather(1, places.clamp(max=target.shape[1] - 1).expand(len(target), -1))
    masked = (places >= prefix[:, None]) & real
    tokens = torch.where(masked, mask_id, gold).where(real, gold[:, :1])
    return tokens, real, masked & (places < lengths[:, None]), gold


def revealed(guess: Tensor, counts: Tensor, chance: torch.Generator) -> Tensor:
    """``counts`` [B] random places of each row of ``guess`` [B,T]."""
    drawn = torch.rand(guess.shape, generator=chance, device=guess.device).masked_fill(~guess, 2.0)
    return guess & (drawn.argsort(1).argsort(1) < counts[:, None])
