"""``quire mix`` prints a config that runs, or one sentence."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from quire.__main__ import execute


def test_what_it_writes_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    parts = ["--encoder", "ViTEncoder", "--objective", "PositionPrediction", "MaskedReconstruction"]
    assert execute(["mix", *parts, "-o", "new/mine.yaml"]) == 0
    made = yaml.safe_load(Path("new/mine.yaml").read_text(encoding="utf-8"))
    assert made["model"]["objective"]["class_path"] == "Sum"
    assert made["model"]["encoder"]["init_args"]["positions"] == "none"  # as position prediction needs it
    assert execute(["fit", "-c", "new/mine.yaml", "--trainer.max_steps", "2"]) == 0


def test_tokens_are_pooled_for_a_part_that_wants_a_vector(capsys: pytest.CaptureFixture[str]) -> None:
    assert execute(["mix", "--encoder", "ViTEncoder", "--objective", "CaseBasedReasoning"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("# ViTEncoder (core) with CaseBasedReasoning (prototypes)")
    assert yaml.safe_load(said)["model"]["encoder"]["class_path"] == "Pooled"


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ([], "name at least one part"),
        (["--encoder", "Greedy"], "--encoder Greedy: Greedy is a sampler"),
        (["--encoder", "ViTEncodr"], "did you mean ViTEncoder or"),
        (["--encoder", "FlatPixels", "--objective", "PositionPrediction"], "PositionPrediction needs a TokenEncoder"),
    ],
)
def test_what_cant_be_mixed_is_one_sentence(parts: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert execute(["mix", *parts]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
