from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

from quire import plugins
from quire.__main__ import execute
from quire.errors import ConfigError
from quire.registry import Registry


@pytest.fixture
def install(tmp_path, monkeypatch):
    """``install(name, source)`` puts a distribution quire-NAME with one module on the path."""
    monkeypatch.syspath_prepend(str(tmp_path))
    plugins.load.cache_clear()

    def put(name, source, version="1.0"):
        module = f"fake_{name.replace('-', '_')}"
        (tmp_path / f"{module}.py").write_text("from quire import hookimpl\n" + textwrap.dedent(source))
        info = tmp_path / f"quire_{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: quire-{name}\nVersion: {version}\n")
        (info / "entry_points.txt").write_text(f"[quire]\n{name} = {module}\n")
        plugins.load.cache_clear()

    yield put
    for name in [m for m in sys.modules if m.startswith("fake_")]:
        del sys.modules[name]
    plugins.load.cache_clear()


GOOD = """
@hookimpl
def quire_components(register):
    register("fake_good.Thing", "part", "gadget")
"""

BROKEN = {
    "import": ("import nothing_like_this", "ModuleNotFoundError: No module named 'nothing_like_this'"),
    "signature": ("@hookimpl\ndef quire_components(register, extra): ...", "PluginValidationError"),
    "misspelt": ("@hookimpl\ndef quire_componets(register): ...", "unknown hook 'quire_componets'"),
    "api": ("QUIRE_API = 99", "built for plugin interface 99, this Quire has 1"),
    "raises": ("@hookimpl\ndef quire_components(register): 1 / 0", "ZeroDivisionError"),
    "kind": ("@hookimpl\ndef quire_components(register): register('a.B', 'gizmo')", "kind 'gizmo'"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_plugin_is_recorded_and_the_others_go_on(install, capsys, how):
    source, said = BROKEN[how]
    install("bad", source, version="0.7")
    install("good", GOOD)
    found = plugins.load()
    assert said in found.records["bad"].error.replace("\n", " ")
    assert found.registry.get("Thing").plugin == "good"
    assert found.records["good"].error is None
    assert execute(["plugins"]) == 0
    line = next(ln for ln in capsys.readouterr().out.splitlines() if ln.startswith("bad"))
    assert "quire-bad" in line and "0.7" in line
    assert execute(["doctor", "--fast"]) == 1
    assert "BROKEN" in capsys.readouterr().out


def test_a_plugin_that_fails_half_way_leaves_nothing_behind(install):
    install("half", "@hookimpl\ndef quire_components(register):\n    register('x.Half', 'part')\n    1 / 0")
    assert "Half" not in plugins.load().registry.entries


def test_quire_trace_raises_the_plugins_own_error(install, monkeypatch):
    install("bad", "1 / 0")
    monkeypatch.setenv("QUIRE_TRACE", "1")
    with pytest.raises(ZeroDivisionError):
        plugins.load()


@pytest.mark.parametrize(
    ("value", "names"), [("good", ["core", "good"]), ("", ["core"]), (" good , other ", ["core", "good"])]
)
def test_quire_plugins_chooses_what_is_loaded(install, monkeypatch, value, names):
    install("good", GOOD)
    install("second", GOOD.replace("Thing", "Other"))
    monkeypatch.setenv("QUIRE_PLUGINS", value)
    plugins.load.cache_clear()
    assert list(plugins.load().records) == names


def test_a_name_claimed_twice_is_refused_only_when_it_is_used(install):
    install("good", GOOD)
    install("second", GOOD.replace("fake_good", "fake_second"))
    registry = plugins.load().registry
    assert registry.get("Digits").plugin == "core"
    with pytest.raises(
        ConfigError, match=r"Thing is claimed by good \(fake_good.Thing\) and second \(fake_second.Thing\)"
    ):
        registry.get("Thing")


def test_commands_of_a_plugin_run(install, capsys):
    install(
        "tool",
        """
        @hookimpl
        def quire_commands(register):
            register("hello", "fake_tool.hello", "greets")

        def hello(argv):
            print("hi", *argv)
            return 3
        """,
    )
    assert execute(["hello", "you"]) == 3
    assert "hi you" in capsys.readouterr().out
    assert execute(["helo"]) == 2
    assert "did you mean hello" in capsys.readouterr().err


def test_an_unknown_name_gets_the_nearest_one():
    with pytest.raises(ConfigError, match="no component is named Digitz; did you mean Digits"):
        plugins.load().registry.get("Digitz")


def test_paths_and_kinds_are_checked():
    with pytest.raises(ConfigError, match="is not a class path"):
        Registry().add("module:Class", "part")
    with pytest.raises(ConfigError, match="kinds are encoder"):
        Registry().add("module.Class", "thing")


@pytest.mark.parametrize(
    "command", ["plugins", "components", "components --json", "configs", "doctor --fast", "--help"]
)
def test_listing_commands_import_no_torch(command):
    code = (
        "import sys; from quire.__main__ import execute; assert execute(sys.argv[1:]) in (0, 1);"
        "assert not {'torch', 'lightning', 'numpy'} & set(sys.modules), 'heavy import'"
    )
    done = subprocess.run([sys.executable, "-c", code, *command.split()], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_quire_itself_imports_no_torch():
    code = "import quire, sys; dir(quire); assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
