"""What ``quire new plugin`` renders: as it is, it installs, is listed, trains, conforms, and goes away again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from quire.__main__ import execute

ROOT = Path(__file__).parents[2]
NAME = "my-method"


def rendered(folder: Path, name: str) -> Path:
    assert execute(["new", "plugin", name, "--folder", str(folder)]) == 0
    return folder / name


@pytest.mark.parametrize("name", ["a", NAME, "a-rather-long-name-of-a-method-2"])
def test_it_is_formatted_and_has_no_lint_for_any_name(tmp_path, name):
    made = rendered(tmp_path, name)
    ruff = [sys.executable, "-m", "ruff"]
    for command in (["check"], ["format", "--check"]):
        done = subprocess.run([*ruff, *command, "--no-cache", made], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout


def test_no_placeholder_is_left(tmp_path):
    made = rendered(tmp_path, NAME)
    files = [f for f in made.rglob("*") if f.is_file()]
    assert {str(f.relative_to(made)) for f in files} == {
        "README.md",
        "pyproject.toml",
        "src/quire_my_method/__init__.py",
        "src/quire_my_method/configs/tiny.yaml",
        "src/quire_my_method/objective.py",
        "tests/test_conformance.py",
        "tests/test_objective.py",
    }
    for file in files:
        text = file.read_text(encoding="utf-8")
        assert not [word for word in ("__name__", "__module__", "__Class__") if word in text], file


class Fresh:
    """A virtual environment of its own that sees this one's packages, so torch isn't installed again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
        self.python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
        variables = {"base": str(folder), "platbase": str(folder)}
        own = Path(sysconfig.get_path("purelib", "venv", variables))
        ours = [p for p in sys.path if p.endswith("site-packages")]
        lines = [f"import site; site.addsitedir({p!r})" for p in ours]  # their .pth files count too
        (own / "beneath.pth").write_text("\n".join(lines) + "\n", encoding="utf-8")

    def run(self, *command: str | Path, script: str = "", cwd: Path | None = None) -> subprocess.CompletedProcess:
        """Python with these arguments, or one of the environment's scripts."""
        start = [self.python.with_name(script)] if script else [self.python, "-m"]
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST", "PL_", "QUIRE_PLUGINS"))}
        done = subprocess.run(
            [*start, *command],
            cwd=cwd or self.folder,
            env={"OMP_NUM_THREADS": "1", **environment},
            capture_output=True,
            text=True,
            timeout=500,
            check=False,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
        return done

    def install(self, project: Path) -> None:
        """pip, offline."""
        self.run("pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-index", project)


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    made = Fresh(tmp_path_factory.mktemp("fresh"))
    made.install(ROOT)  # brings the scripts quire and lightning
    return made


@pytest.fixture(scope="module")
def project(fresh, tmp_path_factory):
    folder = tmp_path_factory.mktemp("project")
    fresh.run("new", "plugin", NAME, "--folder", folder, script="quire")
    fresh.install(folder / NAME)
    return folder / NAME


def listed(fresh: Fresh) -> dict[str, str | None]:
    found = json.loads(fresh.run("plugins", "--json", script="quire").stdout)
    return {record["name"]: record["error"] for record in found}


def test_installed_it_is_listed_and_trains_and_conforms_and_uninstalled_it_is_gone(fresh, project, tmp_path):
    assert listed(fresh)[NAME] is None
    names = {c["name"] for c in json.loads(fresh.run("components", "--json", "--plugin", NAME, script="quire").stdout)}
    assert names == {"MyMethod"}

    said = fresh.run(
        "fit", "-c", f"{NAME}/tiny", "--trainer.enable_progress_bar=false", script="lightning", cwd=tmp_path
    )
    assert list(tmp_path.glob(f"runs/{NAME}/tiny/version_0/checkpoints/*.ckpt")), said.stdout

    kit = fresh.run("pytest", "-q", "-p", "no:cacheprovider", cwd=project).stdout
    assert "failed" not in kit and "passed" in kit

    fresh.run("pip", "uninstall", "-q", "-y", f"quire-{NAME}")
    assert NAME not in listed(fresh)
