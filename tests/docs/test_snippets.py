"""What the pages show works: YAML parses through the command line, marked Python runs, commands and configs exist."""

from __future__ import annotations

import re
import sys
import types
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from tests.docs.blocks import PAGES, Block, all_blocks, blocks

from quire.__main__ import LIGHTNING, execute
from quire.contracts import SLOTS
from quire.plugins import load

SHOWN = all_blocks("yaml")
RUNS = [b for b in SHOWN if {"model", "data"} <= set(yaml.safe_load(b.text) or {})]
SKETCHES = all_blocks("yaml", mark="sketch")
RUNNABLE = [page for page in PAGES if any(b.mark == "run" for b in blocks(page))]
SHELL = all_blocks("sh", "bash", "shell", "console")


def where(item: Block | Path) -> str:
    return item.where if isinstance(item, Block) else item.name


@pytest.mark.parametrize("block", RUNS, ids=where)
def test_a_complete_run_parses_through_the_command_line(
    block: Block, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    file = tmp_path / "shown.yaml"
    file.write_text(block.text, encoding="utf-8")
    code = execute(["fit", "-c", str(file), "--print_config"])
    assert code == 0, f"{block.where}: {capsys.readouterr().err}"


def test_the_pages_show_complete_runs() -> None:
    assert {"README.md", "index.md", "mixing.md", "evaluation.md"} <= {b.page.name for b in RUNS}


def names(value: object) -> set[str]:
    """Every class that a config names."""
    if isinstance(value, dict):
        own = {value["class_path"]} if isinstance(value.get("class_path"), str) else set()
        return own.union(*(names(v) for k, v in value.items() if k != "class_path")) if value else own
    if isinstance(value, list):
        return set().union(*(names(v) for v in value))
    return {value} if isinstance(value, str) and re.fullmatch(r"[A-Z]\w+", value) else set()


@pytest.mark.parametrize("block", SKETCHES, ids=where)
def test_a_sketch_keeps_to_the_grammar_and_is_still_a_sketch(block: Block) -> None:
    shown = yaml.safe_load(block.text)
    assert set(shown) <= {"model", "data", "trainer"}
    assert set(shown["model"]) <= {*SLOTS, "metrics", "optimizer", "schedule"}
    missing = names(shown) - set(load().registry.entries)
    assert missing, f"{block.where}: everything it names is installed now, so drop the mark: it must parse"


@pytest.mark.parametrize("page", RUNNABLE, ids=where)
def test_marked_python_runs_in_page_order(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    module = types.ModuleType(f"shown_in_{page.stem}")  # a module: roles are looked up where a class was written
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for block in blocks(page):
        if block.language == "python" and block.mark == "run":
            exec(compile("\n" * block.line + block.text, str(page), "exec"), module.__dict__)


def commands(block: Block) -> list[list[str]]:
    lines = block.text.replace("\\\n", " ").splitlines()
    words = [line.partition(" #")[0].lstrip("$ ").split() for line in lines]
    return [w for w in words if w and w[0] in ("quire", "lightning")]


@pytest.mark.parametrize("block", SHELL, ids=where)
def test_shown_commands_and_configs_exist(block: Block) -> None:
    known = {*LIGHTNING, *load().commands}
    for words in commands(block):
        assert len(words) > 1, f"{block.where}: {words}"
        assert words[1] in known, f"{block.where}: there is no command {words[1]}"
        for flag, value in pairwise(words):
            plugin, slash, _ = value.partition("/")
            if flag == "-c" and slash and plugin in load().records:
                assert value in load().configs(), f"{block.where}: {plugin} ships no config {value}"


def test_shown_arguments_of_reproduce_name_a_claim() -> None:
    for block in SHELL:
        for words in commands(block):
            if words[1] == "reproduce" and len(words) > 2 and words[2] != "my-method":
                assert words[2] in load().claims, f"{block.where}: {words[2]} has no claim"


def test_blocks_and_marks_are_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "a\n<!-- run -->\n```python\nx = 1\n```\n\n```yaml\nmodel: {}\n```\n<!-- sketch -->\n```yaml\nb: 1\n```\n"
        '```yaml title="a/b.yaml"\nc: 1\n```\n'
    )
    assert [(b.line, b.language, b.text, b.mark) for b in blocks(page)] == [
        (3, "python", "x = 1\n", "run"),
        (7, "yaml", "model: {}\n", ""),
        (11, "yaml", "b: 1\n", "sketch"),
        (14, "yaml", "c: 1\n", "file"),
    ]
