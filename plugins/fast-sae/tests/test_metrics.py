"""Means over dialogues are not means over tokens, whatever batches they came in."""

from __future__ import annotations

import math

import pytest
import torch
from fast_toys import SITE, dialogues, subject, write

from quire.contracts import Losses
from quire.errors import ConfigError
from quire.model import Model
from quire.reproduce import arm_trainer, quiet
from quire.roles.sparse.card import measure
from quire.roles.sparse.decoder import SparseDecoder
from quire.roles.sparse.encoder import SparseEncoder
from quire.roles.sparse.objective import SparseReconstruction
from quire.roles.sparse.selectors import TopK
from quire_fast_sae.instances import InstructActivations
from quire_fast_sae.metrics import SequenceMSE, SpecialTokenMSE

ERRORS, INSTANCES = torch.tensor([4.0, 1.0, 1.0, 1.0]), torch.tensor([5, 9, 9, 9])


def test_a_short_dialogue_counts_as_much_as_a_long_one():  # oracle: 2.5, log2 1.3219, where the token mean is 1.75
    for splits in ([4], [2, 2], [1, 1, 1, 1]):
        plain, log = SequenceMSE(log2=False), SequenceMSE()
        for e, i in zip(ERRORS.split(splits), INSTANCES.split(splits)):
            plain.update(e, i)
            log.update(e, i)
        assert plain.compute() == 2.5 and math.isclose(float(log.compute()), 1.3219, abs_tol=1e-4)
    assert ERRORS.mean() == 1.75
    assert plain.label == "SequenceMSE" and log.label == "SequenceMSE.log2"


def test_special_tokens_alone_by_type_and_without_the_first_position():
    metric = SpecialTokenMSE(log2=False)
    special = torch.tensor([True, True, False, True, True])
    errors = torch.tensor([8.0, 2.0, 100.0, 4.0, 6.0])
    rows = {"special": special, "instances": torch.tensor([0, 0, 0, 1, 1]), "positions": torch.tensor([0, 1, 2, 0, 1])}
    tokens = torch.tensor([256, 257, 65, 256, 257])
    metric.update(errors[:2], **{k: v[:2] for k, v in rows.items()}, tokens=tokens[:2])
    metric.update(errors[2:], **{k: v[2:] for k, v in rows.items()}, tokens=tokens[2:])
    assert metric.compute() == 5.0
    assert {k: float(v) for k, v in metric.table.items()} == {
        "": 5.0,
        "without position 0": 4.0,
        "median": 4.0,
        "token 256": 6.0,
        "token 257": 4.0,
    }


def test_no_special_token_is_refused():
    with pytest.raises(ConfigError, match="SequenceMSE has seen no token"):
        SequenceMSE().compute()
    metric = SpecialTokenMSE()
    with pytest.raises(ConfigError, match="SpecialTokenMSE has no special ids: "):
        metric.compute()
    none = torch.zeros(4, dtype=torch.bool)
    metric.update(ERRORS, none, INSTANCES, INSTANCES, INSTANCES)
    with pytest.raises(ConfigError, match="SpecialTokenMSE has no special ids: "):
        metric.compute()


def test_an_empty_list_of_special_ids_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"has no special ids: data\.special_ids is an empty list"):
        fitted(tmp_path, special_ids=[])


def fitted(tmp_path, **more):
    source = write(tmp_path / "x.jsonl", dialogues(60))
    data = InstructActivations(subject(), SITE, source, contexts=8, batch_size=32, buffer=256, **more)
    encoder = SparseEncoder(24, TopK(4), init="zeros")
    metrics = [SequenceMSE(log2=False), SpecialTokenMSE(log2=False)]
    model = Model(encoder, SparseDecoder(), SparseReconstruction(), metrics=metrics)
    with quiet():
        trainer = arm_trainer(max_steps=2, limit_val_batches=1.0)
        trainer.fit(model, datamodule=data)
        return trainer.validate(model, datamodule=data, verbose=False)[0], model, data


def test_a_run_logs_every_number_in_the_units_of_the_data(tmp_path):
    said, model, data = fitted(tmp_path)
    expected, marked = [], []
    for ids in data.source.dataset("val").tokens:
        x = data.studied().sites.read({"tokens": ids[None]}, [SITE]).values[SITE][0]
        with torch.no_grad():
            error = (model.decoder(model.encoder({"activation": x})) - x).square().mean(1)
        expected.append(error.mean())
        marked.append(error[ids >= 256].mean())
    assert math.isclose(said["val/SequenceMSE"], float(torch.stack(expected).mean()), rel_tol=1e-4)
    assert math.isclose(said["val/SpecialTokenMSE"], float(torch.stack(marked).mean()), rel_tol=1e-4)
    names = {k.removeprefix("val/SpecialTokenMSE ") for k in said if k.startswith("val/SpecialTokenMSE ")}
    assert names == {"<U>", "<A>", "<E>", "median", "without position 0"}


def test_whole_samples_and_other_objectives_are_read_too(tmp_path):
    _, model, data = fitted(tmp_path)
    batch = data.sample(data.rows("val").batch([0, 1, 2]))
    metric = SequenceMSE(log2=False)
    with torch.no_grad():
        metric.observe(model, batch, Losses({}))
    assert float(metric.compute()) > 0


def test_both_are_rows_of_the_card_and_leave_the_log_alone(tmp_path):
    said, model, data = fitted(tmp_path)
    metrics = [SequenceMSE(log2=False), SpecialTokenMSE(log2=False), SequenceMSE()]
    metrics[0].update(ERRORS, INSTANCES)
    card = measure(model.encoder, model.decoder, data, extra=metrics, splice=False)
    assert math.isclose(card.numbers["sequence_mse"], said["val/SequenceMSE"], rel_tol=1e-4)
    assert math.isclose(card.numbers["special_mse"], said["val/SpecialTokenMSE"], rel_tol=1e-4)
    assert math.isclose(card.numbers["sequence_mse_log2"], math.log2(said["val/SequenceMSE"]), rel_tol=1e-4)
    assert "special_mse without position 0" in card.numbers and "special_mse token 257" in card.numbers
    assert metrics[0].compute() == 2.5
    listed = measure(model.encoder, model.decoder, feed_without_marks(data), extra=metrics, splice=False)
    assert "special_mse" not in listed.numbers


def feed_without_marks(data):
    """The same dialogues, of which no token is special."""
    return InstructActivations(data.studied(), SITE, data.source, contexts=8, batch_size=32, drop_special=True)
