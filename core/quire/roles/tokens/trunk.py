"""The trunk that our own encoders share: cells, stem, positions, class token, blocks, norm."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from quire.contracts import Batch, Spec
from quire.errors import ConfigError
from quire.roles.tokens.blocks import Rotation, make_blocks, run_tokens, start_weights
from quire.roles.tokens.contract import POSITIONS, Subset, TokenEncoder, Tokens, gather, indices, layer_number
from quire.roles.tokens.positions import Positions, attached, check_kind


class TrunkEncoder(TokenEncoder):
    """A pre-norm transformer over cells that a subclass cuts and embeds: ``layout``, ``cut``, ``make_stem``.

    Args:
        width: D.
        depth: Number of blocks.
        heads: Attention heads; they divide the width.
        mlp_ratio: Hidden width of the MLP over D.
        class_token: Whether a class token goes before the others.
        positions: What ``embed`` adds.
        key_bias: Whether keys have a bias.
        layer_scale: Start of a learned factor on each residual branch; None for no factor.
        drop_path: Share of residual branches dropped in the last block, rising linearly from 0.
        final_norm: Whether a LayerNorm follows the last block.
        start: Start of the linear maps' weights: ``normal`` (deviation 0.02) or ``xavier``.
    """

    capabilities = frozenset({"subset", "context", "features"})
    kinds: ClassVar[tuple[str, ...]] = POSITIONS

    def __init__(
        self,
        width: int,
        depth: int,
        heads: int,
        mlp_ratio: float,
        class_token: bool,
        positions: str,
        key_bias: bool,
        layer_scale: float | None,
        drop_path: float,
        final_norm: bool,
        start: str,
    ) -> None:
        super().__init__()
        if heads < 1 or width % heads:
            raise ConfigError(f"{type(self).__name__} has width={width}, not divisible by heads={heads}")
        if start not in ("normal", "xavier"):
            raise ConfigError(f"{type(self).__name__} has start={start!r}; it takes normal or xavier")
        self.width, self.depth, self.heads, self.mlp_ratio, self.start = width, depth, heads, mlp_ratio, start
        self.positions = check_kind(positions, self.kinds)
        self.prefix_tokens = int(class_token)
        self.key_bias, self.layer_scale, self.drop_path, self.final_norm = key_bias, layer_scale, drop_path, final_norm
        self.table_std = 0.02
        self.places: Positions | None = None

    # ---- what a subclass writes
    def cut(self, batch: Batch) -> Tensor:
        """Raw cells [B,N,…] in the layout's order."""
        raise NotImplementedError

    def make_stem(self, spec: Spec) -> nn.Module:
        """The map from raw cells [B,K,…] to [B,K,D]; it looks at one cell at a time."""
        raise NotImplementedError

    # ---- life
    def build(self, spec: Spec) -> None:
        """Make stem, positions, class token, blocks and norm."""
        super().build(spec)
        layout = self.layout(spec)
        self.stem = self.make_stem(spec)
        start_weights(self.stem, self.start)
        if self.positions in ("sincos", "learned"):
            self.places = Positions(self.positions, layout, self.width, self.table_std)
        if self.prefix_tokens:
            self.prefix = nn.ParameterList([nn.Parameter(torch.randn(self.prefix_tokens, self.width) * 0.02)])
        self.blocks = make_blocks(
            self.width,
            self.depth,
            self.heads,
            self.mlp_ratio,
            self.key_bias,
            self.layer_scale,
            self.drop_path,
            self.start,
        )
        self.norm = nn.LayerNorm(self.width, eps=1e-6) if self.final_norm else nn.Identity()

    def attach_positions(self, kind: str, init: str = "zeros", std: float = 0.02) -> None:
        """Give this encoder positions; ``init_args`` says so, so a checkpoint made later rebuilds with them."""
        if not attached(self, kind, init, self.positions):
            return
        self.table_std = std if init == "normal" else 0.0
        if self.built:
            like = next(self.blocks.parameters())
            self.places = Positions(kind, self.built_layout, self.width, self.table_std).to(like.device, like.dtype)

    def layers(self) -> list[nn.Module]:
        """Embedding, then the blocks."""
        first = [self.stem, *([self.places] if self.places is not None else [])]
        if self.prefix_tokens:
            first.append(self.prefix)
        return [nn.ModuleList(first), *self.blocks]

    # ---- use
    def embed(self, batch: Batch, keep: Subset | Tensor | None = None) -> Tokens:
        """Tokens with positions; with ``keep`` only those cells are cut out and embedded."""
        layout = self.layout(batch)
        cells, mask = self.cut(batch), self.token_mask(batch)
        rows = len(cells)
        index = torch.arange(layout.cells, device=cells.device).expand(rows, -1)
        places = None if self.places is None else self.places(layout)
        if keep is not None:
            index = indices(keep, layout.cells)
            cells = gather(cells, index)
            mask = None if mask is None else mask.gather(1, index)
            places = None if places is None else places[index]
        values = self.stem(cells)
        if places is not None:
            values = values + places.to(values.dtype)
        prefix = self.prefix[0].to(values.dtype).expand(rows, -1, -1) if self.prefix_tokens else None
        return Tokens(values, index, layout, mask, prefix)  # type: ignore[arg-type]

    def encode(
        self,
        tokens: Tokens,
        keep: Subset | Tensor | None = None,
        context: Subset | Tensor | None = None,
        context_update: bool = True,
    ) -> Tokens:
        """Run the blocks and the final norm on all, kept, or context-restricted tokens."""
        if keep is not None:
            tokens = tokens.take(indices(keep, tokens.values.shape[1]))
        return run_tokens(self.blocks, self.norm, tokens, context, context_update, self.rotation(tokens))

    def forward(
        self,
        batch: Batch,
        keep: Subset | Tensor | None = None,
        context: Subset | Tensor | None = None,
        context_update: bool = True,
    ) -> Tokens:
        """``embed`` of the kept cells only, then ``encode``."""
        return self.encode(self.embed(batch, keep), None, context, context_update)

    def features(self, batch: Batch, layer: int = -1) -> Tokens:
        """Hidden states before the final norm, after block ``layer`` (0: embedded tokens; -1: last block)."""
        blocks = self.blocks[: layer_number(layer, self.depth, type(self).__name__)]
        tokens = self.embed(batch)
        return run_tokens(blocks, nn.Identity(), tokens, rotation=self.rotation(tokens))

    def rotation(self, tokens: Tokens) -> Rotation | None:
        """Rotary angles of prefix and content tokens; None where positions aren't rotary."""
        return None
