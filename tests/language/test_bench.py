"""``quire bench language``: every arm runs on the same prompts, says the same ids, and is counted as it should be."""

from __future__ import annotations

import gzip
import json
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers")

from quire.__main__ import execute
from quire.contracts import Spec, build
from quire.roles.language.bench_arms import Decode, Generate, difference, quiet
from quire.roles.language.bench_models import Scripted, shapes
from quire.roles.language.bench_report import spread
from quire.roles.language.bench_tasks import Task, copies, from_file
from quire.roles.language.drafters import PromptCopy
from quire.roles.language.loop import Greedy, Speculative
from quire.roles.language.models import CausalLM
from quire.roles.language.proof import batch_of


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The folder and the content of a quick run."""
    folder = tmp_path_factory.mktemp("bench")
    assert execute(["bench", "language", "--quick", "--model", "llama", "gpt2", "--out", str(folder)]) == 0
    return folder, json.loads((folder / "result.json").read_text())


def test_a_quick_run_writes_table_numbers_and_chart(report):
    folder, found = report
    assert {p.name for p in folder.iterdir()} == {"table.md", "result.json", "chart.png"}
    assert [t["model"] for t in found["tasks"]] == ["llama", "gpt2"]
    assert len(found["tasks"][0]["load"]) == 2
    assert "load" in (folder / "table.md").read_text()


def test_transformers_and_both_models_run_every_usual_sampler_alone_and_in_a_batch(report):
    for task in report[1]["tasks"]:
        arms = {(r["sampler"], r["model"], r["batch"]) for r in task["rows"]}
        assert {("generate", "transformers", 1), ("generate", "transformers", 2)} <= arms
        assert ("prompt lookup", "transformers", 1) in arms
        for sampler in ("Greedy", "PromptCopy", "PromptCopy+SpeedGuard"):
            assert {(sampler, m, b) for m in ("HFCausal", "CausalLM") for b in (1, 2)} <= arms


def test_ratios_are_to_transformers_greedy(report):
    for task in report[1]["tasks"]:
        assert task["rows"][0]["sampler"] == "generate" and task["rows"][0]["ratio"]["median"] == 1


def test_prompt_copy_takes_as_many_passes_as_prompt_lookup(report):
    for task in report[1]["tasks"]:
        passes = {(r["sampler"], r["model"]): r["forwards"] for r in task["rows"] if r["batch"] == 1}
        lookup = passes["prompt lookup", "transformers"]
        assert passes["PromptCopy", "HFCausal"] == passes["PromptCopy", "CausalLM"] == lookup
        assert passes["generate", "transformers"] == passes["Greedy", "HFCausal"] == 2 * 12


def test_an_unedited_copy_of_128_tokens_takes_13_passes():
    """Spec oracle 5, measured on transformers: 128 passes become 13."""
    task = copies(0, 1, 64, 128, 512)
    model = Scripted(_own())
    model.follow(task.prompts, task.scripts)
    subject = SimpleNamespace(tokenizer=None)
    run = Decode(Speculative(PromptCopy(3, 10), max_new_tokens=128), subject, model)(task, [0])
    assert run.forwards == 13 and run.rows == task.scripts


def test_edits_are_exactly_that_many_and_ids_that_end_a_row_are_not_used():
    task = copies(30, 3, 10, 40, 300, ends=(7, 8))
    for prompt, script in zip(task.prompts, task.scripts):
        assert len(prompt) >= len(script) == 40
        assert sum(a != b for a, b in zip(prompt, script)) == 12
        assert not {7, 8} & {*prompt, *script}
    assert len({len(p) for p in task.prompts}) == 3


def test_generate_follows_a_script_in_a_ragged_batch():
    module = shapes("gpt2", quick=True)[0].module
    task = copies(20, 3, 8, 6, 200)
    with quiet():
        run = Generate(module, 6)(task, [0, 1, 2])
    assert run.rows == task.scripts and run.forwards == 6


def test_a_scripted_model_runs_its_whole_network():
    inner = _own()
    task = copies(0, 2, 8, 4, 512)
    model = Scripted(inner)
    model.follow(task.prompts, task.scripts)
    ids = torch.tensor(task.prompts[:1])
    with torch.no_grad():
        mine, plain = model.open(ids).logits, inner.open(ids).logits
    assert int(mine.argmax()) == task.scripts[0][0]
    assert int((mine != plain).sum()) == 1


def test_scripts_follow_their_rows_when_others_leave():
    task = copies(0, 3, 8, 6, 512)
    model = Scripted(_own())
    model.follow(task.prompts, task.scripts)
    whole = SimpleNamespace(decoder=model, encoder=None)
    sampler = Greedy(6)
    sampler.rule = lambda row, emitted: row == 1 and len(emitted) == 2
    rows = [r[0] for r in sampler(whole, batch_of(task.prompts, model, {})).tokens]
    assert rows == [task.scripts[0], task.scripts[1][:2], task.scripts[2]]


def test_the_first_difference_is_named():
    assert difference([[1, 2], [3, 4]], [[1, 2], [3, 4]]) is None
    assert difference([[1, 2], [3, 4]], [[1, 2], [3, 5]]) == (1, 1)
    assert difference([[1, 2]], [[1]]) == (0, 1)


def test_quartiles():
    assert spread([1, 2, 3, 4, 5]) == {"median": 3, "q1": 2, "q3": 4}


def test_prompts_of_a_file(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as out:
        out.write('{"prompt": "one"}\n{"text": "two"}\n{"tokens": [5, 6]}\n')
    encode = lambda line: [len(line)]  # noqa: E731
    assert from_file(str(tmp_path / "a.txt"), 8, encode) == Task("a.txt", [[3], [3]])
    assert from_file(str(tmp_path / "b.jsonl.gz"), 8, encode).prompts == [[3], [3], [5, 6]]
    assert len(from_file(str(tmp_path / "a.txt"), 1, encode).prompts) == 1


def test_a_trained_checkpoint_decodes_prompts_of_a_file(tmp_path):
    from quire import export
    from quire.model import Model
    from quire.roles.language.text import Bytes

    model = Model(decoder=CausalLM(width=16, depth=1, heads=2), spec={"vocab_size": 260, "length": 64, "eos": 2})
    model.configure_model()
    model.tokenizer = Bytes()
    folder = export(model, tmp_path / "model")
    (tmp_path / "p.txt").write_text("def f(a, b):\ndef g(a):\n")
    argv = ["--model", str(folder), "--prompts", str(tmp_path / "p.txt"), "--samplers", "Greedy", "PromptCopy"]
    more = ["--new-tokens", "4", "--repeats", "1", "--batch", "1", "--out", str(tmp_path / "out")]
    assert execute(["bench", "language", *argv, *more]) == 0
    (task,) = json.loads((tmp_path / "out/result.json").read_text())["tasks"]
    assert [(r["sampler"], r["model"]) for r in task["rows"]] == [("Greedy", "CausalLM"), ("PromptCopy", "CausalLM")]


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ([], "quire bench needs a role: language"),
        (["langage"], "no benchmark of a role langage; did you mean language"),
        (["language", "--samplers", "PromtCopy"], "no component is named PromtCopy; did you mean PromptCopy"),
        (["language", "--samplers", "Bytes"], "Bytes is neither a sampler nor a drafter"),
        (["language", "--samplers", "{class_path: PromptCopy, init_args: {tokns: 3}}"], "tokns"),
        (["language", "--samplers", "{init_args: {}}"], "a component is a name, or class_path and init_args"),
        (["language", "--quick", "--samplers", "SmallModel"], "decoder"),
        (["language", "--repeats", "0"], "--repeats must be at least 1, got 0"),
        (["language", "--edits", "120"], "--edits are percent, 0 to 100, got 120"),
        (["language", "--prompts", "x.txt"], "--prompts needs a trained model: llama has random weights"),
        (["language", "--model", "nothing.ckpt"], "no checkpoint at nothing.ckpt"),
    ],
)
def test_wrong_arguments_are_one_sentence(argv, says, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert execute(["bench", *argv]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert says in error and error.startswith("error:")


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("p.csv", "a", "takes .txt or .jsonl"),
        ("p.txt", "\n", "holds no prompts"),
        ("p.jsonl", '{"x": 1}\n', "line 1 has no prompt"),
        ("p.jsonl", "{\n", "line 1 is not JSON"),
    ],
)
def test_a_broken_file_of_prompts_is_named(name, content, says, tmp_path):
    from quire.errors import QuireError

    (tmp_path / name).write_text(content)
    with pytest.raises(QuireError, match=says):
        from_file(str(tmp_path / name), 8, lambda line: [])


def test_ids_that_differ_from_greedy_are_a_fault(tmp_path, monkeypatch, capsys):
    from quire.roles.language import bench

    class Wrong(Decode):
        def __call__(self, task, which):
            run = super().__call__(task, which)
            if isinstance(self.sampler.drafter, PromptCopy):
                run.rows = [[*row[:-1], 0] for row in run.rows]
            return run

    monkeypatch.setattr(bench, "Decode", Wrong)
    argv = ["bench", "language", "--quick", "--samplers", "PromptCopy", "--out", str(tmp_path)]
    assert execute(argv) == 1
    assert (
        "PromptCopy at batch 1 on HFCausal differs from generate at prompt 0, new token 11" in capsys.readouterr().err
    )
    assert (tmp_path / "table.md").is_file()


def _own():
    torch.manual_seed(0)
    model = CausalLM(width=16, depth=1, heads=2)
    build(model, Spec({"vocab_size": 512, "length": 400}))
    return model.eval()
