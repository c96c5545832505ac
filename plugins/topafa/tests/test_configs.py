"""The shipped YAML says what it is, parses, and the metric runs on a dictionary from another project's files."""

import pytest
import torch
from topafa_toys import D, F, model_of

from quire import ConfigError
from quire.__main__ import execute
from quire.plugins import load
from quire.roles.sparse.selectors import TopK
from quire_topafa.selector import TopAFA

NAMES = ("quick", "planted", "tiny", "text", "gpt2", "eps_lbo")


def test_every_config_is_shipped_and_says_what_it_is():
    shipped = {n for n in load().configs() if n.startswith("topafa/")}
    assert shipped == {f"topafa/{n}" for n in NAMES}
    for name in shipped:
        first = load().configs()[name].read_text(encoding="utf-8").splitlines()[0]
        assert first.startswith("# ") and len(first) > 40
        assert ("(parse only)" in first) == name.endswith(("gpt2", "eps_lbo"))


@pytest.mark.parametrize("layer", [6, 7, 8])
def test_the_official_scale_parses_for_each_layer(layer, capsys):
    sweep = ["--data.init_args.site", f"blocks.{layer}.resid_pre"]
    assert execute(["fit", "-c", "topafa/gpt2", *sweep, "--print_config"]) == 0
    assert f"blocks.{layer}.resid_pre" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore")
def test_the_metric_reads_a_dictionary_in_saelens_files(tmp_path, monkeypatch, capsys):
    from quire.roles.sparse.formats.files import write

    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    write(model_of(TopK(4), width=D, latents=F), tmp_path / "sae", "saelens")
    small = f"{{class_path: CausalLM, init_args: {{width: {D}, depth: 2, heads: 2, rope: false}}}}"
    options = ["--model.encoder.init_args.path", "sae", "--model.decoder.init_args.path", "sae"]
    options += ["--data.init_args.subject", small, "--data.init_args.site", "blocks.1.resid_pre"]
    options += ["--data.init_args.source", "stdlib:docs", "--data.init_args.length", "16"]
    options += ["--data.init_args.batch_size", "64", "--trainer.limit_val_batches", "2", "--trainer.accelerator", "cpu"]
    assert execute(["validate", "-c", "topafa/eps_lbo", *options]) == 0, capsys.readouterr().err
    assert "val/EpsLBO" in capsys.readouterr().out


def test_it_is_not_written_as_something_that_it_is_not(tmp_path):
    from quire.roles.sparse.formats.files import write

    with pytest.raises(ConfigError, match="TopAFA"):
        write(model_of(TopAFA()), tmp_path / "sae", "saelens")
