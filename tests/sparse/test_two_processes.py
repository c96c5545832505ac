"""Oracle 5: two processes with half the rows each are one process with all of them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import yaml

from quire import load
from quire.__main__ import execute

CONFIG: dict[str, Any] = {
    "seed_everything": 3,
    "model": {
        "encoder": {
            "class_path": "SparseEncoder",
            "init_args": {
                "latents": 64,
                "norm": "global_rms",
                "selector": {"class_path": "TopK", "init_args": {"k": 3}},
            },
        },
        "decoder": "SparseDecoder",
        "objective": {"class_path": "SparseReconstruction", "init_args": {"dead_after": 60}},
        "optimizer": {"class_path": "torch.optim.Adam", "init_args": {"lr": 0.003, "eps": 1e-4}},
        "schedule": "Constant",
    },
    "data": {"class_path": "PlantedFeatures", "init_args": {"samples": 512, "width": 16, "batch_size": 32}},
    "trainer": {
        "max_steps": 12,
        "accelerator": "cpu",
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "limit_val_batches": 0,
        "log_every_n_steps": 4,
    },
}
TWO = ["--data.batch_size", "16", "--trainer.devices", "2", "--trainer.strategy", "ddp"]


def test_two_processes_with_half_the_rows_train_the_same_dictionary(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "one.yaml").write_text(yaml.safe_dump(CONFIG))
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(CONFIG))
    monkeypatch.chdir(tmp_path)
    assert execute(["fit", "-c", "one.yaml"]) == 0
    command = [str(Path(sys.executable).with_name("lightning")), "fit", "-c", "two.yaml", *TWO]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = (load(next((tmp_path / "runs" / name).rglob("*.ckpt"))).state_dict() for name in ("one", "two"))
    assert int((one["decoder.tokens_since_fired"] >= 60).sum()) > 0  # the AuxK term was on
    assert torch.equal(one["decoder.tokens_since_fired"], two["decoder.tokens_since_fired"])
    assert float(one["encoder.rms.rows"]) == float(two["encoder.rms.rows"]) == 12 * 32
    for name in one:
        assert torch.allclose(one[name].double(), two[name].double(), atol=1e-6), name
