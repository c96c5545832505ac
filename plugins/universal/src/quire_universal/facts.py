"""Questions that need one, two or three of the facts told: a generator in the manner of bAbI, all its own."""

from __future__ import annotations

from typing import Any

import torch

from quire.data import DataModule, Fields
from quire.datasets.text import ragged
from quire.errors import ConfigError

PEOPLE = ("ana", "ben", "cleo", "dan")
PLACES = ("attic", "barn", "cellar", "garden", "kitchen", "yard")
THINGS = ("apple", "book", "coin", "drum")
WORDS = (
    *("<pad>", "<s>", "</s>", "<mask>", *PEOPLE, *PLACES, *THINGS),
    *("goes", "takes", "where", "is", "was", "before", "to", "the", ".", "?"),
)
ID = {word: i for i, word in enumerate(WORDS)}


class Facts(DataModule):
    """Short stories of who goes where and takes what, a question, and a place as the answer.

    For the ponder experiment of Dehghani et al. 2018. One supporting fact: where is a person. Two: where is a thing
    (who took it, and where that person went). Three: where was it before that (and where the person had been).

    Args:
        supporting: Numbers of supporting facts, some of 1, 2, 3; rows are drawn from them evenly.
        facts: Sentences a story, at least 4.
        samples: Training samples; validation and test have an eighth each.
        **kwargs: Arguments of ``DataModule``.

    Returns:
        ``source`` [B,S] story and question, ``tokens`` [B,3] start, answer, end, with masks; ``label`` [B]: supporting
        facts minus 1.

    Raises:
        ConfigError: other numbers, fewer than 4 facts, or no samples.
    """

    fields = ("source", "source_mask", "tokens", "mask", "label")

    def __init__(self, supporting: list[int] | None = None, facts: int = 6, samples: int = 8192, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.supporting = [1, 2, 3] if supporting is None else list(supporting)
        if not self.supporting or not set(self.supporting) <= {1, 2, 3}:
            raise ConfigError(f"Facts.supporting holds some of 1, 2, 3, got {self.supporting}")
        if facts < 4 or samples < 1:
            raise ConfigError(f"Facts needs at least 4 facts and 1 sample, got {facts} and {samples}")
        self.facts, self.samples = facts, samples

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """Stories of four facts."""
        from quire_universal.objective import tiny_seq2seq

        return tiny_seq2seq(data={"class_path": "Facts", "init_args": {"facts": 4, "samples": 64, "batch_size": 16}})

    def sizes(self) -> dict[str, Any]:
        """vocab_size, length, classes and the special ids."""
        return {
            "vocab_size": len(WORDS),
            "length": 5 * self.facts + 9,
            "classes": 3,
            "pad": 0,
            "bos": 1,
            "eos": 2,
            "mask_id": 3,
        }

    def split(self, name: str) -> Fields:
        """Draw one split; train, val and test have streams of their own."""
        chance = torch.Generator().manual_seed(71 + ("train", "val", "test").index(name))
        count = self.samples if name == "train" else max(1, self.samples // 8)
        rows, answers, labels = [], [], []
        for _ in range(count):
            needed = self.supporting[_draw(len(self.supporting), chance)]
            story, question, answer = tell(needed, self.facts, chance)
            rows.append([ID[w] for line in story for w in line.split()] + [ID[w] for w in question.split()])
            answers.append([1, ID[answer], 2])
            labels.append(needed - 1)
        source, source_mask = ragged(rows, 5 * self.facts + 9, 0)
        tokens, mask = ragged(answers, 3, 0)
        return Fields(source=source, source_mask=source_mask, tokens=tokens, mask=mask, label=torch.tensor(labels))


def tell(needed: int, facts: int, chance: torch.Generator) -> tuple[list[str], str, str]:
    """A story of ``facts`` lines, a question that needs ``needed`` of them, and its answer."""
    while True:
        story, went, carried = _happen(facts, chance)
        if needed == 1:
            who = PEOPLE[_draw(len(PEOPLE), chance)]
            if went[who]:
                return story, f"where is {who} ?", went[who][-1]
            continue
        for thing, (who, since) in carried.items():
            trips = went[who][since:]  # where it was carried
            if needed == 2 and trips:
                return story, f"where is the {thing} ?", trips[-1]
            if needed == 3 and len(trips) > 1 and trips.count(trips[-1]) == 1:
                return story, f"where was the {thing} before the {trips[-1]} ?", trips[-2]


def _happen(facts: int, chance: torch.Generator) -> tuple[list[str], dict[str, list[str]], dict[str, tuple[str, int]]]:
    story: list[str] = []
    went: dict[str, list[str]] = {who: [] for who in PEOPLE}
    carried: dict[str, tuple[str, int]] = {}  # thing → who has it, and how many trips that person had made before
    cast = [PEOPLE[i] for i in torch.randperm(len(PEOPLE), generator=chance)[:2].tolist()]
    while len(story) < facts:
        who = cast[_draw(2, chance)]
        free = [t for t in THINGS if t not in carried]
        if free and _draw(3, chance) == 0:
            thing = free[_draw(len(free), chance)]
            carried[thing] = (who, len(went[who]))
            story.append(f"{who} takes the {thing} .")
        else:
            place = PLACES[_draw(len(PLACES), chance)]
            if went[who][-1:] != [place]:
                went[who].append(place)
                story.append(f"{who} goes to {place} .")
    return story, went, carried


def _draw(below: int, chance: torch.Generator) -> int:
    return int(torch.randint(0, below, (1,), generator=chance))
