"""The shipped YAML says what it is."""

from quire.plugins import load


def test_every_config_is_shipped_and_says_what_it_is():
    shipped = {n for n in load().configs() if n.startswith("universal/")}
    assert shipped == {f"universal/{n}" for n in ("quick", "act", "lm", "text", "full")}
    for name in shipped:
        first = load().configs()[name].read_text(encoding="utf-8").splitlines()[0]
        assert first.startswith("# ") and len(first) > 40 and ("(parse only)" in first) == name.endswith("full")
