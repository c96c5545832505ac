"""Probes beside a run: they change nothing, come when due, log the rows beside the result, and refuse early."""

from __future__ import annotations

import csv
import json
import random

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from tests.core.toys import Guess, Line, Toy
from torch import nn

from quire import ConfigError, Model, Objective
from quire.datasets.images import Digits
from quire.roles.latent.mlp import MlpVectorEncoder
from quire.roles.latent.plain import FlatPixels
from quire.roles.probes.attentive import AttentiveProbe
from quire.roles.probes.classify import Classify
from quire.roles.probes.health import Health
from quire.roles.probes.knn import KNNProbe
from quire.roles.probes.linear import LinearProbe
from quire.roles.probes.subject import untouched
from quire.roles.tokens.vit import ViTEncoder


class Normed(Line):
    """Line with a BatchNorm before it."""

    def build(self, spec):
        super().build(spec)
        self.batch = nn.BatchNorm1d(8)

    def forward(self, batch):
        return super().forward({"vector": self.batch(batch["vector"])})


class Idle(Objective):
    """Reads nothing, and fails once training begins."""

    def build(self, spec):
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, model, batch):
        raise AssertionError("training has begun")


def trainer(tmp_path, **kwargs):
    options = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return pl.Trainer(
        default_root_dir=tmp_path, **{**options, "enable_model_summary": False, "max_epochs": 2, **kwargs}
    )


def run(tmp_path, callbacks, encoder=None, data=None, **kwargs):
    pl.seed_everything(5)
    model = Model(encoder=encoder or Normed(), objective=Guess())
    made = trainer(tmp_path, callbacks=callbacks, **kwargs)
    made.fit(model, datamodule=data or Toy(batch_size=32))
    return model, made


def small_vit(**kwargs):
    return ViTEncoder(patch=4, width=16, depth=1, heads=2, drop_path=0.5, **kwargs)


def test_training_with_every_probe_is_bit_equal_to_training_without(tmp_path):
    # role-tokens 6: a probe never changes the training run
    states = []
    for probes in (
        [],
        [KNNProbe(), LinearProbe(every=1, max_train=100), AttentiveProbe(every=1, epochs=1), Health(max_samples=100)],
    ):
        pl.seed_everything(5)
        model = Model(encoder=small_vit(), objective=Classify(mixup=0.2))
        run = trainer(tmp_path, callbacks=probes, val_check_interval=0.5, max_epochs=1)
        run.fit(model, datamodule=Digits(batch_size=50, train_samples=200))
        states.append({**model.state_dict(), "_rng": torch.get_rng_state()})
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])


def test_batchnorm_statistics_modes_gradients_and_random_streams_are_left_alone(tmp_path):
    model, _ = run(tmp_path, [])
    model.train()
    model.encoder.norm.eval()
    model.encoder.linear.weight.requires_grad_(False)
    modes = {n: m.training for n, m in model.named_modules()}
    wants = {n: p.requires_grad for n, p in model.named_parameters()}
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    with untouched(model, torch.device("cpu")):
        assert not any(m.training for m in model.modules())
        assert not torch.is_grad_enabled()
        torch.manual_seed(7), np.random.rand(3), random.random()
        model.encoder(next(iter(Toy().loader("val"))))
    assert modes == {n: m.training for n, m in model.named_modules()}
    assert wants == {n: p.requires_grad for n, p in model.named_parameters()}
    assert all(torch.equal(b, buffers[n]) for n, b in model.named_buffers())
    assert torch.equal(before[0], torch.get_rng_state())
    assert (before[1] == np.random.get_state()[1]).all() and before[2] == random.getstate()


def test_each_result_has_a_random_encoder_and_a_raw_input_beside_it_in_log_and_files(tmp_path, capsys):
    _, made = run(tmp_path, [KNNProbe(k=3)], logger=CSVLogger(tmp_path, name="here"))
    seen = made.callback_metrics
    assert {"val/knn", "val/knn_random", "val/knn_raw"} <= set(seen)
    folder = tmp_path / "here" / "version_0"
    rows = json.loads((folder / "probe_knn.json").read_text())
    assert [r["features"] for r in rows] == ["random", "raw", "majority", "encoder", "encoder"]
    assert [r["epoch"] for r in rows if r["features"] == "encoder"] == [0, 1]
    assert rows[-1]["accuracy"] == pytest.approx(seen["val/knn"].item())
    assert rows[-1]["setting"] == {"k": 3, "temperature": 0.07} and rows[-1]["train_samples"] == 256
    with (folder / "probe_knn.csv").open() as handle:
        table = list(csv.DictReader(handle))
    assert len(table) == 5 and float(table[-1]["accuracy"]) == rows[-1]["accuracy"]
    logged = (folder / "metrics.csv").read_text().splitlines()[0]
    assert "val/knn_random" in logged
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("encoder", "random", "raw", "majority", "±"))


