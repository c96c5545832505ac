"""``quire reproduce prototypes``: do R1 and R2 make prototypes real-looking and representative, and at what cost?"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from lightning.pytorch import Callback, seed_everything
from torch import Tensor

from quire.contracts import Batch
from quire.datasets.images import Digits
from quire.model import Model
from quire.reproduce import Band, Claim, Results, arm_trainer, mean, quiet
from quire.roles.latent.mlp import MlpVectorDecoder, MlpVectorEncoder
from quire.roles.probes.classify import Classify
from quire.schedule import Constant
from quire_prototypes.callbacks import PrototypeImages
from quire_prototypes.distances import squared_distances
from quire_prototypes.metrics import (
    PrototypeClassCoverage,
    PrototypePixelDistance,
    PrototypesUsed,
    R1Full,
    R2Full,
)
from quire_prototypes.modules import PrototypeLayer, codes_of, layer_of
from quire_prototypes.objective import CaseBasedReasoning
from quire_prototypes.start import centres
from quire_prototypes.training import encode, evaluating, scan, take

EPOCHS, BATCH, PROTOTYPES, CLASSES = 150, 250, 15, 10
WITH, WITHOUT = "R1=1 R2=1", "R1=0 R2=0"
LINEAR, KMEANS = "linear head", "k-means"
NAMES = {
    "accuracy": "accuracy",
    "R1Full": "R1",
    "R2Full": "R2",
    "PrototypePixelDistance": "pixel distance",
    "reconstruct": "AE error",
    "PrototypeClassCoverage": "classes owned",
    "PrototypesUsed": "prototypes used",
}


class PrototypesClaim(Claim):
    """Li et al. 2018 on scikit-learn's digits: (R1, R2) switched on and off, against a plain head and k-means.

    The k-means arm trains the same net with R1 and R2, then puts 15 centres of its training codes in the prototypes'
    place; a sample gets the majority class of its nearest centre.
    """

    paper = (
        "Deep Learning for Case-Based Reasoning through Prototypes: A Neural Network that Explains Its Predictions, "
        "Oscar Li, Hao Liu, Chaofan Chen, Cynthia Rudin, AAAI 2018"
    )
    statement = "R1 and R2 make prototypes real-looking and representative without loss of accuracy"
    budget = (
        f"scikit-learn digits, 1347 training and 450 test images, MLP 64-128-10-128-64, {PROTOTYPES} prototypes, "
        f"{EPOCHS} epochs of batches of {BATCH}, Adam 0.002, classify 20, reconstruct 1; R1, R2 and pixel distance on "
        "all training data, the rest on test images"
    )
    arms: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        WITH: {"r1": 1.0, "r2": 1.0},
        WITHOUT: {"r1": 0.0, "r2": 0.0},
        "R1=1 R2=0": {"r1": 1.0, "r2": 0.0},
        "R1=0 R2=1": {"r1": 0.0, "r2": 1.0},
        "R1=5 R2=5": {"r1": 5.0, "r2": 5.0},
        LINEAR: {"head": "linear"},
        KMEANS: {"head": "kmeans", "r1": 1.0, "r2": 1.0},
    }
    seeds = 5
    quick_seeds = 2
    headline = "pixel distance"

    def run(self, arm: str, settings: Mapping[str, Any], seed: int, quick: bool, folder: Path) -> dict[str, float]:
        """Train one arm and measure it."""
        with quiet():
            seed_everything(seed, verbose=False)
            head = settings.get("head", "prototypes")
            model = _linear() if head == "linear" else _prototypes(settings["r1"], settings["r2"])
            data = Digits(split="stratified", batch_size=BATCH, seed=seed)
            pictures: list[Callback] = [PrototypeImages(every=EPOCHS, path=str(folder))] if head != "linear" else []
            trainer = arm_trainer(
                max_epochs=EPOCHS,
                callbacks=pictures,
                default_root_dir=str(folder),
            )
            trainer.fit(model, datamodule=data)
            logged = trainer.test(model, datamodule=data, verbose=False)[0]
            if head == "linear":
                return {"accuracy": logged["test/accuracy"]}
            measured = {name: logged[f"test/{key}"] for key, name in NAMES.items()}
            if head == "kmeans":
                return measured | _by_centres(model, data, seed)
            return measured | _uncovered(layer_of(model).owners())

    def bands(self, results: Results) -> list[Band]:
        """Accuracy kept, R1 far lower, decoded prototypes nearer to real images."""
        accuracy, without = (mean(results, arm, "accuracy") for arm in (WITH, WITHOUT))
        r1 = mean(results, WITH, "R1") / mean(results, WITHOUT, "R1")
        pixels = mean(results, WITH, "pixel distance") / mean(results, WITHOUT, "pixel distance")
        return [
            Band(f"test accuracy of {WITH}", accuracy, ">= 0.95", accuracy >= 0.95),
            Band(f"accuracy of {WITH} minus {WITHOUT}", accuracy - without, ">= -0.01", accuracy - without >= -0.01),
            Band(f"R1 of {WITH} over {WITHOUT}", r1, "< 1/3", r1 < 1 / 3),
            Band(f"pixel distance of {WITH} over {WITHOUT}", pixels, "<= 0.7", pixels <= 0.7),
        ]

    def remarks(self, results: Results) -> list[str]:
        """Uncovered classes of every arm, the interval of the accuracy difference, what the controls say."""
        said = [note for arm in results if (note := _coverage(arm, results[arm]))]
        low, high = _interval(results, WITH, WITHOUT, "accuracy")
        said.append(f"accuracy of {WITH} minus {WITHOUT}: 95 % bootstrap interval over seeds [{low:+.4f}, {high:+.4f}]")
        for control in (LINEAR, KMEANS):
            gap = mean(results, WITH, "accuracy") - mean(results, control, "accuracy")
            said.append(f"accuracy of {WITH} minus the control {control}: {gap:+.4f}")
        better = [m for m in ("R1", "R2", "pixel distance") if mean(results, KMEANS, m) < mean(results, WITH, m)]
        if better:
            said.append(f"{KMEANS} centres of the same codes are better on {', '.join(better)} than learnt prototypes")
        said.append("the paper's own data (MNIST, cars, Fashion-MNIST) and accuracies are not tested here")
        return said


# ---- arms
def _encoder() -> MlpVectorEncoder:
    return MlpVectorEncoder(widths=(128,), code=10, code_activation="sigmoid")


def _model(**parts: Any) -> Model:
    adam = functools.partial(torch.optim.Adam, lr=0.002)
    return Model(encoder=_encoder(), optimizer=adam, schedule=Constant(), **parts)


def _prototypes(r1: float, r2: float) -> Model:
    return _model(
        decoder=PrototypeLayer(MlpVectorDecoder(widths=(128,)), prototypes=PROTOTYPES),
        objective=CaseBasedReasoning(r1=r1, r2=r2),
        metrics=[R1Full(), R2Full(), PrototypePixelDistance(), PrototypeClassCoverage(), PrototypesUsed()],
    )


def _linear() -> Model:
    return _model(objective=Classify())


@torch.no_grad()
def _by_centres(model: Model, data: Digits, seed: int) -> dict[str, float]:
    """What the trained codes' own k-means centres reach in the prototypes' place."""
    layer = layer_of(model)
    codes, labels = encode(model, data)
    assert labels is not None, "digits have labels"
    layer.prototypes.copy_(centres(codes, PROTOTYPES, seed))
    votes = torch.zeros(PROTOTYPES, CLASSES)
    votes.index_put_((_nearest(layer, codes), labels), torch.ones(len(labels)), accumulate=True)
    owners = votes.argmax(dim=1)
    found = scan(model, data)
    test: Batch = take(model, data, "test", list(range(len(data.dataset("test")))))  # type: ignore[arg-type]
    with evaluating(model):
        nearest = _nearest(layer, codes_of(model, test).vector)
    assert found.pixels is not None, "the layer decodes to pixels"
    return {
        "accuracy": float((owners[nearest] == test["label"]).float().mean()),
        "R1": float(found.r1),
        "R2": float(found.r2),
        "pixel distance": float(found.pixels.mean()),
        "classes owned": float(len(owners.unique())),
        "prototypes used": float(len(nearest.unique())),
        **_uncovered(owners),
    }


def _nearest(layer: PrototypeLayer, codes: Tensor) -> Tensor:
    return squared_distances(codes, layer.prototypes).min(dim=1).indices


# ---- remarks
def _uncovered(owners: Tensor) -> dict[str, float]:
    """A mark for each class that owns no prototype."""
    return {f"class {k} uncovered": 1.0 for k in sorted(set(range(CLASSES)) - set(owners.tolist()))}


def _coverage(arm: str, seeds: Mapping[int, Mapping[str, float]]) -> str:
    missing = {}
    for seed, metrics in seeds.items():
        classes = [k for k in range(CLASSES) if f"class {k} uncovered" in metrics]
        if classes:
            missing[seed] = ", ".join(map(str, classes))
    if not missing:
        return ""
    return f"{arm}: classes without a prototype: " + "; ".join(f"{k} (seed {s})" for s, k in missing.items())


def _interval(results: Results, arm: str, control: str, metric: str) -> tuple[float, float]:
    """95 % bootstrap interval of the mean paired difference over seeds."""
    deltas = np.array([results[arm][s][metric] - results[control][s][metric] for s in sorted(results[arm])])
    draws = np.random.default_rng(0).choice(deltas, (10_000, len(deltas))).mean(axis=1)
    low, high = np.percentile(draws, [2.5, 97.5])
    return float(low), float(high)
