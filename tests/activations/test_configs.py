"""The sparse recipes of the root folder parse; what needs no download trains."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors import safe_open

from quire.__main__ import execute
from quire.datasets.activations import tiny

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", ["sparse_tiny", "sparse_text", "sparse_gpt2"])
def test_a_recipe_parses(name, capsys):
    assert execute(["fit", "-c", str(ROOT / f"configs/{name}.yaml"), "--print_config"]) == 0
    assert "quire.datasets.activations.module.Activations" in capsys.readouterr().out


def test_the_tiny_recipe_trains_and_keeps_its_buffer_beside_the_checkpoint(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QUIRE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tiny, "STEPS", {"tiny": 2})
    short = ["--trainer.max_steps", "4", "--trainer.val_check_interval", "2", "--trainer.limit_val_batches", "1"]
    short += ["--data.source", "stdlib:docs", "--data.buffer", "2048", "--trainer.enable_progress_bar", "false"]
    run = ["fit", "-c", str(ROOT / "configs/sparse_tiny.yaml"), *short]
    assert execute(run) == 0
    said = capsys.readouterr().out
    beside = list((tmp_path / "runs/sparse_tiny/version_0/checkpoints").glob("last.*.rows.safetensors"))
    assert len(beside) == 1 and str(beside[0].relative_to(tmp_path)) in said
    with safe_open(beside[0], "pt") as handle:
        assert "0.pool.activation" in handle.keys()  # noqa: SIM118
    assert execute([*run, "--trainer.max_steps", "6", "--ckpt_path", "last"]) == 0
