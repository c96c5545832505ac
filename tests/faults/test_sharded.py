"""Weights in shards over two processes: the curve of one process, half the weights each, back to one and to a file."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from quire import load
from quire.__main__ import execute
from quire.contracts import Objective
from quire.errors import ConfigError
from quire.model import Model
from quire.sharding import build_sharded

MODEL = {
    "encoder": {"class_path": "ViTEncoder", "init_args": {"patch": 2, "width": 32, "depth": 3, "heads": 2}},
    "objective": "Classify",
    "schedule": "Constant",
}
PLAIN = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False, "log_every_n_steps": 1}


class Duel(Objective):
    """Two players."""

    players = ("one", "other")


def config(folder: Path, name: str, processes: int, steps: int, distributed: bool = True, **parts: Any) -> Path:
    sizes = {"data_parallel_size": processes, "tensor_parallel_size": 1, "save_distributed_checkpoint": distributed}
    strategy = {"class_path": "lightning.pytorch.strategies.ModelParallelStrategy", "init_args": sizes}
    trainer = {**PLAIN, "max_steps": steps, "limit_val_batches": 2, "devices": processes, "strategy": strategy}
    data = {"class_path": "Digits", "init_args": {"batch_size": 32 // processes}}
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump({"model": {**MODEL, **parts}, "data": data, "trainer": trainer}))
    return file


def fit(file: Path, *argv: str) -> Path:
    """Fit in a process of its own, which starts the others; gives the run's folder."""
    command = [str(Path(sys.executable).with_name("lightning")), "fit", "-c", file.name, *argv]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=file.parent, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return max((file.parent / "runs" / file.stem).glob("version_*"))


def losses(run: Path) -> dict[int, float]:
    with (run / "metrics.csv").open() as handle:
        return {int(r["step"]): float(r["train/loss"]) for r in csv.DictReader(handle) if r["train/loss"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where one process has trained for 10 steps, and two in shards for 8."""
    made = tmp_path_factory.mktemp("sharded")
    straight = yaml.safe_load(config(made, "straight", 1, 10).read_text())
    del straight["trainer"]["strategy"]
    (made / "straight.yaml").write_text(yaml.safe_dump(straight))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(made)
        assert execute(["fit", "-c", "straight.yaml"]) == 0
    fit(config(made, "two", 2, 8))
    return made


def test_two_processes_with_half_the_weights_each_give_the_curve_of_one(folder: Path) -> None:
    one, two = (losses(folder / f"runs/{name}/version_0") for name in ("straight", "two"))
    assert len(two) == 8
    for step, loss in two.items():
        assert loss == pytest.approx(one[step], abs=1e-4), step
    shards = sorted((folder / "runs/two/version_0/checkpoints/last.ckpt").glob("*.distcp"))
    sizes = [s.stat().st_size for s in shards]
    assert len(sizes) == 2 and max(sizes) < 0.6 * sum(sizes)


def test_one_process_goes_on_from_the_shards_of_two(folder: Path) -> None:
    straight = losses(folder / "runs/straight/version_0")
    shards = "runs/two/version_0/checkpoints/last.ckpt"
    found = losses(fit(config(folder, "one", 1, 10), "--ckpt_path", shards))
    assert found == {s: pytest.approx(straight[s], abs=1e-4) for s in (8, 9)}


def test_two_processes_go_on_from_what_one_wrote(folder: Path) -> None:
    fit(config(folder, "alone", 1, 8))
    straight = losses(folder / "runs/straight/version_0")
    shards = "runs/alone/version_0/checkpoints/last.ckpt"
    found = losses(fit(config(folder, "pair", 2, 10), "--ckpt_path", shards))
    assert found == {s: pytest.approx(straight[s], abs=1e-4) for s in (8, 9)}


def test_threads_that_outlive_their_group_dont_meet_pythons_own_end(folder: Path) -> None:
    """There they abort now and then: "terminate called without an active exception"."""
    code = "import atexit, os\nfrom quire.__main__ import main, threads\n"
    code += "atexit.register(lambda: print('goodbye', *threads()))\nend = os._exit\n"
    code += "os._exit = lambda code: (print('at once', flush=True), end(code))\nmain()\n"
    (folder / "run.py").write_text(code)
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    for argv in (["fit", "-c", config(folder, "end", 1, 1).name], ["plugins"]):
        command = [sys.executable, "run.py", *argv]
        said = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=True).stdout
        lasting = "gloo" in said.partition("goodbye")[2]
        assert "goodbye" in said and said.endswith("at once\n") == lasting


def test_shards_become_a_file_that_loads(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards = folder / "runs/two/version_0/checkpoints/last.ckpt"
    with pytest.raises(ConfigError, match="is in shards: quire consolidate"):
        load(shards)
    assert execute(["consolidate", str(shards)]) == 0
    model = load(shards.with_name("whole-last.ckpt"))
    assert sum(p.numel() for p in model.parameters()) > 10_000
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert execute(["consolidate", str(folder)]) == 2
    assert "is not a folder of shards" in capsys.readouterr().err


def test_a_whole_file_can_be_asked_for(folder: Path) -> None:
    run = fit(config(folder, "whole", 2, 2, distributed=False))
    assert load(run / "checkpoints/last.ckpt").objective is not None


def test_what_cant_be_sharded_is_refused_by_name() -> None:
    class Pair:
        def size(self) -> int:
            return 2

    class One:
        def size(self) -> int:
            return 1

    with pytest.raises(ConfigError, match="tensor_parallel_size: 1"):
        build_sharded(Model(), lambda: None, {"tensor_parallel": Pair()})
    model = Model(objective=Duel())
    with pytest.raises(ConfigError, match="Duel has several players, which can't be sharded: use ddp"):
        build_sharded(model, lambda: None, {"tensor_parallel": One()})
