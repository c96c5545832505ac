"""A token encoder on a bench: built, in eval mode, nothing at zero that could hide what it does, a few samples."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from quire.contracts import Batch
from quire.roles.tokens.contract import Subset, TokenEncoder, Tokens
from quire.testing.quiet import quietly
from quire.testing.subject import Subject
from quire.testing.trial import copied, first_batch, needed, size_of
from quire.testing.verdict import Fault, Skip

ROWS = 4
MASKS = ("mask", "source_mask")


@dataclass
class Bench:
    """What the token checks work with.

    Attributes:
        name: Short name of the encoder.
        encoder: A TokenEncoder.
        batch: At most ``ROWS`` samples, none of them with padding.
        generator: For subsets and noise.
    """

    name: str
    encoder: Any
    batch: Batch
    generator: torch.Generator

    def embed(self) -> Tokens:
        """All tokens."""
        return self.encoder.embed(copied(self.batch))

    def encoded(self, batch: Batch | None = None, **chosen: Any) -> Tokens:
        """``forward`` of the batch, or of another."""
        return self.encoder(copied(self.batch if batch is None else batch), **chosen)

    def subset(self, rows: int, cells: int, share: float = 0.5) -> Subset:
        """A random subset, another on each row, at least 1 and not all of the cells."""
        count = min(max(1, round(cells * share)), max(1, cells - 1))
        return Subset.ordered(torch.rand(rows, cells, generator=self.generator).argsort(1), count)

    def noise(self, like: Tensor) -> Tensor:
        """Standard normal."""
        return torch.randn(like.shape, generator=self.generator)

    def needs(self, capability: str) -> None:
        """Raise ``Skip`` when the encoder does not offer it."""
        if capability not in self.encoder.capabilities:
            raise Skip(f"{self.name} does not offer {capability!r}")


def bench(subject: Subject) -> Bench:
    """The component of the tiny run, ready to be tried. Raises ``Skip`` when there is none."""
    made = needed(lambda: subject.trial.spare(), "constructs")
    encoder = made.find(subject.cls)
    if not isinstance(encoder, TokenEncoder):
        raise Skip("not reached: see registered")
    with quietly():
        batch = first_batch(made.data)
    few = first_rows(batch, min(ROWS, size_of(batch)))
    for name in MASKS:
        if name in few:
            few[name] = torch.ones_like(few[name])
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in encoder.parameters():
            if not parameter.any():  # a zero table or gate would hide what it does
                parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    return Bench(subject.name, encoder.eval(), few, generator)


def first_rows(batch: Batch, count: int) -> Batch:
    """The first samples of a batch."""
    return {k: v[:count].clone() if isinstance(v, Tensor) else v[:count] for k, v in batch.items()}


def masked_by(tokens: Tokens, mask: Tensor) -> Tokens:
    """The same tokens with another mask."""
    return replace(tokens, mask=mask, padded=not bool(mask.all()))


def far(a: Tensor, b: Tensor) -> float:
    """The largest difference, relative to values above 1."""
    return float((a - b).abs().max() / max(1.0, float(a.abs().max()))) if a.numel() else 0.0


def agree(a: Tensor, b: Tensor, tolerance: float, said: str) -> None:
    """Raise ``Fault`` when two results differ in shape, or by more than the tolerance."""
    if a.shape != b.shape:
        raise Fault(f"{said} (shapes {list(a.shape)} and {list(b.shape)})")
    if far(a, b) > tolerance:
        raise Fault(f"{said} (by {far(a, b):.1e})")
