"""Render ``docs/reproduction.md`` from the results of ``quire reproduce``, so no number there is typed by hand.

``python docs/reproduction.py`` copies ``runs/reproduce/*/result.json`` to ``docs/results/<plugin>.json``, which are
committed, and writes the table between the page's two marks. A claim without a result is marked as not run.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from quire.plugins import load

DOCS = Path(__file__).resolve().parent
START, END = "<!-- results: written by docs/reproduction.py -->", "<!-- end of results -->"
FIGURE = (
    "![every claim: its arms in the number that it is about, and each requirement with what was measured]"
    "(images/reproduction.png)\n\nLeft: mean and deviation over seeds of every arm, controls included. Right: each "
    "requirement on a scale of its own, allowed values shaded; a dot in the shade holds."
)
SAYS = {True: "holds", False: "**fails**", None: "can't tell"}


def collect(runs: Path, kept: Path) -> list[str]:
    """Copy ``runs/*/result.json`` to ``kept/<plugin>.json``; returns the plugins found."""
    found = []
    for file in sorted(runs.glob("*/result.json")):
        report = json.loads(file.read_text(encoding="utf-8"))
        kept.mkdir(parents=True, exist_ok=True)
        (kept / f"{report['plugin']}.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        found.append(report["plugin"])
    return found


def rendered(kept: Path, claims: Iterable[str]) -> str:
    """The table and one section a plugin, from the results that are kept."""
    reports = {f.stem: json.loads(f.read_text(encoding="utf-8")) for f in sorted(kept.glob("*.json"))}
    rows, blocks = [], []
    for name in sorted({*reports, *claims}):
        if name in reports:
            report = reports[name]
            verdict = f"**{report['verdict']}**"
            rows.append([f"[{name}](#{name})", report["claim"], held(report), str(report["seeds"]), verdict])
            blocks += section(report)
        else:
            rows.append([name, f"**not run yet**: `quire reproduce {name}`", "", "", ""])
    return "\n\n".join([table(["plugin", "claim", "requirements", "seeds", "verdict"], rows), FIGURE, *blocks])


def held(report: Mapping[str, Any]) -> str:
    """``4 of 5 hold``."""
    return f"{sum(b['held'] is True for b in report['bands'])} of {len(report['bands'])} hold"


def section(report: Mapping[str, Any]) -> list[str]:
    """All numbers of one claim: arms, requirements, remarks."""
    metrics = list(dict.fromkeys(m for v in report["arms"].values() for m in v))
    rows = [[arm, *(number(v[m]) if m in v else "" for m in metrics)] for arm, v in report["arms"].items()]
    bands = [[b["text"], f"{b['measured']:.4g}", b["needed"], SAYS[b["held"]]] for b in report["bands"]]
    return [
        f"## {report['plugin']}",
        report["paper"],
        f"Budget: {budget(report)}. Mean ± standard deviation over seeds.",
        table(["arm", *metrics], rows),
        table(["required", "measured", "needed", "result"], bands),
        *(f"Note: {remark}" for remark in report["remarks"]),
    ]


def number(value: Mapping[str, float]) -> str:
    """Mean and standard deviation over seeds."""
    return f"{value['mean']:.4g} ± {value['sd']:.2g}"


def budget(report: Mapping[str, Any]) -> str:
    """What the verdict holds for."""
    return f"{report['budget'].rstrip('.')}; {report['seeds']} seed{'' if report['seeds'] == 1 else 's'}"


def table(head: list[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(" ".join(c.replace("|", "\\|").split()) for c in line) + " |" for line in lines)


def render(page: str, body: str) -> str:
    """``page`` with what lies between its two marks replaced."""
    before, _, rest = page.partition(START)
    return f"{before}{START}\n\n{body}\n\n{END}{rest.partition(END)[2]}"


def main() -> int:
    """Take what was run, write the page and its figure."""
    from claims_figure import draw  # beside this file, which runs as a script

    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--runs", default=str(DOCS.parent / "runs" / "reproduce"), help="where quire reproduce wrote")
    found = collect(Path(parser.parse_args().runs), DOCS / "results")
    page = DOCS / "reproduction.md"
    body = rendered(DOCS / "results", load().claims)
    draw(DOCS / "results", DOCS / "images" / "reproduction.png")
    page.write_text(render(page.read_text(encoding="utf-8"), body), encoding="utf-8")
    print(f"{page.name}: new results of {', '.join(found) or 'nothing'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
