"""A language model that can be stepped: its capabilities, its decode state, drafts, and what decoding returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from lightning.pytorch import Callback
from torch import Tensor

from quire.contracts import Batch, Codes, Decoder, Part
from quire.errors import ConfigError
from quire.roles.language.stats import Stats


@dataclass(frozen=True)
class Caps:
    """What a step model can do. A sampler asks for what it needs and is refused in one sentence.

    Attributes:
        vocab_size: Width of the logits.
        embeds: ``step`` takes embeddings in place of ids.
        tree_mask: ``step`` takes ``parents``: a slot sees its ancestors only.
        gather: ``keep`` may keep any subset of the last slots, not only a prefix.
        batch: Rows of different lengths may be stepped together.
        positions_max: Longest sequence, or None.
        eos_ids: Tokens that end a row.
        pad_id: Token that fills; ``mask`` decides what is padding, never this id.
        start_id: Token that opens an empty prompt, or None.
        window: Sliding attention window, or None.
        lacks: Capability that is missing → why, as a sentence for the user.
    """

    vocab_size: int
    embeds: bool = True
    tree_mask: bool = True
    gather: bool = True
    batch: bool = True
    positions_max: int | None = None
    eos_ids: tuple[int, ...] = ()
    pad_id: int = 0
    start_id: int | None = None
    window: int | None = None
    lacks: Mapping[str, str] = field(default_factory=dict)


@dataclass
class DecodeState:
    """Where decoding stands.

    Attributes:
        lengths: [B] int64, slots held by each row; the next token's position.
        logits: [B,V] fp32 after the last kept token.
        cache: The model's own.
        pending: Q, slots of the last ``step`` that ``keep`` has not decided yet.
        extras: What a wrapper keeps (routing decisions, halting).
    """

    lengths: Tensor
    logits: Tensor
    cache: Any
    pending: int = 0
    extras: dict[str, Any] = field(default_factory=dict)


class StepModel(Decoder):
    """Role: a decoder that continues tokens one step at a time over a cache.

    ``forward(codes, tokens, mask) -> logits [B,T,V]`` is the training path. Decoding is
    ``open`` (prefill), then ``step`` with the pending token and any draft behind it, then ``keep``.
    """

    def caps(self) -> Caps:
        """Capabilities; valid once built."""
        raise NotImplementedError

    def encode(self, batch: Batch) -> Codes | None:
        """The source's codes by an encoder of its own, where ``model.encoder`` is not set; None: it reads no source."""
        return None

    def open(
        self, prompt: Tensor, mask: Tensor | None = None, codes: Codes | None = None, max_length: int | None = None
    ) -> DecodeState:
        """Read the prompts.

        Args:
            prompt: [B,L] int64, padded on either side.
            mask: [B,L] bool, True = real; None: no padding.
            codes: The source's codes for an encoder-decoder model, encoded once.
            max_length: Most slots a row will ever hold; None: the model's limit or growing.
        """
        raise NotImplementedError

    def open_drafted(
        self,
        draft: Tensor,
        prompt: Tensor,
        mask: Tensor | None = None,
        codes: Codes | None = None,
        max_length: int | None = None,
    ) -> DecodeState | None:
        """Prefill with guesses behind the prompt: one pass reads the prompt and checks them.

        Args:
            draft: [B,Q] int64, a chain behind each prompt.
            prompt, mask, codes, max_length: As in ``open``.

        Returns:
            A state that holds each row's prompt and its Q guesses, with ``logits`` [B,1+Q,V] after the prompt and after
            each guess; ``cut`` forgets what doesn't stand. None: it can't, and ``open`` is called instead.
        """
        return None

    def step(
        self,
        state: DecodeState,
        ids: Tensor | None,
        embeds: Tensor | None = None,
        parents: Tensor | None = None,
        valid: Tensor | None = None,
    ) -> Tensor:
        """Append Q slots a row and return their logits [B,Q,V] in fp32.

        Args:
            state: From ``open``; changed in place.
            ids: [B,Q] int64, or None with ``embeds`` [B,Q,D].
            parents: [B,Q] int64, the slot (0..Q-1) before each one, -1 for the kept sequence's end; None: a chain.
            valid: [B,Q] bool; False slots are seen by nobody, take no position and are dropped by ``keep``.
        """
        raise NotImplementedError

    def keep(self, state: DecodeState, chosen: Tensor) -> None:
        """Keep slots of the last step: ``chosen`` [B,<=Q] int64 in order, -1 padded; the others are forgotten."""
        raise NotImplementedError

    def rows(self, state: DecodeState, order: Tensor) -> None:
        """Select, drop, repeat or permute rows: ``order`` [K] int64."""
        raise NotImplementedError

    def cut(self, state: DecodeState, lengths: Tensor) -> None:
        """Forget every slot from ``lengths`` [B] on."""
        raise NotImplementedError

    def shallow(self, **how: Any) -> StepModel:
        """A cheaper pass through the same weights, for self-drafting: ``layers=n``, ``steps=n`` or ``routed=True``."""
        raise ConfigError(f"{type(self).__name__} has no shallow pass by {', '.join(how) or 'nothing'}")

    def without_condition(self, codes: Codes | None, rows: int) -> Codes | None:
        """What ``open`` takes in place of ``codes`` [rows] for no condition, for guidance."""
        raise ConfigError(
            f"Sample.cfg needs a model with a null class: {type(self).__name__} has none; train CausalLM with"
            " prefix_classes and NextToken.class_dropout, or give Sample.unconditional"
        )

    def embed(self, ids: Tensor) -> Tensor:
        """[…] int64 → […,D] input embeddings, with the module's own scale."""
        raise NotImplementedError

    def callbacks(self) -> list[Callback]:
        """What makes ``predict`` read weights faster on a CPU."""
        from quire.roles.language.layout import DecodingLayout

        return [*super().callbacks(), DecodingLayout()]

    def iter_layers(self) -> Sequence[Any]:
        """Its layers from first to last, for routing and self-drafting."""
        raise ConfigError(f"{type(self).__name__} exposes no layers; implement iter_layers()")


