"""Quire's own language models: a decoder-only and an encoder-decoder transformer, trainable and steppable."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from quire.contracts import Batch, Codes, Spec
from quire.errors import ConfigError
from quire.roles.language.blocks import Block, Cache, Seen, Source, dropout_of, norm_of
from quire.roles.language.contract import Caps, DecodeState, PrefilledModel
from quire.roles.language.guidance import ClassCodes
from quire.roles.language.rows import opening, tree


class CausalLM(PrefilledModel):
    """Decoder-only transformer: rotary positions, pre-norm, tied head, fused attention, a cache that can be cut.

    Args:
        width: D, divisible by heads; D/heads even with ``rope``.
        depth: Layers.
        heads: Attention heads.
        ffn: Hidden width of the feed-forward; default 4·D, for ``swiglu`` 8/3·D rounded up to a multiple of 8.
        rope: Rotary positions; false learns a table of the spec's ``length``.
        dropout: On attention, feed-forward and residuals, in [0, 1).
        tie: The head uses the embedding's weights.
        norm: ``layer`` or ``rms``.
        mlp: ``gelu``, ``swiglu`` or ``none`` (attention only).
        qk_norm: Normalise queries and keys per head.
        window: A token sees this many tokens at most, itself included; null sees all.
        prefix_classes: Put a class embedding (one of this many, and a null class after them) in place of the first
            token; the batch's ``label`` chooses it, no label is the null class. True: as many as the data has.

    Returns:
        ``forward(codes, tokens [B,T], mask [B,T]) -> logits [B,T,V]``.

    Raises:
        ConfigError: sizes that do not divide, or an unknown ``norm`` or ``mlp``.
    """

    crosses = False

    def __init__(
        self,
        width: int = 256,
        depth: int = 6,
        heads: int = 8,
        ffn: int | None = None,
        rope: bool = True,
        dropout: float = 0.0,
        tie: bool = True,
        norm: str = "layer",
        mlp: str = "gelu",
        qk_norm: bool = False,
        window: int | None = None,
        prefix_classes: bool | int | None = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        if prefix_classes and self.crosses:
            raise ConfigError(f"{name} takes no prefix_classes: its condition is the source; use CausalLM")
        if depth < 1 or heads < 1 or width % heads or (rope and (width // heads) % 2):
            raise ConfigError(
                f"{name} needs depth >= 1 and width divisible by heads, an even number each with rope;"
                f" got width {width}, heads {heads}, depth {depth}"
            )
        if norm not in ("layer", "rms") or mlp not in ("gelu", "swiglu", "none"):
            raise ConfigError(f"{name}.norm is layer or rms, mlp is gelu, swiglu or none; got {norm!r} and {mlp!r}")
        if not 0 <= dropout < 1:
            raise ConfigError(f"{name}.dropout must be in [0, 1), got {dropout}")
        if window is not None and window < 1:
            raise ConfigError(f"{name}.window must be at least 1, got {window}")
        self.width, self.depth, self.heads, self.rope, self.tie, self.norm = width, depth, heads, rope, tie, norm
        self.mlp, self.qk_norm, self.dropout, self.window = mlp, qk_norm, dropout, window
        self.prefix_classes = prefix_classes or None
        self.ffn = ffn or (-(-8 * width // 3 // 8) * 8 if mlp == "swiglu" else 4 * width)

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """A small language model on the standard library's text."""
        from quire.roles.language.accept import tiny_speculative

        return tiny_speculative({})

    def build(self, spec: Spec) -> None:
        """Embedding, blocks and head for the spec's vocabulary."""
        vocab = spec.need("vocab_size", self)
        eos = spec.get("eos")
        self._caps = Caps(
            vocab,
            positions_max=None if self.rope else spec.need("length", self),
            eos_ids=() if eos is None else (int(eos),),
            pad_id=int(spec.get("pad") or 0),
            start_id=spec.get("bos"),
            window=self.window,
        )
        self.token = nn.Embedding(vocab, self.width)
        self.place = None if self.rope else nn.Embedding(spec.need("length", self), self.width)
        if (n := self.prefix_classes) is not None:
            self.prefix_classes = int(spec.agree("classes", None if n is True else n, self))
        self.classes = None if self.prefix_classes is None else nn.Embedding(self.prefix_classes + 1, self.width)
        shape = (self.width, self.heads, self.ffn, self.norm, self.mlp, self.qk_norm, self.dropout, self.crosses)
        self.blocks = nn.ModuleList([Block(*shape) for _ in range(self.depth)])
        self.final = norm_of(self.norm, self.width)
        self.head = nn.Linear(self.width, vocab, bias=False)
        self.drop = dropout_of(self.dropout)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
                if getattr(module, "bias", None) is not None:
                    nn.init.zeros_(module.bias)  # type: ignore[arg-type]
        for block in self.blocks:  # residual branches start small, so depth does not raise the variance
            for name, parameter in block.named_parameters():
                if name.endswith(("out.weight", "down.weight")):
                    parameter.data /= (2 * self.depth) ** 0.5
        if self.tie:
            self.head.weight = self.token.weight

    def caps(self) -> Caps:
        """All capabilities; a window forbids nothing, since the cache keeps every slot."""
        return self._caps

    def iter_layers(self) -> list[Block]:
        """The blocks."""
        return list(self.blocks)  # type: ignore[arg-type]

    def embed(self, ids: Tensor) -> Tensor:
        """[…] → […,D]."""
        return self.token(ids)

    def reads(self, stage: str) -> tuple[str, ...]:
        """The label, where it is trained on classes."""
        return ("label",) if self.prefix_classes and stage != "predict" else ()

    def encode(self, batch: Batch) -> Codes | None:
        """The batch's classes, for a model that takes them."""
        return None if self.prefix_classes is None else ClassCodes.of(batch, int(self.prefix_classes))

    def without_condition(self, codes: Codes | None, rows: int) -> Codes | None:
        """The null class."""
        if self.prefix_classes is None:
            return super().without_condition(codes, rows)
        return ClassCodes(torch.full((rows,), int(self.prefix_classes), device=self.token.weight.device))

    def _classed(self, x: Tensor, label: Tensor | None) -> Tensor:
        """[B,T,D] with the class in the first place, the null class where none is said."""
        if self.classes is None:
            return x
        first = self.classes.weight[-1].expand(len(x), -1) if label is None else self.classes(label.to(x.device))
        return torch.cat([first[:, None].to(x.dtype), x[:, 1:]], 1)

    # ---- training
    def forward(
        self,
        codes: Codes | None,
        tokens: Tensor,
        mask: Tensor | None = None,
        doc: Tensor | None = None,
        label: Tensor | None = None,
    ) -> Tensor:
        """Logits [B,T,V] of every place; position t sees places up to t.

        Args:
            codes: The source's codes, for an encoder-decoder model.
            tokens: [B,T] int64.
            mask: [B,T] bool, True = real; None: no padding.
            doc: [B,T] int64, attention stays within a document; None: one document a row.
            label: [B] class ids for ``prefix_classes``; None: the null class.
        """
        return self.head(self.final(self.hidden(codes, tokens, mask, doc, label)))

    def hidden(
        self,
        codes: Codes | None,
        tokens: Tensor,
        mask: Tensor | None = None,
        doc: Tensor | None = None,
        label: Tensor | None = None,
    ) -> Tensor:
        """[B,T,D] before the final norm."""
        length = tokens.shape[1]
        x = self._classed(self.embed(tokens), label)
        places = torch.arange(length, device=tokens.device)[None]
        seen_mask = None
        if mask is not None or doc is not None or self.window is not None:
            back = places[0][:, None] - places[0][None]
            allowed = (back >= 0) if self.window is None else (back >= 0) & (back < self.window)
            seen_mask = allowed[None]
            if mask is not None:
                places = (mask.long().cumsum(1) - 1).clamp(min=0)
                own = torch.eye(length, dtype=torch.bool, device=tokens.device)  # padding sees itself: no empty row
                seen_mask = (seen_mask & mask[:, None, :]) | own
            if doc is not None:
                seen_mask = seen_mask & (doc[:, :, None] == doc[:, None, :])
            seen_mask = seen_mask[:, None]
        seen = self._seen(seen_mask, seen_mask is None, 0, length, places, x)
        return self._trunk(self._placed(x, places), seen, self._source(codes), None)

    def _trunk(self, x: Tensor, seen: Seen, source: Source | None, caches: list[Cache] | None) -> Tensor:
        for i, block in enumerate(self.blocks):
            x = block(x, seen, source, None if caches is None else caches[i])
        return x

    def _placed(self, x: Tensor, places: Tensor) -> Tensor:
        return self.drop(x if self.place is None else x + self.place(places))

    def _seen(
        self, mask: Tensor | None, causal: bool, where: int | Tensor, slots: int, places: Tensor, like: Tensor
    ) -> Seen:
        if not self.rope:
            return Seen(mask, causal, where, slots, None, None)
        half = self.width // self.heads // 2
        rates = 10000.0 ** (-torch.arange(half, device=places.device, dtype=torch.float32) / half)
        angles = places[:, None, :, None].float() * rates
        return Seen(mask, causal, where, slots, angles.cos().to(like.dtype), angles.sin().to(like.dtype))

    def _source(self, codes: Codes | None) -> Source | None:
        return None

    # ---- stepping
    def prefill(
        self, draft: Tensor | None, prompt: Tensor, mask: Tensor | None, codes: Codes | None, max_length: int | None
    ) -> DecodeState:
        """See ``PrefilledModel``."""
        prompt, counts, at = opening(prompt, mask, draft, self._caps.positions_max)
        length = prompt.shape[1]
        x = self._classed(self.embed(prompt), getattr(codes, "label", None))
        room = max(max_length or 0, length + 1)
        head = self.width // self.heads
        caches = [Cache(len(prompt), self.heads, room, head, x) for _ in self.blocks]
        places = torch.arange(length, device=prompt.device)[None]
        window = None
        if self.window is not None:
            back = places[0][:, None] - places[0][None]
            window = ((back >= 0) & (back < self.window))[None, None]
        seen = self._seen(window, window is None, 0, length, places, x)
        source = self._source(codes)
        x = self._trunk(self._placed(x, places), seen, source, caches)
        near = x[torch.arange(len(x), device=x.device)[:, None], at]
        logits = self.head(self.final(near)).float()
        state = DecodeState(at[:, -1] + 1, logits[:, 0] if draft is None else logits, caches)
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
        device, width = x.device, x.shape[1]
        counts: list[int] = state.extras["counts"]
        slots = max(counts) + width
        for cache in state.cache:
            cache.grow(slots)
        even = min(counts) == max(counts)
        if parents is None:
            depths = torch.arange(width, device=device)[None]
        else:
            depths, ancestors = tree(parents.tolist(), device)
        places = (state.lengths[:, None] if not even else counts[0]) + depths
        if self.place is not None:
            places = places.clamp(max=self.place.num_embeddings - 1)  # only padding slots can lie beyond
        mask = None
        if not (even and width == 1 and parents is None and self.window is None):
            mask = self._step_mask(state.lengths, slots, width, places, None if parents is None else ancestors, valid)
        where: int | Tensor = counts[0] if even else state.lengths[:, None] + torch.arange(width, device=device)
        seen = self._seen(mask, False, where, slots, places if places.ndim == 2 else places[None], x)
        x = self._trunk(self._placed(x, places), seen, state.extras["source"], state.cache)
        state.pending = width
        state.extras["cache_bytes"] = sum(c.bytes for c in state.cache)
        return self.head(self.final(x)).float()

    def _step_mask(
        self, lengths: Tensor, slots: int, width: int, places: Tensor, ancestors: Tensor | None, valid: Tensor | None
    ) -> Tensor:
        device = lengths.device
        at = torch.arange(slots, device=device)[None] - lengths[:, None]  # [B,S]; the new slots are 0..Q-1
        new = (at >= 0) & (at < width)
        if ancestors is None:
            ancestors = torch.ones(1, width, width, dtype=torch.bool, device=device).tril()
        chosen = at.clamp(0, width - 1)[:, None, :].expand(-1, width, -1)
        among = ancestors.expand(len(lengths), -1, -1).gather(2, chosen) & new[:, None, :]
        if valid is not None:
            shown = valid.to(device).gather(1, at.clamp(0, width - 1))
            mine = at[:, None, :] == torch.arange(width, device=device)[None, :, None]
            among = (among & shown[:, None, :]) | (mine & new[:, None, :])  # an unused slot sees itself: no empty row
        allowed = (at < 0)[:, None, :] | among
        if self.window is not None:
            kept = torch.arange(slots, device=device)[None, None].expand(len(lengths), 1, -1)
            new_places = places.expand(len(lengths), -1).gather(1, at.clamp(0, width - 1))[:, None, :]
            key_places = torch.where(new[:, None, :], new_places, kept)
            allowed = allowed & (places.expand(len(lengths), -1)[:, :, None] - key_places < self.window)
        return allowed[:, None]

    def keep(self, state: DecodeState, chosen: Tensor) -> None:
        """Move the chosen slots behind the kept ones; a prefix needs no move."""
        picked = [[c for c in row if c >= 0] for row in chosen.tolist()]
        if any(row != list(range(len(row))) for row in picked):
            width = max(len(row) for row in picked)
            filled = torch.tensor([row + list(range(len(row), width)) for row in picked], device=state.lengths.device)
            start = state.lengths[:, None]
            target = start + torch.arange(width, device=start.device)
            for cache in state.cache:
                cache.move(start + filled, target)
        counts = [n + len(row) for n, row in zip(state.extras["counts"], picked)]
        state.extras["counts"] = counts
        state.lengths = torch.tensor(counts, device=state.lengths.device)
        state.pending = 0

    def cut(self, state: DecodeState, lengths: Tensor) -> None:
        """Slots beyond are overwritten later."""
        state.extras["counts"] = lengths.tolist()
        state.lengths = lengths.to(state.lengths.device)
        state.pending = 0

    def shallow(self, **how: Any) -> CausalLM:
        """``layers=n``: the first n blocks with the same final norm and head."""
        layers = how.get("layers")
        if set(how) != {"layers"} or not isinstance(layers, int) or not 1 <= layers <= self.depth:
            raise ConfigError(f"{type(self).__name__} can be shallow by layers=1..{self.depth}, got {how}")
        view = copy.copy(self)
        view._modules = dict(self._modules)
        view.blocks = nn.ModuleList(list(self.blocks)[:layers])
        view.depth = layers
        return view

    def rows(self, state: DecodeState, order: Tensor) -> None:
        """Select rows of everything."""
        state.lengths, state.logits = state.lengths[order], state.logits[order]
        state.extras["counts"] = [state.extras["counts"][i] for i in order.tolist()]
        for cache in state.cache:
            cache.rows(order)
        if state.extras["source"] is not None:
            state.extras["source"].rows(order)


class Seq2SeqDecoder(CausalLM):
    """The same transformer with cross-attention to an encoder's tokens.

    Args:
        width, depth, heads, ffn, rope, dropout, tie, norm, mlp, qk_norm, window: As in ``CausalLM``.

    Returns:
        ``forward(codes, tokens [B,T], mask [B,T]) -> logits [B,T,V]``; ``codes`` are the source's tokens.

    Raises:
        ConfigError: no codes, or codes that are not tokens.
    """

    crosses = True

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """Reverse three digits."""
        from quire.datasets.algorithmic import Algorithmic

        return Algorithmic.tiny()

    def build(self, spec: Spec) -> None:
        """As CausalLM, and a projection where the encoder's width differs."""
        super().build(spec)
        given = spec.code("width", self)
        self.bridge: nn.Module = nn.Identity() if given == self.width else nn.Linear(given, self.width)

    def _source(self, codes: Codes | None) -> Source | None:
        values, mask = getattr(codes, "values", None), getattr(codes, "mask", None)
        if values is None:
            raise ConfigError(
                "Seq2SeqDecoder needs an encoder that gives tokens; model.encoder is not set or gives none"
            )
        return Source(self.bridge(values), mask)
