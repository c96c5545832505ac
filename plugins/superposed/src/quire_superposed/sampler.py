"""Superposed Decoding: k drafts of a prompt share one forward pass a token. Shen et al. 2024."""

from __future__ import annotations

import time
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from quire.contracts import Batch, Part, Sampler
from quire.errors import ConfigError
from quire.roles.language.contract import DecodeState, Drafter, Generated, StepModel, codes_of, device_of
from quire.roles.language.rows import decoder_of, limit_of, padded, predictions, select
from quire.roles.language.stats import Stats
from quire.roles.language.stop import StopRule
from quire_superposed.drafts import Drafts, Judge, mixed
from quire_superposed.evidence import Evidence
from quire_superposed.presets import chosen
from quire_superposed.prompts import prompts_and_truth
from quire_superposed.shared import likeliest, superposition
from quire_superposed.stores import opened

MODES = ("geom", "all", "none")


class Superposed(Sampler):
    """k ranked continuations of each prompt for one decoding pass and one cache row. Shen et al. 2024.

    The model reads one mixture of the drafts' last embeddings, so all drafts share its distribution; n-grams tell them
    apart. With ``alpha: 0`` or ``mode: none`` one draft is greedy decoding's; with ``alpha`` above 0 n-grams may
    override the model, so even one draft may differ from it.

    Args:
        drafts: k; null takes the preset's, as do the next four.
        tokens: m, the model's likeliest tokens that are considered, at least k; 3k unless the preset says otherwise.
        alpha: Share of the n-grams in the mixed log-score, in [0, 1].
        temperature: Of the model's distribution, above 0.
        ngrams: A file of ``quire ngrams``, ``data`` (count the run's training tokens), or null for none.
        lengths: Context lengths of the n-grams.
        weights: One for each length, at least 0, at most 1 in sum.
        penalty: Taken off the score of a draft whose candidates have no n-gram evidence.
        ngram_floor: Least n-gram probability of a draft that has some evidence, in [0, 1]; 0 lets one zero exclude a
            token, as published.
        mode: ``geom``; ``all`` lets every token of the vocabulary in, not only the m likeliest; ``none``: no n-grams.
        stop_early: End a prompt once no draft under way can come among its k best.
        preset: The authors' settings by prompt length and drafts: ``p15_d3`` (default), ``p5_d3``, ``p15_d10``…;
            arguments given beside it stand.
        max_new_tokens: Exact limit of each draft.
        prompt: Read only this many tokens of each row; the rest is what ``DraftSet`` compares with. Null reads all, or
            up to the batch's ``prompt_length``.
        stop: Strings that end a draft.
        processors: Parts ``(prefix ids, logits [V]) -> logits`` run on each draft with its own prefix.
        drafter: Refused: a tree to verify needs slots of its own.

    Needs:
        decoder: StepModel that takes embeddings.

    Returns:
        ``Generated`` with up to k drafts a prompt, the best first; a score is the draft's mixed log-score per token.
        In its statistics ``draft_ms`` is the time in n-grams.

    Raises:
        ConfigError: an argument out of range, more drafts than tokens, a model without embeddings, a store that does
            not fit.
    """

    decoder: StepModel
    lossless: ClassVar[bool] = False

    def __init__(
        self,
        drafts: int | None = None,
        tokens: int | None = None,
        alpha: float | None = None,
        temperature: float | None = None,
        ngrams: str | None = "data",
        lengths: list[int] | None = None,
        weights: list[float] | None = None,
        penalty: float = 200.0,
        ngram_floor: float = 0.0,
        mode: str = "geom",
        stop_early: bool = True,
        preset: str | None = None,
        max_new_tokens: int = 10,
        prompt: int | None = None,
        stop: list[str] | None = None,
        processors: list[Part] | None = None,
        drafter: Drafter | None = None,
    ) -> None:
        super().__init__()
        row = chosen(preset, drafts)
        self.drafts = row.drafts
        self.tokens = tokens if tokens is not None else row.tokens or 3 * row.drafts
        self.alpha = row.alpha if alpha is None else alpha
        self.temperature = row.temperature if temperature is None else temperature
        self.lengths = list(row.lengths if lengths is None else lengths)
        self.weights = list(row.weights if weights is None else weights)
        self.ngrams, self.penalty, self.ngram_floor, self.mode = ngrams, penalty, ngram_floor, mode
        self.stop_early, self.max_new_tokens, self.prompt = stop_early, max_new_tokens, prompt
        self.strings, self.processors = list(stop or []), list(processors or [])
        self.evidence: Evidence | None = None
        self._counted: Any = None  # the data module whose tokens the evidence is of
        if drafter is not None:
            raise ConfigError(
                "Superposed and tree verification can't share a step: its drafts live in one cache row, a tree needs"
                f" slots of its own: drop {type(drafter).__name__}, or use Speculative"
            )
        self._validate()

    def _validate(self) -> None:
        if self.temperature <= 0:
            raise ConfigError(f"Superposed: temperature must be > 0 (got {self.temperature:g}); use Greedy for argmax")
        if self.drafts < 1 or self.max_new_tokens < 0 or (self.prompt is not None and self.prompt < 1):
            raise ConfigError(
                "Superposed needs drafts >= 1, max_new_tokens >= 0 and prompt >= 1;"
                f" got {self.drafts}, {self.max_new_tokens} and {self.prompt}"
            )
        if self.tokens < self.drafts:
            raise ConfigError(f"Superposed: tokens ({self.tokens}) must be >= drafts ({self.drafts})")
        if not 0 <= self.alpha <= 1 or not 0 <= self.ngram_floor <= 1 or self.penalty < 0:
            raise ConfigError(
                "Superposed needs alpha and ngram_floor in [0, 1] and penalty >= 0;"
                f" got alpha {self.alpha:g}, ngram_floor {self.ngram_floor:g}, penalty {self.penalty:g}"
            )
        if self.mode not in MODES:
            raise ConfigError(f"Superposed.mode is geom, all or none, got {self.mode!r}")
        given = f"got lengths {self.lengths} and weights {self.weights}"
        if len(self.lengths) != len(self.weights) or not self.lengths:
            raise ConfigError(f"Superposed needs one weight for each of lengths; {given}")
        if min(self.weights) < 0 or sum(self.weights) > 1 + 1e-9:
            raise ConfigError(
                f"Superposed.weights must be >= 0 and at most 1 in sum, so that scores only fall; {given}"
            )
        if min(self.lengths) < 1 or len(set(self.lengths)) < len(self.lengths):
            raise ConfigError(f"Superposed.lengths must be different and at least 1; {given}")

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """Three drafts behind eight tokens of the standard library's text."""
        from quire.roles.language.accept import tiny_speculative

        run = tiny_speculative({})
        arguments = {"max_new_tokens": 6, "prompt": 8}
        run["model"]["sampler"] = {"class_path": "Superposed", "init_args": arguments}
        return run

    @torch.no_grad()
    def forward(self, model: Any, batch: Batch) -> Generated:
        """Draft behind every prompt of the batch."""
        target: StepModel = model.decoder.role(StepModel)
        caps = target.caps()
        if not caps.embeds:
            why = caps.lacks.get("embeds", f"{type(target).__name__} takes ids only")
            raise ConfigError(f"Superposed needs embeds; {why}")
        if self.drafts > caps.vocab_size:
            raise ConfigError(f"Superposed: drafts ({self.drafts}) must be <= the vocabulary ({caps.vocab_size})")
        self._open(model, caps.vocab_size)
        codes, decode = codes_of(model, batch), decoder_of(model, self.strings)
        prompts, _ = prompts_and_truth(batch, caps, self.prompt)
        limits = [limit_of(place, p, caps, self.max_new_tokens) for place, p in enumerate(prompts)]
        rule = StopRule(caps.eos_ids, self.max_new_tokens + 1, self.strings, decode)
        whole, made = Stats(), Generated([], [], [], [], Stats())
        for group in [list(range(len(prompts)))] if caps.batch else [[i] for i in range(len(prompts))]:
            part = None if codes is None else select(codes, group, len(prompts))
            stats = Stats(rows_looped=0 if caps.batch else len(group))
            found = self._decode(target, [prompts[i] for i in group], [limits[i] for i in group], part, rule, stats)
            whole = whole.merge(stats)
            for drafts in found:
                made.tokens.append([d.ids for d in drafts])
                made.scores.append([d.score for d in drafts])
                made.finish.append([d.reason for d in drafts])
        index = batch["index"].tolist() if "index" in batch else list(range(len(prompts)))
        whole.rows = sum(len(row) for row in made.tokens)
        whole.new_tokens = sum(len(ids) for row in made.tokens for ids in row)
        return Generated(index, made.tokens, made.scores, made.finish, whole)

    def finish(self, model: Any, results: list[Any]) -> Any:
        """One row a prompt with all its drafts; the summed statistics last, with what ``DraftSet`` has measured."""
        from quire_superposed.metrics import DraftSet

        rows = predictions(model, results)
        for metric in getattr(model, "metrics", ()):
            if isinstance(metric, DraftSet) and metric.update_called:
                rows[-1]["drafts"] = metric.table()
        return rows

    def _open(self, model: Any, vocab_size: int) -> None:
        if self.ngrams is None or self.mode == "none" or self.alpha == 0:
            return
        source = getattr(model, "datamodule", None) if self.ngrams == "data" else None
        if self.evidence is None or source not in (None, self._counted):
            store = opened(self.ngrams, self.lengths, model, vocab_size)
            self.evidence = Evidence(store, self.lengths, self.weights)
            self.refer("_counted", source)

    # ---- decoding
    def _decode(
        self, target: StepModel, prompts: list[list[int]], limits: list[int], codes: Any, rule: StopRule, stats: Stats
    ) -> list[list[Any]]:
        start = time.perf_counter()
        reach = max(self.lengths)
        tails = np.array([([-1] * reach + p)[-reach:] for p in prompts], dtype=np.int64)
        drafts = Drafts(tails, self.drafts, np.array(limits))
        results: list[list[Any]] = [[] for _ in prompts]
        places = np.arange(len(prompts))
        if self.max_new_tokens == 0:
            return [drafts.ranked(p) for p in range(len(prompts))]
        caps, device = target.caps(), device_of(target)
        ids, mask = padded(prompts, caps.pad_id, device)
        state = target.open(ids, mask, codes, max_length=max(len(p) + n for p, n in zip(prompts, limits)))
        logits = state.logits
        stats.prefills, stats.prefill_ms = 1, 1e3 * (time.perf_counter() - start)
        begun = time.perf_counter()
        while True:
            tokens, gains = self._gains(logits, drafts, [prompts[p] for p in places], stats)
            drafts.advance(tokens, gains, rule.eos, self._judge(rule))
            stats.ttft_ms = stats.ttft_ms or 1e3 * (time.perf_counter() - start)
            stats.cache_bytes_peak = max(stats.cache_bytes_peak, int(state.extras.get("cache_bytes", 0)))
            over = drafts.done(self.stop_early)
            if over.any():
                for row in np.flatnonzero(over):
                    results[places[row]] = drafts.ranked(int(row))
                stay = np.flatnonzero(~over)
                if not len(stay):
                    break
                target.rows(state, torch.from_numpy(stay).to(state.lengths.device))
                drafts.select(stay)
                places = places[stay]
            logits = self._step(target, state, drafts, stats)
        stats.decode_ms = 1e3 * (time.perf_counter() - begun)
        return results

    def _step(self, target: StepModel, state: DecodeState, drafts: Drafts, stats: Stats) -> Tensor:
        before = time.perf_counter()
        device = state.lengths.device
        last = target.embed(torch.from_numpy(drafts.ids[:, :, -1]).to(device))  # [P,k,D]
        logits = target.step(state, None, embeds=superposition(last, drafts.weights()))
        target.keep(state, torch.zeros(len(last), 1, dtype=torch.long))
        stats.verify_ms += 1e3 * (time.perf_counter() - before)
        stats.target_forwards += 1
        stats.target_positions += len(last)
        stats.steps += len(last)
        stats.layers_used += float(state.extras.get("layers_used", 0.0))
        return logits[:, 0]

    def _judge(self, rule: StopRule) -> Judge | None:
        return (lambda _, ids: rule.judge(ids)) if self.strings else None

    def _gains(
        self, logits: Tensor, drafts: Drafts, prompts: list[list[int]], stats: Stats
    ) -> tuple[np.ndarray, np.ndarray]:
        """Candidates [P,k or 1,C], ascending, and every draft's gain for each [P,k,C]."""
        each = logits[:, None] if not self.processors else self._processed(logits, drafts, prompts)
        tokens, log_p = likeliest(each.float() / self.temperature, None if self.mode == "all" else self.tokens)
        if self.processors:
            log_p = np.where(np.isnan(log_p), -np.inf, log_p)  # a processor may forbid everything
        before = time.perf_counter()
        shape = (len(log_p), drafts.count, log_p.shape[2])
        q = None
        if self.evidence is not None:
            flat = drafts.tails.reshape(-1, drafts.tails.shape[2])
            if self.mode == "all":
                q = self.evidence.everywhere(flat, log_p.shape[2]).reshape(shape)
            else:
                q = self.evidence.of(flat, np.broadcast_to(tokens, shape).reshape(len(flat), -1)).reshape(shape)
        gains = mixed(np.broadcast_to(log_p, shape), q, self.alpha, self.penalty, self.ngram_floor)
        stats.draft_ms += 1e3 * (time.perf_counter() - before)
        return tokens, gains

    def _processed(self, logits: Tensor, drafts: Drafts, prompts: list[list[int]]) -> Tensor:
        """[P,V] → [P,k,V], each draft's own; one that lives no more keeps the shared ones."""
        made = logits[:, None].repeat(1, drafts.count, 1)
        for p, prompt in enumerate(prompts):
            for j in np.flatnonzero(drafts.scores[p] > -np.inf):
                for processor in self.processors:
                    made[p, j] = processor([*prompt, *drafts.ids[p, j].tolist()], made[p, j])
        return made
