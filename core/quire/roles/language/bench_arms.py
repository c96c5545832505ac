"""Arms of a decoding benchmark, and their race: same prompts, arms in turn, CPU and wall time."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, Protocol

import torch
from torch import Tensor

from quire.contracts import Sampler
from quire.roles.language.bench_models import Subject, lift
from quire.roles.language.bench_tasks import Task
from quire.roles.language.contract import Generated
from quire.roles.language.layout import laid_out
from quire.roles.language.proof import batch_of
from quire.roles.language.stats import Stats

Rows = list[list[int]]


@dataclass
class Run:
    """One call's ids and seconds: CPU and wall, up to the first token and behind it."""

    rows: Rows
    first_cpu: float
    first_wall: float
    rest_cpu: float
    rest_wall: float
    forwards: int
    stats: Stats | None = None


class Way(Protocol):
    """Continues the prompts at ``which`` of a task."""

    def __call__(self, task: Task, which: list[int]) -> Run: ...


@dataclass
class Arm:
    """One row of the table.

    Attributes:
        name: The sampler.
        model: What is decoded.
        way: How.
        batch: Prompts in one call.
        exact: Whether its ids must equal greedy decoding's.
        rounds: Of each repeat, the runs over all prompts.
    """

    name: str
    model: str
    way: Way
    batch: int = 1
    exact: bool = True
    rounds: list[list[Run]] = field(default_factory=list)


class Clock:
    """CPU and wall seconds since it was made."""

    def __init__(self) -> None:
        self.cpu, self.wall = time.process_time(), time.perf_counter()

    def read(self) -> tuple[float, float]:
        """(CPU, wall)."""
        return time.process_time() - self.cpu, time.perf_counter() - self.wall


class Decode:
    """A sampler on a step model."""

    def __init__(self, sampler: Sampler, subject: Subject, decoder: Any) -> None:
        self.sampler: Any = sampler
        self.model = SimpleNamespace(decoder=decoder, encoder=None, tokenizer=subject.tokenizer)

    def __call__(self, task: Task, which: list[int]) -> Run:
        """Decode; the first event of the stream ends the prefill."""
        prompts = [task.prompts[i] for i in which]
        spans = {} if task.scripts is None else {"source_span": torch.tensor([[0, len(p)] for p in prompts])}
        batch = batch_of(prompts, self.model.decoder, spans)  # a scripted prompt is a passage to copy
        with laid_out(self.model.decoder):  # as in a prediction run
            clock, first = Clock(), None
            events = self.sampler.stream(self.model, batch)
            while True:
                try:
                    next(events)
                    first = first or clock.read()
                except StopIteration as end:
                    result: Generated = end.value
                    break
            cpu, wall = clock.read()
        first = first or (cpu, wall)
        rows = [row[0] for row in result.tokens]
        return Run(rows, *first, cpu - first[0], wall - first[1], result.stats.passes, result.stats)


class Generate:
    """transformers' own ``generate`` on the module, greedy.

    Args:
        module: The transformers model.
        new_tokens: Exact number, unless an end token comes.
        lookup: Arguments of its prompt lookup, or empty.
    """

    def __init__(self, module: Any, new_tokens: int, **lookup: int) -> None:
        self.module, self.new_tokens, self.lookup = module, new_tokens, lookup

    def __call__(self, task: Task, which: list[int]) -> Run:
        """Generate; the end of the first forward pass ends the prefill."""
        prompts = [task.prompts[i] for i in which]
        texts = [] if task.scripts is None else [task.prompts[i] + task.scripts[i] for i in which]
        most = max(len(p) for p in prompts)
        pads = [most - len(p) for p in prompts]  # on the left, as its batches want it
        device = self.module.device
        ids = torch.tensor([[0] * n + p for n, p in zip(pads, prompts)], device=device)
        mask = torch.tensor([[0] * n + [1] * len(p) for n, p in zip(pads, prompts)], device=device)
        ends: list[tuple[float, float]] = []
        clock = Clock()

        def passed(module: Any, args: Any, kwargs: dict[str, Any], out: Any) -> None:
            if texts:
                lift(out.logits, texts, kwargs["position_ids"][:, -out.logits.shape[1] :].tolist())
            ends.append(clock.read())

        handle = self.module.register_forward_hook(passed, with_kwargs=True)
        try:
            made: Tensor = self.module.generate(
                ids, attention_mask=mask, max_new_tokens=self.new_tokens, do_sample=False, num_beams=1, **self.lookup
            )
        finally:
            handle.remove()
        cpu, wall = clock.read()
        rows = [self._ended(row) for row in made[:, most:].tolist()]
        first = ends[0]
        return Run(rows, *first, cpu - first[0], wall - first[1], len(ends))

    def _ended(self, row: list[int]) -> list[int]:
        said = self.module.generation_config.eos_token_id
        ends = set() if said is None else {said} if isinstance(said, int) else set(said)
        place = next((i for i, token in enumerate(row) if token in ends), len(row))
        return row[: place + 1]


def race(arms: list[Arm], task: Task, repeats: int, note: Callable[[str], None]) -> None:
    """Run every arm ``repeats`` times over the task, after a round that isn't counted.

    The arms take turns at every prompt, in reversed order every second round; batches follow at the end of a round.
    """
    count = len(task.prompts)
    with quiet(), torch.inference_mode():
        for turn in range(-1, repeats):
            gc.collect()
            order = arms[:: -1 if turn % 2 else 1]
            made: dict[int, list[Run]] = {id(arm): [] for arm in arms}
            alone = [[i] for i in range(count if turn >= 0 else 1)]  # the round before the first: one prompt
            for which in alone:
                for arm in order:
                    if arm.batch == 1:
                        made[id(arm)].append(arm.way(task, which))
            for arm in order:
                if arm.batch > 1:
                    for start in range(0, count, arm.batch):
                        made[id(arm)].append(arm.way(task, list(range(start, min(count, start + arm.batch)))))
            if turn >= 0:
                for arm in arms:
                    arm.rounds.append(made[id(arm)])
                note(f"{task.name}: round {turn + 1} of {repeats}")


@contextmanager
def quiet() -> Iterator[None]:
    """transformers' remarks on generation flags kept back."""
    try:
        from transformers.utils import logging
    except ImportError:
        yield
        return
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def difference(want: Rows, got: Rows) -> tuple[int, int] | None:
    """(prompt, place) where ids first differ, or None."""
    for row, (a, b) in enumerate(zip(want, got)):
        if a != b:
            return row, next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
    return None
