"""``quire reproduce mp3``: does position prediction help a classifier with few labels, and for how long?"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from quire.checkpoint import Pretrained
from quire.data import DataModule
from quire.datasets.images import Digits, TorchvisionImages
from quire.model import Model
from quire.reproduce import Band, Claim, Results, arm_trainer, difference, mean, quiet, spread
from quire.roles.probes.classify import Classify
from quire.roles.tokens.vit import ViTEncoder
from quire_mp3.callbacks import AttachPositions
from quire_mp3.metrics import GridDistance, PositionAccuracy
from quire_mp3.objective import PositionPrediction

MP3, SCRATCH = "MP3 0.5 with positions", "scratch with positions"
BARE, BARE_FULL = "MP3 0.5 without positions", "MP3 0 without positions"
LATE_MP3, LATE_SCRATCH = f"{MP3}, 900 steps", f"{SCRATCH}, 900 steps"
XAVIER_MP3, XAVIER_SCRATCH = f"{MP3}, Xavier start", f"{SCRATCH}, Xavier start"
LONG = f"{MP3}, 5000 pretraining and 900 steps"
MNIST_MP3, MNIST_SCRATCH = f"MNIST, {MP3}, 5000 pretraining and 900 steps", f"MNIST, {SCRATCH}, 900 steps"

TEST, PLACE = "test accuracy %", "position accuracy %"
NEEDED = 8.0
"""Points that MP3 must lead by."""


def _arm(
    masking: float | None, positions: bool, steps: int = 200, pretraining: int = 700, **more: Any
) -> dict[str, Any]:
    return {"masking": masking, "positions": positions, "steps": steps, "pretraining": pretraining, **more}


class PretrainingHelps(Claim):
    """MP3 before fine-tuning against training from scratch, on digits; Zhai et al. 2022, scaled down."""

    paper = "Position Prediction as an Effective Pretraining Strategy. Zhai et al., ICML 2022"
    statement = (
        "position prediction before supervised training beats supervised training from scratch, and a network without "
        "positions can beat a supervised one with them (the paper's claims in words; its tables were not available)"
    )
    budget = (
        "digits, 1400 unlabelled training images, 397 test images; ViT of 3 layers, width 48, patches of 2x2; 700 "
        "steps of pretraining, 200 of fine-tuning on 200 labels unless an arm says otherwise, batches of 64, learning "
        "rate 1e-3; weights start from a normal of deviation 0.02 as in DeiT, for all arms alike"
    )
    arms = {
        MP3: _arm(0.5, True),
        BARE: _arm(0.5, False),
        BARE_FULL: _arm(0.0, False),
        SCRATCH: _arm(None, True),
        "scratch without positions": _arm(None, False),
        LATE_MP3: _arm(0.5, True, 900),
        LATE_SCRATCH: _arm(None, True, 900),
        XAVIER_MP3: _arm(0.5, True, start="xavier"),
        XAVIER_SCRATCH: _arm(None, True, start="xavier"),
    }
    extra = {
        "long": {
            LONG: _arm(0.5, True, 900, 5000),
            MNIST_MP3: _arm(0.5, True, 900, 5000, data="mnist", labels=1000),
            MNIST_SCRATCH: _arm(None, True, 900, data="mnist", labels=1000),
        }
    }
    seeds = 3
    headline = TEST

    def __init__(self) -> None:
        self._pretrained: dict[tuple[Any, ...], tuple[Path, dict[str, float]]] = {}

    # ---- one arm
    def run(self, arm: str, settings: Mapping[str, Any], seed: int, quick: bool, folder: Path) -> dict[str, float]:
        """Pretrain if the arm does, fine-tune, test. Arms that differ later only share their pretraining."""
        mnist = settings.get("data") == "mnist"
        start = settings.get("start", "normal")
        if settings["masking"] is None:
            return _finetune(_encoder(mnist, start), settings, seed, mnist, folder)
        steps = settings["pretraining"] // 2 if quick else settings["pretraining"]
        key = (settings["masking"], steps, mnist, seed, start)
        if key not in self._pretrained:
            self._pretrained[key] = _pretrain(settings["masking"], steps, seed, mnist, folder, start)
        path, place = self._pretrained[key]
        return {**_finetune(Pretrained(str(path), freeze=False), settings, seed, mnist, folder), **place}

    # ---- what was claimed
    def bands(self, results: Results) -> list[Band]:
        """All three are for the short fine-tuning budget."""
        lead, error = difference(results, MP3, SCRATCH, TEST)
        bare, unsure = difference(results, BARE, SCRATCH, TEST)
        told = mean(results, MP3, PLACE)
        return [
            Band(
                f"{MP3} minus {SCRATCH}, test accuracy after 200 steps (standard error {error:.2g})",
                lead,
                f"at least +{NEEDED} points and above twice the standard error",
                None if math.isinf(error) else lead >= NEEDED and lead > 2 * error,
            ),
            Band("held-out position accuracy in %, chance is 6.25", told, "at least 25, 4 times chance", told >= 25),
            Band(
                f"{BARE} minus {SCRATCH}, test accuracy after 200 steps (standard error {unsure:.2g})",
                bare,
                "above 0",
                None if math.isinf(unsure) else bare > 0,
            ),
        ]

    def remarks(self, results: Results) -> list[str]:
        """What the verdict does not say."""
        held = [b.held for b in self.bands(results)]
        word = "not reproduced" if False in held else "can't tell from one seed" if None in held else "reproduced"
        said = [f"{word} at a short fine-tuning budget (200 steps); {_late(results, LATE_MP3, LATE_SCRATCH)}"]
        if held[0] is False:
            said.insert(0, f"not reproduced: {_both(results, MP3, SCRATCH)}, needed +{NEEDED}")
        masked, error = difference(results, BARE, BARE_FULL, TEST)
        said.append(f"not required: masking 0.5 minus masking 0, both without positions: {masked:+.1f} ± {error:.2g}")
        if XAVIER_MP3 in results:
            lead, error = difference(results, XAVIER_MP3, XAVIER_SCRATCH, TEST)
            said.append(
                f"with Xavier's start instead, at 200 steps: {lead:+.1f} ± {error:.2g} points "
                f"({_both(results, XAVIER_MP3, XAVIER_SCRATCH)}); a lead there makes up for a poor start of the control"
            )
        long = [p for p in ((LONG, LATE_SCRATCH), (MNIST_MP3, MNIST_SCRATCH)) if p[0] in results]
        said += [f"{arm}: {_late(results, arm, control)}" for arm, control in long]
        if MNIST_MP3 in results:
            said.append("MNIST arms: 60000 unlabelled and 1000 labelled images, 10000 to test; control not tuned")
        if not long:
            said.append("whether longer pretraining or more unlabelled data keep the lead: run it with --arms long")
        return said


def _both(results: Results, arm: str, control: str) -> str:
    one, other = (f"{mean(results, a, TEST):.1f} ± {spread(results, a, TEST):.1f}" for a in (arm, control))
    return f"MP3 {one}, scratch {other}"


def _late(results: Results, arm: str, control: str) -> str:
    lead, error = difference(results, arm, control, TEST)
    if math.isinf(error):
        return f"at 900 steps {lead:+.1f} points, and one seed can't tell ({_both(results, arm, control)})"
    word = "an advantage" if lead > 2 * error else "a disadvantage" if lead < -2 * error else "no advantage"
    return f"at 900 steps {word}: {lead:+.1f} points, standard error {error:.2g} ({_both(results, arm, control)})"


# ---- training
def _encoder(mnist: bool, start: str) -> ViTEncoder:
    """From scratch on few labels the normal start is worth over ten points: a control without it is a straw man."""
    return ViTEncoder(patch=4 if mnist else 2, width=48, depth=3, heads=4, positions="none", start=start)


def _data(mnist: bool, seed: int, labels: int | None = None) -> DataModule:
    if mnist:
        return TorchvisionImages("MNIST", "$QUIRE_DATA/mnist", seed=seed, batch_size=64, train_samples=labels)
    return Digits(seed=seed, batch_size=64, train_samples=labels)


def _pretrain(
    masking: float, steps: int, seed: int, mnist: bool, folder: Path, start: str
) -> tuple[Path, dict[str, float]]:
    pl.seed_everything(seed, verbose=False)
    objective = PositionPrediction(masking, pictures=0)
    metrics = [PositionAccuracy(), PositionAccuracy("nonconstant"), GridDistance()]
    model = Model(encoder=_encoder(mnist, start), objective=objective, metrics=metrics)  # type: ignore[arg-type]
    trainer, tested = _fit(model, _data(mnist, seed), steps, folder, [])
    trainer.save_checkpoint(folder / "pretrained.ckpt")
    return folder / "pretrained.ckpt", {
        PLACE: 100 * tested["test/PositionAccuracy"],
        "nonconstant %": 100 * tested["test/PositionAccuracy_nonconstant"],
        "grid distance": tested["test/GridDistance"],
    }


def _finetune(encoder: Any, settings: Mapping[str, Any], seed: int, mnist: bool, folder: Path) -> dict[str, float]:
    pl.seed_everything(seed, verbose=False)
    model = Model(encoder=encoder, objective=Classify())
    beside = [AttachPositions()] if settings["positions"] else []
    _, tested = _fit(model, _data(mnist, seed, settings.get("labels", 200)), settings["steps"], folder, beside)
    return {TEST: 100 * tested["test/accuracy"]}


def _fit(
    model: Model, data: DataModule, steps: int, folder: Path, callbacks: list[Any]
) -> tuple[pl.Trainer, Mapping[str, float]]:
    """Train without a word; the trainer, and what ``test`` measured."""
    with quiet():
        trainer = arm_trainer(
            max_epochs=-1,
            max_steps=steps,
            default_root_dir=folder,
            callbacks=callbacks,
        )
        trainer.fit(model, datamodule=data)
        return trainer, trainer.test(model, datamodule=data, verbose=False)[0]
