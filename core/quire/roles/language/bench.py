"""``quire bench language``: every sampler beside transformers' own decoding, in one run on the same prompts."""

from __future__ import annotations

import inspect
import json
import os
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml

from quire.commands import Arguments
from quire.contracts import Sampler
from quire.errors import ConfigError, DataError
from quire.plugins import load as installed
from quire.recipe import component_class
from quire.roles.language.accept import Exact
from quire.roles.language.bench_arms import Arm, Decode, Generate, difference, race
from quire.roles.language.bench_models import Scripted, Subject, loaded, shapes
from quire.roles.language.bench_report import legend, machine, markdown, summarise, text
from quire.roles.language.bench_tasks import Task, copies, from_file

SHAPES = ("llama", "gpt2")
USUAL = ("Greedy", "PromptCopy", "PromptCopy+SpeedGuard")
QUICK = {"length": 12, "new_tokens": 12, "count": 2, "batch": 2, "repeats": 1, "edits": [10]}


def main(argv: list[str]) -> int:
    """Race the samplers; prints a table and writes ``table.md``, ``result.json`` and ``chart.png``."""
    options = _parser().parse_args(argv)
    _check(options)
    torch.set_num_threads(options.threads)
    makers, unfit = _makers(options.samplers)
    folder = Path(options.out)
    report: dict[str, Any] = {
        "command": "quire bench language" + "".join(f" {shlex.quote(a)}" for a in argv),
        "machine": machine(),
        **{k: getattr(options, k) for k in ("new_tokens", "repeats", "threads", "batch", "count", "quick")},
        "tasks": [],
    }
    wrong: list[str] = []
    for model in options.model:
        subjects = shapes(model, options.quick) if model in SHAPES else loaded(model)
        for task in _tasks(options, subjects[0]):
            before = os.getloadavg()[0]
            arms, left_out = _arms(options, makers, subjects, task)
            race(arms, task, options.repeats, lambda said: print(said, file=sys.stderr, flush=True))
            wrong += _faults(arms, subjects)
            found = {"model": model, "task": task.name, "rows": summarise(arms), "left_out": [*unfit, *left_out]}
            report["tasks"].append({**found, "load": [before, os.getloadavg()[0]]})
            _write(report, folder)  # after each task: a kill leaves what is known
            if not options.json:
                print(text(report["tasks"][-1]) + "\n", flush=True)
    print(json.dumps(report) if options.json else "\n".join([*legend(report), f"wrote files into {folder}"]))
    if wrong:
        raise DataError("; ".join(wrong))
    return 0


def _parser() -> Arguments:
    parser = Arguments(prog="quire bench language", description="samplers beside transformers' own", allow_abbrev=False)
    parser.add_argument("--model", nargs="+", default=["llama"], help="llama, gpt2 (scripted), or a path")
    parser.add_argument("--samplers", nargs="+", help="samplers or drafters by name, NAME+SpeedGuard, YAML, or a file")
    parser.add_argument("--prompts", help=".txt or .jsonl (default: the scripted copy task)")
    parser.add_argument("--edits", nargs="+", type=int, default=[0, 10, 30], help="percent changed in the copy task")
    parser.add_argument("--length", type=int, default=64, help="tokens of a scripted prompt, at least (default: 64)")
    parser.add_argument("--new-tokens", type=int, default=64, help="exact number (default: 64)")
    parser.add_argument("--count", type=int, default=8, help="prompts (default: 8)")
    parser.add_argument("--batch", type=int, default=8, help="rows of the batches beside batch 1; 1: none (default: 8)")
    parser.add_argument("--repeats", type=int, default=5, help="rounds (default: 5)")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default: 1)")
    parser.add_argument("--out", default="runs/bench/language", help="where to write (default: runs/bench/language)")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, to see that everything runs")
    parser.add_argument("--json", action="store_true", help="print JSON for programs")
    return parser


def _check(options: Any) -> None:
    if options.quick:
        for name, value in QUICK.items():
            setattr(options, name, value)
    for name in ("length", "new_tokens", "count", "batch", "repeats", "threads"):
        if getattr(options, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(options, name)}")
    for edits in options.edits:
        if not 0 <= edits <= 100:
            raise ConfigError(f"--edits are percent, 0 to 100, got {edits}")
    scripted = [m for m in options.model if m in SHAPES]
    if scripted and options.prompts:
        raise ConfigError(
            f"--prompts needs a trained model: {scripted[0]} has random weights and follows a script;"
            " give --model a checkpoint or a folder"
        )


