"""Two processes on the CPU do what one does: the same curve with the same global batch, results in index order."""

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
from safetensors.torch import load_file

from quire.__main__ import execute
from quire.predictions import in_order

ROOT = Path(__file__).parents[2]
CONFIG: dict[str, Any] = {
    "model": {
        "encoder": {"class_path": "MlpVectorEncoder", "init_args": {"widths": [32], "code": 8}},
        "objective": {"class_path": "Classify"},
    },
    "data": {"class_path": "Digits", "init_args": {"batch_size": 32}},
    "trainer": {
        "max_epochs": 1,
        "accelerator": "cpu",
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
    },
}
TWO = ["--data.batch_size", "16", "--trainer.devices", "2", "--trainer.strategy", "ddp"]
QUIET = ["--trainer.logger", "false"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where one process has trained and predicted."""
    made = tmp_path_factory.mktemp("ddp")
    (made / "one.yaml").write_text(yaml.safe_dump(CONFIG))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(made)
        assert execute(["fit", "-c", "one.yaml"]) == 0
        assert execute(["predict", "-c", "one.yaml", "--ckpt_path", "last"]) == 0
    return made


def process(folder: Path, command: list[str]) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done


def script(folder: Path, *argv: str) -> None:
    """Run the console script in a process of its own, which starts the second."""
    process(folder, [str(Path(sys.executable).with_name("lightning")), *argv])


def curve(folder: Path) -> dict[str, list[float]]:
    with (folder / "metrics.csv").open() as handle:
        rows = list(csv.DictReader(handle))
    names = ("train/loss", "train/classify", "train/accuracy")
    return {name: [float(r[name]) for r in rows if r[name]] for name in names}


def test_two_processes_give_the_curve_of_one(folder: Path) -> None:
    (folder / "two.yaml").write_text(yaml.safe_dump(CONFIG))
    script(folder, "fit", "-c", "two.yaml", *TWO)
    one, two = (curve(folder / f"runs/{name}/version_0") for name in ("one", "two"))
    assert len(one["train/loss"]) == 1400 // 32
    for name in one:  # what is logged is the mean over both processes
        assert two[name] == pytest.approx(one[name], abs=1e-5), name


def test_torchrun_gives_the_curve_of_one(folder: Path) -> None:
    (folder / "run.yaml").write_text(yaml.safe_dump(CONFIG))
    bin_ = Path(sys.executable).parent
    launch = [str(bin_ / "torchrun"), "--standalone", "--nproc_per_node", "2", "--no-python", str(bin_ / "lightning")]
    process(folder, [*launch, "fit", "-c", "run.yaml", *TWO])
    one, two = (curve(folder / f"runs/{name}/version_0") for name in ("one", "run"))
    for name in one:
        assert two[name] == pytest.approx(one[name], abs=1e-5), name


def test_a_finished_run_leaves_no_process_group(folder: Path) -> None:
    code = "import sys, torch.distributed as group\nfrom quire.__main__ import execute\n"
    code += "assert execute(sys.argv[1:]) == 0\nassert not group.is_initialized()\nprint('left')\n"
    (folder / "run.py").write_text(code)
    done = process(
        folder, [sys.executable, "run.py", "validate", "-c", "one.yaml", "--ckpt_path", "last", *TWO, *QUIET]
    )
    assert "left" in done.stdout


def test_two_processes_predict_in_index_order(folder: Path) -> None:
    script(folder, "predict", "-c", "one.yaml", "--ckpt_path", "last", *TWO)
    one, two = (load_file(folder / f"runs/one/version_{i}/predictions.safetensors") for i in (1, 2))
    assert len(two["vector"]) == 397  # an odd number: one process repeats a sample, which is dropped
    assert torch.allclose(one["vector"], two["vector"], atol=1e-6)


def test_results_of_ranks_are_interleaved_without_repeats() -> None:
    codes = {r: torch.tensor([10.0 * i for i in r]) for r in ((0, 2), (1, 3), (4, 6), (5, 0))}
    wanted = [0.0, 10.0, 20.0, 30.0, 40.0, 50.0, 60.0]
    assert in_order([(list(i), c) for i, c in codes.items()])[0].tolist() == wanted
    assert in_order([(list(i), {"vector": c}) for i, c in codes.items()])[0]["vector"].tolist() == wanted
    assert in_order([(list(i), c.tolist()) for i, c in codes.items()]) == [wanted]


def test_results_that_do_not_tell_samples_apart_stay_batches() -> None:
    gathered = [([1, 3], {"mean": torch.tensor(3.0)}), ([0, 2], {"mean": torch.tensor(2.0)})]
    assert [r["mean"].item() for r in in_order(gathered)] == [2.0, 3.0]
