"""The one verification loop: plain decoding is speculation without a drafter."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Generator, Iterator
from typing import Any

import torch
from torch import Tensor

from quire.contracts import Batch, Part, Sampler
from quire.data import mix
from quire.errors import ConfigError, DataError
from quire.roles.language.accept import Exact, SampleOnce, tiny_speculative, walk
from quire.roles.language.contract import (
    Acceptance,
    Caps,
    DecodeState,
    Draft,
    Drafter,
    Generated,
    StepModel,
    codes_of,
    device_of,
)
from quire.roles.language.guard import SpeedGuard
from quire.roles.language.guidance import Guided, check_guidance
from quire.roles.language.rows import (
    Row,
    decoder_of,
    limit_of,
    padded,
    predictions,
    prompts_of,
    select,
    slots,
    sources_of,
)
from quire.roles.language.stats import Stats
from quire.roles.language.stop import StopRule


class Speculative(Sampler):
    """Decode with a drafter: several guessed tokens are checked in one pass of the model.

    Args:
        drafter: Where guesses come from; null decodes plainly.
        acceptance: Which guesses stand; default ``Exact``, whose output is plain greedy decoding's.
        guard: Watches whether drafting pays and goes plain where it doesn't; null never does.
        budget: Most nodes a draft may have.
        max_new_tokens: Exact limit of each row.
        max_total: Limit of prompt and continuation together; null: the model's own.
        stop: Strings that end a row.
        processors: Parts ``(prefix ids, logits [V]) -> logits`` run at each node with its own prefix.
        seed: Of sampling; a row's stream depends on it and on the row's index alone, not on the batch.
        debug: Check after each step that the cache holds what was emitted.

    Raises:
        ConfigError: a limit below 0, a model without a capability that the drafter needs, a prompt too long.
    """

    decoder: StepModel

    def __init__(
        self,
        drafter: Drafter | None = None,
        acceptance: Acceptance | None = None,
        guard: SpeedGuard | None = None,
        budget: int = 64,
        max_new_tokens: int = 64,
        max_total: int | None = None,
        stop: list[str] | None = None,
        processors: list[Part] | None = None,
        seed: int = 0,
        debug: bool = False,
    ) -> None:
        super().__init__()
        if max_new_tokens < 0:
            raise ConfigError(f"sampler.max_new_tokens must be at least 0, got {max_new_tokens}")
        if budget < 1:
            raise ConfigError(f"sampler.budget must be at least 1, got {budget}")
        self.drafter, self.acceptance, self.guard = drafter, acceptance or Exact(), guard
        self.budget, self.max_new_tokens, self.max_total = budget, max_new_tokens, max_total
        self.strings, self.processors, self.seed, self.debug = stop or [], list(processors or []), seed, debug
        self.rule: Callable[[int, list[int]], bool] | None = None  # (row, emitted) → end; set in Python, by the bridge
        self.shape: Callable[[int, list[int], Tensor], Tensor] | None = None  # (row, prefix, logits [V]) → logits

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """Prompt lookup on the standard library's text."""
        return tiny_speculative({})

    @property
    def lossless(self) -> bool:
        """Whether its output's law is plain decoding's."""
        return self.acceptance.lossless

    def forward(self, model: Any, batch: Batch) -> Generated:
        """Continue every prompt of the batch."""
        events = self.stream(model, batch)
        while True:
            try:
                next(events)
            except StopIteration as end:
                return end.value

    def finish(self, model: Any, results: list[Any]) -> Any:
        """One row a prompt, and the summed statistics last."""
        return predictions(model, results)

    @torch.no_grad()  # on a generator torch restores the mode between yields
    def stream(self, model: Any, batch: Batch) -> Generator[tuple[int, list[int]], None, Generated]:
        """Yield ``(row, ids)`` as tokens are certain; several at once, none is ever retracted.

        The generator's return value is the ``Generated``.
        """
        target = self._view(model.decoder.role(StepModel))
        codes = codes_of(model, batch)
        prompts = prompts_of(batch, target.caps())
        sources = sources_of(batch)
        decode = decoder_of(model, self.strings)
        index = batch["index"].tolist() if "index" in batch else list(range(len(prompts)))
        if self.drafter is not None:
            self.drafter.refer("codes", codes)
            self.drafter.begin(target, prompts, sources)
        whole = Stats()
        rows: list[Row] = []
        groups = [list(range(len(prompts)))] if target.caps().batch else [[i] for i in range(len(prompts))]
        for group in groups:
            part = None if codes is None else select(codes, group, len(prompts))
            made = [self._row(i, prompts[i], index[i], target.caps(), decode) for i in group]
            stats = yield from self._decode(target, made, part)
            stats.rows_looped = 0 if target.caps().batch else len(group)
            whole = whole.merge(stats)
            rows += made
        tokens = [[row.stop.emitted] for row in rows]
        finish = [[row.stop.reason or "length"] for row in rows]
        return Generated(index, tokens, [], finish, whole, [row.stats for row in rows])

    # ---- inside
    def _view(self, target: StepModel) -> StepModel:
        return target

    def _row(self, place: int, prompt: list[int], index: int, caps: Caps, decode: Callable | None) -> Row:
        limit = limit_of(place, prompt, caps, self.max_new_tokens, self.max_total)
        rule = None if self.rule is None else functools.partial(self.rule, place)
        stop = StopRule(caps.eos_ids, limit, self.strings, decode, rule)
        return Row(place, prompt, stop, torch.Generator().manual_seed(mix(self.seed, index)))

    def _decode(self, target: StepModel, rows: list[Row], codes: Any) -> Generator[tuple[int, list[int]], None, Stats]:
        stats = Stats()
        start = time.perf_counter()
        caps = target.caps()
        if all(r.stop.reason for r in rows):
            return Stats(rows=len(rows))
        drafter_before = self.drafter.drafter_forwards if self.drafter is not None else 0
        if self.guard is not None:
            self.guard.calibrate(target)
        longest = max(len(r.prompt) + r.stop.limit for r in rows) + self.budget * (self.drafter is not None)
        if caps.positions_max is not None:
            longest = min(longest, caps.positions_max + self.budget)
        state, events = self._open(target, rows, codes, longest, stats)
        stats.prefill_ms = stats.ttft_ms = 1e3 * (time.perf_counter() - start)
        stats.prefills = 1
        stats.cache_bytes_peak = int(state.extras.get("cache_bytes", 0))
        begun = time.perf_counter()
        yield from events
        alive = self._leave(target, state, rows)
        while alive:
            held = [0] * len(alive) if caps.positions_max is None else state.lengths.tolist()  # on a GPU it would wait
            drafts = self._drafts(alive, held, caps, stats)
            ids, parents, valid = slots(alive, drafts, state.lengths.device)
            before = time.perf_counter()
            logits = target.step(state, ids, parents=parents, valid=valid)
            stats.verify_ms += 1e3 * (time.perf_counter() - before)
            stats.target_forwards += int(state.extras.get("passes", 1))
            stats.target_positions += int(state.extras.get("slots", ids.numel()))
            events, paths = self._settled(alive, drafts, logits)
            chosen = torch.full(ids.shape, -1, dtype=torch.long)
            for i, nodes in enumerate(paths):
                chosen[i, : 1 + len(nodes)] = torch.tensor([0, *(n + 1 for n in nodes)])
            target.keep(state, chosen)
            stats.cache_bytes_peak = max(stats.cache_bytes_peak, int(state.extras.get("cache_bytes", 0)))
            stats.layers_used += float(state.extras.get("layers_used", 0.0))
            if self.debug:
                self._check(alive, state)
            yield from events
            alive = self._leave(target, state, alive)
        stats.decode_ms = 1e3 * (time.perf_counter() - begun)
        if self.drafter is not None:
            stats.drafter_forwards = self.drafter.drafter_forwards - drafter_before
        return functools.reduce(Stats.merge, (row.stats for row in rows), stats)

    def _open(
        self, target: StepModel, rows: list[Row], codes: Any, longest: int, stats: Stats
    ) -> tuple[DecodeState, list[tuple[int, list[int]]]]:
        """Prefill; where a drafter knows a continuation of the prompt itself, the same pass checks its chain."""
        caps, device = target.caps(), device_of(target)
        prompt, mask = padded([r.prompt for r in rows], caps.pad_id, device)
        if self.drafter is not None and type(target).open_drafted is not StepModel.open_drafted:
            most = max(len(r.prompt) for r in rows) - 1
            drafts = [d and d.first_path() for d in self._drafts(rows, [most] * len(rows), caps, stats)]
            width = max(len(d.tokens) if d else 0 for d in drafts)
            guesses = [(d.tokens if d else []) + r.prompt[-1:] * width for r, d in zip(rows, drafts)]
            draft = torch.tensor([g[:width] for g in guesses], device=device)
            state = target.open_drafted(draft, prompt, mask, codes, longest) if width else None
            if state is not None:
                stats.target_positions += draft.numel()
                events, paths = self._settled(rows, drafts, state.logits)
                for row in rows:
                    row.stats.opened += 1
                kept = [len(r.prompt) + len(nodes) for r, nodes in zip(rows, paths)]
                target.cut(state, torch.tensor(kept, device=device))
                return state, events
        state, events = target.open(prompt, mask, codes, max_length=longest), []
        for i, row in enumerate(rows):
            row.pending = self.acceptance.first(self._processed(row, row.context, state.logits[i]), row.generator)
            taken = row.stop.feed([row.pending])
            row.stats.new_tokens += len(taken)
            events.append((row.place, taken))
        return state, events

    def _settled(
        self, rows: list[Row], drafts: list[Draft | None], logits: Tensor
    ) -> tuple[list[tuple[int, list[int]]], list[list[int]]]:
        """What each row emits after a pass that checked its draft, and the nodes that stood."""
        events, paths = [], []
        for row, draft, (nodes, bonus) in zip(rows, drafts, self._choices(rows, drafts, logits)):
            events.append(self._emit(row, draft, nodes, bonus))
            paths.append(nodes)
        return events, paths

    def _drafts(self, alive: list[Row], lengths: list[int], caps: Caps, stats: Stats) -> list[Draft | None]:
        before = time.perf_counter()
        allowed = self.budget if self.guard is None else self.guard.budget(self.budget)
        drafts: list[Draft | None] = []
        for row, length in zip(alive, lengths):
            depth = row.stop.left - 1  # the bonus token fills the last place
            if caps.positions_max is not None:
                depth = min(depth, caps.positions_max - length - 1)
            draft = None
            if self.drafter is not None and depth > 0 and allowed > 0:
                draft = self.drafter.propose(row.place, row.context, allowed)
                draft = self._sound(draft, caps).cut(depth, allowed) if draft is not None else None
                if draft is not None and not caps.tree_mask and draft.parents != list(range(-1, len(draft.tokens) - 1)):
                    why = caps.lacks.get("tree_mask", "the decoder has none: use a chain drafter")
                    raise ConfigError(f"Speculative with {type(self.drafter).__name__} needs tree_mask; {why}")
            drafts.append(draft if draft is not None and draft.tokens else None)
        spent = 1e3 * (time.perf_counter() - before)
        stats.draft_ms += spent
        self._allowed, self._draft_ms = allowed, spent / len(alive)
        return drafts

    def _sound(self, draft: Draft, caps: Caps) -> Draft:
        stray = next((t for t in draft.tokens if not 0 <= t < caps.vocab_size), None)
        if stray is not None:
            raise ConfigError(
                f"{type(self.drafter).__name__} proposed the id {stray}; the model has {caps.vocab_size} tokens:"
                " the drafter needs the model's tokenizer"
            )
        return draft

    def _choices(self, alive: list[Row], drafts: list[Draft | None], logits: Tensor) -> Iterator[tuple[list[int], int]]:
        empty = Draft([], [])
        plain_exact = type(self.acceptance) is Exact and not self.processors and self.shape is None
        top = logits.argmax(-1).tolist() if plain_exact else None  # one transfer for all rows
        for i, (row, draft) in enumerate(zip(alive, drafts)):
            if top is not None:
                yield walk(draft or empty, top[i].__getitem__)
            else:
                own = logits[i, : 1 + len((draft or empty).tokens)]
                yield self.acceptance.choose(self._at_nodes(row, draft or empty, own), draft or empty, row.generator)

    def _at_nodes(self, row: Row, draft: Draft, logits: Tensor) -> Tensor:
        if not self.processors and self.shape is None:
            return logits
        paths: list[list[int]] = [row.context]
        for token, parent in zip(draft.tokens, draft.parents):
            paths.append([*paths[parent + 1], token])
        return torch.stack([self._processed(row, path, own) for path, own in zip(paths, logits)])

    def _processed(self, row: Row, prefix: list[int], logits: Tensor) -> Tensor:
        for processor in self.processors:
            logits = processor(prefix, logits)
        if self.shape is not None:
            logits = self.shape(row.place, prefix, logits)
        return logits

    def _emit(self, row: Row, draft: Draft | None, nodes: list[int], bonus: int) -> tuple[int, list[int]]:
        path = [draft.tokens[n] for n in nodes] if draft is not None else []
        context = row.context
        taken = row.stop.feed([*path, bonus])
        row.stats.steps += 1
        row.stats.new_tokens += len(taken)
        row.stats.cut += len(path) + 1 - len(taken)
        row.pending = bonus
        if draft is not None and self.drafter is not None:
            row.stats.count(draft.depths(), len(nodes))
            rejected = [t for i, t in enumerate(draft.tokens) if i not in set(nodes)]
            self.drafter.observe(row.place, context, [*path, bonus], rejected)
        elif self.drafter is not None:
            row.stats.fallback_steps += 1
            row.stats.guard_off_steps += self._allowed == 0
            self.drafter.observe(row.place, context, [bonus], [])
        if self.guard is not None:
            drafted = len(draft.tokens) if draft is not None else 0
            self.guard.note(self._allowed, drafted, len(taken), self._draft_ms)
        return row.place, taken

    def _leave(self, target: StepModel, state: DecodeState, rows: list[Row]) -> list[Row]:
        stay = [i for i, row in enumerate(rows) if row.stop.reason is None]
        if stay and len(stay) < len(rows):
            target.rows(state, torch.tensor(stay, device=state.lengths.device))
        return [rows[i] for i in stay]

    def _check(self, alive: list[Row], state: DecodeState) -> None:
        for row, length in zip(alive, state.lengths.tolist()):
            if row.stop.reason is None and length != len(row.context) - 1:
                raise DataError(f"row {row.place} holds {length} slots for {len(row.context)} tokens")


