"""A small decoder that guesses a whole block at once: general aggressive decoding's drafter."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from quire.contracts import Decoder, Spec
from quire.errors import ConfigError, DataError
from quire.roles.language.blocks import Block, Seen, Source
from quire.roles.language.contract import Draft, Drafter, StepModel, device_of
from quire.roles.language.rows import left_aligned, padded

if TYPE_CHECKING:
    from quire.model import Model

UNTRAINED = "BlockDrafter is untrained: load it with Pretrained(path, part=decoder)"


class BlockDrafter(Decoder, Drafter):
    """Guess the next ``block`` tokens in one bidirectional pass over what is written and as many masks. Ge et al. 2022.

    It has an encoder of its own over ``source``, run once a batch. Train it as ``model.decoder`` with
    ``BlockPrediction``, then put ``{class_path: Pretrained, init_args: {path: …, part: decoder}}`` in a drafter's slot.
    A guess reads the whole prefix again, since in a bidirectional decoder nothing of it can be cached; the source's
    codes are.

    Args:
        block: k, tokens guessed at once, at least 1.
        width: D, divisible by ``heads``.
        depth: Layers of encoder and decoder.
        heads: Attention heads.
        dropout: In [0, 1).
        share_embedding: One table for source, target and head; false: three.

    Returns:
        ``forward(source, tokens [B,T], mask [B,T]) -> logits [B,T,V]``, with ``source`` from ``read``.

    Raises:
        ConfigError: sizes that do not divide, a mask id that is another special id too, a model of another vocabulary,
            an untrained drafter.
        DataError: a source or target longer than the data said.
    """

    fields = ("source|source_span",)
    trained: Tensor

    def __init__(
        self,
        block: int = 25,
        width: int = 512,
        depth: list[int] = [6, 6],  # noqa: B006
        heads: int = 8,
        dropout: float = 0.1,
        share_embedding: bool = True,
    ) -> None:
        super().__init__()
        if block < 1:
            raise ConfigError(f"BlockDrafter.block must be at least 1, got {block}")
        if heads < 1 or width % heads or len(depth) != 2 or min(depth) < 1:
            raise ConfigError(
                "BlockDrafter needs width divisible by heads and depth [encoder, decoder] of at least 1 each;"
                f" got width {width}, heads {heads}, depth {depth}"
            )
        if not 0 <= dropout < 1:
            raise ConfigError(f"BlockDrafter.dropout must be in [0, 1), got {dropout}")
        self.block, self.width, self.depth, self.heads = block, width, list(depth), heads
        self.dropout, self.share_embedding = dropout, share_embedding
        self._sources: list[Source | None] = []

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """Learn to reverse three digits, three at once."""
        small = {"block": 3, "width": 16, "depth": [1, 1], "heads": 2, "dropout": 0.0}
        task = {"task": "reverse", "train_length": 3, "test_length": 3, "samples": 64, "batch_size": 16}
        return {
            "model": {"decoder": {"class_path": cls.__name__, "init_args": small}, "objective": "BlockPrediction"},
            "data": {"class_path": "Algorithmic", "init_args": task},
        }

    def build(self, spec: Spec) -> None:
        """Embeddings, blocks and head for the spec's vocabulary."""
        self.vocab = int(spec.need("vocab_size", self))
        self.pad, self.eos = int(spec.get("pad") or 0), spec.get("eos")
        given = spec.get("mask_id")
        self.mask_id = self.vocab if given is None else int(given)  # without one in the vocabulary, one behind it
        for name in ("pad", "bos", "eos", "unk"):
            if spec.get(name) == self.mask_id:
                raise ConfigError(
                    f"BlockDrafter needs a mask id of its own: mask and {name} are both {self.mask_id}; take a"
                    " tokenizer with a mask token"
                )
        self.positions = int(spec.need("length", self)) + self.block
        rows = max(self.vocab, self.mask_id + 1)
        self.token = nn.Embedding(rows, self.width)
        self.source_token = self.token if self.share_embedding else nn.Embedding(rows, self.width)
        self.place, self.source_place = (nn.Embedding(self.positions, self.width) for _ in range(2))
        shape = (self.width, self.heads, 4 * self.width, "layer", "gelu", False, self.dropout)
        self.encoder_blocks = nn.ModuleList([Block(*shape, False) for _ in range(self.depth[0])])
        self.decoder_blocks = nn.ModuleList([Block(*shape, True) for _ in range(self.depth[1])])
        self.encoder_norm, self.decoder_norm = nn.LayerNorm(self.width), nn.LayerNorm(self.width)
        self.drop = nn.Dropout(self.dropout)
        self.head = nn.Linear(self.width, rows, bias=False)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
                if getattr(module, "bias", None) is not None:
                    nn.init.zeros_(module.bias)  # type: ignore[arg-type]
        if self.share_embedding:
            self.head.weight = self.token.weight
        self.register_buffer("trained", torch.zeros((), dtype=torch.bool))

    def bind(self, model: Model) -> None:
        """Refuse a model whose tokens mean something else."""
        super().bind(model)
        ours, theirs = self.__dict__["built_with"].get("tokenizer"), (model.spec or Spec()).get("tokenizer")
        if ours and theirs and ours != theirs:
            raise ConfigError(
                f"BlockDrafter was trained on the tokenizer {ours}, this run has {theirs}: make them agree"
            )

    # ---- the network
    def read(self, source: Tensor, mask: Tensor | None = None) -> Source:
        """Encode sources [B,S] with ``mask`` [B,S], True = real; padding may stand on either side.

        Raises:
            DataError: a source of more tokens than there are positions, or one padded on the left without a mask.
        """
        if mask is None and source.shape[1] > 1 and bool((source[:, 0] == self.pad).any()):
            row = int((source[:, 0] == self.pad).nonzero()[0])
            raise DataError(f"source {row} begins with padding (id {self.pad}): pass source_mask with it")
        source, counts, _ = left_aligned(source, mask, "source")
        if max(counts) > self.positions:
            row = counts.index(max(counts))
            raise DataError(f"source {row} has {max(counts)} tokens; BlockDrafter was built for {self.positions}")
        source = source[:, : max(counts)]
        real = torch.arange(source.shape[1], device=source.device) < torch.tensor(counts, device=source.device)[:, None]
        x = self.drop(self.source_token(source) + self.source_place.weight[: source.shape[1]])
        seen = Seen(real[:, None, None], False, 0, source.shape[1], None, None)
        for block in self.encoder_blocks:
            x = block(x, seen)
        return Source(self.encoder_norm(x), real)

    def forward(self, source: Source, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Logits [B,T,V] of every place; every place sees all real ones.

        Args:
            source: From ``read``.
            tokens: [B,T] int64, ``mask_id`` at what is to be guessed; padding on the right.
            mask: [B,T] bool, True = real; None: no padding.
        """
        length = tokens.shape[1]
        if length > self.positions:
            raise DataError(f"a target has {length} tokens; BlockDrafter was built for {self.positions}")
        x = self.drop(self.token(tokens) + self.place.weight[:length])
        seen = Seen(None if mask is None else mask[:, None, None], False, 0, length, None, None)
        for block in self.decoder_blocks:
            x = block(x, seen, source)
        return self.head(self.decoder_norm(x))[..., : self.vocab]

    # ---- drafting
    def begin(self, model: StepModel, prompts: list[list[int]], sources: list[list[int]] | None) -> None:
        """Encode the batch's sources, once."""
        if not bool(self.trained):
            raise ConfigError(UNTRAINED)
        if sources is None:
            raise ConfigError("BlockDrafter reads the batch's source, or source_span of the prompt; it has neither")
        theirs = model.caps().vocab_size
        if theirs != self.vocab:
            raise ConfigError(f"BlockDrafter has {self.vocab} tokens, the model {theirs}: they must agree")
        self._starts, self.drafter_forwards = [len(p) for p in prompts], 0
        self._sources = [None] * len(prompts)
        real = [i for i, source in enumerate(sources) if source]  # without a source there is nothing to guess from
        if real:
            ids, mask = padded([sources[i] for i in real], self.pad, device_of(self))
            whole = self.read(ids, torch.ones_like(ids, dtype=torch.bool) if mask is None else mask)
            self.drafter_forwards += 1
            kept = {id(block): whole.keys_values(block) for block in self.decoder_blocks if isinstance(block, Block)}
            for at, i in enumerate(real):
                self._sources[i] = _row(whole, kept, at, len(sources[i]))

    def propose(self, row: int, context: list[int], budget: int) -> Draft | None:
        """The likeliest token at each of the next places; None without a source or beyond the last position."""
        source, written = self._sources[row], context[self._starts[row] :]
        count = min(self.block, budget, self.positions - len(written))
        if source is None or count < 1:
            return None
        self.drafter_forwards += 1
        tokens = torch.tensor([[*written, *[self.mask_id] * count]], device=device_of(self))
        guessed = self(source, tokens)[0, len(written) :].argmax(-1).tolist()
        if self.eos in guessed:
            guessed = guessed[: guessed.index(self.eos) + 1]
        return Draft.chain(guessed)


def _row(whole: Source, kept: dict[int, tuple[Tensor, Tensor]], at: int, count: int) -> Source:
    """One row of encoded sources, its cross-attention keys and values included, without padding."""
    made = Source(whole.values[at : at + 1, :count], None)
    made.made = {name: (k[at : at + 1, :, :count], v[at : at + 1, :, :count]) for name, (k, v) in kept.items()}
    return made
