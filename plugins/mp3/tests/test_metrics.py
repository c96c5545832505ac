"""Metrics over a whole evaluation."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch

from quire import ConfigError, Losses, Model
from quire.datasets.images import Digits
from quire.roles.probes.classify import Classify
from quire.roles.tokens.contract import Layout, Segment
from quire.roles.tokens.vit import ViTEncoder
from quire_mp3.metrics import GridDistance, PositionAccuracy
from quire_mp3.modules import Guesses
from quire_mp3.objective import PositionPrediction


def guesses(right: int, rows: int = 1) -> Losses:
    """Six tokens on a 2x3 grid, the first ``right`` of which are placed right and the others in cell 0."""
    layout = Layout.of(Segment("image", (2, 3), (2, 2), "image"))
    logits = torch.zeros(rows, 6, 6)
    for i in range(6):
        logits[:, i, i if i < right else 0] = 1
    cell, yes = torch.arange(6).expand(rows, 6), torch.ones(rows, 6, dtype=torch.bool)
    context = yes.clone()
    context[:, 3:] = False
    image = torch.zeros(rows, 1, 4, 6)
    image[:, :, 0, 0] = 1  # only the first patch is not constant
    return Losses({}, outputs={"position": Guesses(logits, cell, yes, context, layout, {"image": image})})


def test_metrics_count_tokens_over_batches_of_different_size():
    accuracy, distance = PositionAccuracy(), GridDistance()
    for right, rows in ((6, 1), (2, 3)):
        for metric in (accuracy, distance):
            metric.observe(None, {}, guesses(right, rows))
    assert accuracy.compute().item() == pytest.approx((6 + 3 * 2) / 24)
    assert distance.compute().item() == pytest.approx(3 * (2 + 1 + 2 + 3) / 24)  # cells 2..5 are that far from cell 0


def test_subsets_of_tokens():
    for subset, expected in (("context", 2 / 3), ("rest", 0.0), ("nonconstant", 1.0)):
        metric = PositionAccuracy(subset)
        metric.observe(None, {}, guesses(2))
        assert metric.compute().item() == pytest.approx(expected)


def test_a_subset_that_the_data_does_not_have_is_refused():
    said = "PositionAccuracy.subset is voiced, but this data has all, context, rest, nonconstant"
    with pytest.raises(ConfigError, match=said):
        PositionAccuracy("voiced").observe(None, {}, guesses(2))


def test_another_objective_is_refused():
    encoder = ViTEncoder(patch=2, width=16, depth=1, heads=2)
    with pytest.raises(ConfigError, match="PositionAccuracy needs a PositionPrediction; model.objective is Classify"):
        Model(encoder=encoder, objective=Classify(), metrics=[PositionAccuracy()])


def test_test_logs_each_metric_by_its_subset(tmp_path):
    encoder = ViTEncoder(patch=2, width=16, depth=1, heads=2, positions="none")
    metrics = [PositionAccuracy(), PositionAccuracy("rest"), GridDistance("nonconstant")]
    model = Model(encoder=encoder, objective=PositionPrediction(), metrics=metrics)
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, limit_test_batches=2, default_root_dir=tmp_path
    )
    (found,) = trainer.test(model, Digits(), verbose=False)
    assert {"test/PositionAccuracy", "test/PositionAccuracy_rest", "test/GridDistance_nonconstant"} <= set(found)
    assert found["test/PositionAccuracy"] == pytest.approx(found["test/accuracy"], abs=1e-6)
