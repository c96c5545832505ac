"""``quire mix``: a config that puts named parts of several papers together, tried before it is printed."""

from __future__ import annotations

import contextlib
import copy
import inspect
import io
import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from quire.contracts import SLOTS
from quire.errors import ConfigError, QuireError
from quire.matching import check_fields, class_refusal, has
from quire.plugins import load
from quire.registry import Entry
from quire.testing.trial import Trial, tiny_of

Config = dict[str, Any]


def mix(named: Mapping[str, list[str]], run: bool = True) -> Config:
    """A run with the named parts, the rest filled from their own smallest examples; three steps of it were taken.

    Args:
        named: Component names by slot: encoder, decoder, objective (several become a ``Sum``), sampler, data.
        run: Whether to take the steps; False only builds the model and compares what it reads with the data.

    Raises:
        ConfigError: an unknown name or one of another kind, or the reason why these parts can't work together.
    """
    chosen = {slot: [_of_kind(name, slot) for name in names] for slot, names in named.items() if names}
    anchors = [e for slot in ("objective", "sampler", "decoder", "encoder") for e in chosen.get(slot, ())]
    if not anchors:
        raise ConfigError("name at least one part: --encoder, --decoder, --objective or --sampler")
    wrapped = _refuse_pairs(chosen)
    said: list[str] = []
    for config in _candidates(chosen, anchors, wrapped):
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # what callbacks of the run say
                _try(Trial(config), "sampler" in config["model"], run)
            return config
        except QuireError as error:
            said.append(str(error))
        except Exception as error:  # shapes that no part checks
            said.append(f"{' with '.join(e.name for e in anchors)}: {type(error).__name__}: {error}".split("\n")[0])
    raise ConfigError(said[0] + "; without --data, data that has what they read is looked for" * ("data" in chosen))


def _try(trial: Trial, sampler: bool, run: bool) -> None:
    made = trial.made()  # first, also of a run: what building refuses says more than fields that are not there
    check_fields(made.model, made.data.offered(), type(made.data).__name__, "fit")
    if run:
        trial.ran()
    if run and sampler:
        trial.predicted()


def _of_kind(name: str, slot: str) -> Entry:
    entry = load().registry.get(name)
    if entry.kind != slot:
        raise ConfigError(f"--{slot} {name}: {entry.name} is a {entry.kind}; quire components --kind {slot} lists them")
    return entry


def _refuse_pairs(chosen: Mapping[str, list[Entry]]) -> bool:
    """Whether the encoder must be pooled to a vector. Raises ``ConfigError`` for a pair that declares it can't be."""
    pooled = False
    for needer in (e for entries in chosen.values() for e in entries if e.kind != "data"):
        for slot in SLOTS:
            for given in chosen.get(slot, ()) if slot != needer.kind else ():
                said = class_refusal(needer.load(), slot, given.load())
                tokens = slot == "encoder" and "TokenEncoder" in given.role
                if said and tokens and not class_refusal(needer.load(), slot, load().registry.get("Pooled").load()):
                    pooled = True
                elif said:
                    raise ConfigError(said)
    return pooled


def _candidates(chosen: Mapping[str, list[Entry]], anchors: list[Entry], pooled: bool) -> Iterator[Config]:
    """Runs worth a try: each anchor's smallest example with the named parts in their places, likeliest first."""
    examples = [tiny_of(anchor.load()) for anchor in anchors]
    sources = [tiny_of(e.load())["data"] for e in chosen.get("data", ())]
    others = () if sources else _covering(anchors)
    seen: list[Config] = []
    for source in itertools.chain(sources or [e["data"] for e in examples], others):
        for example in sorted(examples, key=lambda example: example["data"] != source):
            for adapt in (False, True):
                for rest in [example["model"], *(e["model"] for e in examples if e is not example)]:
                    model = _filled(chosen, example["model"], rest, adapt, pooled)
                    for spare in ((), ("sampler",), ("sampler", "decoder")):
                        kept = {k: v for k, v in model.items() if k not in spare or k in chosen}
                        config = {"model": kept, "data": source}
                        if config not in seen and kept.get("objective"):
                            seen.append(config)
                            yield copy.deepcopy(config)


