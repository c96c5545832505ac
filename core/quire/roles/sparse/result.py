"""A card as it is kept: numbers with their meaning, the density histogram, JSON and Markdown."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from quire.errors import DataError
from quire.roles.sparse.sweeps import draw_density

MEANING = {
    "l0": "active latents per token, mean",
    "l0_min": "fewest on one token",
    "l0_max": "most on one token",
    "fvu": "squared error over the variance around the mean of these tokens (baseline: that mean)",
    "nmse": "squared error over the squared norm (baseline: zero)",
    "cosine": "of token and rebuild, mean",
    "norm_ratio": "norm of the rebuild over the token's, mean",
    "dead": "share of latents that were active on none of these tokens",
    "dead_training": "share of latents not active in the last tokens of training (window below)",
    "coherence": "largest |cosine| of two decoder rows",
    "ce_clean": "cross-entropy of the subject, nats per target",
    "ce_spliced": "with the rebuild at the site",
    "ce_zero": "with zeros at the site",
    "ce_mean": "with the mean of these tokens at the site",
    "delta_ce": "ce_spliced - ce_clean",
    "recovered_zero": "(ce_zero - ce_spliced) / (ce_zero - ce_clean)",
    "recovered_mean": "(ce_mean - ce_spliced) / (ce_mean - ce_clean)",
    "kl": "KL(clean||spliced) of next-token distributions, nats per target",
}
"""Name and meaning of every number; printed with it."""

BIN = 0.25
"""Width of a bin of the density histogram, in log10 of the share of tokens."""


class Row(NamedTuple):
    """One line of a card."""

    name: str
    value: float
    meaning: str


@dataclass
class Card:
    """The numbers of one dictionary.

    Attributes:
        numbers: By name; NaN where a number can't be had, then a note says why.
        density: Latents in each bin of ``edges``.
        edges: Bounds of the bins, log10 of the share of tokens that a latent is active on.
        name: What a plot calls it: the arm.
        seed: Of its training.
        about: What was evaluated: tokens, site, subject, latents, windows.
        notes: Sentences.
    """

    numbers: dict[str, float]
    density: list[int] = field(default_factory=list)
    edges: list[float] = field(default_factory=list)
    name: str = ""
    seed: int = 0
    about: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def __getitem__(self, name: str) -> float:
        return self.numbers[name]

    def get(self, name: str) -> float:
        """A number, NaN when the card has none of this name."""
        return self.numbers.get(name, math.nan)

    def rows(self) -> list[Row]:
        """Every number with its meaning."""
        return [Row(name, value, MEANING.get(name, "")) for name, value in self.numbers.items()]

    def plain(self) -> dict[str, Any]:
        """For JSON: NaN is null."""
        return {**asdict(self), "numbers": {k: None if math.isnan(v) else v for k, v in self.numbers.items()}}

    def text(self) -> str:
        """Markdown: what was evaluated, the numbers with their meaning, the notes."""
        head = f"# Card{': ' + self.name if self.name else ''}\n\n"
        head += ", ".join(f"{k.replace('_', ' ')}: {v}" for k, v in self.about.items()) + f", seed: {self.seed}\n\n"
        lines = ["| number | value | meaning |", "| --- | --- | --- |"]
        lines += [f"| {r.name} | {shown(r.value)} | {r.meaning.replace('|', chr(92) + '|')} |" for r in self.rows()]
        return head + "\n".join(lines) + "\n" + "".join(f"\nNote: {note}\n" for note in self.notes)

    def write(self, folder: str | Path, stem: str = "card") -> Path:
        """``card.json``, ``card.md`` and the density histogram ``card.png`` into a folder; returns the first."""
        place = Path(folder)
        place.mkdir(parents=True, exist_ok=True)
        file = place / f"{stem}.json"
        file.write_text(json.dumps(self.plain(), indent=2) + "\n", encoding="utf-8")
        (place / f"{stem}.md").write_text(self.text(), encoding="utf-8")
        draw_density(self, place / f"{stem}.png")
        return file

    @classmethod
    def read(cls, file: str | Path) -> Card:
        """A card from its JSON file. Raises ``DataError`` when it is none."""
        try:
            said = json.loads(Path(file).read_text(encoding="utf-8"))
            numbers = {k: math.nan if v is None else float(v) for k, v in said["numbers"].items()}
            return cls(**{**said, "numbers": numbers})
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise DataError(f"{file} is no card of a sparse dictionary: {error}") from error


def shown(value: float) -> str:
    """A number as tables print it."""
    return "-" if math.isnan(value) else f"{value:.4g}"


def histogram(fired: Tensor, tokens: int) -> tuple[list[int], list[float]]:
    """Latents by log10 of the share of tokens they are active on, and the bins' bounds; dead ones are left out."""
    low = -BIN * math.ceil(math.log10(max(tokens, 10)) / BIN)
    edges = [low + BIN * i for i in range(round(-low / BIN) + 1)]
    shares = (fired[fired > 0].double() / tokens).log10()
    bins = ((shares - low) / BIN).floor().long().clamp(0, len(edges) - 2)
    return torch.bincount(bins, minlength=len(edges) - 1).tolist(), edges
