"""The picture of a stream: accuracy on each split's classes after each split. After Träuble et al. 2023."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback

from quire.errors import ConfigError
from quire_dkvb.stream import ClassIncremental


class StreamPicture(Callback):
    """Draw accuracy over the stream: each split's classes and all classes, after each split. Träuble et al. 2023.

    It reads what validation found, so let validation run at the end of each split (``check_val_every_n_epoch`` equal to
    ``epochs_per_split``, or a divisor). At the end of fit it writes a PNG beside the run's log.

    Args:
        file: Name of the PNG.

    Needs:
        data: ClassIncremental. objective: one that hands out logits.

    Raises:
        ConfigError: other data.
    """

    def __init__(self, file: str = "stream.png") -> None:
        self.file = file
        self._rows: dict[int, np.ndarray] = {}
        self._seen: list[torch.Tensor] = []

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """A stream of digits through a linear head."""
        return {**ClassIncremental.tiny(), "trainer": {"max_epochs": 5, "callbacks": ["StreamPicture"]}}

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuse data that are no stream."""
        if not isinstance(trainer.datamodule, ClassIncremental):
            name = type(trainer.datamodule).__name__
            raise ConfigError(f"StreamPicture draws a stream of classes; data is {name}: wrap it in ClassIncremental")

    def on_validation_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Start counting."""
        classes = sum(map(len, trainer.datamodule.tasks()))
        self._seen = [torch.zeros(classes), torch.zeros(classes)]
        self._handle = pl_module.objective.register_forward_hook(self._count)

    def _count(self, objective: Any, args: Any, losses: Any) -> None:
        logits, label = losses.outputs.get("logits"), args[1]["label"].cpu()
        if logits is not None:
            hit = (logits.argmax(1).cpu() == label).float()
            self._seen[0].index_add_(0, label, hit)
            self._seen[1].index_add_(0, label, torch.ones_like(hit))

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Keep the newest accuracy by class of the current split."""
        self._handle.remove()
        right, total = (pl_module.all_gather(t.to(pl_module.device)).view(-1, len(t)).sum(0).cpu() for t in self._seen)
        if not trainer.sanity_checking and trainer.state.fn == "fit":
            self._rows[trainer.datamodule.current(trainer.current_epoch)] = (right / total).numpy()

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Draw."""
        folder = Path(trainer.log_dir or trainer.default_root_dir)  # asked on every rank: it waits for rank 0
        if not self._rows or not trainer.is_global_zero or trainer.fast_dev_run:
            return
        file = folder / self.file
        draw(file, self._rows, trainer.datamodule.tasks(), type(pl_module.encoder).__name__)


def draw(file: Path, rows: Mapping[int, np.ndarray], tasks: Sequence[Sequence[int]], name: str) -> None:
    """Left: accuracy by trained split and asked split. Right: all classes, between what is possible and forgetting all.

    Args:
        file: The PNG.
        rows: Accuracy by class [K] after each split.
        tasks: Classes of each split.
        name: Of what was trained.
    """
    from matplotlib.figure import Figure

    count, classes = len(tasks), sum(map(len, tasks))
    grid = np.full((count, count), np.nan)
    for s, by_class in rows.items():
        grid[s] = [np.nanmean(by_class[list(task)]) for task in tasks]
    figure = Figure(figsize=(9.2, 3.9), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1, 1.15])
    left.imshow(grid, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for s, t in np.argwhere(~np.isnan(grid)):
        colour = "white" if grid[s, t] > 0.6 else "black"
        left.text(t, s, f"{grid[s, t]:.2f}", ha="center", va="center", fontsize=8, color=colour)
    few = all(len(task) <= 3 for task in tasks)
    names = [", ".join(map(str, task)) if few else str(i + 1) for i, task in enumerate(tasks)]
    left.set_xticks(range(count), names, fontsize=8)
    left.set_yticks(range(count), names, fontsize=8)
    left.set(xlabel="asked about classes" if few else "asked about split", ylabel="just trained on")
    left.set_title("accuracy on each split", fontsize=9)

    steps = np.arange(1, count + 1)
    shown = sorted(rows)
    curve = [float(np.nanmean(rows[s])) for s in shown]
    seen = np.cumsum([len(task) for task in tasks]) / classes
    last = np.array([len(task) for task in tasks]) / classes
    right.plot(steps, seen, "--", color="#888888", label="knows all it was shown")
    right.plot(steps, last, ":", color="#888888", label="knows only the last split")
    right.plot([s + 1 for s in shown], curve, "o-", color="#1f3b57", label=name)
    right.set_xticks(steps)
    right.set(xlabel="splits trained", ylabel="accuracy on all classes", ylim=(0, 1.03))
    right.set_title(f"all {classes} classes: {curve[-1]:.3f} at the end", fontsize=9)
    right.legend(fontsize=8, loc="upper left")
    right.spines[["top", "right"]].set_visible(False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(str(file), dpi=140)
