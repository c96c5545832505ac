"""``quire harvest``: a folder holds what the stream gives, whatever cut it short; others are refused."""

from __future__ import annotations

import errno
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.activations.subjects import Ids, feed, transformers_model

from quire.__main__ import execute
from quire.datasets.activations import harvest, shards
from quire.datasets.activations.module import Activations
from quire.errors import ConfigError, DataError

SUBJECT = transformers_model()


def harvested(folder, splits="train,val", shard_rows=100, tokens=None, **data):
    """Harvest a small subject in this process."""
    source = feed(**{"subject": SUBJECT, "source": Ids(samples=60, ragged=True), **data})
    options = harvest._parser().parse_args(["--out", str(folder), "--shard-rows", str(shard_rows)])
    options.tokens = tokens
    harvest.run(source, Path(folder), splits.split(","), options)
    return source


def content(folder):
    """All rows of a split's shards in order."""
    parts = [load_file(file) for file, _ in shards.shards_of(Path(folder))]
    return {k: torch.cat([p[k] for p in parts]) for k in parts[0]}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def keys(rows):
    return rows["instance"].long() * 1000 + rows["position"].long()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder harvested in one go, with gradients."""
    place = tmp_path_factory.mktemp("whole")
    harvested(place, with_grad=True)
    return place


def test_a_folder_feeds_what_the_stream_feeds(folder):
    source = feed(subject=SUBJECT, source=Ids(samples=60, ragged=True), with_grad=True)
    stored = feed(subject=None, folder=str(folder), with_grad=True)
    assert stored.spec == source.spec and stored.spec["width"] == 32
    stored.setup("fit")
    assert {"token", "grad", "label", "special"} <= set(stored.fields)
    for name in ("train_dataloader", "val_dataloader"):
        a, b = (
            {k: torch.cat([batch[k] for batch in batches]) for k in batches[0]}
            for batches in (list(getattr(source, name)()), list(getattr(stored, name)()))
        )
        rows = min(len(a["token"]), len(b["token"]))
        assert rows == len(a["token"]) == len(b["token"]) and a["token"].dtype == b["token"].dtype
        both = {int(k): i for i, k in enumerate(keys(a))}
        for i, key in enumerate(keys(b).tolist()):
            if key in both:  # the tail that is dropped may be another one
                assert all(torch.allclose(a[f][both[key]].float(), b[f][i].float(), atol=1e-5) for f in a)
    assert stored.test_dataloader() == []  # not harvested


def test_a_folder_of_several_sites_gives_each(tmp_path):
    sites = ["blocks.0.resid", "blocks.1.z"]
    harvested(tmp_path, "val", site=sites)
    stored = feed(subject=None, folder=str(tmp_path), site=sites)
    batch = next(iter(stored.val_dataloader()))
    assert batch["states"].shape == (16, 2, 32) and torch.equal(batch["states"][:, 1], batch["activation@blocks.1.z"])
    alone = next(iter(feed(subject=SUBJECT, source=Ids(samples=60, ragged=True), site=sites).val_dataloader()))
    assert torch.allclose(batch["states"], alone["states"], atol=1e-5)


def test_the_header_says_what_the_rows_are(folder):
    header = json.loads((folder / "train/header.json").read_text())
    assert header["site"] == ["blocks.0.resid"] and header["dtype"] == "float32" and header["complete"]
    assert len(header["fingerprint"]) == 16 and header["rows"] == len(content(folder / "train")["activation"])
    assert len(shards.shards_of(folder / "train")) > 2


@pytest.mark.parametrize("cut", [0, 1, 5, 9])
def test_a_harvest_goes_on_where_it_stopped(folder, tmp_path, monkeypatch, cut):
    write, read = shards.save_file, shards_read(monkeypatch)
    calls = iter(range(100))

    def fails(tensors, target, said):
        if next(calls) == cut:
            Path(target).write_bytes(b"half of it")
            raise KeyboardInterrupt
        write(tensors, target, said)

    monkeypatch.setattr(shards, "save_file", fails)
    stopped = False
    try:
        harvested(tmp_path, with_grad=True)
    except KeyboardInterrupt:
        stopped = True
    assert stopped == (cut < 9)
    monkeypatch.setattr(shards, "save_file", write)
    if stopped and (tmp_path / "train/header.json").is_file() and not (tmp_path / "val").is_dir():
        with pytest.raises(DataError, match="is not finished"):
            list(feed(subject=None, folder=str(tmp_path)).train_dataloader())
    first = len(read)
    harvested(tmp_path, with_grad=True)
    for name in ("train", "val"):
        assert same(content(tmp_path / name), content(folder / name))
        assert not list((tmp_path / name).glob(".*"))
    assert len(read) - first <= len(read) and (stopped or len(read) == first)  # what was done is not run again


def shards_read(monkeypatch):
    """Counts forward passes."""
    from quire.datasets.activations.forwards import Forwards

    seen, read = [], Forwards.read

    def counted(self, indices):
        seen.append(tuple(indices))
        return read(self, indices)

    monkeypatch.setattr(Forwards, "read", counted)
    return seen


KILLED = """
import os, signal, sys
from pathlib import Path
from quire.datasets.activations import shards
write, calls = shards.save_file, iter(range(100))
def fails(tensors, target, said):
    if next(calls) == 2:
        Path(target).write_bytes(b"half of it")
        os.kill(os.getpid(), signal.SIGKILL)
    write(tensors, target, said)