def _tasks(options: Any, subject: Subject) -> list[Task]:
    if options.prompts is None:
        caps = subject.decoder.caps()
        size = (options.count, options.length, options.new_tokens, caps.vocab_size, caps.eos_ids)
        return [copies(edits, *size) for edits in options.edits]

    def encode(line: str) -> list[int]:
        if subject.encode is None:
            raise ConfigError(f"--prompts: {subject.name} has no tokenizer, so give tokens (ids) in a .jsonl file")
        return subject.encode(line)

    return [from_file(options.prompts, options.count, encode)]


# ---- arms
def _makers(items: list[str] | None) -> tuple[dict[str, Callable[[], Any]], list[str]]:
    """Samplers by name; of the usual ones, those that can't be made without arguments are named with the reason."""
    made: dict[str, Callable[[], Any]] = {}
    left_out: list[str] = []
    for item in items or [*USUAL, *plugin_drafters()]:
        try:
            made |= {name: maker(config) for name, config in samplers(item)}
        except ConfigError as error:
            if items:
                raise
            left_out.append(f"{item}: {error}")
    return made, left_out


def _arms(
    options: Any, makers: dict[str, Callable[[], Any]], subjects: list[Subject], task: Task
) -> tuple[list[Arm], list[str]]:
    """Every arm at batch 1 and at ``--batch``, transformers' greedy first; and what could not be one."""
    arms: list[Arm] = []
    left_out: list[str] = []
    batches = sorted({1, min(options.batch, len(task.prompts))})
    for subject in subjects:
        if subject.module is not None:
            plain = Generate(subject.module, options.new_tokens)
            lookup = Generate(
                subject.module, options.new_tokens, prompt_lookup_num_tokens=10, max_matching_ngram_size=3
            )
            arms += [Arm("generate", "transformers", plain, size) for size in batches]
            arms.append(Arm("prompt lookup", "transformers", lookup))  # transformers refuses it above batch 1
    for subject in subjects:
        decoder: Any = subject.decoder
        if task.scripts is not None:
            decoder = Scripted(subject.decoder)
            decoder.follow(task.prompts, task.scripts)
        for name, make in makers.items():
            try:
                for size in batches:  # a sampler each, since guards and drafters learn
                    sampler = make()
                    sampler.max_new_tokens = options.new_tokens
                    way = Decode(sampler, subject, decoder)
                    if size == batches[0]:
                        _tried(way, task)
                    exact = isinstance(getattr(sampler, "acceptance", None), Exact)
                    arms.append(Arm(name, subject.name, way, size, exact))
            except ConfigError as error:
                if options.samplers:
                    raise
                left_out.append(f"{name} on {subject.name}: {error}")
    first = next((a for a in arms if a.name in ("generate", "Greedy")), arms[0])
    return [first, *(a for a in arms if a is not first)], left_out


def _tried(way: Decode, task: Task) -> None:
    """Three tokens, so one draft: a sampler that doesn't fit the model is refused before the race."""
    kept = way.sampler.max_new_tokens
    way.sampler.max_new_tokens = min(3, kept)
    with torch.inference_mode():
        way(task, [0])
    way.sampler.max_new_tokens = kept


def plugin_drafters() -> list[str]:
    """Installed plugins' drafters: under the exact rule every drafter is lossless."""
    return [e.name for e in installed().registry if e.kind == "part" and "drafter" in e.role and e.plugin != "core"]


