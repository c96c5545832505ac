"""An unchanged config on a local Ray cluster of two workers gives the curve of one process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tests.faults.test_two_processes import CONFIG, curve

from quire.__main__ import execute


@pytest.mark.slow
def test_two_ray_workers_give_the_curve_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray.train", reason="pip install 'quire[ray]'")
    monkeypatch.chdir(tmp_path)
    for name in ("one", "ray"):
        Path(f"{name}.yaml").write_text(yaml.safe_dump(CONFIG))
    assert execute(["fit", "-c", "one.yaml"]) == 0
    script = str(Path(sys.executable).with_name("quire"))
    command = [script, "ray", "--workers", "2", "fit", "-c", "ray.yaml", "--data.batch_size", "16"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (curve(tmp_path / f"runs/{name}/version_0") for name in ("one", "ray"))
    assert len(one["train/loss"]) == 1400 // 32
    for name in one:
        assert two[name] == pytest.approx(one[name], abs=1e-5), name


def test_what_ray_is_asked_is_checked_before_it_starts(capsys: pytest.CaptureFixture[str]) -> None:
    assert execute(["ray", "plugins"]) == 2
    assert "one of fit, validate, test, predict" in capsys.readouterr().err
    assert execute(["ray", "--workers", "0", "fit", "-c", "quickstart.yaml"]) == 2
    assert "--workers must be at least 1" in capsys.readouterr().err
