"""Pictures beside the run: the field, what is restored from noise, the chains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor

from quire.errors import ConfigError
from quire.matching import refusal
from quire_dae_score.denoiser import GaussianDenoiser, denoiser_of, evaluating
from quire_dae_score.latent import LatentField
from quire_dae_score.modules import tiny_run
from quire_dae_score.pictures import draw_field, draw_rows

POINTS = 2000
"""States or data points that a picture of the plane shows at most."""


class ScorePictures(Callback):
    """Draw a learnt score at the end of ``fit`` and chains at the end of ``predict``. After Alain and Bengio 2012.

    A GaussianDenoiser brings one by itself; list it to change its arguments. In the plane: ``field.png``, the score as
    arrows over the data, and ``chains.png``, the same with the chains' states. For images, and for latent codes that
    ``LatentField`` can turn back into images: ``restored.png`` (data, with noise, restored) and ``chains.png``, a row a
    chain from its start on. Other data are not drawn.

    Args:
        rows: Images or chains drawn.
        columns: States of a chain of images, evenly spaced in time.
        path: Folder; null is beside the run's log.
        seed: Of the noise in ``restored.png``; the run's own randomness isn't touched.

    Needs:
        objective: GaussianDenoiser.

    Raises:
        ConfigError: ``rows`` below 1 or ``columns`` below 2, or another objective.
    """

    objective: GaussianDenoiser

    def __init__(self, rows: int = 8, columns: int = 12, path: str | None = None, seed: int = 0) -> None:
        super().__init__()
        if rows < 1 or columns < 2:
            raise ConfigError(f"ScorePictures needs rows >= 1 and columns >= 2, got {rows} and {columns}")
        self.rows, self.columns, self.path, self.seed = rows, columns, path, seed
        self._data: list[Tensor] = []
        self._chains: list[Tensor] = []

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """Two modes in the plane."""
        drawing = {"class_path": "ScorePictures", "init_args": {"rows": 3}}
        return {**tiny_run(sampler={}), "trainer": {"callbacks": [drawing]}}

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuse another objective."""
        said = refusal(type(self), "objective", pl_module.objective)  # type: ignore[arg-type]
        if said:
            raise ConfigError(said)
        self._data, self._chains = [], []

    # ---- what is seen
    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Keep some data: as the model sees them, behind the transforms."""
        if trainer.current_epoch == 0 and sum(map(len, self._data)) < POINTS:
            self._data.append(self._seen(pl_module, batch))

    def on_predict_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Keep some chains and their starts."""
        if isinstance(outputs, dict) and "samples" in outputs and sum(map(len, self._chains)) < POINTS:
            self._data.append(self._seen(pl_module, batch))
            self._chains.append(outputs["samples"].detach())

    def _seen(self, model: Any, batch: Any) -> Tensor:
        field, source = denoiser_of(model, self).field, model.datamodule
        if source is not None and field not in batch:  # the step's own batch is the one before the transforms
            batch = source.transform(dict(batch), torch.Generator(model.device).manual_seed(self.seed), training=False)
        return batch[field].detach()

    # ---- drawing
    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """The field in the plane, or images restored from noise."""
        place = self._place(trainer)
        if place is not None and self._data:
            with trainer.precision_plugin.forward_context():
                self._draw_fit(place, pl_module, torch.cat(self._data))

    def on_predict_end(self, trainer: Any, pl_module: Any) -> None:
        """The chains."""
        place = self._place(trainer)
        if place is not None and self._chains:
            with trainer.precision_plugin.forward_context():
                self._draw_chains(place, pl_module, torch.cat(self._data), torch.cat(self._chains))

    def _place(self, trainer: Any) -> Path | None:
        log = trainer.log_dir  # asked on every rank: it waits for rank 0
        whole = isinstance(
            trainer.strategy, (SingleDeviceStrategy, DDPStrategy)
        )  # a sharded model can't run on one rank
        if not trainer.is_global_zero or not whole or trainer.fast_dev_run:
            return None
        return Path(self.path or log or trainer.default_root_dir)

    @torch.no_grad()
    def _draw_fit(self, place: Path, model: Any, data: Tensor) -> None:
        denoiser = denoiser_of(model, self)
        sigma = denoiser.sigma
        with evaluating(model):
            if data.shape[1:] == (2,):
                draw_field(place / "field.png", lambda x: denoiser.score(model, x, sigma), data[:POINTS], sigma)
                return
            clean = data[: self.rows]
            draws = torch.Generator(clean.device).manual_seed(self.seed)
            noisy = clean + sigma * torch.randn(clean.shape, generator=draws, device=clean.device)
            made = denoiser.restore(model, {denoiser.field: noisy}, sigma)
        shown = [as_images(model, x) for x in (clean, noisy, made)]
        if shown[0] is not None:
            names = ["data", "noisy", "restored"]
            draw_rows(place / "restored.png", torch.stack(shown, 1), names, f"σ = {sigma:g}")

    @torch.no_grad()
    def _draw_chains(self, place: Path, model: Any, starts: Tensor, chains: Tensor) -> None:
        denoiser = denoiser_of(model, self)
        sigma = denoiser.sigma
        if starts.shape[1:] == (2,):
            with evaluating(model):
                score = lambda x: denoiser.score(model, x, sigma)  # noqa: E731
                draw_field(place / "chains.png", score, starts[:POINTS], sigma, chains)
            return
        steps = torch.linspace(0, chains.shape[1] - 1, min(self.columns - 1, chains.shape[1])).round().long()
        states = torch.cat([starts[: self.rows, None], chains[: self.rows][:, steps.to(chains.device)]], 1)
        drawn = as_images(model, states.flatten(0, 1))
        if drawn is not None:
            names = ["start", *(str(int(s) + 1) for s in steps)]
            title = f"chains at σ = {sigma:g}: the start, then kept states by number"
            draw_rows(place / "chains.png", drawn.unflatten(0, states.shape[:2]), names, title)


def as_images(model: Any, states: Tensor) -> Tensor | None:
    """States [N,…] as images [N,C,H,W]: themselves, or what a ``LatentField`` of the run decodes; None otherwise."""
    if states.ndim == 4:
        return states
    for part in getattr(model.datamodule, "transforms", ()):
        if isinstance(part, LatentField):
            made = part.decode(states)
            return made if made is not None and made.ndim == 4 else None
    return None
