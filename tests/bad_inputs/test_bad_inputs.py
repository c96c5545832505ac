"""Each case of ``cases.yaml``: the exit code, and one sentence that names the key or file and the remedy."""

from __future__ import annotations

import copy
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tests.bad_inputs.files import write_all

from quire import plugins
from quire.__main__ import execute

CORPUS = yaml.safe_load((Path(__file__).parent / "cases.yaml").read_text(encoding="utf-8"))
CASES = CORPUS["cases"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all broken files and one good checkpoint."""
    made = tmp_path_factory.mktemp("bad")
    fill(made)
    return made


def fill(made: Path) -> None:
    """Train the good checkpoints in ``made`` and write the broken files."""
    (made / "ckpt").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(made)
        for base, needs in CORPUS["trained"].items():
            if needs in plugins.load().records:
                Path(f"{base}.yaml").write_text(yaml.safe_dump(CORPUS["bases"][base]))
                assert execute(["fit", "-c", f"{base}.yaml"]) == 0
                os.link(f"runs/{base}/version_0/checkpoints/last.ckpt", f"ckpt/{base}.ckpt")
    write_all(made)


@pytest.fixture(autouse=True)
def fresh_plugins() -> Any:
    """Plugins are looked up anew, so that a case may put some on the path."""
    yield
    plugins.load.cache_clear()


def merged(base: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    """``base`` with ``change`` laid over it, deep; a null takes a key away, a new class_path its old arguments."""
    out = copy.deepcopy(base)
    for key, value in change.items():
        if isinstance(value, dict) and isinstance(out.get(key), dict) and "class_path" not in value:
            out[key] = merged(out[key], value)
        elif value is None:
            out.pop(key, None)
        else:
            out[key] = value
    return out


def argv_of(case: dict[str, Any], folder: Path) -> list[str]:
    """The command line of a case; writes its config first, where it has one."""
    if "command" in case:
        return shlex.split(case["command"])
    config = folder / f"{case['name'].replace(' ', '-')}.yaml"
    config.write_text(yaml.safe_dump(merged(CORPUS["bases"][case.get("base", "codes")], case.get("yaml", {}))))
    return [case.get("do", "fit"), "-c", config.name, *shlex.split(case.get("args", ""))]


def prepare(case: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(folder)
    if case.get("needs", "core") not in plugins.load().records:
        pytest.skip(f"plugin {case['needs']} is not installed")
    if case.get("without_gpu") and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    if case.get("site"):
        monkeypatch.syspath_prepend(str(folder / "site"))
    plugins.load.cache_clear()
    return argv_of(case, folder)


@pytest.mark.parametrize("case", CASES, ids=[c["name"] for c in CASES])
def test_a_bad_input_ends_in_one_sentence(
    case: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    code = execute(prepare(case, folder, monkeypatch))
    err = capfd.readouterr().err
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, err
    assert "Traceback" not in err
    for pattern in case["says"]:
        assert re.search(pattern, lines[0]), lines[0]
    assert code == case.get("exit", 2), lines[0]
    assert not (folder / "pwned").exists()


@pytest.mark.parametrize("case", CASES[::15], ids=[c["name"] for c in CASES[::15]])
def test_quire_trace_raises_the_same_error(case: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    argv = prepare({k: v for k, v in case.items() if k != "site"}, folder, monkeypatch)
    monkeypatch.setenv("QUIRE_TRACE", "1")
    with pytest.raises(Exception):  # noqa: B017, PT011  # which one differs from case to case
        execute(argv)


@pytest.mark.parametrize(("trace", "shown"), [("0", False), ("1", True)])
def test_the_console_script_shows_a_traceback_only_on_request(trace: str, shown: bool, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "quire", "components", "Digitz"],
        env={**os.environ, "QUIRE_TRACE": trace},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ("Traceback" in done.stderr) is shown
    assert done.returncode == (1 if shown else 2)
    assert "did you mean Digits" in done.stderr


@pytest.mark.skipif("mp3" not in plugins.load().records, reason="plugin mp3 is not installed")
def test_a_plugin_that_the_environment_leaves_out_is_said_to_be_left_out(tmp_path: Path) -> None:
    argv = ["fit", "--data", "Digits", "--model.objective", "PositionPrediction"]
    done = subprocess.run(
        [sys.executable, "-m", "quire", *argv],
        env={**os.environ, "QUIRE_PLUGINS": ""},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "named PositionPrediction; quire components lists them; QUIRE_PLUGINS= leaves the others out" in done.stderr


def test_the_corpus_is_large_and_no_name_comes_twice() -> None:
    names = [case["name"] for case in CASES]
    assert len(names) == len(set(names)) >= 40
