"""On two processes each row is fed once, and the checkpoint keeps the place and the buffer of both."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from quire.checkpoint import read

ROOT = Path(__file__).parents[2]
SUBJECT = {"class_path": "CausalLM", "init_args": {"width": 16, "depth": 2, "heads": 2}}
DATA = {"subject": SUBJECT, "source": "stdlib:docs", "length": 16, "train_samples": 200, "batch_size": 32}
CONFIG = {
    "model": {
        "encoder": {
            "class_path": "SparseEncoder",
            "init_args": {"latents": 32, "selector": {"class_path": "BatchTopK", "init_args": {"k": 4}}},
        },
        "decoder": "SparseDecoder",
        "objective": "SparseReconstruction",
    },
    "data": {"class_path": "Activations", "init_args": {**DATA, "buffer": 512, "contexts": 8}},
    "trainer": {
        "accelerator": "cpu",
        "devices": 2,
        "strategy": "ddp",
        "limit_val_batches": 0,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "callbacks": [{"class_path": "ModelCheckpoint", "init_args": {"every_n_train_steps": 6, "save_last": True}}],
    },
}


def fit(folder: Path, steps: int, *more: str) -> None:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [str(Path(sys.executable).with_name("lightning")), "fit", "-c", "two.yaml"]
    command += ["--trainer.max_steps", str(steps), *more]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def last(folder: Path) -> Path:
    versions = sorted((folder / "runs/two").glob("version_*"))
    return versions[-1] / "checkpoints/last.ckpt"


@pytest.mark.slow
def test_a_resumed_run_of_two_processes_ends_as_a_whole_one(tmp_path: Path) -> None:
    ends = []
    for name in ("whole", "cut"):
        folder = tmp_path / name
        folder.mkdir()
        schedule = {"class_path": "Constant"}
        (folder / "two.yaml").write_text(yaml.safe_dump({**CONFIG, "model": {**CONFIG["model"], "schedule": schedule}}))
        if name == "cut":
            fit(folder, 6)
            state = read(last(folder))["Activations"]
            assert len(state["ranks"]) == 2
            rows = load_file(last(folder).parent / state["rows"]["name"])
            both = [rows[f"{r}.pool.instance"] * 100 + rows[f"{r}.pool.position"] for r in (0, 1)]
            assert not set(both[0].tolist()) & set(both[1].tolist())
        fit(folder, 12, *(["--ckpt_path", "last"] if name == "cut" else []))
        ends.append(read(last(folder))["state_dict"])
    for key, value in ends[0].items():
        assert torch.equal(value, ends[1][key]), key
