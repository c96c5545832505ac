"""``quire ngrams``: counts the data module of a config, in shards, and merges them."""

import numpy as np
import pytest
from safetensors import safe_open

from quire.__main__ import execute
from quire.datasets.text import TextTokens
from quire.plugins import load
from quire.roles.language.ngrams import NGramStore
from quire_superposed.stores import counted, documents

YAML = """
model: {decoder: CausalLM, objective: NextToken}
data: {class_path: TextTokens, init_args: {source: %s, unit: line, length: 32, batch_size: 2}}
"""


@pytest.fixture
def config(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"the {w} sat on the {w} mat" for w in ("cat", "dog", "cow", "hen", "fox") * 6))
    file = tmp_path / "run.yaml"
    file.write_text(YAML % text)
    return str(file)


def test_the_command_is_registered():
    assert load().commands["ngrams"][0] == "quire_superposed.command.main"


def test_it_writes_counts_of_the_training_split_with_the_fingerprint(config, tmp_path, capsys):
    out = tmp_path / "n.safetensors"
    assert execute(["ngrams", "-c", config, "--out", str(out), "--lengths", "1,2"]) == 0
    assert "vocabulary 260" in capsys.readouterr().out
    with safe_open(str(out), framework="numpy") as handle:
        assert '"fingerprint"' in handle.metadata()["quire"]
    store = NGramStore(orders=[1, 2], path=str(out))
    data = TextTokens(source=str(tmp_path / "text.txt"), unit="line", length=32, batch_size=2)
    assert store.fingerprint == data.tokenizer.fingerprint
    t, h = (ord(c) + 4 for c in "th")
    tokens, counts = store.successors(1, [t])
    rows = [data.tokenizer.decode(r) for r in documents(data.dataset("train"), 1, 2)]
    assert counts[list(tokens).index(h)] == sum(r.count("th") for r in rows)


def test_shards_merged_are_the_whole(config, tmp_path):
    files = [str(tmp_path / f"{i}.safetensors") for i in range(3)]
    for i, file in enumerate(files):
        assert execute(["ngrams", "-c", config, "--out", file, "--shard", f"{i}/3", "--lengths", "1,3"]) == 0
    whole, merged = str(tmp_path / "w.safetensors"), str(tmp_path / "m.safetensors")
    assert execute(["ngrams", "-c", config, "--out", whole, "--lengths", "1,3"]) == 0
    assert execute(["ngrams", "--merge", *files, "--out", merged, "--lengths", "1,3"]) == 0
    a, b = (NGramStore(orders=[1, 3], path=f) for f in (whole, merged))
    for order in (1, 3):
        for name, part in a.tables[order].items():
            np.testing.assert_array_equal(part, b.tables[order][name])


def test_data_arguments_may_be_changed_on_the_command_line(config, tmp_path):
    out = str(tmp_path / "n.safetensors")
    assert execute(["ngrams", "-c", config, "--out", out, "--lengths", "1", "--data.split", "0.5"]) == 0
    assert execute(["ngrams", "-c", config, "--out", str(tmp_path / "o.safetensors"), "--lengths", "1"]) == 0
    a, b = (NGramStore(orders=[1], path=str(tmp_path / f)) for f in ("n.safetensors", "o.safetensors"))
    assert a.tables[1]["counts"].sum() < b.tables[1]["counts"].sum()


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["-c", "CONFIG", "--out", "n.pkl"], "must end in .safetensors"),
        (["--out", "n.safetensors"], "one of them"),
        (["-c", "CONFIG", "--merge", "x", "--out", "n.safetensors"], "one of them"),
        (["-c", "CONFIG", "--out", "n.safetensors", "--lengths", "1,two"], "--lengths takes whole numbers"),
        (["-c", "CONFIG", "--out", "n.safetensors", "--lengths", "0"], "at least 1"),
        (["-c", "CONFIG", "--out", "n.safetensors", "--shard", "3/3"], "--shard is I/N"),
        (["-c", "superposed/quik", "--out", "n.safetensors"], "did you mean superposed/quick"),
        (["-c", "CONFIG", "--out", "n.safetensors", "--data.lenght", "3"], "lenght"),
        (["--merge", "nowhere.safetensors", "--out", "n.safetensors"], "no n-gram store at nowhere.safetensors"),
        (["--merge", "a", "--out", "n.safetensors", "--data.length", "3"], "--merge takes files only"),
    ],
)
def test_wrong_use_is_refused_in_one_line(argv, said, config, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert execute(["ngrams", *[config if a == "CONFIG" else a for a in argv]]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_a_config_without_data_is_refused(tmp_path, capsys):
    file = tmp_path / "bare.yaml"
    file.write_text("model: {decoder: CausalLM}\n")
    assert execute(["ngrams", "-c", str(file), "--out", "n.safetensors"]) == 2
    assert "has no data" in capsys.readouterr().err


def test_documents_start_behind_the_start_token_and_end_with_their_end_token():
    import torch

    from quire.data import Fields

    rows = Fields(tokens=torch.tensor([[1, 5, 6, 2, 7, 8, 0, 0]]), mask=torch.tensor([[True] * 6 + [False] * 2]))
    assert list(documents(rows, 1, 2)) == [[5, 6, 2], [7, 8]]
    assert counted.__doc__
