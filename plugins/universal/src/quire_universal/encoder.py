"""The Universal Transformer's encoder. Dehghani et al. 2018."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quire.contracts import Batch, Spec
from quire.errors import ConfigError, DataError
from quire.roles.tokens.contract import Layout, Segment, Subset, TokenEncoder, Tokens, gather, indices, layer_number
from quire.roles.tokens.patches import pair, patch_grid, patchify
from quire_universal.halting import Ponder
from quire_universal.sight import Sight
from quire_universal.universal import Universal


@dataclass
class PonderedTokens(Tokens):
    """Tokens that know what they cost.

    Args:
        ponder: [B,T] steps plus remainder, or None without halting.
        steps: [B,T] steps taken, or None without halting.
    """

    ponder: Tensor = None  # type: ignore[assignment]
    steps: Tensor = None  # type: ignore[assignment]

    def take(self, keep: Tensor) -> Tokens:
        """Only the tokens at ``keep`` [B,K]."""
        made = super().take(keep)
        assert isinstance(made, PonderedTokens)
        for name in ("ponder", "steps"):
            if (value := getattr(self, name)) is not None:
                setattr(made, name, gather(value, keep))
        return made


class UniversalEncoder(Universal, TokenEncoder):
    """One transformer block applied again and again to all tokens, with positions and steps signalled each time.

    Dehghani et al. 2018. Reads ``source`` and ``source_mask`` where the batch has them, else ``tokens`` and ``mask``;
    with ``patch`` it reads ``image``.

    Args:
        patch: Side of an image patch in pixels; null reads token ids.
        **kwargs: The recurrence's shape: arguments of ``Universal``.

    Returns:
        Tokens: values [B,T,D], mask [B,T]; with halting also ``ponder`` and ``steps`` [B,T].

    Raises:
        ConfigError: sizes that do not fit, unknown words, an empty source.
        DataError: a row of padding alone, an id outside the vocabulary.
    """

    fields = ("source|tokens|image",)
    capabilities = frozenset({"subset", "context", "features", "grid"})

    def __init__(self, patch: int | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.patch = None if patch is None else pair(patch, "UniversalEncoder.patch")
        self.positions = {"none": "none", "rope": "rope", "learned": "learned"}.get(self.position, "sincos")
        self.fields = ("image",) if self.patch is not None else ("source|tokens",)  # type: ignore[misc]
        if self.patch is None:
            self.capabilities = self.capabilities - {"grid"}

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """Patches of digits, classified."""
        shape = {"width": 16, "heads": 2, "ffn": 32, "steps": 2, "dropout": 0.0, "patch": 2}
        encoder = {"class_path": "UniversalEncoder", "init_args": shape}
        return {"model": {"encoder": encoder, "objective": "Classify"}, "data": "Digits"}

    # ---- life
    def layout(self, source: Batch | Spec) -> Layout:
        """Places of a batch's tokens or patches, or of a spec's."""
        if self.patch is not None:
            given = source.get("image")
            height, width = given.shape[-2:] if isinstance(given, Tensor) else Spec(source).need("image_size", self)
            return Layout.of(Segment("image", patch_grid(height, width, self.patch), self.patch, "image"))
        name = _field(source)
        ids = source.get(name)
        length = ids.shape[1] if isinstance(ids, Tensor) else Spec(source).need("length", self)
        return Layout.of(Segment("text", (int(length),), (1,), name))

    def build(self, spec: Spec) -> None:
        """Embedding, recurrence and halting unit."""
        length = self.layout(spec).cells
        self.stem: nn.Module
        if self.patch is not None:
            self.stem = nn.Linear(int(spec.need("channels", self)) * self.patch[0] * self.patch[1], self.width)
        else:
            self.ids = int(spec.need("vocab_size", self))
            self.stem = self.embedding(self.ids)
        self.length = length
        self.core = self.recurrence(length, causal=False, cross=False)
        self.drop = nn.Dropout(self.dropout)
        self.build_halting(spec)

    def sizes(self) -> dict[str, Any]:
        """As every token encoder, and ``vocab_size`` where it reads ids, ``patch_values`` where it reads images."""
        if isinstance(self.stem, nn.Linear):
            return {**super().sizes(), "patch_values": self.stem.in_features}
        return {**super().sizes(), "vocab_size": self.ids}

    def layers(self) -> list[nn.Module]:
        """Embedding and signals, then the block, or each step's own."""
        return [nn.ModuleList([self.stem, self.core.signals]), *self.core.blocks]

    def attach_positions(self, kind: str, init: str = "zeros", std: float = 0.02) -> None:
        """Give this encoder positions, added at every step; ``init_args`` says so."""
        if kind not in ("sincos", "learned") or init not in ("zeros", "normal"):
            raise ConfigError(f"positions are sincos or learned and start with zeros or normal, got {kind!r}, {init!r}")
        if self.positions == kind:
            return
        if self.positions != "none":
            raise ConfigError(f"UniversalEncoder has {self.positions} positions already; it can't get {kind} ones")
        self.positions, self.position = kind, "coordinate" if kind == "sincos" else "learned"
        self.init_args["position"] = self.position
        if self.built:
            signals, like = self.core.signals, next(self.core.parameters())
            signals.position = self.position
            if kind == "learned":
                signals.places = nn.Embedding(self.length, self.width).to(like.device, like.dtype)
                nn.init.normal_(signals.places.weight, std=std if init == "normal" else 0.0)

    # ---- use
    def token_mask(self, batch: Batch) -> Tensor | None:
        """The batch's own mask."""
        if self.patch is not None:
            return None
        return batch.get("source_mask" if _field(batch) == "source" else "mask")

    def embed(self, batch: Batch) -> Tokens:
        """Tokens without signals: these are added before every step."""
        layout, mask = self.layout(batch), self.token_mask(batch)
        if self.patch is not None:
            values = self.stem(patchify(batch["image"], self.patch))
        else:
            values = self.stem(self._ids(batch[_field(batch)], mask, _field(batch))) * self.width**0.5
        index = torch.arange(layout.cells, device=values.device).expand(len(values), -1)
        return Tokens(self.drop(values), index, layout, mask)  # type: ignore[arg-type]

    def _ids(self, ids: Tensor, mask: Tensor | None, name: str) -> Tensor:
        if not ids.shape[1]:
            raise ConfigError(f"UniversalEncoder: {name} is empty, [B,0]")
        if not ids.is_cuda and not torch.compiler.is_compiling():  # on a GPU it would wait
            low, high = int(ids.min()), int(ids.max())
            if low < 0 or high >= self.ids:
                raise DataError(f"{name} has id {low if low < 0 else high} but vocab_size={self.ids}")
            if mask is not None and not bool(mask.any(1).all()):
                raise DataError(f"row {int((~mask.any(1)).nonzero()[0])} of {name} is padding alone")
        return ids

    def encode(
        self,
        tokens: Tokens,
        keep: Subset | Tensor | None = None,
        context: Subset | Tensor | None = None,
        context_update: bool = True,
    ) -> PonderedTokens:
        """Run the recurrence and the final norm."""
        values, ponder, tokens = self._run(tokens, keep, context, context_update, self.steps, None)
        made = PonderedTokens(
            self.core.norm(values), tokens.index, tokens.layout, tokens.mask, tokens.prefix, tokens.padded
        )
        if ponder is not None:
            made.ponder, made.steps = ponder.cost, ponder.steps
        return made

    def features(self, batch: Batch, layer: int = -1) -> Tokens:
        """The state after step ``layer`` (0: embedded tokens; -1: the last step), before the final norm."""
        upto = layer_number(layer, self.steps, "UniversalEncoder")
        tokens = self.embed(batch)
        if not upto:
            return tokens
        states: list[Tensor] = []
        self._run(tokens, None, None, True, upto, states)
        return tokens.with_values(states[-1])  # where all have stopped the state stays

    def _run(
        self,
        tokens: Tokens,
        keep: Subset | Tensor | None,
        context: Subset | Tensor | None,
        context_update: bool,
        steps: int,
        states: list[Tensor] | None,
    ) -> tuple[Tensor, Ponder | None, Tokens]:
        if keep is not None:
            tokens = tokens.take(indices(keep, tokens.values.shape[1]))
        x, real = tokens.values, tokens.mask if tokens.padded else None
        columns = real
        if context is not None:
            chosen = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
            chosen = chosen.scatter(1, indices(context, x.shape[1], "context"), True)
            columns = chosen if real is None else chosen & real
        generator = self.chance(x.device)
        places = tokens.index + self.offsets(len(x), x.device, generator)
        if places.stride(0) == 0:
            places = places[:1]
        sight = Sight(places, None if columns is None else columns[:, None, None, :], real=real)
        sight.turn = self.turns(places, x)
        if context is not None and not context_update:
            sight.frozen = self.core.signals(x, 1, self.core.signals.at(places, x))
        values, ponder = self.core(x, sight, steps, self.halting, generator=generator, states=states)
        return values, ponder, tokens


def _field(source: Batch | Spec) -> str:
    return "source" if isinstance(source.get("source"), Tensor) else "tokens"