def test_raw_digits_are_known_to_reach_about_97_per_cent_by_neighbours(tmp_path):
    # role-tokens 6 [V]: raw pixels on Digits reach about 97 % by kNN
    pl.seed_everything(0)
    probe = KNNProbe()
    made = trainer(tmp_path, callbacks=[probe])
    model = Model(encoder=FlatPixels(), objective=Classify())
    made.validate(model, datamodule=Digits(), verbose=False)
    by = {row.features: row.accuracy for row in probe.rows}
    assert by["raw"] == pytest.approx(0.97, abs=0.01)
    assert by["encoder"] == by["random"] == by["raw"]  # FlatPixels is the raw input and has no weights
    assert by["majority"] < 0.15


def measured(probe):
    return [row.epoch for row in probe.rows if row.features == "encoder"]


def test_a_probe_comes_every_so_many_epochs_and_at_the_end(tmp_path):
    probe, last = KNNProbe(every=2), KNNProbe(every=0, label="last")
    run(tmp_path, [probe, last], max_epochs=5)
    assert measured(probe) == [1, 3, 4]
    assert measured(last) == [4]


def test_a_run_that_ends_by_steps_is_measured_with_its_last_weights(tmp_path):
    probe = KNNProbe(every=0)
    _, made = run(tmp_path, [probe], max_epochs=-1, max_steps=11, logger=CSVLogger(tmp_path))
    assert [row.step for row in probe.rows if row.features == "encoder"] == [11]
    assert made.callback_metrics["val/knn"].item() == pytest.approx(probe.rows[-1].accuracy)
    assert "val/knn" in (tmp_path / "lightning_logs/version_0/metrics.csv").read_text()


def test_without_validation_the_end_is_still_measured(tmp_path):
    probe = KNNProbe()
    run(tmp_path, [probe], limit_val_batches=0)
    assert len(measured(probe)) == 1


def test_validate_and_test_judge_their_own_split(tmp_path):
    probe = KNNProbe()
    model, made = run(tmp_path, [probe])
    (seen,) = made.test(model, datamodule=Toy(), verbose=False)
    assert {"test/knn", "test/knn_raw"} <= set(seen)
    assert probe.rows[-1].split == "test" and probe.rows[-1].samples == 50
    made.validate(model, datamodule=Toy(), verbose=False)
    assert probe.rows[-1].split == "val" and probe.rows[-1].samples == 64


def test_rows_beside_the_result_are_measured_once(tmp_path):
    probe = KNNProbe()
    run(tmp_path, [probe], max_epochs=4)
    assert [row.features for row in probe.rows].count("random") == 1
    assert len(measured(probe)) == 4


def test_a_resumed_run_writes_the_whole_history(tmp_path):
    path = tmp_path / "here.ckpt"
    _, made = run(tmp_path, [KNNProbe()], max_epochs=2)
    made.save_checkpoint(path)
    probe = KNNProbe()
    again = trainer(tmp_path, callbacks=[probe], max_epochs=4)
    again.fit(Model(encoder=Normed(), objective=Guess()), datamodule=Toy(batch_size=32), ckpt_path=path)
    assert measured(probe) == [0, 1, 2, 3]


def test_two_probes_of_one_kind_are_told_apart_by_their_label(tmp_path):
    _, made = run(tmp_path, [KNNProbe(k=1, label="nearest"), KNNProbe(k=5)])
    assert {"val/nearest", "val/knn"} <= set(made.callback_metrics)


def test_an_encoder_that_cannot_be_made_anew_leaves_the_random_row_out_and_says_why(tmp_path):
    class Local(Line):
        """Not importable by its path."""

    probe = KNNProbe()
    _, made = run(tmp_path, [probe], encoder=Local())
    row = next(r for r in probe.rows if r.features == "random")
    assert "Local" in row.note and row.plain()["accuracy"] is None
    assert "val/knn_random" not in made.callback_metrics


