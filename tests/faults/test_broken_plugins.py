"""One installation with everything that can be wrong with a plugin: it is named, and all else works."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from quire import plugins
from quire.__main__ import execute

WRONG = {  # plugin name: source, what is said of it
    "fails-on-import": ("import nothing_like_this", "ModuleNotFoundError: No module named 'nothing_like_this'"),
    "is-no-python": ("def quire_components(:", "SyntaxError"),
    "exits": ("raise SystemExit(3)", "SystemExit: 3"),
    "wrong-signature": ("@hookimpl\ndef quire_components(register, more): ...", "Argument(s) {'more'}"),
    "other-interface": (
        "QUIRE_API = 99",
        "built for plugin interface 99, this Quire has 1: install a matching version",
    ),
    "misspelt-hook": ("@hookimpl\ndef quire_componets(register): ...", "unknown hook 'quire_componets'"),
    "raises-in-hook": ("@hookimpl\ndef quire_commands(register): 1 / 0", "ZeroDivisionError"),
    "claims-then-fails": (
        "@hookimpl\ndef quire_components(register): register('a.Same', 'part'); 1 / 0",
        "ZeroDivision",
    ),
    "wrong-kind": ("@hookimpl\ndef quire_components(register): register('a.B', 'gizmo')", "kind 'gizmo'"),
}
GOOD = """
@hookimpl
def quire_components(register):
    register("{module}.Same", "encoder")

@hookimpl
def quire_commands(register):
    register("{name}", "{module}.greet", "greets")

def greet(argv):
    print("greetings")
"""
FIT = {
    "model": {"encoder": "FlatPixels", "objective": "Classify"},
    "data": "Digits",
    "trainer": {"max_steps": 1, "accelerator": "cpu", "enable_progress_bar": False, "limit_val_batches": 0},
}


def put(site: Path, name: str, source: str, distribution: str = "", version: str = "4.2") -> None:
    """A distribution with one module and one entry point, as pip leaves it."""
    distribution = distribution or f"odd-{name}"
    module = distribution.replace("-", "_")
    text = source.replace("{module}", module).replace("{name}", name)
    (site / f"{module}.py").write_text("from quire import hookimpl\n" + textwrap.dedent(text))
    info = site / f"{module}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
    (info / "entry_points.txt").write_text(f"[quire]\n{name} = {module}\n")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("site")
    for name, (source, _) in WRONG.items():
        put(made, name, source)
    put(made, "good", GOOD)
    put(made, "other", GOOD)  # claims the component name Same too
    put(made, "good", GOOD, distribution="second-good", version="0.3")  # and one takes the plugin name good again
    return made


@pytest.fixture
def run(
    site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """``run(*argv)`` in this installation gives exit code, stdout and stderr."""
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.chdir(tmp_path)
    plugins.load.cache_clear()

    def call(*argv: str) -> tuple[int, str, str]:
        capfd.readouterr()
        code = execute(list(argv))
        return code, *capfd.readouterr()

    yield call
    plugins.load.cache_clear()


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("command", ["plugins", "doctor --fast"])
def test_a_broken_plugin_is_shown_by_name_distribution_version_and_error(run, command: str, name: str) -> None:
    code, out, _ = run(*command.split())
    assert code == (0 if command == "plugins" else 1)
    (line,) = [ln for ln in out.splitlines() if name in ln]
    assert f"odd-{name}" in line
    assert "4.2" in line
    assert WRONG[name][1] in line


@pytest.mark.parametrize("command", ["plugins", "doctor --fast"])
def test_a_plugin_name_taken_twice_is_shown_with_both_distributions(run, command: str) -> None:
    lines = [ln for ln in run(*command.split())[1].splitlines() if "already taken" in ln]
    assert len(lines) == 1
    assert "the name good is already taken by" in lines[0]
    assert "odd-good" in lines[0] and "second-good" in lines[0]


def test_doctor_shows_a_component_name_claimed_twice(run) -> None:
    (line,) = [ln for ln in run("doctor", "--fast")[1].splitlines() if ln.startswith("name Same")]
    assert "BROKEN" in line and "good" in line and "other" in line


def test_a_component_name_claimed_twice_is_refused_only_where_it_is_used(run) -> None:
    code, _, err = run("fit", "--data", "Digits", "--model.encoder", "Same")
    assert code == 2
    assert "Same is claimed by good" in err and "and other" in err
    assert run("components", "Digits")[0] == 0


@pytest.mark.parametrize(
    "command", ["components", "components --json", "configs", "--help", "--version", "plugins --json", "good", "other"]
)
def test_every_other_command_works(run, command: str) -> None:
    code, out, err = run(*command.split())
    assert (code, err) == (0, "")
    assert out


def test_training_works(run) -> None:
    Path("fit.yaml").write_text(yaml.safe_dump(FIT))
    assert run("fit", "-c", "fit.yaml")[0] == 0


def test_a_broken_plugins_name_in_a_config_is_said_to_be_broken(run) -> None:
    code, _, err = run("fit", "-c", "fails-on-import/tiny")
    assert code == 2
    assert "plugin fails-on-import is installed but broken (ModuleNotFoundError" in err


def test_the_console_script_lists_the_broken_without_importing_torch(site: Path, tmp_path: Path) -> None:
    code = "import sys, quire.__main__ as q; c = q.execute(['plugins']); print('torch' in sys.modules); sys.exit(c)"
    env = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert all(name in done.stdout for name in WRONG)
    assert done.stdout.endswith("False\n")