def samplers(item: str) -> list[tuple[str, Any]]:
    """(name, config) of ``Greedy``, ``PromptCopy``, ``PromptCopy+SpeedGuard``, YAML, or a file with a list of these."""
    if item.endswith((".yaml", ".yml")):
        try:
            content = yaml.safe_load(Path(item).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ConfigError(f"--samplers: {item} is no YAML file that can be read") from error
        listed = content if isinstance(content, list) else [content]
        return [pair for one in listed for pair in samplers(one if isinstance(one, str) else json.dumps(one))]
    if item.lstrip().startswith("{"):
        try:
            config = yaml.safe_load(item)
        except yaml.YAMLError as error:
            raise ConfigError(f"--samplers: {item} is not valid YAML") from error
        return [_named(config)]
    name, _, guard = item.partition("+")
    entry = installed().registry.get(name)
    if entry.kind == "sampler":
        return [(item, {"class_path": name})]
    if "drafter" not in entry.role:
        raise ConfigError(f"--samplers: {name} is neither a sampler nor a drafter")
    return [(item, _drafting({"class_path": name}, guard or None))]


def _named(config: dict[str, Any]) -> tuple[str, Any]:
    """A config's name: its drafter's, with its arguments, or its own."""
    if not isinstance(config, dict) or "class_path" not in config:
        raise ConfigError(f"--samplers: a component is a name, or class_path and init_args; got {config}")
    entry = installed().registry.get(str(config["class_path"]).rpartition(".")[2])
    if "drafter" in entry.role:
        config = _drafting(config, None)
    arguments = config.get("init_args") or {}
    inside = arguments.get("drafter")
    shown: dict[str, Any] = inside if isinstance(inside, dict) else {"class_path": inside or entry.name}
    own = {k: v for k, v in (shown.get("init_args") or {}).items() if not isinstance(v, (dict, list))}
    said = ", ".join(f"{k}={v}" for k, v in own.items())
    name = str(shown["class_path"]).rpartition(".")[2] + (f"({said})" if said else "")
    return (f"{name}+SpeedGuard" if arguments.get("guard") else name), config


def _drafting(drafter: dict[str, Any], guard: str | None) -> dict[str, Any]:
    cls = installed().registry.get(str(drafter["class_path"]).rpartition(".")[2]).load()
    if "corpus" in inspect.signature(cls).parameters and "init_args" not in drafter:
        drafter = {**drafter, "init_args": {"corpus": None}}  # a benchmark has no training data
    arguments: dict[str, Any] = {"drafter": drafter}
    return {"class_path": "Speculative", "init_args": {**arguments, **({"guard": guard} if guard else {})}}


def maker(config: Any) -> Callable[[], Any]:
    """What makes the sampler of a config, read as ``lightning fit`` reads it, anew at each call."""
    from jsonargparse import ArgumentParser

    from quire.parse_errors import one_line

    words = set(re.split(r"[=\s\[\]{},:\"']+", json.dumps(config)))
    installed().registry.import_named(words)

    class Parser(ArgumentParser):
        def error(self, message: str, ex: Exception | None = None) -> NoReturn:
            raise ConfigError(one_line(message, words)) from ex

    parser = Parser(prog="quire bench language")
    parser.add_subclass_arguments(Sampler, "sampler")
    read = parser.parse_object({"sampler": config})
    cls = component_class(read.sampler.class_path)
    if not hasattr(cls, "stream"):
        raise ConfigError(f"{cls.__name__} does not stream tokens: quire bench language takes language samplers")
    return lambda: parser.instantiate(read).sampler


# ---- results
def _faults(arms: list[Arm], subjects: list[Subject]) -> list[str]:
    """Arms whose ids are not greedy decoding's, though their rule says so."""
    said = []
    for arm in arms:
        family = "transformers" if any(s.module is not None for s in subjects) else subjects[0].name
        same = [a for a in arms if a.batch == 1 and a.model in (arm.model, family)]
        want = next((a for a in same if a.name in ("generate", "Greedy")), arm)
        rows = [[row for run in one for row in run.rows] for one in (want.rounds[0], *arm.rounds)]
        found = next((d for got in rows[1:] if (d := difference(rows[0], got)) is not None), None)
        if found is not None and arm.exact:
            said.append(
                f"{arm.name} at batch {arm.batch} on {arm.model} differs from {want.name} at prompt {found[0]},"
                f" new token {found[1]}: not lossless there, or two logits tie"
            )
    return said


def _write(report: dict[str, Any], folder: Path) -> None:
    from quire.roles.language.bench_chart import draw

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "result.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    (folder / "table.md").write_text(markdown(report), encoding="utf-8")
    draw(report, folder / "chart.png")
