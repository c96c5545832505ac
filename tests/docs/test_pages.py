"""Nothing is missing from the pages: hooks, components, fields, papers, results; and what they link to exists."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import yaml
from docs import claims_figure, generate, reproduction
from tests.docs.blocks import ROOT, blocks

from quire.data import FIELDS
from quire.plugins import load
from quire.registry import Entry

DOCS = ROOT / "docs"
TYPED_BY_HAND = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "plugins").glob("*/README.md"))]


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The generated pages of this installation."""
    out = tmp_path_factory.mktemp("docs") / "generated"
    assert generate.generate(out) == []
    return out


def content(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# ---- hooks
def undocumented(names: list[str], page: str) -> list[str]:
    return [n for n in names if f"\n## {n}\n" not in page or f'"generated/snippets/{n}.md"' not in page]


def test_every_hook_has_a_section_with_its_signature_and_an_example() -> None:
    page = (DOCS / "hooks.md").read_text(encoding="utf-8")
    names = [name for name, _, _ in generate.hooks()]
    assert len(names) >= 3
    assert undocumented(names, page) == []
    shown = "".join(b.text for b in blocks(DOCS / "hooks.md") if b.mark == "run")
    assert all(f"def {name}(" in shown for name in names)


def test_a_hook_without_a_section_is_noticed() -> None:
    page = (DOCS / "hooks.md").read_text(encoding="utf-8")
    assert undocumented(["quire_nothing"], page) == ["quire_nothing"]


# ---- components
def missing(entries: list[Entry], folder: Path) -> list[str]:
    pages = {
        kind: (folder / "components" / f"{kind}.md").read_text(encoding="utf-8") for kind in {e.kind for e in entries}
    }
    return [e.name for e in entries if f"\n## {e.name}\n" not in pages[e.kind]]


def test_every_component_has_its_section(generated: Path) -> None:
    entries = list(load().registry)
    assert entries
    assert missing(entries, generated) == []
    index = (generated / "components" / "index.md").read_text(encoding="utf-8")
    assert all(f"[{e.name}]({e.kind}.md#{e.name.lower()})" in index for e in entries)


def test_a_component_without_a_section_is_noticed(generated: Path) -> None:
    assert missing([Entry("Nobody", "a.Nobody", "encoder", (), "core")], generated) == ["Nobody"]


def test_a_component_shows_arguments_handed_on_to_its_base(generated: Path) -> None:
    page = (generated / "components" / "data.md").read_text(encoding="utf-8")
    digits = page.partition("\n## Digits\n")[2].partition("\n## ")[0]
    assert "| `channels` |" in digits  # its own
    assert "| `train_samples` |" in digits  # DataModule's, by **kwargs
    assert "Keep only this many training samples" in digits


def test_every_batch_field_is_in_the_table(generated: Path) -> None:
    table = (generated / "snippets" / "fields.md").read_text(encoding="utf-8")
    assert all(f"| `{name}` | {text} |" in table for name, text in FIELDS.items())
    assert '"generated/snippets/fields.md"' in (DOCS / "concepts.md").read_text(encoding="utf-8")


def test_the_pages_are_the_same_every_time(generated: Path, tmp_path: Path) -> None:
    generate.generate(tmp_path / "again")
    assert content(tmp_path / "again") == content(generated)


# ---- papers
@pytest.mark.parametrize("readme", sorted((ROOT / "plugins").glob("*/README.md")), ids=lambda p: p.parent.name)
def test_the_readme_of_a_plugin_is_its_page(readme: Path, generated: Path) -> None:
    page = (generated / "papers" / f"{readme.parent.name}.md").read_text(encoding="utf-8")
    assert readme.read_text(encoding="utf-8").splitlines()[0] in page
    prose = [p for p in readme.read_text(encoding="utf-8").split("\n\n") if p and not generate.LINK.search(p)]
    assert all(p.strip() in page for p in prose)
    for entry in load().registry:
        if entry.plugin == readme.parent.name:
            assert f"[{entry.name}](../components/{entry.kind}.md" in page


def test_links_of_a_readme_are_seen_from_its_page(tmp_path: Path) -> None:
    home = ROOT / "plugins" / "x"
    text = "[a](../../docs/mixing.md#sum) [b](https://example.org) [c](src/x.py) [d](#here)"
    assert generate.relink(text, home, tmp_path) == (
        "[a](../../mixing.md#sum) [b](https://example.org) c (`plugins/x/src/x.py`) [d](#here)"
    )


# ---- results
REPORT = {
    "plugin": "toy",
    "paper": "A paper",
    "claim": "it | helps",
    "budget": "digits, 10 steps.",
    "seeds": 2,
    "arms": {"method": {"acc": {"mean": 0.75, "sd": 0.01}}, "control": {"acc": {"mean": 0.5, "sd": 0.02}}},
    "bands": [{"text": "method - control", "measured": 0.25, "needed": "> 0.1", "held": True}],
    "verdict": "reproduced",
    "remarks": ["not at a long budget"],
}


def test_the_reproduction_page_is_what_the_kept_results_say() -> None:
    page = (DOCS / "reproduction.md").read_text(encoding="utf-8")
    body = reproduction.rendered(DOCS / "results", load().claims)
    assert page == reproduction.render(page, body), "run python docs/reproduction.py"


def test_a_claim_is_in_the_table_with_its_numbers_or_marked_as_not_run(tmp_path: Path) -> None:
    (tmp_path / "runs" / "toy").mkdir(parents=True)
    (tmp_path / "runs" / "toy" / "result.json").write_text(json.dumps(REPORT), encoding="utf-8")
    assert reproduction.collect(tmp_path / "runs", tmp_path / "kept") == ["toy"]
    page = reproduction.rendered(tmp_path / "kept", ["toy", "later"])
    assert "| later | **not run yet**: `quire reproduce later` |" in page
    row = next(line for line in page.splitlines() if line.startswith("| [toy](#toy)"))
    for piece in ("it \\| helps", "1 of 1 hold", "**reproduced**"):
        assert piece in row
    assert "Budget: digits, 10 steps; 2 seeds." in page
    assert "| control | 0.5 ± 0.02 |" in page
    assert "| method - control | 0.25 | > 0.1 | holds |" in page
    assert "Note: not at a long budget" in page


@pytest.mark.parametrize(
    ("needed", "allowed"),
    [
        (">= 3", (3.0, math.inf)),
        ("< 1/3", (-math.inf, 0.3333)),
        ("in [1.3, 4]", (1.3, 4.0)),
        ("at least +8.0 points and above twice the standard error", (8.0, math.inf)),
        ("within 3 points (parity)", (-3.0, 3.0)),
        ("0.39931 ± 0.003", (0.39631, 0.40231)),
        ("> 0.9 and above 0.628 + 0.05", (0.9, math.inf)),
        ("1", (1.0, 1.0)),
        ("falling at each weight", (-math.inf, math.inf)),
    ],
)
def test_the_figure_shades_what_a_requirement_allows(needed: str, allowed: tuple[float, float]) -> None:
    assert claims_figure.bounds(needed) == pytest.approx(allowed)


def test_the_figure_is_drawn_from_kept_results(tmp_path: Path) -> None:
    claims_figure.draw(tmp_path, tmp_path / "empty.png")
    assert not (tmp_path / "empty.png").exists()
    (tmp_path / "toy.json").write_text(json.dumps(REPORT), encoding="utf-8")
    claims_figure.draw(tmp_path, tmp_path / "toy.png")
    assert (tmp_path / "toy.png").stat().st_size > 1000


def test_rendering_again_changes_nothing() -> None:
    page = f"before\n{reproduction.START}\nold\n{reproduction.END}\nafter\n"
    once = reproduction.render(page, "new")
    assert once == f"before\n{reproduction.START}\n\nnew\n\n{reproduction.END}\nafter\n"
    assert reproduction.render(once, "new") == once


# ---- links and navigation
@pytest.mark.parametrize("page", TYPED_BY_HAND, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_local_links_and_pictures_exist(page: Path) -> None:
    links = re.findall(r"\]\((?!https?://|#|mailto:)([^)#\s]+)", page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_every_page_is_in_the_navigation() -> None:
    said = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    listed = set(re.findall(r"[\w/-]+\.md", json.dumps(said)))
    assert {p.name for p in DOCS.glob("*.md")} <= listed


def test_the_readme_names_every_paper() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    missing = [
        f.parent.name for f in (ROOT / "plugins").glob("*/README.md") if f"](plugins/{f.parent.name}/" not in text
    ]
    assert not missing


def test_the_readme_shows_commands_a_run_a_mix_and_a_picture() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "make demo" in text
    assert "make test" in text
    assert sum(b.language == "yaml" for b in blocks(ROOT / "README.md")) >= 2
    assert "![" in text
