"""DirichletMask: how many tokens of each modality are seen, and which. Bachmann et al. 2022."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quire.errors import ConfigError
from quire.roles.masking import Masking, real_order
from quire.roles.tokens.contract import Layout, Subset
from quire_multimae.adapters import tiny_run


class DirichletMask(Masking):
    """Share a fixed number of visible tokens over the modalities by a Dirichlet draw per sample. Bachmann et al. 2022.

    Each sample draws shares pi, takes round(K pi_t) tokens of modality t uniformly, and is repaired to exactly K:
    rounding and small modalities leave too many, which are dropped at random, or too few, filled at random.

    Args:
        visible: K, tokens kept of each sample over all modalities; null takes ``ratio``.
        ratio: Share of all tokens kept where ``visible`` is null, in (0, 1].
        alpha: Concentration, above 0, one for all or by modality (1 where not named). Large: even shares; small:
            nearly all from one modality.
        subset_uniform: First draw, evenly, which modalities take part; the others get next to nothing.
        forced: Modality → tokens that are kept of it, exactly; the Dirichlet draw shares out the rest of K.

    Returns:
        A Subset with K on every row.

    Raises:
        ConfigError: ``alpha`` or ``ratio`` out of range, an unknown modality, more visible or forced than there are.
    """

    def __init__(
        self,
        visible: int | None = None,
        ratio: float = 1 / 6,
        alpha: float | dict[str, float] = 1.0,
        subset_uniform: bool = False,
        forced: dict[str, int] | None = None,
    ) -> None:
        super().__init__()
        for value in alpha.values() if isinstance(alpha, dict) else (alpha,):
            if not value > 0:
                raise ConfigError(f"alpha must be > 0, got {value}")
        if not 0 < ratio <= 1:
            raise ConfigError(f"ratio must be in (0,1], got {ratio:g}")
        if visible is not None and visible < 1:
            raise ConfigError(f"visible must be at least 1, got {visible}")
        if any(count < 0 for count in (forced or {}).values()):
            raise ConfigError(f"forced must name counts of at least 0, got {forced}")
        self.visible, self.ratio, self.alpha = visible, ratio, alpha
        self.subset_uniform, self.forced = subset_uniform, dict(forced or {})

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """MultiMAE on digits, their edges and their levels."""
        return tiny_run()

    def draw(self, layout: Layout, batch_size: int, mask: Tensor | None, generator: torch.Generator) -> Subset:
        """One draw per row; nothing waits for the device."""
        device, cells = generator.device, layout.cells
        _, _, fewest = real_order(mask, batch_size, cells, device)
        count = self.visible if self.visible is not None else max(1, round(self.ratio * fewest))
        if count > fewest:
            raise ConfigError(f"visible={count} exceeds the {fewest} tokens available")
        forced = self._forced(layout, count)
        noise = torch.rand(batch_size, cells, generator=generator, device=device)
        if mask is not None:
            noise = noise.masked_fill(~mask.to(device), 2.0)  # padding comes last in its modality
        key = torch.rand(batch_size, cells, generator=generator, device=device)
        left = count - sum(forced.values())
        wanted = (left * self._shares(layout, batch_size, forced, generator)).round().long()
        for i, segment in enumerate(layout.segments):
            own = slice(segment.start, segment.stop)
            rank = noise[:, own].argsort(1).argsort(1)
            if segment.name in forced:
                key[:, own] += torch.where(rank < forced[segment.name], -1.0, 2.0)
            else:
                key[:, own] += (rank >= wanted[:, i : i + 1]).to(key.dtype)
        if mask is not None:
            key = key.masked_fill(~mask.to(device), 4.0)
        return Subset.ordered(key.argsort(1), count)

    def _forced(self, layout: Layout, count: int) -> dict[str, int]:
        sizes = {s.name: s.cells for s in layout.segments}
        for name in (*self.forced, *(self.alpha if isinstance(self.alpha, dict) else ())):
            if name not in sizes and len(sizes) > 1:  # one modality alone: what is said of others is idle
                raise ConfigError(f"DirichletMask names {name!r}; the tokens are of {', '.join(sizes)}")
        forced = {k: n for k, n in self.forced.items() if k in sizes}
        for name, n in forced.items():
            if n > sizes[name]:
                raise ConfigError(f"forced keeps {n} tokens of {name}, which has {sizes[name]}")
        total, rest = sum(forced.values()), sum(n for k, n in sizes.items() if k not in forced)
        if not 0 <= count - total <= rest:
            raise ConfigError(f"forced keeps {total} and leaves {rest} free tokens, which can't make visible={count}")
        return forced

    def _shares(self, layout: Layout, rows: int, forced: dict[str, int], generator: torch.Generator) -> Tensor:
        """[B,T] Dirichlet shares, drawn in logarithms: at a small alpha the Gamma variables themselves underflow."""
        names, device = [s.name for s in layout.segments], generator.device
        said = self.alpha if isinstance(self.alpha, dict) else dict.fromkeys(names, self.alpha)
        alpha = torch.tensor([said.get(n, 1.0) for n in names], device=device, dtype=torch.float32).expand(rows, -1)
        free = torch.tensor([n not in forced for n in names], device=device)
        if self.subset_uniform:
            drawn = torch.randint(1, 2 ** len(names), (rows, 1), generator=generator, device=device)
            chosen = (drawn >> torch.arange(len(names), device=device)) & 1
            alpha = torch.where(chosen.bool(), alpha, 1e-5)
        gamma = torch._standard_gamma((alpha + 1).contiguous(), generator)  # Gamma(a) is Gamma(a + 1) U^(1/a)
        uniform = torch.rand(gamma.shape, generator=generator, device=device).clamp(min=1e-30)
        logs = (gamma.log() + uniform.log() / alpha).masked_fill(~free, -torch.inf)
        shares = logs.softmax(1)
        return torch.where(free, shares, 0.0).nan_to_num(0.0)
