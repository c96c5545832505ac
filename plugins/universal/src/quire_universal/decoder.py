"""The Universal Transformer's decoder, trained whole and stepped over a cache. Dehghani et al. 2018."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from quire.contracts import Codes, Spec
from quire.errors import ConfigError
from quire.roles.language.blocks import Source
from quire.roles.language.contract import Caps, DecodeState, PrefilledModel
from quire.roles.language.rows import opening, tree
from quire_universal.block import KERNELS
from quire_universal.halting import Ponder
from quire_universal.sight import Sight, StepCache
from quire_universal.universal import Universal

TAPS = max(KERNELS) - 1


class UniversalDecoder(Universal, PrefilledModel):
    """One causal transformer block applied again and again; with an encoder it attends to its tokens.

    Dehghani et al. 2018. The cache has a set of slots for each step, since keys and values differ at every step. A
    position that stops early still fills its remaining steps' slots: a later token may run longer and look there.

    Args:
        tie: The head uses the embedding's weights.
        **kwargs: The recurrence's shape: arguments of ``Universal``.

    Returns:
        ``forward(codes, tokens [B,T], mask [B,T]) -> logits [B,T,V]``.

    Raises:
        ConfigError: sizes that do not fit, unknown words, codes missing or not expected.
    """

    longest: Tensor

    def __init__(self, tie: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.tie = tie

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """Reverse three digits."""
        from quire_universal.objective import tiny_seq2seq

        return tiny_seq2seq()

    def check(self, model: Any) -> None:
        """Refuse an objective that reads a source where nothing encodes it."""
        if model.encoder is None and model.objective is not None and "source" in model.objective.fields:
            name = type(model.objective).__name__
            raise ConfigError(
                f"{name} reads a source for UniversalDecoder, but model.encoder is null: set model.encoder, "
                "UniversalEncoder for one"
            )

    def build(self, spec: Spec) -> None:
        """Embedding, recurrence, head, and cross-attention where there is an encoder."""
        vocab, eos = int(spec.need("vocab_size", self)), spec.get("eos")
        length = int(spec.need("length", self)) if self.position == "learned" else 0
        self._caps = Caps(
            vocab,
            positions_max=length or None,
            eos_ids=() if eos is None else (int(eos),),
            pad_id=int(spec.get("pad") or 0),
            start_id=spec.get("bos"),
        )
        given = (spec.get("codes") or {}).get("width")
        self.bridge: nn.Module = nn.Identity() if given in (None, self.width) else nn.Linear(given, self.width)
        self.crosses = given is not None
        self.token = self.embedding(vocab)
        self.core = self.recurrence(length, causal=True, cross=self.crosses)
        self.drop = nn.Dropout(self.dropout)
        self.head = nn.Linear(self.width, vocab, bias=False)
        nn.init.normal_(self.head.weight, std=self.width**-0.5)
        if self.tie:
            self.head.weight = self.token.weight
        self.build_halting(spec)
        self.register_buffer("longest", torch.zeros((), dtype=torch.long))  # of the rows it was trained on
        self._known: int | None = None

    def caps(self) -> Caps:
        """All capabilities."""
        return self._caps

    def embed(self, ids: Tensor) -> Tensor:
        """[…] → […,D], scaled by √D."""
        return self.token(ids) * self.width**0.5

    def iter_layers(self) -> list[nn.Module]:
        """The block, once for each step."""
        return [self.core.blocks[t % len(self.core.blocks)] for t in range(self.steps)]

    # ---- training
    def forward(self, codes: Codes | None, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Logits [B,T,V] of every place; position t sees places up to t."""
        return self.pondered(codes, tokens, mask)[0]

    def pondered(self, codes: Codes | None, tokens: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Ponder | None]:
        """Logits [B,T,V], and what each position cost; None without halting."""
        length = tokens.shape[1]
        places = torch.arange(length, device=tokens.device)[None]
        seen = None
        if mask is not None:
            places = (mask.long().cumsum(1) - 1).clamp(min=0)
            own = torch.eye(length, dtype=torch.bool, device=tokens.device)  # padding sees itself: no empty row
            seen = ((torch.ones_like(own).tril() & mask[:, None, :]) | own)[:, None]
        generator = self.chance(tokens.device)
        if self.training:
            self.longest.copy_(self.longest.clamp(min=length))
            self._known = None
        else:
            self._notice(length)
        places = places + self.offsets(len(tokens), tokens.device, generator)
        x = self.drop(self.embed(tokens))
        sight = self._sight(places, x, mask=seen, causal=seen is None, real=mask)
        y, ponder = self.core(x, sight, self.steps, self.halting, self._source(codes), generator=generator)
        return self.head(self.core.norm(y)), ponder

    def _sight(self, places: Tensor, like: Tensor, **how: Any) -> Sight:
        return Sight(places, turn=self.turns(places, like), **how)

    def _source(self, codes: Codes | None) -> Source | None:
        values, mask = getattr(codes, "values", None), getattr(codes, "mask", None)
        if not self.crosses:
            if values is not None:
                raise ConfigError("UniversalDecoder was built without an encoder: set model.encoder to give it codes")
            return None
        if values is None:
            raise ConfigError(
                "UniversalDecoder needs an encoder's tokens (it was built with one); no codes, or other codes, given"
            )
        if not values.shape[1]:
            raise ConfigError("UniversalDecoder: the source is empty, [B,0,D]")
        if mask is not None and not mask.is_cuda and not bool(mask.any(1).all()):
            raise ConfigError(f"source {int((~mask.any(1)).nonzero()[0])} has no real tokens")
        return Source(self.bridge(values), mask)

    def _notice(self, length: int) -> None:
        if self._known is None:
            self._known = int(self.longest)
        if 0 < self._known < length and self.position in ("coordinate", "rope"):
            warnings.warn(
                f"UniversalDecoder was trained on {self._known} tokens and now reads {length}: positions beyond are "
                "defined, but unseen; position random_offset trains them",
                stacklevel=3,
            )
            self._known = 1 << 62  # one notice

    # ---- stepping
    def prefill(
        self, draft: Tensor | None, prompt: Tensor, mask: Tensor | None, codes: Codes | None, max_length: int | None
    ) -> DecodeState:
        """See ``PrefilledModel``."""
        prompt, counts, at = opening(prompt, mask, draft, self._caps.positions_max)
        length, device = prompt.shape[1], prompt.device
        self._notice(length)
        lengths = torch.tensor(counts, device=device)
        places = torch.arange(length, device=device)[None]
        real = None if min(counts) == length else places < lengths[:, None]
        caches = [StepCache(max(max_length or 0, length + 1)) for _ in range(self.steps)]
        taps = places[..., None] - 1 - torch.arange(TAPS, device=device)
        x = self.drop(self.embed(prompt))
        sight = self._sight(places, x, causal=True, real=real, slots=length, taps=taps.clamp(min=-1))
        source = self._source(codes)
        y, _ = self.core(x, sight, self.steps, self.halting, source, caches)
        near = y[torch.arange(len(y), device=device)[:, None], at]
        logits = self.head(self.core.norm(near)).float()
        state = DecodeState(lengths, logits[:, 0] if draft is None else logits, caches)
        state.extras.update(counts=counts, source=source, cache_bytes=sum(c.bytes for c in caches))
        return state

    def step(
        self,
        state: DecodeState,
        ids: Tensor | None,
        embeds: Tensor | None = None,
        parents: Tensor | None = None,
        valid: Tensor | None = None,
    ) -> Tensor:
        """Q slots behind each row's kept ones; see ``StepModel.step``."""
        x = self.embed(ids) if ids is not None else embeds
        assert x is not None
        device, (rows, width) = x.device, x.shape[:2]
        counts: list[int] = state.extras["counts"]
        slots = max(counts) + width
        for cache in state.cache:
            cache.grow(slots)
        above = parents if parents is not None else torch.arange(-1, width - 1).expand(rows, -1)
        depths, ancestors = tree(above.tolist(), device)
        places = state.lengths[:, None] + depths
        if self._caps.positions_max is not None:
            places = places.clamp(max=self._caps.positions_max - 1)  # only padding slots can lie beyond
        even = min(counts) == max(counts)
        mask = None
        if not (even and width == 1):
            mask = step_mask(state.lengths, slots, ancestors, valid)
        where: int | Tensor = counts[0] if even else state.lengths[:, None] + torch.arange(width, device=device)
        real = None if valid is None else valid.to(device)
        taps = None if self.transition == "ffn" else taps_of(above.tolist(), counts, device)
        sight = self._sight(places, x, mask=mask, real=real, where=where, slots=slots, taps=taps)
        y, ponder = self.core(x, sight, self.steps, self.halting, state.extras["source"], state.cache)
        state.pending = width
        state.extras["cache_bytes"] = sum(c.bytes for c in state.cache)
        state.extras["layers_used"] = float(self.steps if ponder is None else ponder.mean(ponder.steps))
        return self.head(self.core.norm(y)).float()

    def keep(self, state: DecodeState, chosen: Tensor) -> None:
        """Move the chosen slots behind the kept ones; a prefix needs no move."""
        picked = [[c for c in row if c >= 0] for row in chosen.tolist()]
        if any(row != list(range(len(row))) for row in picked):
            width = max(len(row) for row in picked)
            filled = torch.tensor([row + list(range(len(row), width)) for row in picked], device=state.lengths.device)
            start = state.lengths[:, None]
            for cache in state.cache:
                cache.move(start + filled, start + torch.arange(width, device=start.device))
        self._set(state, [n + len(row) for n, row in zip(state.extras["counts"], picked)])

    def cut(self, state: DecodeState, lengths: Tensor) -> None:
        """Slots beyond are overwritten later."""
        self._set(state, lengths.tolist())

    def _set(self, state: DecodeState, counts: list[int]) -> None:
        state.extras["counts"] = counts
        state.lengths = torch.tensor(counts, device=state.lengths.device)
        state.pending = 0

    def rows(self, state: DecodeState, order: Tensor) -> None:
        """Select rows of everything."""
        state.lengths, state.logits = state.lengths[order], state.logits[order]
        state.extras["counts"] = [state.extras["counts"][i] for i in order.tolist()]
        for cache in state.cache:
            cache.rows(order)
        if state.extras["source"] is not None:
            state.extras["source"].rows(order)

    def shallow(self, **how: Any) -> UniversalDecoder:
        """``steps=n``: the same block, n times. Above the trained number a sinusoid must signal the steps."""
        steps = how.get("steps")
        if set(how) != {"steps"} or not isinstance(steps, int) or steps < 1:
            raise ConfigError(f"UniversalDecoder can be shallow by steps=1..{self.steps}, got {how}")
        table = self.core.signals.steps
        if table is not None and steps > table.num_embeddings:
            raise ConfigError(
                f"step {steps} > table {table.num_embeddings}: use step_signal sinusoid or train with more steps"
            )
        view = copy.copy(self)
        view._modules = dict(self._modules)
        view.steps = steps
        return view


