"""``quire reproduce multimae``: equal to MAE on the image alone, better when another modality is what there is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from quire.checkpoint import Pretrained
from quire.contracts import Batch, Part
from quire.model import Model
from quire.reproduce import Band, Claim, Results, arm_trainer, difference, mean, quiet
from quire.roles.probes.classify import Classify
from quire.roles.tokens.patches import patchify
from quire.roles.tokens.reconstruct import GridDecoder, MaskedReconstruction
from quire_multimae.adapters import ClassMapAdapter, PatchAdapter
from quire_multimae.decoder import MultiTaskDecoder
from quire_multimae.digits import DigitModalities
from quire_multimae.encoder import MultiModalViT
from quire_multimae.masking import DirichletMask
from quire_multimae.objective import MaskedMultiTask
from quire_multimae.sampler import CrossModal

GREY, EDGES, BOTH = "MultiMAE, grey", "MultiMAE, edges", "MultiMAE, grey and edges"
MAE_GREY, MAE_EDGES = "MAE, grey", "MAE, edges"
SCRATCH_GREY, SCRATCH_EDGES = "scratch, grey", "scratch, edges"
OPTIMIZER: dict[str, Any] = {
    "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 2e-3, "weight_decay": 0.05, "fused": True}}
}
TEST, RATIO = "test accuracy %", "grey from edges, MSE / mean image's"
PATCH, WHOLE = "ridge from the same patch", "ridge from all edges"


def _arm(pretrained: str, inputs: list[str], alpha: float = 1.0) -> dict[str, Any]:
    return {"pretrained": pretrained, "inputs": inputs, "alpha": alpha, "pretraining": 2500, "steps": 200}


class CrossModalTransfer(Claim):
    """MultiMAE against MAE and no pretraining, on digits and their edges; Bachmann et al. 2022, scaled down."""

    paper = "MultiMAE: Multi-modal Multi-task Masked Autoencoders. Bachmann et al., ECCV 2022"
    statement = (
        "equal to MAE with the image alone, clearly better when further modalities are available downstream "
        "(the paper's results in words); here edges are a function of the grey image, so it is transfer, not new data"
    )
    budget = (
        "digits, 1400 unlabelled training images, 397 test images; transformer of 3 layers, width 48, patches of 2x2; "
        "2500 steps of pretraining at a learning rate of 2e-3 (MultiMAE: 12 of 48 tokens of grey, edges and 4 levels; "
        "MAE: 4 of 16 grey), 200 of fine-tuning at 1e-3 on 200 labels, batches of 64"
    )
    arms = {
        GREY: _arm("multimae", ["image"]),
        EDGES: _arm("multimae", ["edges"]),
        BOTH: _arm("multimae", ["image", "edges"]),
        MAE_GREY: _arm("mae", ["image"]),
        MAE_EDGES: _arm("mae", ["edges"]),
        SCRATCH_GREY: _arm("none", ["image"]),
        SCRATCH_EDGES: _arm("none", ["edges"]),
    }
    extra = {
        "alpha": {
            "MultiMAE, edges, alpha 0.1": _arm("multimae", ["edges"], 0.1),
            "MultiMAE, edges, alpha 1000": _arm("multimae", ["edges"], 1000.0),
        }
    }
    seeds = 3
    headline = TEST

    def __init__(self) -> None:
        self._pretrained: dict[tuple[Any, ...], tuple[Path, dict[str, float]]] = {}

    # ---- one arm
    def run(self, arm: str, settings: Mapping[str, Any], seed: int, quick: bool, folder: Path) -> dict[str, float]:
        """Pretrain if the arm does, fine-tune, test. Arms with one pretraining share it."""
        kind, inputs = settings["pretrained"], list(settings["inputs"])
        steps, tuning = settings["pretraining"] // (250 if quick else 1), settings["steps"] // (10 if quick else 1)
        if kind == "none":
            encoder = MultiModalViT(_adapters(inputs), width=48, depth=3, heads=4)
            return finetune(encoder, inputs, tuning, seed, folder)
        key = (kind, settings["alpha"], steps, seed)
        if key not in self._pretrained:
            self._pretrained[key] = pretrain(kind, settings["alpha"], steps, seed, folder)
        path, told = self._pretrained[key]
        as_image = kind == "mae"  # MAE knows one modality: edges go in as if they were the image
        found = finetune(Pretrained(str(path), freeze=False), inputs, tuning, seed, folder, as_image)
        return {**found, **told}

    # ---- what was claimed
    def bands(self, results: Results) -> list[Band]:
        """Cross-modal prediction, parity on the image, a lead on the other modality."""
        ratio = mean(results, GREY, RATIO)
        even, unsure = difference(results, GREY, MAE_GREY, TEST)
        lead, error = difference(results, EDGES, MAE_EDGES, TEST)
        return [
            Band(
                f"{RATIO} ({PATCH} {mean(results, GREY, PATCH):.2f}, {WHOLE} {mean(results, GREY, WHOLE):.2f})",
                ratio,
                "below 0.5, which a ridge regression from the same patch reaches",
                ratio < 0.5,
            ),
            Band(
                f"{GREY} minus {MAE_GREY}, test accuracy (standard error {unsure:.2g})",
                even,
                "within 3 points (parity)",
                None if math.isinf(unsure) else abs(even) <= 3,
            ),
            Band(
                f"{EDGES} minus {MAE_EDGES}, test accuracy (standard error {error:.2g})",
                lead,
                "at least +5 points",
                None if math.isinf(error) else lead >= 5,
            ),
        ]

    def remarks(self, results: Results) -> list[str]:
        """What the verdict does not say."""
        said = []
        lead, error = difference(results, EDGES, MAE_EDGES, TEST)
        if lead < 5:
            said.append(f"not reproduced: edges-only {lead:+.1f} ± {error:.2g} points, needed +5")
        for arm, control in ((GREY, SCRATCH_GREY), (EDGES, SCRATCH_EDGES), (BOTH, GREY)):
            found, error = difference(results, arm, control, TEST)
            said.append(f"not required: {arm} minus {control}: {found:+.1f} ± {error:.2g} points")
        for arm in self.extra["alpha"]:
            if arm in results:
                said.append(f"not required: {arm}: {RATIO} {mean(results, arm, RATIO):.2f}")
        said.append("edges and levels are functions of the grey image: nothing here shows gain from new information")
        return said


# ---- training
def _adapters(names: list[str]) -> dict[str, Any]:
    made: dict[str, Any] = {
        "image": PatchAdapter(2, mean=0.3, std=0.38),
        "edges": PatchAdapter(2, mean=0.3, std=0.25),
        "semantic": ClassMapAdapter(2, 1, embed_dim=8),
    }
    return {n: made[n] for n in names}


class Inputs(Part):
    """Only some modalities and the label; or the one as the image. Bachmann et al. 2022 (single-modality transfer)."""

    def __init__(self, names: list[str], as_image: bool = False) -> None:
        super().__init__()
        self.names, self.as_image = names, as_image

    def forward(self, batch: Batch, generator: torch.Generator) -> Batch:
        """The smaller batch."""
        others = {k: v for k, v in batch.items() if k in ("label", "index")}
        return {**others, **{("image" if self.as_image else n): batch[n] for n in self.names}}


def pretrain(kind: str, alpha: float, steps: int, seed: int, folder: Path) -> tuple[Path, dict[str, float]]:
    """A checkpoint, and for MultiMAE how well grey values follow from edges alone."""
    pl.seed_everything(seed, verbose=False)
    trunk: dict[str, Any] = {"width": 48, "depth": 3, "heads": 4}
    names = ["image"] if kind == "mae" else ["image", "edges", "semantic"]
    encoder = MultiModalViT(_adapters(names), **trunk)
    if kind == "mae":
        model = Model(encoder=encoder, decoder=GridDecoder(32, 2, 4), objective=MaskedReconstruction(0.75), **OPTIMIZER)
    else:
        objective = MaskedMultiTask(masking=DirichletMask(12, alpha=alpha), pictures=0)
        model = Model(
            encoder=encoder, decoder=MultiTaskDecoder(width=32, heads=4, depth=1), objective=objective, **OPTIMIZER
        )
    data = DigitModalities(seed=seed, batch_size=64)
    with quiet():
        trainer = arm_trainer(max_epochs=-1, max_steps=steps, default_root_dir=folder)
        trainer.fit(model, datamodule=data)
        trainer.save_checkpoint(folder / "pretrained.ckpt")
    return folder / "pretrained.ckpt", {} if kind == "mae" else grey_from_edges(model, data)


@torch.no_grad()
def grey_from_edges(model: Model, data: DigitModalities) -> dict[str, float]:
    """Test MSE of the grey image from edges alone, divided by the mean training image's; and of two ridge rows."""
    train, test = data.dataset("train").tensors, data.dataset("test").tensors  # type: ignore[attr-defined]
    wanted = test["image"]
    floor = (wanted - train["image"].mean(0)).square().mean()
    made = CrossModal({"edges": "all"})(model.eval(), {"edges": test["edges"]})["image"]
    found = {RATIO: float((made - wanted).square().mean() / floor)}
    for name, cells in ((PATCH, True), (WHOLE, False)):
        views = [[patchify(f[k], (2, 2)) for k in ("edges", "image")] for f in (train, test)]
        if not cells:
            views = [[v.flatten(1)[:, None] for v in pair] for pair in views]
        (x, y), (x_test, y_test) = views
        error = _ridge(x, y, x_test, y_test)
        found[name] = float(error / floor)
    return found


