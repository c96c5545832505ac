"""ExplainByPrototypes: rows that account for the whole logit."""

import json

import pytest
import torch

from quire.contracts import Batch
from quire.errors import ConfigError
from quire_prototypes.modules import codes_of
from quire_prototypes.sampler import ExplainByPrototypes
from quire_prototypes.training import encode


def test_listed_contributions_and_the_rest_sum_to_the_logit(make, batch: Batch):
    model = make(sampler=ExplainByPrototypes(top=4))
    logits = model.decoder(codes_of(model, batch))
    rows = model.sampler(model, batch)
    assert len(rows) == 8 and json.dumps(rows)
    for i, row in enumerate(rows):
        assert row["index"] == i and row["label"] == batch["label"][i] and row["prediction"] == logits[i].argmax()
        parts = row["prototypes"]
        assert len(parts) == 4
        assert sum(p["contribution"] for p in parts) + row["rest"] == pytest.approx(row["logit"], abs=1e-5)
        assert row["logit"] == pytest.approx(logits[i].max().item(), abs=1e-6)
        assert [p["distance"] for p in parts] == sorted(p["distance"] for p in parts)
        for p in parts:
            assert p["contribution"] == pytest.approx(p["distance"] * p["weight"], abs=1e-6)
            assert p["weight"] == pytest.approx(model.decoder.class_weights[p["prototype"], row["prediction"]].item())
            assert p["class"] == model.decoder.owners()[p["prototype"]]
            assert p["nearest"] is None, "no data module, no case"


def test_null_lists_every_prototype_and_leaves_no_rest(make, batch: Batch):
    model = make(sampler=ExplainByPrototypes(top=None))
    for row in model.sampler(model, batch):
        assert sorted(p["prototype"] for p in row["prototypes"]) == list(range(15)) and row["rest"] == 0


def test_predict_adds_the_nearest_training_example(make, digits, trainer):
    model, data = make(sampler=ExplainByPrototypes()), digits()
    results = trainer().predict(model, datamodule=data)
    rows = [row for part in results for row in part]
    assert len(rows) == 450
    codes, labels = encode(model, data)
    for p in rows[7]["prototypes"]:
        distances = (codes - model.decoder.prototypes[p["prototype"]]).square().sum(1)
        best = int(distances.argmin())
        assert p["nearest"] == {
            "index": best,
            "distance": pytest.approx(distances[best].item(), rel=1e-5),
            "label": labels[best],
        }


def test_explanations_need_no_objective(make, batch: Batch):
    model = make(sampler=ExplainByPrototypes())
    model.objective = None
    with torch.no_grad():
        assert len(model.sampler(model, batch)) == 8


def test_no_prototypes_listed_is_refused():
    with pytest.raises(ConfigError, match="top must be at least 1"):
        ExplainByPrototypes(top=0)
