"""mkdocs hook: a navigation entry for each paper's page that ``docs/generate.py`` wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def on_config(config: Any) -> Any:
    """Append ``Papers`` to the navigation."""
    folder = Path(config["docs_dir"]) / "generated" / "papers"
    pages = [{page.stem: f"generated/papers/{page.name}"} for page in sorted(folder.glob("*.md"))]
    if pages:
        config["nav"].append({"Papers": pages})
    return config
