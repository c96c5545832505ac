"""KeyInit: runs once, before training, on data without labels; on two processes as on one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from quire import load
from quire.__main__ import execute
from quire.data import DataModule, Fields
from quire.errors import ConfigError
from quire.roles.latent.pca import PCAEncoder
from quire_dkvb.keys import KeyInit
from quire_dkvb.modules import distortion


class Blind(DataModule):
    """Images without labels."""

    fields = ("image", "index")

    def split(self, name):
        return Fields(image=torch.rand(60, 1, 8, 8, generator=torch.Generator().manual_seed(3)))

    def sizes(self):
        return {"image_size": [8, 8], "channels": 1}


def heads_of(model, batch):
    return model.encoder.project(model.encoder.read(batch)[0].flatten(0, 1))


def test_the_bottleneck_brings_it_along_and_keys_fit_the_data(make, digits, trainer, some):
    model = make(ready=False)
    lost = distortion(heads_of(model, some(200)), model.encoder.keys)
    trainer().fit(model, datamodule=digits())
    assert bool(model.encoder.ready)
    assert distortion(heads_of(model, some(200)), model.encoder.keys) < min(0.5, lost / 2)
    assert model.encoder.usage.sum() == 256 * 6, "counted in phase 2 alone"


def test_what_fits_itself_at_the_start_is_fitted_first_and_a_sanity_check_is_no_mistake(make, digits, trainer):
    model = make(encoder=PCAEncoder(8), ready=False)
    trainer(num_sanity_val_steps=2, limit_val_batches=2).fit(model, datamodule=digits())
    assert bool(model.encoder.ready) and not model.encoder.checking


def test_keys_are_initialised_once_and_a_checkpoints_are_kept(make, digits, trainer):
    model = make(ready=False)
    trainer().fit(model, datamodule=digits())
    kept, usage = model.encoder.keys.clone(), model.encoder.usage.clone()
    trainer().fit(model, datamodule=digits())
    assert torch.equal(model.encoder.keys, kept)
    assert (model.encoder.usage >= usage).all() and model.encoder.usage.sum() == 2 * usage.sum()


def test_the_same_seed_gives_the_same_keys_and_another_one_others(make, digits, trainer):
    found = []
    for seed in (0, 0, 1):
        model = make(ready=False)
        model.seed = seed
        torch.rand(seed + len(found))  # a disturbed stream
        trainer(callbacks=[KeyInit(epochs=1)]).fit(model, datamodule=digits())
        found.append(model.encoder.keys)
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_other_data_without_labels_place_the_keys(make, digits, trainer):
    model = make(ready=False)
    blind = Blind()
    trainer(callbacks=[KeyInit(data=blind, batch_size=60)]).fit(model, datamodule=digits())
    heads = heads_of(model, {"image": blind.dataset("train").tensors["image"]})
    assert distortion(heads, model.encoder.keys) < 0.5


@pytest.mark.parametrize("method", ["kmeans", "uniform"])
def test_other_starts_stay_where_they_are_without_epochs(make, digits, trainer, some, method):
    model = make(ready=False)
    trainer(callbacks=[KeyInit(method=method, epochs=0)]).fit(model, datamodule=digits())
    heads, keys = heads_of(model, some(256)), model.encoder.keys
    assert (keys >= heads.amin(0)[:, None] - 0.5).all() and (keys <= heads.amax(0)[:, None] + 0.5).all()
    if method == "kmeans":
        assert distortion(heads, keys) < 0.4


def test_keys_may_start_on_rows_of_features_or_on_keys_of_a_file(make, digits, trainer, tmp_path):
    prototypes, keys = torch.rand(16, 64), torch.rand(6, 16, 4)
    save_file({"p": prototypes, "k": keys, "odd": torch.rand(5, 64)}, tmp_path / "w.safetensors")
    model = make(ready=False)
    trainer(callbacks=[KeyInit(method=f"{tmp_path}/w.safetensors#p", epochs=0)]).fit(model, datamodule=digits())
    torch.testing.assert_close(model.encoder.keys, model.encoder.project(prototypes).transpose(0, 1))
    model = make(ready=False)
    trainer(callbacks=[KeyInit(method=f"{tmp_path}/w.safetensors#k", epochs=0)]).fit(model, datamodule=digits())
    assert torch.equal(model.encoder.keys, keys)
    for name, said in (
        ("odd", r"odd is \[5, 64\]; features must be \[keys, 64\] with keys = 16"),
        ("x", "no tensor x"),
    ):
        with pytest.raises(ConfigError, match=said):
            trainer(callbacks=[KeyInit(method=f"{tmp_path}/w.safetensors#{name}")]).fit(make(ready=False), digits())


def test_learned_heads_lose_less_than_random_ones(make, digits, trainer, some):
    lost = {}
    for heads in ("random", "learned"):
        model = make({"heads": heads}, ready=False)
        before = model.encoder.R.clone()
        trainer(callbacks=[KeyInit(epochs=10, batch_size=64)]).fit(model, datamodule=digits())
        lost[heads] = distortion(heads_of(model, some(256)), model.encoder.keys)
        torch.testing.assert_close(model.encoder.R.norm(dim=0), torch.ones(6, 4))
        assert torch.equal(before, model.encoder.R) == (heads == "random")
    assert lost["learned"] < 0.9 * lost["random"]


def test_the_trainers_limit_holds_for_phase_one_too(make, digits, trainer):
    model, calls = make({"cache": False}, ready=False), []
    model.encoder.encoder.register_forward_hook(lambda *_: calls.append(1))
    trainer(limit_train_batches=2, callbacks=[KeyInit(epochs=3, batch_size=32)]).fit(model, datamodule=digits())
    assert len(calls) == 3 * 2 + 1 + 2, "steps of phase 1, the report, steps of phase 2"


# ---- bad input
@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"epochs": -1}, "needs epochs >= 0"),
        ({"decay": 1.0}, r"decay must be in \[0, 1\), got 1"),
        ({"method": "best"}, "method must be ema, kmeans, uniform or FILE#TENSOR, got 'best'"),
    ],
)
def test_impossible_arguments_are_refused(given, said):
    with pytest.raises(ConfigError, match=said):
        KeyInit(**given)


def test_more_keys_than_samples_for_kmeans_are_refused_with_both_numbers(make, digits, trainer):
    model = make({"keys": 80}, ready=False)
    with pytest.raises(ConfigError, match="places 80 keys on the 64 samples of the first batch: lower"):
        trainer(callbacks=[KeyInit(method="kmeans", batch_size=64)]).fit(model, datamodule=digits())


def test_no_data_module_and_no_bottleneck_are_refused(make, digits, trainer):
    with pytest.raises(ConfigError, match="give data as one, or KeyInit.data"):
        trainer().fit(make(ready=False), digits().train_dataloader())
    from quire.model import Model
    from quire.roles.latent.plain import FlatPixels
    from quire.roles.probes.classify import Classify

    with pytest.raises(ConfigError, match="KeyInit needs a KeyValueBottleneck; model.encoder is FlatPixels"):
        trainer(callbacks=[KeyInit()]).fit(Model(encoder=FlatPixels(), objective=Classify()), datamodule=digits())


# ---- two processes
CONFIG = {
    "seed_everything": 3,
    "model": {
        "encoder": {
            "class_path": "KeyValueBottleneck",
            "init_args": {"encoder": "FlatPixels", "codebooks": 8, "keys": 16, "key_width": 4, "heads": "learned"},
        },
        "decoder": "CodebookVote",
        "objective": "Classify",
        "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.3}},
        "schedule": "Constant",
    },
    "data": {
        "class_path": "ClassIncremental",
        "init_args": {
            "base": {"class_path": "Digits", "init_args": {"batch_size": 40, "train_samples": 200}},
            "epochs_per_split": 2,
        },
    },
    "trainer": {
        "max_epochs": 10,
        "accelerator": "cpu",
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "callbacks": [{"class_path": "KeyInit", "init_args": {"epochs": 3, "batch_size": 50}}],
    },
}
TWO = ["--data.base.init_args.batch_size", "20", "--trainer.devices", "2", "--trainer.strategy", "ddp"]


def test_two_processes_find_the_same_keys_values_and_counts_as_one(tmp_path: Path, monkeypatch) -> None:
    """Oracle 10: sums all-reduced, replacements shared, and the stream cut alike."""
    for name in ("one", "two"):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(CONFIG))
    monkeypatch.chdir(tmp_path)
    assert execute(["fit", "-c", "one.yaml"]) == 0
    command = [str(Path(sys.executable).with_name("lightning")), "fit", "-c", "two.yaml", *TWO]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = (load(next((tmp_path / "runs" / n).rglob("last.ckpt"))).state_dict() for n in ("one", "two"))
    assert one["encoder.usage"].sum() == 200 * 2 * 8
    assert torch.equal(one["encoder.usage"], two["encoder.usage"])
    for key in ("encoder.keys", "encoder.R", "encoder.values"):
        torch.testing.assert_close(one[key], two[key], atol=1e-5, rtol=1e-4)
