"""Beam search over any step model: a prompt's beams are rows of one cache that are reordered at each step."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from quire.contracts import Batch, Part, Sampler
from quire.errors import ConfigError
from quire.roles.language.accept import tiny_speculative
from quire.roles.language.contract import (
    Acceptance,
    Caps,
    DecodeState,
    Drafter,
    Generated,
    StepModel,
    codes_of,
    device_of,
)
from quire.roles.language.rows import decoder_of, limit_of, padded, predictions, prompts_of, select
from quire.roles.language.stats import Stats
from quire.roles.language.stop import StopRule


@dataclass
class Beam:
    """One continuation: ids and their summed log-probability; once it has ended, the score and the reason too."""

    ids: list[int]
    total: float
    score: float = 0.0
    reason: str = ""


@dataclass
class Search:
    """One prompt's beams: those that go on, best first, and the best of those that have ended."""

    prompt: list[int]
    stop: StopRule
    alive: list[Beam] = field(default_factory=lambda: [Beam([], 0.0)])
    ended: list[Beam] = field(default_factory=list)


class BeamSearch(Sampler):
    """Keep the likeliest continuations at each step; return all of a prompt's beams, the best first.

    A candidate that ends is kept if it is among the ``beams`` best of its step; the search of a prompt stops when no
    beam that goes on can still overtake the worst of ``beams`` ended ones. Ties go to the better beam, then to the
    lower id, so one beam is ``Greedy``.

    Args:
        beams: Continuations kept, at least 1.
        min_new_tokens: No end token before this many.
        length_penalty: Score is the summed log-probability over length to this power; 0 compares plain sums.
        max_new_tokens: Exact limit of each row.
        max_total: Limit of prompt and continuation together; null: the model's own.
        stop: Strings that end a beam.
        processors: Parts ``(prefix ids, log-probabilities [V]) -> [V]`` run on each beam.
        drafter, acceptance: Refused: beams can't be verified by a draft.

    Returns:
        ``Generated`` with up to ``beams`` continuations a row and their scores, the best first.

    Raises:
        ConfigError: an argument out of range, a drafter or an acceptance rule, a prompt too long.
    """

    decoder: StepModel

    def __init__(
        self,
        beams: int = 3,
        min_new_tokens: int = 0,
        length_penalty: float = 0.0,
        max_new_tokens: int = 64,
        max_total: int | None = None,
        stop: list[str] | None = None,
        processors: list[Part] | None = None,
        drafter: Drafter | None = None,
        acceptance: Acceptance | None = None,
    ) -> None:
        super().__init__()
        given = drafter if drafter is not None else acceptance
        if given is not None:
            raise ConfigError(
                "speculative decoding is defined for greedy or sampling, not beams:"
                f" drop {type(given).__name__} from BeamSearch, or use Speculative"
            )
        if beams < 1:
            raise ConfigError(f"BeamSearch.beams must be at least 1, got {beams}")
        if max_new_tokens < 0 or not 0 <= min_new_tokens <= max(max_new_tokens, 0):
            raise ConfigError(
                "BeamSearch needs 0 <= min_new_tokens <= max_new_tokens;"
                f" got min_new_tokens {min_new_tokens}, max_new_tokens {max_new_tokens}"
            )
        self.beams, self.min_new_tokens, self.length_penalty = beams, min_new_tokens, float(length_penalty)
        self.max_new_tokens, self.max_total = max_new_tokens, max_total
        self.strings, self.processors = list(stop or []), list(processors or [])

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """A small language model on the standard library's text."""
        run = tiny_speculative({})
        run["model"]["sampler"] = {"class_path": "BeamSearch", "init_args": {"beams": 2, "max_new_tokens": 8}}
        return run

    @torch.no_grad()
    def forward(self, model: Any, batch: Batch) -> Generated:
        """Search behind every prompt of the batch."""
        target: StepModel = model.decoder.role(StepModel)
        caps, codes = target.caps(), codes_of(model, batch)
        prompts, decode = prompts_of(batch, caps), decoder_of(model, self.strings)
        searches = []
        for place, prompt in enumerate(prompts):
            limit = limit_of(place, prompt, caps, self.max_new_tokens, self.max_total)
            searches.append(Search(prompt, StopRule(caps.eos_ids, limit, self.strings, decode)))
        whole = Stats()
        for group in [list(range(len(prompts)))] if caps.batch else [[i] for i in range(len(prompts))]:
            part = None if codes is None else select(codes, group, len(prompts))
            stats = self._search(target, caps, [searches[i] for i in group], part)
            stats.rows_looped = 0 if caps.batch else len(group)
            whole = whole.merge(stats)
        index = batch["index"].tolist() if "index" in batch else list(range(len(prompts)))
        found = [search.ended for search in searches]
        return Generated(
            index,
            [[beam.ids for beam in beams] for beams in found],
            [[beam.score for beam in beams] for beams in found],
            [[beam.reason for beam in beams] for beams in found],
            whole,
        )

    def finish(self, model: Any, results: list[Any]) -> Any:
        """One row a prompt with all its beams, and the summed statistics last."""
        return predictions(model, results)

    # ---- inside
    def _search(self, target: StepModel, caps: Caps, searches: list[Search], codes: Any) -> Stats:
        stats, start = Stats(), time.perf_counter()
        if self.max_new_tokens == 0:
            for search in searches:
                search.ended = [Beam([], 0.0, 0.0, "length")]
            stats.rows = len(searches)
            return stats
        device = device_of(target)
        prompt, mask = padded([s.prompt for s in searches], caps.pad_id, device)
        state = target.open(prompt, mask, codes, max_length=max(len(s.prompt) + s.stop.limit for s in searches))
        logits = state.logits
        stats.prefills, stats.prefill_ms = 1, 1e3 * (time.perf_counter() - start)
        begun = time.perf_counter()
        while searches:
            origin, first = [], 0  # the row that each surviving beam continues
            for search in searches:
                rows = slice(first, first + len(search.alive))
                first = rows.stop
                origin += [rows.start + parent for parent in self._advance(search, logits[rows])]
            stats.ttft_ms = stats.ttft_ms or 1e3 * (time.perf_counter() - start)
            stats.cache_bytes_peak = max(stats.cache_bytes_peak, int(state.extras.get("cache_bytes", 0)))
            for search in searches:
                if not search.alive:
                    stats.rows += len(search.ended)
                    stats.new_tokens += sum(len(beam.ids) for beam in search.ended)
            searches = [search for search in searches if search.alive]
            if searches:
                logits = self._step(target, state, searches, origin, first, stats)
        stats.decode_ms = 1e3 * (time.perf_counter() - begun)
        return stats

    def _step(
        self, target: StepModel, state: DecodeState, searches: list[Search], origin: list[int], held: int, stats: Stats
    ) -> Tensor:
        if origin != list(range(held)):
            target.rows(state, torch.tensor(origin, device=state.lengths.device))
        last = [[beam.ids[-1]] for search in searches for beam in search.alive]
        before = time.perf_counter()
        logits = target.step(state, torch.tensor(last, device=device_of(target)))
        stats.verify_ms += 1e3 * (time.perf_counter() - before)
        target.keep(state, torch.zeros(len(last), 1, dtype=torch.long))
        stats.target_forwards += 1
        stats.target_positions += len(last)
        stats.steps += len(last)
        stats.layers_used += float(state.extras.get("layers_used", 0.0))
        return logits[:, 0]

    def _advance(self, search: Search, logits: Tensor) -> list[int]:
        """Extend a prompt's beams by one token; returns which of them each new one continues, none at the end."""
        law = torch.log_softmax(logits.float(), -1)
        for processor in self.processors:
            law = torch.stack([processor(search.prompt + b.ids, row) for b, row in zip(search.alive, law)])
        ends = sorted(search.stop.eos)
        if ends and len(search.alive[0].ids) < self.min_new_tokens:
            law[:, ends] = -torch.inf
        totals = law + law.new_tensor([beam.total for beam in search.alive])[:, None]
        made: list[Beam] = []
        parents: list[int] = []
        wanted = self.beams * max(2, 1 + len(ends))  # so many that enough go on, if each beam ends by each end token
        for rank, (place, total) in enumerate(best(totals.flatten(), wanted)):
            parent, token = divmod(place, law.shape[-1])
            beam = Beam([*search.alive[parent].ids, token], total)
            beam.reason = search.stop.judge(beam.ids) or ""
            if beam.reason and rank < self.beams:
                beam.score = self._score(total, len(beam.ids))
                search.ended.append(beam)
            elif not beam.reason and len(made) < self.beams:
                made.append(beam)
                parents.append(parent)
        search.ended = sorted(search.ended, key=lambda b: -b.score)[: self.beams]
        search.alive = made
        if made and len(search.ended) == self.beams:
            length = search.stop.limit if self.length_penalty > 0 else len(made[0].ids)
            if self._score(made[0].total, length) <= search.ended[-1].score:  # totals only fall: nothing can overtake
                search.alive = []
        return parents if search.alive else []

    def _score(self, total: float, length: int) -> float:
        return total / length**self.length_penalty


def best(totals: Tensor, count: int) -> list[tuple[int, float]]:
    """Places and values of the largest finite numbers [N], descending; of equal ones the first places."""
    least = totals.topk(min(count, len(totals))).values[-1]
    places = ((totals >= least) & totals.isfinite()).nonzero()[:, 0]
    values = totals[places].tolist()
    return sorted(zip(places.tolist(), values), key=lambda pair: (-pair[1], pair[0]))[:count]