shards.save_file = fails
from quire.__main__ import execute
execute(sys.argv[1:])
"""


def command(out, *more):
    subject = ["CausalLM", "--data.subject.width", "16", "--data.subject.depth", "2", "--data.subject.heads", "2"]
    text = ["--data.source", "stdlib:docs", "--data.length", "32", "--data.train_samples", "60", "--data.contexts", "4"]
    data = ["--data", "Activations", "--data.subject", *subject, *text]
    return ["harvest", *data, "--splits", "train", "--shard-rows", "300", "--out", str(out), *more]


def test_kill_9_loses_nothing_and_reads_nothing_twice(tmp_path, capfd):
    killed = subprocess.run([sys.executable, "-c", KILLED, *command(tmp_path / "killed")], capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    done = shards.shards_of(tmp_path / "killed/train")
    assert len(done) == 2 and list((tmp_path / "killed/train").glob(".*.part"))
    assert execute(command(tmp_path / "killed")) == 0
    again = capfd.readouterr().out
    assert execute(command(tmp_path / "whole")) == 0
    assert same(content(tmp_path / "killed/train"), content(tmp_path / "whole/train"))
    rows = content(tmp_path / "killed/train")
    assert len(keys(rows).unique()) == len(rows["activation"]) == 60 * 32
    kept = sum(int(said["rows"]) for _, said in done)
    assert f"1920 rows in {tmp_path}/killed/train, {1920 - kept} of them new" in again
    assert execute(command(tmp_path / "killed")) == 0
    assert "1920 rows" in (out := capfd.readouterr().out) and ", 0 of them new" in out.splitlines()[-1]
    assert execute(["harvest", *command("x")[1:-4], "--list-sites"]) == 0
    assert "blocks.1.heads" in capfd.readouterr().out.split()


def test_a_full_disk_is_one_sentence_and_keeps_what_is_complete(tmp_path, monkeypatch):
    write, calls = shards.save_file, iter(range(100))

    def full(tensors, target, said):
        if next(calls) == 1:
            Path(target).write_bytes(b"a bit")
            raise OSError(errno.ENOSPC, "No space left on device")
        write(tensors, target, said)

    monkeypatch.setattr(shards, "save_file", full)
    with pytest.raises(DataError, match=r"no space is left for .*part-r000-000001.safetensors.*run the same command"):
        harvested(tmp_path)
    assert len(shards.shards_of(tmp_path / "train")) == 1 and not list((tmp_path / "train").glob(".*.part"))


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"site": "blocks.1.resid"}, r"harvested with data.site \['blocks.0.resid'\], not \['blocks.1.resid'\]"),
        ({"dtype": "bfloat16"}, "data.dtype float32, not bfloat16"),
        ({"drop_special": True}, "data.drop_special False, not True"),
        ({"subject": transformers_model("llama")}, r"data.subject \(its weights\)"),
        ({"target_site": "blocks.1.resid"}, "data.target_site None, not blocks.1.resid"),
    ],
)
def test_a_folder_of_something_else_is_refused(folder, data, said):
    with pytest.raises(ConfigError, match=said):
        feed(**{"subject": None, "folder": str(folder), **data}).train_dataloader()
    with pytest.raises(ConfigError):
        harvested(folder, with_grad=True, **data)


def test_missing_gradients_another_tokenizer_and_other_options_are_refused(tmp_path):
    harvested(tmp_path, "val")
    with pytest.raises(ConfigError, match="data.with_grad False, not True"):
        feed(subject=None, folder=str(tmp_path), with_grad=True).val_dataloader()
    with pytest.raises(ConfigError, match="harvested with data.tokens None, not 50"):
        harvested(tmp_path, "val", tokens=50)
    header = json.loads((tmp_path / "val/header.json").read_text())
    with pytest.raises(ConfigError, match="harvested with the tokenizer aa, not bb"):
        shards.compare(tmp_path, {**header, "tokenizer": "aa"}, {"tokenizer": "bb"})


def test_broken_and_missing_shards_are_said(folder, tmp_path):
    import shutil

    shutil.copytree(folder, tmp_path / "copy")
    part = sorted((tmp_path / "copy/train").glob("*.safetensors"))[1]
    whole = part.read_bytes()
    part.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"000001.safetensors is cut short or broken"):
        feed(subject=None, folder=str(tmp_path / "copy")).train_dataloader()
    part.unlink()
    with pytest.raises(DataError, match="should hold .* rows and holds"):
        feed(subject=None, folder=str(tmp_path / "copy")).train_dataloader()
    with pytest.raises(ConfigError, match="is not a harvested folder"):
        dict(Activations(None, folder=str(tmp_path / "nothing")).spec)


def test_tokens_are_limited(tmp_path):
    harvested(tmp_path, "train", tokens=90)
    rows = len(content(tmp_path / "train")["activation"])
    assert 90 <= rows <= 90 + 4 * 12


def test_wrong_commands_are_one_sentence(tmp_path, capfd):
    for argv, said in (
        (["harvest"], "quire harvest needs data"),
        (["harvest", "--data", "Digits", "--out", "x"], "Digits is no Activations data module"),
        (command("x")[:-2], "add --out FOLDER"),
        ([*command(tmp_path), "--splits", "trian"], "no split is named trian; did you mean train?"),
        ([*command(tmp_path), "--precision", "17"], "quire doctor shows"),
        ([*command(tmp_path), "--tokens", "0"], "--tokens must be at least 1"),
    ):
        assert execute(argv) == 2, argv
        assert said in capfd.readouterr().err