def step_mask(lengths: Tensor, slots: int, ancestors: Tensor, valid: Tensor | None) -> Tensor:
    """[B,1,Q,S] bool: each new slot sees the kept ones, its ancestors and itself.

    Args:
        lengths: [B] slots held.
        slots: S.
        ancestors: [B,Q,Q] bool, oneself included.
        valid: [B,Q] bool, or None.
    """
    device, width = lengths.device, ancestors.shape[1]
    at = torch.arange(slots, device=device)[None] - lengths[:, None]  # [B,S]; the new slots are 0..Q-1
    new = (at >= 0) & (at < width)
    if valid is not None:
        own = torch.eye(width, dtype=torch.bool, device=device)  # an unused slot sees itself: no empty row
        ancestors = (ancestors & valid.to(device)[:, None, :]) | own
    among = ancestors.gather(2, at.clamp(0, width - 1)[:, None, :].expand(-1, width, -1))
    return ((at < 0)[:, None, :] | (among & new[:, None, :]))[:, None]


def taps_of(parents: list[list[int]], counts: list[int], device: torch.device) -> Tensor:
    """[B,Q,K] slots of each new slot's last K ancestors, nearest first, -1 for none."""
    out = []
    for row, held in zip(parents, counts):
        lines: list[list[int]] = []
        for parent in row:
            before = [held + parent, *lines[parent]] if parent >= 0 else list(range(held - 1, held - 1 - TAPS, -1))
            lines.append([max(-1, slot) for slot in before[:TAPS]])
        out.append(lines)
    return torch.tensor(out, device=device)
