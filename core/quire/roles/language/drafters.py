"""Drafters that need no training: copy from the context, ask a smaller model, join several, or follow a script."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quire.contracts import Decoder
from quire.errors import ConfigError
from quire.roles.language.accept import tiny_speculative
from quire.roles.language.contract import DecodeState, Draft, Drafter, StepModel, device_of
from quire.roles.language.corpus import count_into
from quire.roles.language.ngrams import NGramStore
from quire.roles.language.rows import select


class PromptCopy(Drafter):
    """Prompt lookup: find the last few tokens earlier in the context and propose what followed them.

    Args:
        ngram: Longest match tried; shorter ones follow, down to 1.
        tokens: Most tokens proposed.
        match: ``first`` takes the leftmost match, ``latest`` the one nearest to the end.
        corpus: Counts to follow, likeliest token by token, where the context holds no match; a store without a file
            counts the run's training tokens first.

    Raises:
        ConfigError: an argument below 1, an unknown ``match``, or a corpus of another vocabulary or tokenizer.
    """

    def __init__(
        self, ngram: int = 3, tokens: int = 10, match: str = "first", corpus: NGramStore | None = None
    ) -> None:
        super().__init__()
        if ngram < 1 or tokens < 1:
            raise ConfigError(f"PromptCopy needs ngram and tokens of at least 1, got {ngram} and {tokens}")
        if match not in ("first", "latest"):
            raise ConfigError(f"PromptCopy.match is first or latest, got {match!r}")
        self.ngram, self.tokens, self.match, self.corpus = ngram, tokens, match, corpus
        self._whole: Any = None
        self._places: dict[int, dict[tuple[int, ...], list[int]]] = {}
        self._seen: dict[int, int] = {}

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """On the standard library's text."""
        return tiny_speculative({})

    def begin(self, model: StepModel, prompts: list[list[int]], sources: list[list[int]] | None) -> None:
        """Forget earlier rows; see that the corpus is counted and of this vocabulary."""
        self._places, self._seen = {}, {}
        if self.corpus is not None:
            source, spec = getattr(self._whole, "datamodule", None), getattr(self._whole, "spec", None) or {}
            if not self.corpus.vocab_size:
                if source is None:
                    raise ConfigError(
                        "PromptCopy.corpus is an empty store and there is no data module to count: give"
                        " NGramStore.path, or run under a Trainer with data"
                    )
                count_into(self.corpus, source)
            self.corpus.need(spec.get("vocab_size") or model.caps().vocab_size, spec.get("tokenizer"))

    def bind(self, model: Any) -> None:
        """Keep the model, whose data may be the corpus."""
        super().bind(model)
        self.refer("_whole", model)

    def propose(self, row: int, context: list[int], budget: int) -> Draft | None:
        """What followed the longest match; None when nothing matches."""
        places = self._index(row, context)
        for size in range(min(self.ngram, len(context) - 1), 0, -1):
            found = places.get(tuple(context[-size:]))
            if found and found[0] < len(context):
                ends = [e for e in found if e < len(context)] if self.match == "latest" else found[:1]
                copied = context[ends[-1] : ends[-1] + min(self.tokens, budget)]
                if copied:
                    return Draft.chain(copied)
        return None if self.corpus is None else self._follow(self.corpus, context, min(self.tokens, budget))

    def _follow(self, corpus: NGramStore, context: list[int], most: int) -> Draft | None:
        reach = corpus.orders[-1]
        path, made = context[-reach:], 0
        while made < most and (token := corpus.likeliest(path[-reach:])) is not None:
            path, made = [*path, token], made + 1
        return Draft.chain(path[-made:]) if made else None

    def _index(self, row: int, context: list[int]) -> dict[tuple[int, ...], list[int]]:
        places = self._places.setdefault(row, {})
        start = self._seen.get(row, 0)
        for end in range(start + 1, len(context) + 1):  # only what is new since the last call
            for size in range(1, min(self.ngram, end) + 1):
                places.setdefault(tuple(context[end - size : end]), []).append(end)
        self._seen[row] = len(context)
        return places


