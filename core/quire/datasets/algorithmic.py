"""Sequence tasks with exact answers, made on the spot: copy, reverse, sort, add, repeat."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quire.data import DataModule, Fields
from quire.datasets.pair_rows import CAUSAL_FIELDS, PAIR_FIELDS, pair_fields
from quire.errors import ConfigError

TASKS = ("copy", "reverse", "sort", "add", "repeat")
PAD, BOS, EOS, MASK, PLUS, FIRST = 0, 1, 2, 3, 4, 5
"""Ids: padding, start, end, mask, the plus sign, then digits 0-9, then one id a task."""


class Algorithmic(DataModule):
    """Digit strings and what a task makes of them; test strings may be longer than any seen in training.

    Args:
        task: copy, reverse, sort, add, repeat, or several joined by ``+``; a task token then goes first.
        train_length: Most digits in training and validation; the least is 1.
        test_length: Most digits in test; the least is one more than ``train_length`` where it is larger.
        samples: Training samples; validation and test have an eighth each.
        causal: One row for decoder-only models: source, start token, answer; with ``prompt_length``, ``source_span``.
        **kwargs: Arguments of ``DataModule``.

    Returns:
        ``source`` [B,S] and ``tokens`` [B,T] (start, answer, end) with their masks; causal: ``tokens`` alone.

    Raises:
        ConfigError: an unknown task, or a length or number of samples below 1.
    """

    fields = PAIR_FIELDS

    def __init__(
        self,
        task: str = "copy",
        train_length: int = 10,
        test_length: int = 20,
        samples: int = 8192,
        causal: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.tasks = task.split("+")
        for name in self.tasks:
            if name not in TASKS:
                raise ConfigError(f"Algorithmic.task is one or more of {', '.join(TASKS)} joined by +, got {name!r}")
        if min(train_length, test_length, samples) < 1:
            raise ConfigError(
                f"Algorithmic needs lengths and samples of at least 1, got {train_length}, {test_length} and {samples}"
            )
        self.train_length, self.test_length, self.samples, self.causal = train_length, test_length, samples, causal
        if causal:
            self.fields = CAUSAL_FIELDS  # type: ignore[misc, assignment]

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """Reverse three digits."""
        small = {"width": 16, "depth": 1, "heads": 2}
        return {
            "model": {
                "encoder": {
                    "class_path": "TextEncoder",
                    "init_args": {**small, "positions": "sincos", "lm_head": False},
                },
                "decoder": {"class_path": "Seq2SeqDecoder", "init_args": small},
                "objective": "Seq2SeqTokens",
                "sampler": {"class_path": "Greedy", "init_args": {"max_new_tokens": 5}},
            },
            "data": {
                "class_path": "Algorithmic",
                "init_args": {"task": "reverse", "train_length": 3, "test_length": 3, "samples": 64, "batch_size": 16},
            },
        }

    def sizes(self) -> dict[str, Any]:
        """vocab_size, length and the special ids."""
        return {
            "vocab_size": FIRST + 10 + len(TASKS),
            "length": self._rows()[0] + self._rows()[1],
            "pad": PAD,
            "bos": BOS,
            "eos": EOS,
            "mask_id": MASK,
        }

    def _rows(self) -> tuple[int, int]:
        most = max(self.train_length, self.test_length)
        source = (2 * most + 1 if "add" in self.tasks else most) + (len(self.tasks) > 1)
        answer = {"add": most + 1, "repeat": 2 * most}
        return source, 2 + max(answer.get(t, most) for t in self.tasks)

    def split(self, name: str) -> Fields:
        """Draw one split; train, val and test have streams of their own."""
        source = torch.Generator().manual_seed(("train", "val", "test").index(name))
        most = self.test_length if name == "test" else self.train_length
        least = self.train_length + 1 if name == "test" and self.test_length > self.train_length else 1
        count = self.samples if name == "train" else max(1, self.samples // 8)
        questions, answers = [], []
        for _ in range(count):
            task = self.tasks[_draw(0, len(self.tasks) - 1, source)]
            question, answer = solve(task, _draw(least, most, source), source)
            mark = [FIRST + 10 + TASKS.index(task)] if len(self.tasks) > 1 else []
            questions.append([*mark, *question])
            answers.append([BOS, *answer, EOS])
        wide, long = self._rows()
        return Fields(**pair_fields(questions, answers, PAD, self.causal, wide, long))


def solve(task: str, length: int, source: torch.Generator) -> tuple[list[int], list[int]]:
    """A random question of ``length`` digits and its answer, as ids.

    ``add`` writes two numbers, least digit first, with a plus sign between; ``repeat`` says everything twice.
    """
    digits = torch.randint(0, 10, (length,), generator=source).tolist()
    if task == "add":
        other = torch.randint(0, 10, (length,), generator=source).tolist()
        total = sum((a + b) * 10**i for i, (a, b) in enumerate(zip(digits, other)))
        answer = [int(c) for c in reversed(str(total))]
        return [*_ids(digits), PLUS, *_ids(other)], _ids(answer)
    answer = {"copy": digits, "reverse": digits[::-1], "sort": sorted(digits), "repeat": digits * 2}[task]
    return _ids(digits), _ids(answer)


def _ids(digits: list[int]) -> list[int]:
    return [FIRST + d for d in digits]


def _draw(least: int, most: int, source: torch.Generator) -> int:
    return int(torch.randint(least, most + 1, (1,), generator=source))


def as_text(ids: Tensor | list[int]) -> str:
    """Digits and plus signs of an id row, for reading."""
    return "".join("+" if i == PLUS else str(i - FIRST) for i in map(int, ids) if i == PLUS or FIRST <= i < FIRST + 10)
