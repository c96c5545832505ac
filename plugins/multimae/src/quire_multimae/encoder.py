"""MultiModalViT: one transformer over the tokens of any set of modalities. Bachmann et al. 2022."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from quire.contracts import Batch, Spec
from quire.errors import ConfigError
from quire.recipe import instantiate
from quire.roles.tokens.contract import Layout, Subset, Tokens, gather, indices
from quire.roles.tokens.positions import interpolate, sincos
from quire.roles.tokens.timm_weights import TimmWeights, trunk_weights
from quire.roles.tokens.trunk import TrunkEncoder
from quire_multimae.adapters import ModalityAdapter, PatchAdapter, tiny_run


class SharedPlaces(nn.Module):
    """The same fixed sin-cos table for every modality: a finer or coarser grid reads it between its rows.

    Args:
        layout: Layout it is made for; the first segment's grid is the one that is computed.
        width: D.
        smooth: Segments read bicubically; the others (class maps) bilinearly.
        shared: False computes a table of its own for every segment.
    """

    table: Tensor
    all: Tensor

    def __init__(self, layout: Layout, width: int, smooth: set[str], shared: bool = True) -> None:
        super().__init__()
        self.layout, self.width, self.smooth, self.shared = layout, width, smooth, shared
        first = layout.segments[0].grid
        self.register_buffer("table", sincos(first, width), persistent=False)
        rows = [self._rows(s.name, s.grid) for s in layout.segments]
        self.register_buffer("all", torch.cat(rows), persistent=False)

    def forward(self, layout: Layout) -> Tensor:
        """[N,D] for ``layout``, which may lack modalities or have other grids."""
        if layout == self.layout:
            return self.all
        home = {(s.name, s.grid): s for s in self.layout.segments}
        parts = []
        for segment in layout.segments:
            own = home.get((segment.name, segment.grid))
            kept = None if own is None else self.all[own.start : own.stop]
            parts.append(self._rows(segment.name, segment.grid) if kept is None else kept)
        return torch.cat(parts)

    def _rows(self, name: str, grid: tuple[int, ...]) -> Tensor:
        first = self.layout.segments[0].grid
        if not self.shared or len(grid) != len(first):
            return sincos(grid, self.width).to(self.table)
        if name in self.smooth or grid == first:
            return interpolate(self.table, first, grid)
        field = self.table.float().reshape(*first, -1).movedim(-1, 0)[None]
        resized = nn.functional.interpolate(field, size=grid, mode="bilinear", align_corners=False)
        return resized[0].movedim(0, -1).reshape(-1, self.width).to(self.table)


class MultiModalViT(TrunkEncoder):
    """Pre-norm vision transformer over the tokens of any set of modalities. Bachmann et al. 2022, arXiv 2204.01678.

    Every modality has an adapter; tokens lie one modality after the other, in the order of the adapters. There is no
    embedding of the modality. A modality that the batch lacks has no tokens.

    Args:
        modalities: Adapter by name of the modality; the name is the batch field, unless the adapter says another.
        width: D; divisible by 4 for sin-cos positions.
        depth: Number of blocks.
        heads: Attention heads; they divide the width.
        mlp_ratio: Hidden width of the MLP over D.
        global_tokens: Learned tokens without a place, the prefix.
        positions: ``sincos`` (fixed, the same for every modality), ``none`` or ``learned`` (one table a modality).
        aligned: Whether all modalities show the same picture, so that their sizes must agree; false for a sound
            beside an image, which then has positions of its own.
        drop_path: Share of residual branches dropped in the last block, rising linearly from 0.
        final_norm: Whether a LayerNorm follows the last block; the paper's pretraining has none.
        start: Start of the weights: ``xavier``, uniform, or ``normal``, truncated and of deviation 0.02.

    Returns:
        Tokens: values [B,N,D] (or the kept ones), prefix [B,P,D], a layout with one segment a modality.

    Raises:
        ConfigError: no modality, sizes that don't divide or agree, a batch without any of the modalities.
    """

    capabilities = TrunkEncoder.capabilities | {"grid"}

    def __init__(
        self,
        modalities: dict[str, ModalityAdapter],
        width: int = 768,
        depth: int = 12,
        heads: int = 12,
        mlp_ratio: float = 4.0,
        global_tokens: int = 1,
        positions: str = "sincos",
        aligned: bool = True,
        drop_path: float = 0.0,
        final_norm: bool = False,
        start: str = "xavier",
    ) -> None:
        super().__init__(width, depth, heads, mlp_ratio, False, positions, True, None, drop_path, final_norm, start)
        if not modalities:
            raise ConfigError(
                "MultiModalViT.modalities is empty: name at least one, as image: {class_path: PatchAdapter}"
            )
        if global_tokens < 0:
            raise ConfigError(f"MultiModalViT.global_tokens must be at least 0, got {global_tokens}")
        made: Mapping[str, Any] = {name: instantiate(adapter) for name, adapter in modalities.items()}
        for name, adapter in made.items():
            if not isinstance(adapter, ModalityAdapter):
                raise ConfigError(f"modality {name!r} needs a PatchAdapter or ClassMapAdapter, got {adapter!r}")
        self.stem = nn.ModuleDict({name: adapter.named(name, width) for name, adapter in made.items()})
        self.prefix_tokens, self.aligned = global_tokens, aligned

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """MultiMAE on digits, their edges and their levels."""
        return tiny_run()

    @property
    def adapters(self) -> dict[str, Any]:
        """Adapter by modality."""
        return dict(cast(nn.ModuleDict, self.stem).items())

    def reads(self, stage: str) -> tuple[str, ...]:
        """Any one of the modalities' fields."""
        return ("|".join(a.field for a in self.adapters.values()),)

    def layout(self, source: Batch | Spec) -> Layout:
        """One segment for each modality that a batch has, or that a spec describes."""
        present = self.adapters
        if not isinstance(source, Spec):
            present = {name: a for name, a in present.items() if a.field in source}
        if not present:
            raise ConfigError(f"batch has none of: {', '.join(a.field for a in self.adapters.values())}")
        if self.aligned:
            self._agree(list(present.values()), source)
        return Layout.of(*(a.segment(source) for a in present.values()))

    def _agree(self, present: list[ModalityAdapter], source: Batch | Spec) -> None:
        first, *others = present
        height, width = first.size(source)
        for other in others:
            h, w = other.size(source)
            if (h * other.stride, w * other.stride) != (height * first.stride, width * first.stride):
                same = other.stride == first.stride
                wanted = f"{height * first.stride // other.stride}x{width * first.stride // other.stride}"
                raise ConfigError(
                    f"{other.name} is {h}x{w} but {first.name} is {height}x{width}; expected "
                    f"{'the same size' if same else wanted} at stride_level {other.stride}"
                )

    def make_stem(self, spec: Spec) -> nn.Module:
        """The adapters, which are built already."""
        return self.stem

    def build(self, spec: Spec) -> None:
        """Make adapters, positions, global tokens and blocks."""
        kind, count = self.positions, self.prefix_tokens
        self.positions, self.prefix_tokens = ("none" if kind == "sincos" else kind), 0
        try:
            super().build(spec)
        finally:
            self.positions, self.prefix_tokens = kind, count
        layout = self.layout(spec)
        if kind == "sincos":
            smooth = {name for name, a in self.adapters.items() if not a.classes}
            self.places: Any = SharedPlaces(layout, self.width, smooth, self.aligned)
        if count:  # vectors, not a matrix: no weight decay
            drawn = [nn.init.trunc_normal_(torch.empty(self.width), std=0.02) for _ in range(count)]
            self.prefix = nn.ParameterList([nn.Parameter(d) for d in drawn])

    def embed(self, batch: Batch, keep: Subset | Tensor | None = None) -> Tokens:
        """Tokens of every modality that the batch has, with positions; with ``keep`` only those."""
        layout = self.layout(batch)
        adapters = self.adapters
        parts = [adapters[s.name](batch[s.field]) for s in layout.segments]
        values = torch.cat(parts, 1) if len(parts) > 1 else parts[0]
        if self.places is not None:
            values = values + self.places(layout).to(values.dtype)
        rows = len(values)
        index = torch.arange(layout.cells, device=values.device).expand(rows, -1)
        if keep is not None:
            index = indices(keep, layout.cells)
            values = gather(values, index)
        prefix = torch.stack(list(self.prefix)).to(values.dtype).expand(rows, -1, -1) if self.prefix_tokens else None
        return Tokens(values, index, layout, None, prefix)  # type: ignore[arg-type]

    def patch_adapter(self, modality: str) -> PatchAdapter:
        """The adapter of a modality of numbers. Raises ``ConfigError`` for any other."""
        adapters = self.adapters
        if not isinstance(adapters.get(modality), PatchAdapter):
            have = ", ".join(n for n, a in adapters.items() if isinstance(a, PatchAdapter)) or "none"
            raise ConfigError(f"{modality!r} is no modality with a PatchAdapter; there are: {have}")
        return adapters[modality]

    def to_timm(self, modality: str = "image") -> TimmWeights:
        """One modality's adapter and the trunk as timm's ``VisionTransformer``; global tokens are its prefix."""
        adapter = self.patch_adapter(modality)
        segment = next(s for s in self.built_layout.segments if s.name == modality)
        channels = int(adapter.channels or 0)
        mean, std = (v if isinstance(v, list) else [v] * channels for v in (adapter.mean, adapter.std))
        return trunk_weights(self, adapter.proj, segment, channels, mean, std)

    def sizes(self) -> dict[str, Any]:
        """As every token encoder, ``modalities`` (adapters as plain values) and ``patch_values`` where all agree."""
        made = {**super().sizes(), "modalities": {name: a.resolved() for name, a in self.adapters.items()}}
        values = {a.values for a in self.adapters.values()}
        return {**made, "patch_values": values.pop()} if len(values) == 1 else made