class Scripted(Drafter):
    """Propose what a script says: for tests and ceilings.

    Args:
        continuation: The ids behind the prompt; the draft is the next ``tokens`` of them.
        tokens: Tokens proposed.
        wrong: Replace every draft's first token by another, so nothing is accepted.

    Raises:
        ConfigError: ``tokens`` below 1.
    """

    def __init__(self, continuation: list[int], tokens: int = 10, wrong: bool = False) -> None:
        super().__init__()
        if tokens < 1:
            raise ConfigError(f"Scripted.tokens must be at least 1, got {tokens}")
        self.continuation, self.tokens, self.wrong = list(continuation), tokens, wrong
        self._prompts: dict[int, int] = {}

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """A script of five ids."""
        return tiny_speculative({}, {"class_path": "Scripted", "init_args": {"continuation": [5, 6, 7, 8, 9]}})

    def begin(self, model: StepModel, prompts: list[list[int]], sources: list[list[int]] | None) -> None:
        """Note where each prompt ends."""
        self._prompts = {i: len(p) for i, p in enumerate(prompts)}

    def propose(self, row: int, context: list[int], budget: int) -> Draft | None:
        """The script's next tokens."""
        at = len(context) - self._prompts.get(row, 0)
        copied = self.continuation[at : at + min(self.tokens, budget)]
        if copied and self.wrong:
            copied[0] += 1
        return Draft.chain(copied) if copied else None


class SmallModel(Drafter):
    """A smaller step model with the same vocabulary drafts a greedy chain over its own cache.

    Args:
        decoder: The drafting model, as a rule ``Pretrained(path, part="decoder")``.
        tokens: Tokens drafted.

    Raises:
        ConfigError: ``tokens`` below 1, or another vocabulary.
    """

    _small: StepModel

    def __init__(self, decoder: Decoder, tokens: int = 4) -> None:
        super().__init__()
        if tokens < 1:
            raise ConfigError(f"{type(self).__name__}.tokens must be at least 1, got {tokens}")
        self.decoder, self.tokens = decoder, tokens
        self._states: dict[int, tuple[DecodeState, list[int]]] = {}

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """A smaller untrained model."""
        small = {"class_path": "CausalLM", "init_args": {"width": 16, "depth": 1, "heads": 2}}
        return tiny_speculative({}, {"class_path": "SmallModel", "init_args": {"decoder": small, "tokens": 2}})

    def drafting(self, target: StepModel) -> StepModel:
        """The model that drafts."""
        found = self.decoder.role(StepModel)
        if found is None:
            raise ConfigError(f"SmallModel.decoder is {type(self.decoder).__name__}, which can't be stepped")
        return found

    def begin(self, model: StepModel, prompts: list[list[int]], sources: list[list[int]] | None) -> None:
        """Check the vocabulary; states are opened on the first draft of a row."""
        small = self.drafting(model)
        ours, theirs = small.caps().vocab_size, model.caps().vocab_size
        if ours != theirs:
            name = type(self).__name__
            raise ConfigError(f"{name}: the drafter has {ours} tokens, the model {theirs}: they must agree")
        self.refer("_small", small)
        self._states, self._rows, self.drafter_forwards = {}, len(prompts), 0

    def propose(self, row: int, context: list[int], budget: int) -> Draft | None:
        """Cut the cache back to what still holds, read what is new, continue greedily."""
        small: StepModel = self._small
        most = small.caps().positions_max
        count = min(self.tokens, budget, *([] if most is None else [most - len(context)]))
        if count < 1:
            return None
        self.drafter_forwards += 1
        if row in self._states:
            state, held = self._states[row]
            same = next((i for i, (a, b) in enumerate(zip(held, context)) if a != b), min(len(held), len(context) - 1))
            small.cut(state, torch.tensor([same]))
            logits = self._read(state, context[same:])
        else:
            codes = None if self.codes is None else select(self.codes, [row], self._rows)
            state = small.open(torch.tensor([context], device=device_of(small)), codes=codes, max_length=most)
            logits = state.logits[0]
        drafted = [int(logits.argmax())]
        while len(drafted) < count:
            self.drafter_forwards += 1
            drafted.append(int(self._read(state, drafted[-1:]).argmax()))
        self._states[row] = (state, [*context, *drafted[:-1]])
        return Draft.chain(drafted)

    def _read(self, state: DecodeState, ids: list[int]) -> Tensor:
        logits = self._small.step(state, torch.tensor([ids], device=device_of(self._small)))
        self._small.keep(state, torch.arange(len(ids))[None])
        return logits[0, -1]


