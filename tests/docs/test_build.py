"""The site builds, strictly: a broken link, anchor, snippet or reference fails it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_the_site_builds_strictly(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    made = subprocess.run([sys.executable, "docs/generate.py"], cwd=ROOT, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "site" / "index.html").is_file()
    for paper in (ROOT / "plugins").glob("*/README.md"):
        assert (tmp_path / "site" / "generated" / "papers" / paper.parent.name / "index.html").is_file()
