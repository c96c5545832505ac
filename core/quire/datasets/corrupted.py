"""Editing tasks made on the spot: text with slips in it and the clean text, and copies with some tokens replaced."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from typing import Any

import torch

from quire.data import SPLITS, DataModule, Fields, mix
from quire.datasets.pair_files import Pair
from quire.datasets.pair_rows import CAUSAL_FIELDS, PAIR_FIELDS, PairRows, pair_fields
from quire.datasets.pairs import PairText
from quire.datasets.text import held_out, read_source
from quire.errors import ConfigError, DataError
from quire.roles.language.text import Tokenizer

KINDS = ("drop", "double", "swap", "confuse")
CONFUSED = [
    str.split(group)
    for line in (
        "a an the|is are was were be|has have had|do does did|there their|its it's|to too two|then than|in on at",
        "of off|for from|this these|that those|your you're|which who|can could|will would|and an|or of|as has",
        "affect effect|any some|no not|by with|when where|if it|lose loose|accept except|into onto|may might",
    )
    for group in line.split("|")
]
FIRST = 4
"""First id of CopyEdits that is no special one: pad 0, start 1, end 2, mask 3."""


# ---- slips
def corrupt(words: Sequence[str], rate: float, kinds: Sequence[str], chance: random.Random) -> list[str]:
    """Words with slips at a share of their places.

    Args:
        words: The clean words.
        rate: Share of places, in [0, 1]; ``rate * len(words)`` of them are chosen, rounded at random so that the
            mean is exact.
        kinds: Of ``drop`` (the word is gone), ``double`` (it is said twice), ``swap`` (it changes places with the
            next) and ``confuse`` (a word often mistaken for it, else another ending); one is drawn for each place.
        chance: The source of randomness.

    Returns:
        The corrupted words, never none of them: a lone word that should go or move is doubled.
    """
    count = int(rate * len(words) + chance.random())
    chosen = set(chance.sample(range(len(words)), min(count, len(words))))
    out: list[str] = []
    i = 0
    while i < len(words):
        kind = kinds[chance.randrange(len(kinds))] if i in chosen else None
        if kind == "swap" and i + 1 < len(words):
            out += [words[i + 1], words[i]]
            i += 2
            continue
        if kind == "swap" and out:
            out.insert(len(out) - 1, words[i])
        elif kind == "confuse":
            out.append(confuse(words[i], chance))
        elif kind in ("double", "swap") or (kind == "drop" and not out and i + 1 == len(words)):
            out += [words[i]] * 2
        elif kind is None:
            out.append(words[i])
        i += 1
    return out


def confuse(word: str, chance: random.Random) -> str:
    """A word often mistaken for this one; where the table has none, an ending ``s`` comes or goes."""
    start, core, end = re.fullmatch(r"(\W*)(.*?)(\W*)", word, re.DOTALL).groups()  # type: ignore[union-attr]
    others = [o for group in CONFUSED if core.lower() in group for o in group if o != core.lower()]
    if others:
        other = others[chance.randrange(len(others))]
        return start + (other.capitalize() if core[:1].isupper() else other) + end
    return start + (core[:-1] if len(core) > 2 and core[-1] == "s" else core + "s") + end


class CorruptedRows(PairRows):
    """Lines of clean words; the slips of a sample are a function of (seed, epoch, index), drawn as it is fetched."""

    def __init__(self, rows: Sequence[list[str]], data: CorruptedText, seed: int, fresh: bool) -> None:
        super().__init__(rows, data.tokenizer.pad, data.causal, seed, fresh)
        self.data = data

    def words(self, i: int) -> list[str]:
        """The corrupted words of sample ``i`` in this epoch."""
        chance = random.Random(self.key(i))
        low, high = self.data.rates
        return corrupt(self.rows[i], low + (high - low) * chance.random(), self.data.kinds, chance)

    def pair(self, i: int) -> tuple[list[int], list[int]]:
        """Corrupted and clean ids of sample ``i`` in this epoch."""
        tok = self.data.tokenizer
        source = tok.encode(" ".join(self.words(i)))[: self.data.lengths()[0]]
        return source, self.data.framed(tok.encode(" ".join(self.rows[i])))


class CorruptedText(PairText):
    """Lines of text with slips as the source, the clean lines as the target: correction without an annotated corpus.

    Slips are drawn anew in each epoch of training; those of validation and test are fixed.

    Fields: source [B,S], source_mask, tokens [B,T] (start, target, end), mask; causal: tokens and mask [B,S+T],
    prompt_length [B], source_span [B,2]. A batch is as wide as its longest row.

    Args:
        source: What ``TextTokens`` takes: ``stdlib:docs``, a file or folder, ``hf:NAME``. Each line counts once,
            and every k-th one is held out.
        unit: ``line``, or ``sentence`` (paragraphs joined and cut behind full stops).
        length: Most tokens of a clean line; longer ones are cut into several between words.
        words: Fewest words of a line.
        rate: Share of the words with a slip: one number, or two between which it is drawn for each line.
        kinds: Of ``drop``, ``double``, ``swap``, ``confuse``.
        split: Share of the lines that train; the rest is validation and test, half each.
        tokenizer: One for both sides; default ``Bytes``; learnt on the training lines where it learns.
        causal: One row for decoder-only models: source, start token, target, end token.
        **kwargs: Arguments of ``DataModule``.

    Raises:
        ConfigError: an unknown unit or kind, a number out of range, a missing source.
        DataError: too few lines of the source are prose of so many words.
    """

    def __init__(
        self,
        source: str = "stdlib:docs",
        unit: str = "line",
        length: int = 96,
        words: int = 4,
        rate: float | list[float] = [0.05, 0.1],  # noqa: B006
        kinds: list[str] = list(KINDS),  # noqa: B006
        split: float = 0.9,
        tokenizer: Tokenizer | None = None,
        causal: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(tokenizer, causal, **kwargs)
        if unit not in ("line", "sentence"):
            raise ConfigError(f"CorruptedText.unit is line or sentence, got {unit!r}")
        if not kinds or set(kinds) - set(KINDS):
            raise ConfigError(f"CorruptedText.kinds are one or more of {', '.join(KINDS)}, got {kinds}")
        rates = list(rate) if isinstance(rate, (list, tuple)) else [rate, rate]
        if len(rates) != 2 or not 0 <= rates[0] <= rates[1] <= 1:
            raise ConfigError(f"CorruptedText.rate is a number in [0, 1] or two in rising order, got {rate}")
        if length < 2 or words < 1 or not 0 < split < 1:
            raise ConfigError(
                "CorruptedText needs length of at least 2, words of at least 1 and split in (0, 1),"
                f" got {length}, {words} and {split}"
            )
        self.source, self.unit, self.length, self.shortest, self.share = source, unit, length, words, split
        self.rates, self.kinds = (float(rates[0]), float(rates[1])), list(kinds)
        self._lines: dict[str, list[list[str]]] = {}
        self._rows: dict[str, list[list[str]]] = {}

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """Short lines of the standard library's documentation."""
        from quire.datasets.algorithmic import Algorithmic

        given = {"length": 32, "batch_size": 8, "train_samples": 64}
        return {"model": Algorithmic.tiny()["model"], "data": {"class_path": "CorruptedText", "init_args": given}}

    def lengths(self) -> tuple[int, int]:
        """Twice ``length`` for a source, which slips may lengthen (longer ones are cut), and the framed clean line."""
        return 2 * self.length, self.length + 2

    def lines(self) -> dict[str, list[list[str]]]:
        """Words of the clean lines of each split, each once, whatever their length."""
        if not self._lines:
            found = dict.fromkeys(" ".join(words) for d in read_source(self.source) for words in self._cut(d))
            train, held = held_out([line.split(" ") for line in found], self.share)
            if len(held) < 2:
                raise DataError(
                    f"CorruptedText: {self.source} has {len(found)} {self.unit}s of prose with at least"
                    f" {self.shortest} words, too few to train and to hold out: lower data.words or take another text"
                )
            self._lines = {"train": train, "val": held[::2], "test": held[1::2]}
        return self._lines

    def _cut(self, document: str) -> list[list[str]]:
        if self.unit == "line":
            parts = document.splitlines()
        else:
            parts = [s for p in re.split(r"\n\s*\n", document) for s in re.split(r"(?<=[.!?])\s+(?=[A-Z])", p)]
        return [words for part in parts if len(words := part.split()) >= self.shortest and prose(words)]

    def learnt_from(self) -> list[str]:
        """The clean training lines."""
        return [" ".join(words) for words in self.lines()["train"]]

    def rows(self, name: str) -> list[list[str]]:
        """Words of the clean lines of a split, cut to ``length`` tokens."""
        if name not in self._rows:
            self._rows[name] = [part for words in self.lines()[name] for part in self._within(words)]
        return self._rows[name]

    def _within(self, words: list[str]) -> list[list[str]]:
        parts = []
        while len(words) >= self.shortest:
            count, size = len(words), len(self.tokenizer.encode(" ".join(words)))
            while size > self.length and count:
                count = min(count - 1, count * self.length // size)
                size = len(self.tokenizer.encode(" ".join(words[:count])))
            if count >= self.shortest:
                parts.append(words[:count])
            words = words[max(count, 1) :]
        return parts

    def texts(self, name: str) -> list[Pair]:
        """Corrupted and clean line of a split's samples; sample i of val and test has ``index`` i."""
        data = self.split(name)
        return [Pair(" ".join(data.words(i)), (" ".join(words),)) for i, words in enumerate(data.rows)]

    def split(self, name: str) -> CorruptedRows:
        """One split; slips of val and test do not move with ``seed`` or epoch."""
        train = name == "train"
        return CorruptedRows(self.rows(name), self, self.seed if train else -1 - SPLITS.index(name), fresh=train)


def prose(words: list[str]) -> bool:
    """Whether at least three words in four are made of letters, marks around them aside, and none is a ruled line."""
    if any(len(w) > 3 and len(set(w)) == 1 for w in words):
        return False
    return 4 * sum(re.fullmatch(r"\W*[^\W\d_]+(?:['’-][^\W\d_]+)*\W*", w) is not None for w in words) >= 3 * len(words)


# ---- copies
class CopyEdits(DataModule):
    """Random ids, and the same ids with some replaced: how far a drafter that copies can get, at a known edit rate.

    No id is twice in a source, so a copying drafter that has lost its place finds it again by one token.

    Fields: source [B,S], source_mask, tokens [B,S+2] (start, target, end), mask; causal: tokens and mask [B,2S+2],
    prompt_length [B], source_span [B,2].

    Args:
        length: Ids of a source, S.
        rate: Share of ids replaced; ``round(rate * length)`` of them, at random places.
        vocab_size: Ids run from 4 to this; pad 0, start 1, end 2, mask 3.
        samples: Training samples; validation and test have an eighth each.
        causal: One row for decoder-only models: source, start token, target, end token.
        **kwargs: Arguments of ``DataModule``.

    Raises:
        ConfigError: ``rate`` outside [0, 1], numbers below 1, or a vocabulary that is too small for the length.
    """

    fields = PAIR_FIELDS

    def __init__(
        self,
        length: int = 64,
        rate: float = 0.1,
        vocab_size: int = 8192,
        samples: int = 1024,
        causal: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if not 0 <= rate <= 1 or min(length, samples) < 1:
            raise ConfigError(
                f"CopyEdits needs rate in [0, 1], length and samples of at least 1, got {rate}, {length} and {samples}"
            )
        if length >= vocab_size - FIRST:
            raise ConfigError(
                f"CopyEdits.length is {length}, but vocab_size {vocab_size} has {max(0, vocab_size - FIRST)} ids"
                " to choose from: raise vocab_size"
            )
        self.length, self.rate, self.vocab_size, self.samples, self.causal = length, rate, vocab_size, samples, causal
        if causal:
            self.fields = CAUSAL_FIELDS  # type: ignore[misc, assignment]

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """Copies of six ids."""
        from quire.datasets.algorithmic import Algorithmic

        given = {"length": 6, "vocab_size": 32, "samples": 64, "batch_size": 16}
        return {"model": Algorithmic.tiny()["model"], "data": {"class_path": "CopyEdits", "init_args": given}}

    def sizes(self) -> dict[str, Any]:
        """vocab_size, length (source and target together) and the special ids."""
        return {
            "vocab_size": self.vocab_size,
            "length": 2 * self.length + 2,
            "pad": 0,
            "bos": 1,
            "eos": 2,
            "mask_id": 3,
        }

    def split(self, name: str) -> Fields:
        """Draw one split; train, val and test have streams of their own."""
        chance = torch.Generator().manual_seed(mix(17, SPLITS.index(name)))
        count = self.samples if name == "train" else max(1, self.samples // 8)
        sources = [self._distinct(chance) for _ in range(count)]
        targets = [[1, *edited(s, self.rate, self.vocab_size, chance), 2] for s in sources]
        return Fields(**pair_fields(sources, targets, 0, self.causal))

    def _distinct(self, chance: torch.Generator) -> list[int]:
        return (FIRST + torch.randperm(self.vocab_size - FIRST, generator=chance)[: self.length]).tolist()


def edited(ids: list[int], rate: float, vocab_size: int, chance: torch.Generator) -> list[int]:
    """``ids`` with ``round(rate * len(ids))`` of them, at random places, replaced by ids that are not among them."""
    places = torch.randperm(len(ids), generator=chance)[: round(rate * len(ids))].tolist()
    free = sorted(set(range(FIRST, vocab_size)) - set(ids))
    out = list(ids)
    for place in places:
        out[place] = free[int(torch.randint(len(free), (1,), generator=chance))]
    return out
