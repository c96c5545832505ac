"""Norms of codes against norms of inputs, with the bands that overlaps would allow."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from quire.errors import ConfigError
from quire.matching import refusal
from quire.roles.probes.subject import QUICK, Subject
from quire.roles.probes.watch import Watch
from quire.roles.sparse.card import resting
from quire.roles.sparse.decoder import SparseDecoder
from quire.roles.sparse.encoder import SparseEncoder
from quire.roles.sparse.selector import tiny_run
from quire_topafa.norms import eps_lbo, norms

COLOURS = ("#74c0fc", "#ffc078", "#b2f2bb", "#eebefa")


class ZFPlot(Watch):
    """Draw every token's |f~| against its |x|: on the diagonal where the AFA holds. Lee et al. 2025, arXiv 2503.24277.

    A band c = eps (h-1) lies between |x| / sqrt(1 + c) and |x| / sqrt(1 - c); tokens outside need more overlap of rows.
    Writes ``zf.png`` into the run's folder; needs matplotlib.

    Args:
        bands: Values of c, each in (0, 1]; at 1 the band has no upper edge.
        points: Most tokens that are drawn.
        every: Epochs between two drawings; 0 is only at the end of ``fit``, in ``validate`` and ``test``.

    Needs:
        encoder: SparseEncoder. decoder: SparseDecoder.

    Raises:
        ConfigError: a band outside (0, 1], or ``points`` below 1.
    """

    encoder: SparseEncoder
    decoder: SparseDecoder

    def __init__(self, bands: list[float] | None = None, points: int = 5000, every: int = 0) -> None:
        super().__init__("zf", every)
        self.bands = [0.25, 0.5, 1.0] if bands is None else sorted(bands)
        if any(not 0 < c <= 1 for c in self.bands):
            raise ConfigError(f"ZFPlot.bands must lie in (0, 1], got {bands}")
        if points < 1:
            raise ConfigError(f"ZFPlot.points must be at least 1, got {points}")
        self.points = points
        self.x, self.f, self.latents = torch.zeros(0), torch.zeros(0), 2

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """Planted features, TopK with k = 2."""
        run = tiny_run({"class_path": "TopK", "init_args": {"k": 2}})
        return {**run, "trainer": {"callbacks": [{"class_path": cls.__name__, "init_args": {"points": 16}}]}}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a model without a sparse decoder too."""
        super().setup(trainer, pl_module, stage)
        if stage != "predict" and (said := refusal(type(self), "decoder", pl_module.decoder)):  # type: ignore[arg-type]
            raise ConfigError(said)

    def measure(self, subject: Subject, split: str, epoch: int = 0, step: int = 0) -> dict[str, float]:
        """Norms of the first tokens of a split; this process' own."""
        encoder, decoder = subject.model.encoder.role(SparseEncoder), subject.model.decoder.role(SparseDecoder)
        most = min(self.points, QUICK) if subject.quick else self.points
        xs: list[Tensor] = []
        fs: list[Tensor] = []
        with resting(encoder, decoder), torch.no_grad(), subject.scope():
            for batch in getattr(subject.source, f"{split}_dataloader")():
                batch = {k: v.to(subject.device) if isinstance(v, Tensor) else v for k, v in batch.items()}
                x, f = norms(batch, encoder(batch), decoder)
                xs.append(x.cpu())
                fs.append(f.cpu())
                if sum(map(len, xs)) >= most:
                    break
        if not xs:
            raise ConfigError(f"ZFPlot has nothing to draw: the {split} split is empty")
        self.x, self.f, self.latents = torch.cat(xs)[:most], torch.cat(fs)[:most], encoder.latents
        ratio = float((self.f / self.x.clamp(min=1e-12)).mean())
        return {"/norm_ratio": ratio, "/eps_lbo": float(eps_lbo(self.x, self.f, self.latents).median())}

    def show(self, folder: Path) -> str:
        """Draw; where the picture is."""
        folder.mkdir(parents=True, exist_ok=True)
        draw(self.x, self.f, self.bands, folder / "zf.png")
        return f"zf: mean |f| / |x| {float((self.f / self.x.clamp(min=1e-12)).mean()):.4g}; wrote {folder / 'zf.png'}"


def edges(x: Tensor, c: float) -> tuple[Tensor, Tensor]:
    """(lower, upper) |f| that an overlap with eps (h-1) = c allows at norms ``x``; at c = 1 upper is infinite."""
    return x / math.sqrt(1 + c), x / math.sqrt(1 - c) if c < 1 else torch.full_like(x, torch.inf)


def draw(x: Tensor, f: Tensor, bands: list[float], file: Path) -> None:
    """The scatter with its diagonal and bands, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2, 5.0), layout="constrained")
    axes = figure.add_subplot()
    low, high = float(min(x.min(), f.min())), float(max(x.max(), f.max()))
    gap = 0.05 * (high - low) or 1.0
    line = torch.linspace(max(0.0, low - gap), high + gap, 64)
    for place, c in reversed(list(enumerate(bands))):
        lower, upper = edges(line, c)
        upper = upper.clamp(max=10 * (high + gap))
        axes.fill_between(line, lower, upper, color=COLOURS[place % len(COLOURS)], alpha=0.35, label=f"ε(h−1) = {c:g}")
    axes.plot(line, line, color="#212529", linewidth=1.0, label="|f| = |x|")
    axes.scatter(x, f, s=5, color="#364fc7", alpha=0.4, linewidths=0)
    axes.set_xlim(float(line[0]), float(line[-1]))
    axes.set_ylim(max(0.0, low - gap), high + gap)
    axes.set_xlabel("|x|: norm of the input")
    axes.set_ylabel("|f|: norm of the code")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(str(file), dpi=140)
