"""The never-rules hold on the real tree, and each rule sees the fault that a small fake tree commits."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.architecture import rules

ROOT = Path(__file__).resolve().parents[2]
LIGHT = ("quire", "quire.plugins", "quire.registry", "quire.commands", "quire.hooks", "quire.errors", "quire.builtin")

PLUGIN = "plugins/other/src/quire_other"
HOOKS = '"""A plugin."""\nfrom quire.hooks import hookimpl\n\n\n@hookimpl\ndef quire_components(register): ...\n'

GOOD = {
    "core/quire/model.py": "import torch\n\n\ndef draw():\n    import torchvision\n",
    "core/quire/roles/tokens/timm.py": "import timm\n",
    "plugins/good-one/src/quire_good_one/__init__.py": HOOKS,
    "plugins/good-one/src/quire_good_one/objective.py": "import torch\nfrom quire import Objective\n",
    f"{PLUGIN}/__init__.py": HOOKS,
}

BAD: list[tuple[Callable[[Path], list[str]], str, str]] = [
    (rules.core_imports_no_plugin, "core/quire/model.py", "def f():\n    from quire_gsae import GradTopK\n"),
    (rules.core_imports_no_plugin, "core/quire/model.py", "import importlib\nimportlib.import_module('quire_mp3')\n"),
    (rules.plugin_imports_no_plugin, f"{PLUGIN}/x.py", "import quire_good_one.objective\n"),
    (rules.plugin_imports_no_plugin, "plugins/other/tests/test_x.py", "from quire_good_one import objective\n"),
    (rules.nothing_happens_at_import, "core/quire/hub.py", "import urllib.request\n"),
    (rules.nothing_happens_at_import, "core/quire/hub.py", "from http import client\n"),
    (rules.nothing_happens_at_import, "core/quire/hub.py", "class A:\n    net = Net.from_pretrained('x')\n"),
    (rules.nothing_happens_at_import, f"{PLUGIN}/x.py", "REGISTRY.register(object)\n"),
    (rules.nothing_happens_at_import, f"{PLUGIN}/x.py", "@table.register('x')\nclass X: ...\n"),
    (rules.plugin_init_holds_hooks, f"{PLUGIN}/__init__.py", HOOKS + "import torch\n"),
    (
        rules.plugin_init_holds_hooks,
        f"{PLUGIN}/__init__.py",
        HOOKS + "from quire import Objective\n",
    ),
    (rules.plugin_init_holds_hooks, f"{PLUGIN}/__init__.py", HOOKS + "class X: ...\n"),
    (rules.plugin_init_holds_hooks, f"{PLUGIN}/__init__.py", HOOKS + "def loose(): ...\n"),
    (rules.plugin_init_holds_hooks, f"{PLUGIN}/__init__.py", HOOKS + "print(1)\n"),
    (rules.plugin_init_holds_hooks, "plugins/third/src/elsewhere/__init__.py", HOOKS),
    (rules.private_modules_have_no_public_class, "core/quire/_hidden.py", "class Part: ...\n"),
    (rules.private_modules_have_no_public_class, f"{PLUGIN}/_in/x.py", "class Part: ...\n"),
    *[
        (rules.heavy_packages_are_imported_where_used, "core/quire/model.py", f"from {name} import x\n")
        for name in rules.HEAVY
    ],
    (
        rules.heavy_packages_are_imported_where_used,
        "core/quire/model.py",
        "try:\n    import av\nexcept E:\n    av = None\n",
    ),
    (rules.heavy_packages_are_imported_where_used, "core/quire/roles/tokens/timm.py", "import torchvision\n"),
    *[
        (rules.names_say_something, f"core/quire/{name}.py", "")
        for name in ("utils", "util", "helpers", "common", "misc", "base2")
    ],
    (rules.names_say_something, f"{PLUGIN}/utils/x.py", ""),
    (rules.files_are_short, "core/quire/long.py", "\n" * 401),
    (rules.files_are_short, f"{PLUGIN}/wide.py", "\n" * 301),
]

RULES = sorted({rule for rule, _, _ in BAD}, key=lambda rule: rule.__name__)


def grow(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    return root


def repository_files() -> list[Path]:
    """What git has or would add; every text file outside ignored folders when there is no git."""
    git = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(git, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        folders = ("core", "plugins", "tests", "docs", "configs")
        return [p for f in folders for p in sorted((ROOT / f).rglob("*")) if p.is_file()] + sorted(ROOT.glob("*.*"))
    return [ROOT / name for name in listed]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_tree_keeps_the_rule(rule: Callable[[Path], list[str]]) -> None:
    assert rule(ROOT) == []


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_rule_lets_a_good_tree_pass(rule: Callable[[Path], list[str]], tmp_path: Path) -> None:
    assert rule(grow(tmp_path, GOOD)) == []


@pytest.mark.parametrize(("rule", "file", "text"), BAD, ids=[f"{r.__name__}-{i}" for i, (r, _, _) in enumerate(BAD)])
def test_the_rule_sees_the_fault(rule: Callable[[Path], list[str]], file: str, text: str, tmp_path: Path) -> None:
    found = rule(grow(tmp_path, {**GOOD, file: text}))
    assert found, f"{rule.__name__} does not see {text!r} in {file}"
    assert file.partition("/")[0] in found[0]


def test_no_file_of_the_repository_holds_a_machine_path_or_a_registry_host() -> None:
    assert rules.no_machine_paths(ROOT, repository_files()) == []


@pytest.mark.parametrize(
    "line",
    [
        "root: /ho" + "me/ann/mnist",
        'open("/wo' + 'rk/data")',
        "C:" + "\\Users\\ann",
        "--index" + "-url x",
        "https://py" + "pi.org/simple",
    ],
)
def test_a_machine_path_or_a_registry_host_is_seen(line: str, tmp_path: Path) -> None:
    grow(tmp_path, {"README.md": f"fine\n{line}\n"})
    found = rules.no_machine_paths(tmp_path, [tmp_path / "README.md"])
    assert len(found) == 1
    assert found[0].startswith("README.md:2 ")


def test_paths_that_are_nobodys_are_let_through(tmp_path: Path) -> None:
    text = "root: $QUIRE_DATA/mnist\nsee ~/.cache/quire, /proc/cpuinfo, ../files/x and https://example.org/home/x\n"
    grow(tmp_path, {"README.md": text})
    assert rules.no_machine_paths(tmp_path, [tmp_path / "README.md"]) == []


def test_function_bodies_and_type_checking_do_not_run_at_import() -> None:
    source = """
if TYPE_CHECKING:
    import timm
else:
    import av

def f():
    import soundfile

class A:
    import skimage
"""
    tree = rules.ast.parse(source)
    assert [m for node in rules.at_import(tree) for m in rules.imported(node)] == ["av", "skimage"]


@pytest.mark.parametrize("module", LIGHT)
def test_light_modules_leave_torch_out(module: str) -> None:
    code = f"import sys, {module}\nassert 'torch' not in sys.modules, '{module} imports torch'\n"
    code += "assert 'lightning' not in sys.modules\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_finding_every_plugin_leaves_torch_out() -> None:
    code = "import sys\nfrom quire.plugins import load\nload().configs()\n[e.summary() for e in load().registry]\n"
    code += "assert 'torch' not in sys.modules\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
