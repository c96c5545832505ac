"""Fenced blocks of the pages, with the mark that stands above them: ``<!-- run -->`` or ``<!-- sketch -->``.

A block with ``title="…"`` is that file of a walk, has the mark ``file`` and is tested by following the walk.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "plugins").glob("*/README.md")),
]
FENCE = re.compile(r'^```(\w*)(?: title="([^"\n]+)")?[^\n]*\n(.*?)^```', re.M | re.S)
MARK = re.compile(r"<!-- (run|sketch) -->\s*\Z")


@dataclass(frozen=True)
class Block:
    """One fenced block."""

    page: Path
    line: int
    language: str
    text: str
    mark: str
    title: str = ""

    @property
    def where(self) -> str:
        """``docs/mixing.md:12``."""
        return f"{self.page.relative_to(ROOT).as_posix()}:{self.line}"


def blocks(page: Path) -> list[Block]:
    """The blocks of a page, in order."""
    text = page.read_text(encoding="utf-8")
    found = []
    for match in FENCE.finditer(text):
        mark = MARK.search(text, 0, match.start())
        line = text.count("\n", 0, match.start()) + 1
        said = mark[1] if mark else "file" if match[2] else ""
        found.append(Block(page, line, match[1], match[3], said, match[2] or ""))
    return found


def all_blocks(*languages: str, mark: str = "") -> list[Block]:
    """Blocks of every page in one of ``languages`` with this mark."""
    return [b for page in PAGES for b in blocks(page) if b.language in languages and b.mark == mark]
