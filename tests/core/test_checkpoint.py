from __future__ import annotations

import json
import os
import pickle

import lightning.pytorch as pl
import pytest
import torch
from tests.core.toys import Guess, Line, Rebuild, Toy

import quire
from quire import ConfigError, Model, Pretrained, Sum
from quire.contracts import plain


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A trained model and its checkpoint."""
    folder = tmp_path_factory.mktemp("run")
    pl.seed_everything(1)
    model = Model(
        encoder=Line(out=6),
        objective=Sum([Guess(term="a"), Guess(term="b")], weights=[1.0, 0.5]),
        optimizer=torch.optim.Adam,
    )
    run = pl.Trainer(default_root_dir=folder, accelerator="cpu", max_epochs=1, logger=False, enable_progress_bar=False)
    run.fit(model, datamodule=Toy())
    return model.eval(), run.checkpoint_callback.best_model_path


def batch():
    return {"vector": torch.randn(5, 8, generator=torch.Generator().manual_seed(2))}


def test_reloads_without_yaml_with_the_same_outputs(trained):
    model, path = trained
    again = quire.load(path)
    assert torch.equal(model(batch()), again(batch()))
    assert again.objective.factors == [1.0, 0.5]
    assert again.hparams["optimizer"]["class_path"].endswith("Adam")
    assert not again.training


def test_lightnings_own_load_from_checkpoint_works_without_arguments(trained):
    model, path = trained
    again = Model.load_from_checkpoint(path, weights_only=True).eval()
    assert torch.equal(model(batch()), again(batch()))


def test_export_is_safetensors_and_json_and_comes_back(trained, tmp_path):
    model, _ = trained
    folder = quire.export(model, tmp_path / "out")
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert torch.equal(model(batch()), quire.load(folder)(batch()))
    assert json.loads((folder / "config.json").read_text())["quire"]["plugins"] == {"quire": quire.__version__}


def test_a_pretrained_part_is_frozen_and_survives_the_loss_of_its_file(trained, tmp_path):
    model, path = trained
    part = Pretrained(path)
    assert isinstance(part, Line)
    assert not any(p.requires_grad for p in part.parameters())
    assert not part.train().training
    second = Model(encoder=part, objective=Guess())
    run = pl.Trainer(
        default_root_dir=tmp_path, accelerator="cpu", max_epochs=1, logger=False, enable_progress_bar=False
    )
    run.fit(second, datamodule=Toy())
    assert torch.equal(second.encoder.linear.weight, model.encoder.linear.weight)
    moved = tmp_path / "moved.ckpt"
    os.link(run.checkpoint_callback.best_model_path, moved)
    hidden = path + ".gone"
    os.rename(path, hidden)
    try:
        third = quire.load(moved)
    finally:
        os.rename(hidden, path)
    assert third.encoder.frozen
    assert torch.equal(third.encoder.linear.weight, model.encoder.linear.weight)
    assert len(third.encoder.origin["sha256"]) == 64


def test_a_pretrained_part_may_be_nested_and_fine_tuned_with_layer_decay(trained, tmp_path):
    _, path = trained
    tuned = Model(encoder=Pretrained(path, freeze=False, layer_decay=0.5), objective=Guess())
    run = pl.Trainer(default_root_dir=tmp_path, accelerator="cpu", max_steps=1, logger=False, enable_progress_bar=False)
    run.fit(tuned, datamodule=Toy())
    base = tuned.optimizer.keywords["lr"]
    rates = {id(p): g["initial_lr"] for g in run.optimizers[0].param_groups for p in g["params"]}
    assert rates[id(tuned.encoder.linear.weight)] == pytest.approx(base * 0.25)  # two layers below the head
    assert rates[id(tuned.encoder.norm.weight)] == pytest.approx(base * 0.5)
    assert rates[id(tuned.objective.head.weight)] == pytest.approx(base)
    outer = Line(inner=Pretrained(path))
    assert plain(outer)["init_args"]["inner"]["pretrained"]["freeze"] is True


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"part": "decoder"}, "has no part 'decoder'; it has encoder, objective"),
        ({"layer_decay": 1.5}, r"layer_decay must be in \(0, 1\]"),
    ],
)
def test_pretrained_says_what_is_wrong(trained, arguments, said):
    with pytest.raises(ConfigError, match=said):
        Pretrained(trained[1], **arguments)


class Evil:
    def __reduce__(self):
        return os.system, ("touch pwned",)


def test_a_pickle_that_would_run_code_is_refused_and_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {}, "quire": {}, "x": Evil()}, "evil.ckpt")
    with pytest.raises(ConfigError, match="holds pickled code"):
        quire.load("evil.ckpt")
    with open("evil.pkl", "wb") as file:
        pickle.dump(Evil(), file)
    with pytest.raises(ConfigError, match=r"evil.pkl (holds pickled code|is not a checkpoint)"):
        quire.load("evil.pkl")
    assert not os.path.exists("pwned")


def test_a_class_path_in_a_checkpoint_can_not_call_anything_else(trained, tmp_path):
    content = torch.load(trained[1], weights_only=True)
    for path in ("os.system", "subprocess.Popen", "builtins.eval", "torch.nn.Linear"):
        content["hyper_parameters"]["encoder"] = {"class_path": path, "init_args": {}}
        torch.save(content, tmp_path / "bad.ckpt")
        with pytest.raises(ConfigError, match="which no installed plugin registers"):
            quire.load(tmp_path / "bad.ckpt")
    content["hyper_parameters"]["encoder"] = {"class_path": "quire_gsae.selector.GradTopK", "init_args": {}}
    torch.save(content, tmp_path / "bad.ckpt")
    with pytest.raises(ConfigError, match="pip install quire-gsae"):
        quire.load(tmp_path / "bad.ckpt")


def test_files_that_are_not_checkpoints_are_named(tmp_path):
    (tmp_path / "text.ckpt").write_text("hello")
    (tmp_path / "empty.ckpt").write_bytes(b"")
    torch.save({"a": 1}, tmp_path / "other.ckpt")
    for name, said in [("text", "is not a checkpoint"), ("empty", "is not a checkpoint"), ("other", "not a Quire")]:
        with pytest.raises(ConfigError, match=f"{name}.ckpt {said}|{name}.ckpt is {said}"):
            quire.load(tmp_path / f"{name}.ckpt")
    with pytest.raises(ConfigError, match="no checkpoint at"):
        quire.load(tmp_path / "missing.ckpt")
    with pytest.raises(ConfigError, match="not an exported Quire model"):
        quire.load(tmp_path)


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (lambda: Model(encoder=Line(out=5), objective=Guess()), r"encoder.out is 6, this run's is 5"),
        (
            lambda: Model(encoder=Line(out=6), decoder=Rebuild(), objective=Guess()),
            "decoder is not set, this run's is Rebuild",
        ),
        (lambda: Model(encoder=Line(out=6), objective=Guess()), "objective is Sum, this run's is Guess"),
    ],
)
def test_resuming_another_model_names_the_first_difference(trained, tmp_path, other, said):
    run = pl.Trainer(
        default_root_dir=tmp_path, accelerator="cpu", max_epochs=2, logger=False, enable_progress_bar=False
    )
    with pytest.raises(ConfigError, match=said):
        run.fit(other(), datamodule=Toy(), ckpt_path=trained[1], weights_only=True)


def test_an_argument_that_a_checkpoint_can_not_hold_is_named():
    line = Line()
    line.init_args["out"] = object()
    with pytest.raises(ConfigError, match=r"Line.out is a object, which a checkpoint can't keep"):
        plain(line)
