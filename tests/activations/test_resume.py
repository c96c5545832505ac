"""A fit that is cut short and resumed ends with the weights of one that is not, bit for bit: oracle of exact resume."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from tests.activations.subjects import Ids, feed, transformers_model
from torch import nn

from quire.contracts import Codes, Encoder, Losses, Objective
from quire.datasets.activations import beside
from quire.datasets.activations.module import Activations
from quire.errors import ConfigError, DataError
from quire.model import Model


class Linear(Encoder):
    """One matrix."""

    fields = ("activation",)

    def build(self, spec):
        self.map = nn.Linear(spec.need("width", self), 8)

    def forward(self, batch):
        return Codes()


class Rebuild(Objective):
    """Activation and gradient from a noisy projection: any difference in rows, order or noise shows in the weights."""

    encoder: Linear
    fields = ("activation", "grad")

    def forward(self, model, batch):
        x, weight = batch["activation"], model.encoder.map.weight
        noise = torch.randn(x.shape, generator=model.generator("cpu"))
        made = (x + 0.1 * noise) @ weight.T @ weight + model.encoder.map.bias.sum()
        return Losses({"rebuild": (made - x).square().mean() + (made * batch["grad"]).mean()})


SUBJECT = transformers_model()


def run(place, steps, ckpt=None, every=20, validate=0, **data):
    """Fit to ``steps``; returns the weights and the data module. ``validate``: save only while validating."""
    torch.manual_seed(0)
    model = Model(encoder=Linear(), objective=Rebuild())
    source = feed(subject=SUBJECT, source=Ids(samples=60, ragged=True), with_grad=True, **{"buffer": 96, **data})
    how = {"every_n_epochs": 1, "save_on_train_epoch_end": False} if validate else {"every_n_train_steps": every}
    keeping = pl.callbacks.ModelCheckpoint(place, "{step}", save_top_k=-1, **how)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=steps,
        max_epochs=-1,
        callbacks=[keeping],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=validate,
        val_check_interval=10 if validate else None,
    )
    trainer.fit(model, datamodule=source, ckpt_path=ckpt)
    return {k: v.clone() for k, v in model.state_dict().items()}, source


def ckpt(folder, step):
    return str(Path(folder) / f"step={step}.ckpt")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """40 steps that nothing interrupted, and where their checkpoints lie."""
    folder = tmp_path_factory.mktemp("whole")
    weights, source = run(folder, 40, every=5)
    assert len(source._feed) < 40  # more than one epoch
    return weights, folder


@pytest.mark.parametrize("step", [5, 20, 25, 35])
def test_resumed_equals_straight_to_the_bit(whole, tmp_path, step):  # 40 straight; 20 + resume + 20
    weights, folder = whole
    again, _ = run(tmp_path, 40, ckpt(folder, step))
    for name, value in weights.items():
        assert torch.equal(value, again[name]), f"{name} after a break at step {step}"
    assert torch.equal(_rows(tmp_path / "step=40.ckpt", step), _rows(folder / "step=40.ckpt", step))


def test_a_checkpoint_of_a_validation_inside_an_epoch_resumes_too(whole, tmp_path):
    weights, _ = run(tmp_path / "a", 40, validate=2)
    again, _ = run(tmp_path / "b", 40, ckpt(tmp_path / "a", 20), validate=2)
    for name, value in weights.items():
        assert torch.equal(value, again[name]) and torch.equal(value, whole[0][name]), name


def test_a_harvested_folder_resumes_to_the_bit_too(tmp_path):
    from quire.datasets.activations import harvest

    options = harvest._parser().parse_args(["--shard-rows", "70"])
    given = {"subject": SUBJECT, "source": Ids(samples=60, ragged=True), "with_grad": True}
    harvest.run(feed(**given), tmp_path / "rows", ["train"], options)
    weights, _ = run(tmp_path / "a", 40, every=10, folder=str(tmp_path / "rows"))
    for step in (10, 30):
        again, _ = run(tmp_path / f"b{step}", 40, ckpt(tmp_path / "a", step), folder=str(tmp_path / "rows"))
        for name, value in weights.items():
            assert torch.equal(value, again[name]), f"{name} after a break at step {step}"


def _rows(file, step):
    state = torch.load(file, weights_only=True)["Activations"]
    return beside.read_rows({**state["rows"], "checkpoint": str(file)})["0.order"]


def test_a_checkpoint_holds_no_rows_and_the_file_beside_it_holds_them_all(whole):
    _, folder = whole
    content = torch.load(ckpt(folder, 20), weights_only=True)
    state = content["Activations"]
    assert set(state) == {"ranks", "rows"} and len(state["rows"]["sha256"]) == 64
    assert (folder / state["rows"]["name"]).is_file()
    rows = beside.read_rows({**state["rows"], "checkpoint": ckpt(folder, 20)})
    assert rows["0.pool.activation"].shape[1] == 32 and "0.pool.grad" in rows
    assert Path(ckpt(folder, 20)).stat().st_size < 60_000
    names = {p.name.rsplit(".", 3)[0] for p in folder.glob("*.rows.safetensors")}
    ends = {p.stem for p in folder.glob("*.ckpt") if p.stem not in names}
    assert ends == {"step=25"}  # the end of an epoch: the buffer is empty; one file each else, none left over


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda f: f.unlink(), "beside it: the file is gone"),
        (lambda f: f.write_bytes(f.read_bytes()[:-9]), "its hash differs"),
    ],
)
def test_missing_or_broken_rows_are_said(whole, tmp_path, spoil, said):
    shutil.copytree(whole[1], tmp_path / "copy")
    state = torch.load(ckpt(tmp_path / "copy", 20), weights_only=True)["Activations"]
    spoil(tmp_path / "copy" / state["rows"]["name"])
    with pytest.raises(DataError, match=said):
        run(tmp_path, 40, ckpt(tmp_path / "copy", 20))


def test_another_number_of_processes_or_a_smaller_buffer_is_refused(whole, tmp_path):
    shutil.copytree(whole[1], tmp_path / "copy")
    file = ckpt(tmp_path / "copy", 20)
    with pytest.raises(ConfigError, match=r"holds 96 rows, data.buffer is 48: make them agree"):
        run(tmp_path, 40, file, buffer=48)
    content = torch.load(file, weights_only=True)
    content["Activations"]["ranks"] *= 2
    torch.save(content, file)
    with pytest.raises(ConfigError, match="ran on 2 processes, this run has 1"):
        run(tmp_path, 40, file)


def test_a_checkpoint_that_goes_takes_its_rows_along(tmp_path):
    torch.manual_seed(0)
    writer = beside.BesideFiles()
    rows = {"0.order": torch.arange(4)}
    for step in (1, 2):
        state = {"state_dict": {}, "Activations": {"ranks": [], "beside": {"0.order": rows["0.order"] + step}}}
        writer.save_checkpoint(state, tmp_path / "last.ckpt")
        assert "beside" in state["Activations"]  # what the caller holds is not changed
    assert len(list(tmp_path.glob("*.rows.safetensors"))) == 1
    loaded = writer.load_checkpoint(tmp_path / "last.ckpt")["Activations"]
    assert torch.equal(beside.read_rows(loaded["rows"])["0.order"], rows["0.order"] + 2)
    writer.remove_checkpoint(tmp_path / "last.ckpt")
    assert not list(tmp_path.iterdir())


def test_a_kill_between_the_two_files_leaves_the_old_pair(tmp_path, monkeypatch):
    writer = beside.BesideFiles()
    state = {"state_dict": {}, "Activations": {"ranks": [], "beside": {"0.order": torch.arange(4)}}}
    writer.save_checkpoint(state, tmp_path / "last.ckpt")

    def cut(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", cut)
    state["Activations"]["beside"] = {"0.order": torch.arange(9)}
    with pytest.raises(KeyboardInterrupt):
        writer.save_checkpoint(state, tmp_path / "last.ckpt")
    monkeypatch.undo()
    loaded = writer.load_checkpoint(tmp_path / "last.ckpt")["Activations"]
    assert len(beside.read_rows(loaded["rows"])["0.order"]) == 4
    assert Activations.__qualname__ == "Activations"


KILLED = """
import os, signal, sys
import torch
from tests.activations import test_resume as at

