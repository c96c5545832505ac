"""Every complete run that a page shows takes a training and a validation step; one that needs files is only parsed."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.docs.blocks import Block
from tests.docs.test_snippets import RUNS, where

from quire.__main__ import execute
from quire.datasets.activations import tiny

ALONE = [b for b in RUNS if "Pretrained" not in b.text and "$QUIRE_DATA" not in b.text]


@pytest.mark.parametrize("block", ALONE, ids=where)
def test_a_shown_run_takes_a_step(
    block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QUIRE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tiny, "STEPS", dict.fromkeys(tiny.STEPS, 2))  # the embedded subjects, hardly trained
    (tmp_path / "shown.yaml").write_text(block.text, encoding="utf-8")
    quick = ["--trainer.fast_dev_run", "1", "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]
    code = execute(["fit", "-c", "shown.yaml", *quick])
    assert code == 0, f"{block.where}: {capsys.readouterr().err}"


def test_most_shown_runs_need_no_file() -> None:
    assert len(ALONE) > len(RUNS) / 2