class PrefilledModel(StepModel):
    """A step model whose prefill can check guesses: ``open`` and ``open_drafted`` both come from ``prefill``."""

    def prefill(
        self, draft: Tensor | None, prompt: Tensor, mask: Tensor | None, codes: Codes | None, max_length: int | None
    ) -> DecodeState:
        """``open``, with ``logits`` [B,V], or ``open_drafted`` behind ``draft`` [B,Q], with ``logits`` [B,1+Q,V].

        Rows are moved to the left (``rows.opening``), so slot and position agree whatever side was padded.
        """
        raise NotImplementedError

    def open(
        self, prompt: Tensor, mask: Tensor | None = None, codes: Codes | None = None, max_length: int | None = None
    ) -> DecodeState:
        """By ``prefill``."""
        return self.prefill(None, prompt, mask, codes, max_length)

    def open_drafted(
        self,
        draft: Tensor,
        prompt: Tensor,
        mask: Tensor | None = None,
        codes: Codes | None = None,
        max_length: int | None = None,
    ) -> DecodeState | None:
        """By ``prefill``."""
        return self.prefill(draft, prompt, mask, codes, max_length)


def codes_of(model: Any, batch: Batch) -> Codes | None:
    """What the decoder of ``model`` reads besides tokens: the encoder's codes, or what the decoder encodes itself."""
    if model.encoder is not None:
        return model.encoder(batch)
    return model.decoder.role(StepModel).encode(batch)


