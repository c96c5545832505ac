"""The sentences that docs/mixing.md shows are the ones that a user meets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.docs.blocks import ROOT

from quire.__main__ import execute

PAGE = (ROOT / "docs" / "mixing.md").read_text(encoding="utf-8")
SMALL = {"width": 16, "depth": 1, "heads": 2}


def vit(patch: int = 2) -> dict[str, Any]:
    return {"class_path": "ViTEncoder", "init_args": {"patch": patch, **SMALL}}


REFUSED = {
    "role": ("FlatPixels", "PositionPrediction", "Digits"),
    "set up otherwise": (vit(), "PositionPrediction", "Digits"),
    "field": (vit(), "Classify", "SampleImages"),
    "size": (vit(3), "Classify", "Digits"),
    "name": (vit(), "Clasify", "Digits"),
    "option": (vit(), {"class_path": "MaskedReconstruction", "init_args": {"maskin": 0.5}}, "Digits"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_refusal_reads_as_the_page_says(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    encoder, objective, data = REFUSED[what]
    run = {"model": {"encoder": encoder, "objective": objective}, "data": data}
    (tmp_path / "refused.yaml").write_text(yaml.safe_dump(run), encoding="utf-8")
    assert execute(["fit", "-c", "refused.yaml", "--trainer.fast_dev_run", "1", "--trainer.accelerator", "cpu"]) == 2
    said = capsys.readouterr().err
    sentence = next(line for line in said.splitlines() if line.startswith("error: ")).removeprefix("error: ")
    steady = sentence.partition(" installed: ")[0].partition(" or ")[0]  # what is listed depends on the installation
    assert f"| {steady.rstrip('?')}" in PAGE, sentence