where, folder, log = sys.argv[1:]
write, saved = torch.save, []

def told(batches):
    if where == "in a step" and batches == 18:
        os.kill(os.getpid(), signal.SIGKILL)

def cut(state, handle, *more):
    saved.append(state)
    if where == "in a checkpoint" and len(saved) == 4:
        handle.write(b"half of it")
        handle.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    write(state, handle, *more)

at.Rebuild.forward, torch.save = at.logged(log, told), cut
at.run(folder, 40, every=5)
"""


def logged(file, told=lambda batches: None):
    """``Rebuild.forward`` that also appends the rows of each batch to a file."""
    forward, count = Rebuild.forward, iter(range(1, 100))

    def run(self, model, batch):
        with open(file, "a") as log:
            print(*(batch["instance"] * 100 + batch["position"]).tolist(), file=log)
        told(next(count))
        return forward(self, model, batch)

    return run


def fed(file):
    return [tuple(map(int, line.split())) for line in Path(file).read_text().splitlines()]


@pytest.mark.parametrize("where", ["in a step", "in a checkpoint"])
def test_kill_9_loses_nothing_and_feeds_no_row_twice(whole, tmp_path, monkeypatch, where):
    command = [sys.executable, "-c", KILLED, where, str(tmp_path), str(tmp_path / "killed")]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert not (tmp_path / "step=20.ckpt").exists()
    assert len(fed(tmp_path / "killed")) == (18 if where == "in a step" else 20)
    monkeypatch.setattr(Rebuild, "forward", logged(tmp_path / "resumed"))
    again, _ = run(tmp_path, 40, ckpt(tmp_path, 15), every=5)
    rows = fed(tmp_path / "killed")[:15] + fed(tmp_path / "resumed")
    assert rows[: len(fed(tmp_path / "killed"))] == fed(tmp_path / "killed")  # the same batches come again
    epoch = [row for batch in rows[:25] for row in batch]
    assert len(rows) == 40 and len(set(epoch)) == len(epoch) == 25 * 16
    for name, value in whole[0].items():
        assert torch.equal(value, again[name]), name
    assert not list(tmp_path.glob("*.new.rows.safetensors")) and (tmp_path / "step=20.ckpt").exists()