def device_of(model: torch.nn.Module) -> torch.device:
    """Device of the first parameter, else the CPU."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


@dataclass
class Draft:
    """A tree of guessed tokens behind the pending one.

    Attributes:
        tokens: N ids.
        parents: N numbers; ``parents[i] < i``, -1 for a child of the pending token.
    """

    tokens: list[int]
    parents: list[int]

    @classmethod
    def chain(cls, tokens: Sequence[int]) -> Draft:
        """A tree of width 1."""
        return cls(list(tokens), list(range(-1, len(tokens) - 1)))

    def depths(self) -> list[int]:
        """Depth of each node; 1 for a child of the pending token."""
        out: list[int] = []
        for parent in self.parents:
            out.append(1 if parent < 0 else out[parent] + 1)
        return out

    def first_path(self) -> Draft:
        """The chain of first children from the root down."""
        path: list[int] = []
        while (at := path[-1] if path else -1) in self.parents:
            path.append(self.parents.index(at))
        return Draft.chain([self.tokens[i] for i in path])

    def cut(self, depth: int, nodes: int) -> Draft:
        """The nodes up to ``depth``, at most ``nodes`` of them, in order."""
        keep = [i for i, d in enumerate(self.depths()) if d <= depth][:nodes]
        place = {old: new for new, old in enumerate(keep)}
        return Draft([self.tokens[i] for i in keep], [place.get(self.parents[i], -1) for i in keep])


class Drafter(Part):
    """Role of a drafter: guesses what comes next. It is never trusted, so a bad one costs time, not tokens.

    Attributes:
        drafter_forwards: Forward passes of models that the drafter itself has run.
        codes: The batch's source codes for an encoder-decoder model, set before ``begin``; None without a source.
    """

    drafter_forwards: int = 0
    codes: Any = None

    def begin(self, model: StepModel, prompts: list[list[int]], sources: list[list[int]] | None) -> None:
        """Called once per batch, before the first draft."""

    def propose(self, row: int, context: list[int], budget: int) -> Draft | None:
        """A draft of at most ``budget`` nodes behind ``context``, or None.

        ``context`` is the prompt and everything emitted; at the first call of a row it may be the prompt alone.
        """
        raise NotImplementedError

    def observe(self, row: int, context: list[int], accepted: list[int], rejected: list[int]) -> None:
        """What became of the last draft of this row."""


class Acceptance(Part):
    """Role of an acceptance rule: which drafted nodes stand, and which token follows them.

    Attributes:
        lossless: Whether the output's law equals the model's own under plain decoding.
    """

    lossless: ClassVar[bool] = False

    def first(self, logits: Tensor, generator: torch.Generator) -> int:
        """The token after a prefix without draft: ``logits`` [V]."""
        raise NotImplementedError

    def choose(self, logits: Tensor, draft: Draft, generator: torch.Generator) -> tuple[list[int], int]:
        """Nodes accepted, a path from the root, and the bonus token behind the last of them.

        Args:
            logits: [N+1,V]; row 0 follows the pending token, row i+1 follows node i.
            draft: The tree.
            generator: The row's own stream.
        """
        raise NotImplementedError


LogitsProcessor = Callable[[list[int], Tensor], Tensor]
"""(prefix ids, logits [V]) → logits [V]; runs at each node with that node's own prefix."""


class Stop(Protocol):
    """A user's stop rule: true ends the row after this token."""

    def __call__(self, emitted: list[int]) -> bool: ...


@dataclass
class Generated:
    """What a language sampler returns.

    Attributes:
        index: B places in the data.
        tokens: B rows of n continuations of token ids, prompt excluded.
        scores: The same shape, one number each (higher is better), or empty.
        finish: The same shape: ``eos``, ``length``, ``stop`` or ``error``.
        stats: Counts and times of the batch.
        row_stats: B counts of one row each, times left out; empty where rows are not counted apart.
    """

    index: list[int]
    tokens: list[list[list[int]]]
    scores: list[list[float]]
    finish: list[list[str]]
    stats: Stats
    row_stats: list[Stats] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.tokens)