def test_test_labels_choose_nothing(tmp_path):
    # role-tokens 6: shuffling the judged split's labels changes the score, never the setting or the answers
    class Shuffled(Toy):
        def split(self, name):
            data = super().split(name)
            if name != "train":
                data.tensors["label"] = data.tensors["label"].flip(0)
            return data

    settings = []
    for source in (Toy(batch_size=32), Shuffled(batch_size=32)):
        probe = LinearProbe()
        run(tmp_path, [probe], data=source)
        settings.append([row.setting for row in probe.rows])
    assert settings[0] == settings[1]


def test_a_fast_dev_run_measures_a_few_samples_and_writes_nothing(tmp_path):
    probe = KNNProbe()
    run(tmp_path, [probe], fast_dev_run=True)
    assert max(row.samples for row in probe.rows) <= 64
    assert not list(tmp_path.rglob("probe_*"))


@pytest.mark.parametrize("class_token", [False, True])
def test_probes_of_a_vision_transformer_on_digits(tmp_path, class_token):
    pooling = "class" if class_token else "mean"
    probes = [KNNProbe(pooling=pooling), LinearProbe(pooling=pooling), AttentiveProbe(heads=2, epochs=10)]
    probes += [KNNProbe(layer=0, label="embedding")]
    pl.seed_everything(0)
    model = Model(encoder=small_vit(class_token=class_token), objective=Classify(pooling=pooling))
    trainer(tmp_path, callbacks=probes, max_epochs=2).fit(model, datamodule=Digits(train_samples=400))
    for probe in probes:
        by = {row.features: row for row in probe.latest()}
        assert by["encoder"].accuracy > by["majority"].accuracy + 0.05
        assert by["random"].samples == by["raw"].samples == 397
    assert probes[2].latest()[0].setting["heads"] == 2


@pytest.mark.parametrize(
    ("probe", "encoder", "data", "said"),
    [
        (lambda: KNNProbe(), Line, "bare", "KNNProbe reads the field label; Bare offers vector"),
        (lambda: AttentiveProbe(), Line, "toy", "AttentiveProbe needs a TokenEncoder; model.encoder is Line"),
        (lambda: AttentiveProbe(heads=3), small_vit, "digits", "heads 3 does not divide the encoder's width 16"),
        (lambda: KNNProbe(pooling="class"), small_vit, "digits", "KNNProbe.pooling is class, but the encoder has no"),
        (lambda: Health(pooling="class"), small_vit, "digits", "Health.pooling is class, but the encoder has no"),
        (lambda: KNNProbe(), None, "toy", "KNNProbe needs a Encoder; model.encoder is not set"),
    ],
)
def test_what_a_probe_cannot_judge_is_refused_before_training(tmp_path, probe, encoder, data, said):
    class Bare(Toy):
        fields = ("vector",)

    source = {"bare": Bare(), "toy": Toy(), "digits": Digits()}[data]
    model = Model(encoder=encoder() if encoder else None, objective=Idle())
    with pytest.raises(ConfigError, match=said):
        trainer(tmp_path, callbacks=[probe()], num_sanity_val_steps=0).fit(model, datamodule=source)


def test_data_that_is_no_quire_data_module_is_refused(tmp_path):
    made = trainer(tmp_path, callbacks=[KNNProbe()])
    with pytest.raises(ConfigError, match="KNNProbe reads whole splits: give data as a Quire data module"):
        made.fit(Model(encoder=MlpVectorEncoder(), objective=Idle()), torch.utils.data.DataLoader([1]))


@pytest.mark.parametrize("cls", [Classify, KNNProbe, LinearProbe, AttentiveProbe, Health])
def test_the_tiny_example_of_each_component_runs(tmp_path, cls):
    given = cls.tiny()
    data = given["data"]
    source = Digits(batch_size=128, **(data["init_args"] if isinstance(data, dict) else {}))
    listed = given.get("trainer", {}).get("callbacks", [])
    callbacks = [cls(**c["init_args"]) for c in listed]
    trainer(tmp_path, callbacks=callbacks, max_epochs=1).fit(Model(**_complete(given["model"])), datamodule=source)


def _complete(parts):
    return {k: v if isinstance(v, dict) else {"class_path": v} for k, v in parts.items()}
