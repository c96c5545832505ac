"""The tutorial is followed to the letter: its files are written, its commands run, in the page's order."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.docs.blocks import ROOT, Block, blocks

PAGE = ROOT / "docs" / "tutorial.md"
NAME = "barlow-twins"
# one process for all commands after the installation: torch is imported once
FOLLOW = """
import runpy, shlex, sys
import pytest
from quire.__main__ import execute

for line in sys.argv[1:]:
    print("$", line, flush=True)
    program, *words = shlex.split(line)
    if program == "python":
        runpy.run_path(words[0])
    elif program == "pytest":
        assert pytest.main([*words, "-p", "no:cacheprovider"]) == 0, line
    else:
        assert execute(words) == 0, line
"""


def lines(block: Block) -> list[str]:
    return [line.partition(" #")[0].strip() for line in block.text.splitlines() if line.strip()]


class Walk:
    """A folder in which the page was followed, and what the commands printed."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.site = folder, folder / "site"
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST", "PL_", "QUIRE_PLUGINS"))}
        self.environment = {**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(self.site)}
        waiting: list[str] = []
        for block in blocks(PAGE):
            if block.title:
                self.run(*self.due(waiting))
                file = folder / block.title
                assert file.parent.is_dir(), f"{block.where}: nothing has made the folder of {block.title}"
                file.write_text(block.text, encoding="utf-8")
            elif block.language == "sh":
                waiting += lines(block)
        self.said = self.run(*self.due(waiting))

    def due(self, waiting: list[str]) -> list[str]:
        """What must run before the next file is written: only what makes the package's folders."""
        making = [line for line in waiting if line.startswith("quire new")]
        return [waiting.pop(waiting.index(line)) for line in making] if making else waiting

    def run(self, *commands: str) -> str:
        return ""
