"""The shipped YAML says what it is, and parses."""

import pytest
from gsae_toys import K, model_of

from quire.__main__ import execute
from quire.plugins import load
from quire_gsae.selectors import GradTopK


def test_every_config_is_shipped_and_says_what_it_is():
    shipped = {n for n in load().configs() if n.startswith("gsae/")}
    assert shipped == {f"gsae/{n}" for n in ("quick", "tiny", "text", "gpt2")}
    for name in shipped:
        first = load().configs()[name].read_text(encoding="utf-8").splitlines()[0]
        assert first.startswith("# ") and len(first) > 40 and ("(parse only)" in first) == name.endswith("gpt2")


@pytest.mark.parametrize("k", [16, 32, 64])
def test_the_papers_scale_parses_for_each_k(k, capsys):
    sweep = ["--model.encoder.init_args.selector.init_args.k", str(k)]
    assert execute(["fit", "-c", "gsae/gpt2", *sweep, "--print_config"]) == 0
    assert f"k: {k}" in capsys.readouterr().out


def test_it_is_written_as_topk_with_a_note(tmp_path):
    from quire.roles.sparse.formats.files import write

    write(model_of(GradTopK(K)), tmp_path / "sae", "saelens")
    said = (tmp_path / "sae" / "cfg.json").read_text()
    assert '"topk"' in said and "GradTopK" in said
