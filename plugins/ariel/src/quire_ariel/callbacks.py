"""Beside the training loop: what random points say by now, and pictures of the way between sentences."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback

from quire.data import mix
from quire.errors import ConfigError
from quire.matching import refusal
from quire_ariel.decoder import VolumeDecoder
from quire_ariel.errors import CapacityError
from quire_ariel.grammar import SPECIAL, Grammar
from quire_ariel.measures import interval, marks, variety, words_of
from quire_ariel.pictures import Walk, draw, walk

SHOWN = 12


class LatentSampleReport(Callback):
    """Write what uniform points decode to, and draw the way between held-out sentences. Celotti et al. 2020.

    Files lie in ``cube`` beside the run's log: ``points-0001.txt`` after epoch 1, with the numbers, a few sentences
    and a walk, and ``cube.png`` at the end of fit and test. Without a grammar the numbers are different sentences,
    lengths and bits. Read variety against ``UniformCube`` in mode ``ancestral``: it is the language model's.

    Args:
        every: Epochs between two files.
        draws: Points of each.

    Needs:
        decoder: VolumeDecoder.

    Raises:
        ConfigError: a number below 1, or a model without a cube.
    """

    decoder: VolumeDecoder

    def __init__(self, every: int = 1, draws: int = 1000) -> None:
        super().__init__()
        if every < 1 or draws < 1:
            raise ConfigError(f"LatentSampleReport needs every >= 1 and draws >= 1, got {every} and {draws}")
        self.every, self.draws = every, draws

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """A report after each epoch on questions of the small grammar."""
        from quire_ariel.decoder import tiny_volume

        report = {"class_path": "LatentSampleReport", "init_args": {"draws": 50}}
        return {**tiny_volume(), "trainer": {"callbacks": [report]}}

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuse a model without a cube."""
        said = refusal(type(self), "decoder", pl_module.decoder)  # type: ignore[arg-type]
        if said:
            raise ConfigError(said)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Every few epochs."""
        done = trainer.current_epoch + 1
        folder = self._folder(trainer)
        if folder is not None and done % self.every == 0:
            folder.mkdir(parents=True, exist_ok=True)
            text = report(pl_module, trainer.datamodule, self.draws)
            (folder / f"points-{done:04d}.txt").write_text(text, encoding="utf-8")

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """The picture."""
        self._picture(trainer, pl_module)

    def on_test_end(self, trainer: Any, pl_module: Any) -> None:
        """The picture."""
        self._picture(trainer, pl_module)

    def _picture(self, trainer: Any, model: Any) -> None:
        folder = self._folder(trainer)
        if folder is not None:
            picture(folder / "cube.png", model, trainer.datamodule)

    def _folder(self, trainer: Any) -> Path | None:
        log = trainer.log_dir  # asked on every rank: Lightning broadcasts it
        if not trainer.is_global_zero or trainer.fast_dev_run or trainer.datamodule is None:
            return None
        return Path(log or trainer.default_root_dir) / "cube"


def report(model: Any, source: Any, draws: int) -> str:
    """Numbers, sentences of points and a walk, as text."""
    cube: VolumeDecoder = model.decoder.role(VolumeDecoder)
    read, grammar = reader(model), getattr(source, "grammar", None)
    chance = torch.Generator().manual_seed(mix(model.seed, draws))
    found = cube.decode(torch.rand(draws, cube.latent_dim, dtype=torch.float64, generator=chance))
    rows = found.rows()
    lines = [f"{draws} uniform points of {cube.latent_dim} axes, seed {model.seed}"]
    if isinstance(grammar, Grammar):
        drawn = words_of(rows, grammar.words, SPECIAL, cube.caps().eos_ids)
        for name, value in variety(drawn, grammar, {tuple(s) for s in source.drawn()["train"]}).items():
            lines.append(f"  {name:<14} {value:.4f}")
        for name, each in marks(drawn, grammar).items():
            low, high = interval(each)
            lines.append(f"  {name:<14} 95 % bootstrap interval {low:.4f} to {high:.4f}")
    else:
        lines.append(f"  {'unique':<14} {len({tuple(r) for r in rows}) / len(rows):.4f}")
        lines.append(f"  {'tokens':<14} {sum(map(len, rows)) / len(rows):.2f} a sentence")
    lines.append(f"  {'bits':<14} {float(-found.log2_volume.mean()):.2f} a sentence")
    lines.append(f"  {'truncated':<14} {float(found.truncated.double().mean()):.4f}")
    lines += ["", *(f"  {read(row)}" for row in rows[:SHOWN])]
    steps = _steps(model, source)
    if steps is not None:
        lines += ["", "from one held-out sentence to another:", *(f"  {text}" for text in steps[1].texts)]
    return "\n".join(lines) + "\n"


def picture(file: Path, model: Any, source: Any) -> None:
    """The map between four held-out sentences and the walk along its upper edge; nothing where they don't fit."""
    found = _steps(model, source)
    if found is not None:
        cube = model.decoder.role(VolumeDecoder)
        draw(file, cube, found[0], reader(model), found[1], f"a flat piece of the cube, {cube.latent_dim} axes")


def _steps(model: Any, source: Any) -> tuple[torch.Tensor, Walk] | None:
    cube: VolumeDecoder = model.decoder.role(VolumeDecoder)
    grammar, read = getattr(source, "grammar", None), reader(model)

    def valid(row: list[int]) -> bool | None:
        if not isinstance(grammar, Grammar):
            return None
        return grammar.valid(words_of([row], grammar.words, SPECIAL, cube.caps().eos_ids)[0])

    data = source.dataset("val")
    batch = source.collate([data[i] for i in range(min(16, len(data)))])
    points: list[torch.Tensor] = []
    for i in range(len(batch["tokens"])):
        mask = None if "mask" not in batch else batch["mask"][i : i + 1]
        try:
            codes = cube.encode(batch["tokens"][i : i + 1], mask, add_eos=True)
        except CapacityError:
            continue  # longer than the cube holds
        assert codes is not None
        points.append(codes.z[0])
        if len(points) == 4:
            break
    if len(points) < 4:
        return None
    return torch.stack(points), walk(cube, points[0], points[1], read, valid)


def reader(model: Any) -> Any:
    """Ids → text, or the ids where there is no tokenizer."""
    decode = getattr(getattr(model, "tokenizer", None), "decode", None)
    return decode or (lambda ids: " ".join(map(str, ids)))
