"""The shipped YAML says what it is, and parses."""

import pytest

from quire.__main__ import execute
from quire.plugins import load


def test_every_config_is_shipped_and_says_what_it_is():
    shipped = {n for n in load().configs() if n.startswith("universal/")}
    assert shipped == {f"universal/{n}" for n in ("quick", "act", "lm", "scan", "text", "mt", "full")}
    for name in shipped:
        first = load().configs()[name].read_text(encoding="utf-8").splitlines()[0]
        assert first.startswith("# ") and len(first) > 40 and ("(parse only)" in first) == name.endswith("full")


@pytest.mark.parametrize("name", ["scan", "mt", "text", "full"])
def test_configs_of_real_data_parse_without_it(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("QUIRE_DATA", str(tmp_path))
    assert execute(["fit", "-c", f"universal/{name}", "--print_config"]) == 0
    assert "UniversalDecoder" in capsys.readouterr().out
