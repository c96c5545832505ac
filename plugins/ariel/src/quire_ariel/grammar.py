"""A small grammar of questions: sampling, enumeration, and a recogniser that is exact. For Celotti et al. 2020.

The paper's toy grammar was not published; this one is our own. Every sentence follows one of four templates:

    is it NP ?    is it PREP NP ?    is NP VERB NP ?    does NP have NP PREP it ?
    NP = ARTICLE NOUN | ARTICLE ADJECTIVE NOUN | ARTICLE DEGREE ADJECTIVE NOUN
"""

from __future__ import annotations

import functools
import itertools
import random
import re
from collections.abc import Iterator, Mapping, Sequence

from quire.errors import ConfigError

KINDS: dict[str, tuple[str, ...]] = {
    "ARTICLE": ("a", "the"),
    "DEGREE": ("very", "rather"),
    "NOUN": (
        *("apple", "ball", "bird", "book", "cat", "chair", "cup", "dog"),
        *("fish", "hat", "horse", "lamp", "rock", "shoe", "table", "tree"),
    ),
    "ADJECTIVE": ("big", "blue", "clean", "green", "heavy", "old", "red", "small"),
    "PREP": ("above", "behind", "beside", "inside", "near", "under"),
    "VERB": ("carrying", "chasing", "holding", "pushing", "touching"),
}
TEMPLATES = (
    ("is", "it", "NP", "?"),
    ("is", "it", "PREP", "NP", "?"),
    ("is", "NP", "VERB", "NP", "?"),
    ("does", "NP", "have", "NP", "PREP", "it", "?"),
)
WEIGHTS = (3, 5, 6, 6)
"""How often each template is drawn."""
PHRASES = (("ARTICLE", "NOUN"), ("ARTICLE", "ADJECTIVE", "NOUN"), ("ARTICLE", "DEGREE", "ADJECTIVE", "NOUN"))
GROWING = {"NOUN": 16, "ADJECTIVE": 8, "PREP": 6, "VERB": 5}
SPECIAL = 3
LONGEST = 14
"""Tokens of the longest sentence, end token included."""


class Grammar:
    """The grammar over given word lists.

    Args:
        kinds: Words of each kind; no word may be in two, or be one of the templates' own.
    """

    def __init__(self, kinds: Mapping[str, Sequence[str]]) -> None:
        self.kinds = {kind: tuple(words) for kind, words in kinds.items()}
        own = dict.fromkeys(w for t in TEMPLATES for w in t if w != "NP" and w not in kinds)
        self.words = (*own, *(w for words in self.kinds.values() for w in words))
        if len(set(self.words)) != len(self.words):
            raise ConfigError("a word of the grammar has two kinds: its sentences would not be read in one way")
        self.of = {w: w for w in self.words} | {w: kind for kind, words in self.kinds.items() for w in words}
        phrase = "|".join(" ".join(p) for p in PHRASES)
        whole = "|".join(" ".join(t).replace("NP", f"({phrase})").replace("?", r"\?") for t in TEMPLATES)
        self.shape = re.compile(whole)  # over kinds, one name a word
        self.shares = [self._count(p) for p in PHRASES]
        self.productions = [
            *(" ".join(t) for t in TEMPLATES),
            *(f"NP = {' '.join(p)}" for p in PHRASES),
            *(f"{kind} = {w}" for kind, words in self.kinds.items() for w in words),
        ]

    @property
    def vocab_size(self) -> int:
        """Words, and padding, start and end."""
        return len(self.words) + SPECIAL

    def valid(self, words: Sequence[str]) -> bool:
        """Whether these words are a sentence of the grammar; exact."""
        return self.shape.fullmatch(" ".join(self.of.get(w, "-") for w in words)) is not None

    def used(self, words: Sequence[str]) -> set[str]:
        """The productions of a valid sentence; none for another."""
        if not self.valid(words):
            return set()
        kinds = [self.of[w] for w in words]
        found = {f"{k} = {w}" for k, w in zip(kinds, words) if k != w}
        line, start = " ".join(kinds), 0
        parts = []
        for match in re.finditer(r"ARTICLE (?:DEGREE )?(?:ADJECTIVE )?NOUN", line):
            found.add(f"NP = {match.group()}")
            parts += [line[start : match.start()], "NP"]
            start = match.end()
        return found | {"".join([*parts, line[start:]])}

    def phrases(self) -> int:
        """How many noun phrases there are."""
        return sum(self.shares)

    def size(self) -> int:
        """How many sentences there are."""
        return sum(self._count(t) for t in TEMPLATES)

    def _count(self, shape: Sequence[str]) -> int:
        total = 1
        for kind in shape:
            total *= self.phrases() if kind == "NP" else len(self.kinds.get(kind, (kind,)))
        return total

    def draw(self, chance: random.Random) -> list[str]:
        """One sentence: a template by weight, then each part evenly among all that can stand there."""
        (template,) = chance.choices(TEMPLATES, WEIGHTS)
        return [w for kind in template for w in self._part(kind, chance)]

    def _part(self, kind: str, chance: random.Random) -> list[str]:
        if kind == "NP":
            (phrase,) = chance.choices(PHRASES, self.shares)
            return [chance.choice(self.kinds[k]) for k in phrase]
        return [chance.choice(self.kinds[kind])] if kind in self.kinds else [kind]

    def every(self) -> Iterator[list[str]]:
        """All sentences, template by template."""
        phrases = [list(w) for p in PHRASES for w in itertools.product(*(self.kinds[k] for k in p))]
        for template in TEMPLATES:
            places = [phrases if k == "NP" else [[w] for w in self.kinds.get(k, (k,))] for k in template]
            for parts in itertools.product(*places):
                yield [w for part in parts for w in part]


@functools.lru_cache(maxsize=8)
def questions(vocabulary: int = 47) -> Grammar:
    """The grammar with this many tokens, padding, start and end included: its own 44 words, and made-up ones above.

    Raises:
        ConfigError: fewer than 47.
    """
    more = vocabulary - SPECIAL - len(Grammar(KINDS).words)
    if more < 0:
        raise ConfigError(f"QuestionGrammar.vocabulary must be at least {vocabulary - more}, got {vocabulary}")
    kinds = {k: list(v) for k, v in KINDS.items()}
    whole = sum(GROWING.values())
    coined = _coined()
    for place, kind in enumerate(GROWING):
        share = (
            more * GROWING[kind] // whole if place else more - sum(more * n // whole for n in [*GROWING.values()][1:])
        )
        kinds[kind] += [next(coined) for _ in range(share)]
    return Grammar(kinds)


def _coined() -> Iterator[str]:
    syllables = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]
    for count in (2, 3):
        for parts in itertools.product(syllables, repeat=count):
            yield "".join(parts)