def _ridge(x: Tensor, y: Tensor, x_test: Tensor, y_test: Tensor, strength: float = 1.0) -> Tensor:
    """Test MSE of a ridge regression with a bias for each cell: [S,N,F] → [S,N,G]."""
    errors = []
    for cell in range(x.shape[1]):
        a, b = (torch.nn.functional.pad(v[:, cell].double(), (0, 1), value=1.0) for v in (x, x_test))
        weights = torch.linalg.solve(
            a.T @ a + strength * torch.eye(a.shape[1], dtype=a.dtype), a.T @ y[:, cell].double()
        )
        errors.append((b @ weights - y_test[:, cell]).square().mean())
    return torch.stack(errors).mean()


def finetune(
    encoder: Any, inputs: list[str], steps: int, seed: int, folder: Path, as_image: bool = False
) -> dict[str, float]:
    """Test accuracy after fine-tuning on 200 labels."""
    pl.seed_everything(seed, verbose=False)
    model = Model(encoder=encoder, objective=Classify())
    transforms: list[Any] = [Inputs(inputs, as_image)]
    data = DigitModalities(seed=seed, batch_size=64, train_samples=200, transforms=transforms)
    with quiet():
        trainer = arm_trainer(max_epochs=-1, max_steps=steps, default_root_dir=folder)
        trainer.fit(model, datamodule=data)
        tested = trainer.test(model, datamodule=data, verbose=False)[0]
    return {TEST: 100 * tested["test/accuracy"]}