def _covering(anchors: list[Entry]) -> Iterator[Any]:
    """Other data that has every field the parts read, as its own example sets it up."""
    wanted = [w for anchor in anchors for w in getattr(anchor.load(), "fields", ())]
    for entry in load().registry:
        fields = entry.load().__dict__.get("fields", ()) if entry.kind == "data" else ()  # type: ignore[attr-defined]
        if fields and all(has(fields, w) for w in wanted):
            yield tiny_of(entry.load())["data"]


def _filled(chosen: Mapping[str, list[Entry]], base: Config, rest: Config, adapt: bool, pooled: bool) -> Config:
    """``base``'s model with the named parts, and ``rest``'s parts where it has none."""
    model: Config = {slot: part for slot in SLOTS if (part := base.get(slot) or rest.get(slot))}
    for slot in SLOTS:
        parts = [_arguments(entry, model.get(slot), adapt) for entry in chosen.get(slot, ())]
        if len(parts) > 1:
            model[slot] = {"class_path": "Sum", "init_args": {"objectives": parts}}
        elif parts:
            inside = slot == "encoder" and pooled and parts[0]["class_path"] != "Pooled"
            model[slot] = {"class_path": "Pooled", "init_args": {"encoder": parts[0]}} if inside else parts[0]
    return model


def _arguments(entry: Entry, there: Any, adapt: bool) -> Config:
    """A part as its own example has it; ``adapt`` takes what the part in its place is set to, where both know it."""
    found = _within(there, entry.name)
    if found:
        return found
    own = _within(tiny_of(entry.load())["model"], entry.name) or {"class_path": entry.name}
    if not adapt or there is None:
        return own
    known = inspect.signature(entry.load()).parameters
    theirs = {k: v for k, v in _dict(there).get("init_args", {}).items() if k in known}
    return {"class_path": entry.name, "init_args": {**own.get("init_args", {}), **theirs}}


def _within(value: Any, name: str) -> Config | None:
    """The first mention of a component in a config, as a dict."""
    if isinstance(value, str):
        return _dict(value) if value.rpartition(".")[2] == name else None
    if isinstance(value, Mapping) and str(value.get("class_path", "")).rpartition(".")[2] == name:
        return {**value, "class_path": name}
    inside = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    return next((found for item in inside if (found := _within(item, name))), None)


def _dict(part: Any) -> Config:
    return {"class_path": part} if isinstance(part, str) else dict(part)


def command(argv: list[str]) -> int:
    """Print a config that mixes what is named, or the sentence that says why it can't be."""
    from quire.commands import Arguments

    parser = Arguments(prog="quire mix", description="a config that puts named parts together, tried for three steps")
    for slot in (*SLOTS, "data"):
        several = slot == "objective"
        what = f"name of the {slot}" + " (several: their sum)" * several
        parser.add_argument(f"--{slot}", help=what, nargs="+" if several else None)
    parser.add_argument("-o", "--output", help="write the YAML here instead of printing it")
    options = parser.parse_args(argv)
    given = {slot: getattr(options, slot) for slot in (*SLOTS, "data")}
    config = mix({slot: [v] if isinstance(v, str) else v or [] for slot, v in given.items()})
    names = [n for v in given.values() if v for n in ([v] if isinstance(v, str) else v)]
    papers = {n: load().registry.get(n).plugin for n in names}
    text = (
        f"# {' with '.join(f'{n} ({p})' for n, p in papers.items())}: the smallest sizes, which ran for three steps\n"
    )
    text += yaml.safe_dump({**config, "trainer": {"max_steps": 300}}, sort_keys=False)
    if options.output:
        Path(options.output).parent.mkdir(parents=True, exist_ok=True)
        Path(options.output).write_text(text, encoding="utf-8")
        print(f"wrote {options.output}")
    else:
        print(text, end="")
    return 0