class Greedy(Speculative):
    """The likeliest token at each step.

    Args:
        max_new_tokens: Exact limit of each row.
        max_total: Limit of prompt and continuation together; null: the model's own.
        stop: Strings that end a row.

    Raises:
        ConfigError: a limit below 0.
    """

    def __init__(self, max_new_tokens: int = 64, max_total: int | None = None, stop: list[str] | None = None) -> None:
        super().__init__(max_new_tokens=max_new_tokens, max_total=max_total, stop=stop)

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """A small language model on the standard library's text."""
        run = tiny_speculative({})
        run["model"]["sampler"] = {"class_path": "Greedy", "init_args": {"max_new_tokens": 8}}
        return run


class Sample(Speculative):
    """One sampled continuation a row.

    Args:
        temperature: Above 0.
        top_p: Nucleus, in (0, 1].
        top_k: Most tokens considered; 0 for all.
        cfg: Guidance scale, at least 0: logits are u + cfg (c - u), c with the condition and u without it, before
            temperature, top_k and top_p. 1 is the conditional model in one pass; else two passes a token.
        cfg_interval: First and last (exclusive) number of the new tokens that are guided, from 0; null guides all.
        unconditional: Ids of a prompt that stands for no condition; null uses the model's null class.
        max_new_tokens: Exact limit of each row.
        max_total: Limit of prompt and continuation together; null: the model's own.
        stop: Strings that end a row.
        processors: As in ``Speculative``.
        seed: A row's stream depends on it and on the row's index alone.

    Raises:
        ConfigError: an argument out of range, or guidance of a model that has no null class.
    """

    def __init__(
        self,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        max_new_tokens: int = 64,
        max_total: int | None = None,
        stop: list[str] | None = None,
        processors: list[Part] | None = None,
        seed: int = 0,
        cfg: float = 1.0,
        cfg_interval: list[int] | None = None,
        unconditional: list[int] | None = None,
    ) -> None:
        rule = SampleOnce(temperature, top_p, top_k)
        super().__init__(None, rule, None, 1, max_new_tokens, max_total, stop, processors, seed)
        check_guidance(cfg, cfg_interval, unconditional)
        self.cfg, self.cfg_interval, self.unconditional = float(cfg), cfg_interval, unconditional

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """A small language model on the standard library's text."""
        run = tiny_speculative({})
        run["model"]["sampler"] = {"class_path": "Sample", "init_args": {"max_new_tokens": 8, "top_p": 0.9}}
        return run

    def _view(self, target: StepModel) -> StepModel:
        if self.cfg == 1:
            return target
        first, last = self.cfg_interval or (0, math.inf)
        return Guided(target, self.cfg, (first, last), self.unconditional)