class SelfDraft(SmallModel):
    """The model's own shallow pass drafts, the full model verifies. Separate cache, shared weights.

    Args:
        how: What makes the pass shallow, as the model's ``shallow`` takes it: ``{"layers": 2}``, ``{"steps": 2}`` or
            ``{"routed": true}``.
        tokens: Tokens drafted.

    Raises:
        ConfigError: ``tokens`` below 1, or a model without such a pass.
    """

    def __init__(self, how: dict[str, Any] | None = None, tokens: int = 4) -> None:
        Drafter.__init__(self)
        if tokens < 1:
            raise ConfigError(f"SelfDraft.tokens must be at least 1, got {tokens}")
        self.how, self.tokens = dict(how or {"layers": 1}), tokens
        self._states = {}

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """The first layer drafts."""
        return tiny_speculative({}, {"class_path": "SelfDraft", "init_args": {"how": {"layers": 1}, "tokens": 2}})

    def drafting(self, target: StepModel) -> StepModel:
        """The target's shallow pass."""
        return target.shallow(**self.how)


class DraftUnion(Drafter):
    """Several drafters' trees merged into one; equal paths are kept once, earlier drafters first.

    Args:
        drafters: At least one.

    Raises:
        ConfigError: no drafters.
    """

    def __init__(self, drafters: list[Drafter]) -> None:
        super().__init__()
        if not drafters:
            raise ConfigError("DraftUnion needs at least one drafter")
        self.drafters = torch.nn.ModuleList(drafters)

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """Two prompt lookups."""
        members = ["PromptCopy", {"class_path": "PromptCopy", "init_args": {"match": "latest"}}]
        return tiny_speculative({}, {"class_path": "DraftUnion", "init_args": {"drafters": members}})

    def _each(self) -> list[Drafter]:
        return [d for d in self.drafters if isinstance(d, Drafter)]

    def begin(self, model: StepModel, prompts: list[list[int]], sources: list[list[int]] | None) -> None:
        """Begin each."""
        for drafter in self._each():
            drafter.refer("codes", self.codes)
            drafter.begin(model, prompts, sources)
        self.drafter_forwards = sum(d.drafter_forwards for d in self._each())

    def propose(self, row: int, context: list[int], budget: int) -> Draft | None:
        """The merged tree, cut to the budget."""
        tokens: list[int] = []
        parents: list[int] = []
        known: dict[tuple[int, int], int] = {}
        for drafter in self._each():
            draft = drafter.propose(row, context, budget)
            place = {-1: -1}
            for i, (token, parent) in enumerate(zip(draft.tokens, draft.parents) if draft is not None else ()):
                if parent not in place:
                    continue
                key = (place[parent], token)
                if key not in known:
                    if len(tokens) >= budget:
                        continue
                    known[key] = len(tokens)
                    tokens.append(token)
                    parents.append(place[parent])
                place[i] = known[key]
        self.drafter_forwards = sum(d.drafter_forwards for d in self._each())
        return Draft(tokens, parents) if tokens else None

    def observe(self, row: int, context: list[int], accepted: list[int], rejected: list[int]) -> None:
        """Tell each."""
        for drafter in self._each():
            drafter.observe(row, context, accepted, rejected)
