"""jsonargparse's reports → one sentence: the key, what is wrong with it, and the nearest name."""

from __future__ import annotations

import inspect
import os
import re
import sys
from typing import Any

from quire.errors import suggest
from quire.plugins import load

TOP = ["model", "data", "trainer", "config", "ckpt_path", "seed_everything"]


def one_line(message: str, words: set[str]) -> str:
    """The key, the reason and the nearest name.

    A report names the outermost key, then one error per member of a union (``- Expected a <class 'int'>``). What
    lies further inside was reported before, through this very function, so it stands there as a sentence.

    Args:
        message: What the parser says.
        words: Scalars of the command line and YAML, to find the classes whose options are meant.
    """
    found = re.search(r'[Pp]arser key "([^"]+)"', message)
    given = re.search(r"^ *Given value: (.*)", message, re.M | re.S)
    reasons = _reasons(message)
    telling = [r for r in reasons if not r.startswith(("Expected a", "Not a valid subclass"))]
    imports = [r for r in reasons if "dot import path string: " in r]
    value = _value(given[1].strip()) if given else ""
    inner, reason = "", ""
    if telling:
        inner, reason = _split(telling[0])
    elif imports and _is_name(value):
        reason = imports[0]
    path = ".".join(k for k in (found[1] if found else "", inner) if k)
    if reason:
        said = _said(reason, words, path)
    elif value.startswith("{") and "Not a valid subclass" in message:
        said = f"a component is a name, or class_path and init_args; {value} has no class_path"
    else:
        said = _type_mismatch(reasons, value) or " ".join(message.split())
    return f"{path}: {said}" if path else said


def _reasons(message: str) -> list[str]:
    """One entry per error, continuation lines joined, the members that say nothing left out."""
    found: list[str] = []
    for line in message.strip().splitlines():
        text = line.strip()
        if text.startswith("Given value"):
            break
        if not text or text.startswith(('Parser key "', "Subtypes:", "Errors:")):
            continue
        if text.startswith("- ") or not found or "Problem with given class_path" not in found[-1]:
            found.append(text.removeprefix("- "))
        else:
            found[-1] += f" {text}"
    dull = ("Does not validate", "Expected a path", "Subclass types expect", "a class path (str)", "a dict with")
    return [r for r in found if not r.startswith(dull)]


def _split(reason: str) -> tuple[str, str]:
    """``optimizer.lr: 'x' is not a float`` → the keys inside, the sentence."""
    match = re.match(r"((?:[a-z_][\w.]*: )*)(.*)", reason, re.S)
    assert match is not None  # the pattern matches any text
    return match[1].replace(": ", ".").strip("."), match[2]


def _value(text: str) -> str:
    nested = re.match(r"NestedArg\(key='[^']*', val=(.*)\)$", text, re.S)
    return (nested[1] if nested else text).strip("'")


def _is_name(value: str) -> bool:
    return bool(re.search(r"class_path|^[A-Z]\w*$|^\w+(\.\w+)+$|^\[", value)) and not re.match(r"[\d.]+$", value)


def _said(reason: str, words: set[str], path: str) -> str:
    if match := re.search(r"Option '([\w.]+)' is not accepted", reason):
        return f"there is no option {match[1]!r} here{_near_option(match[1], words)}"
    if match := re.search(r"does not accept option '([\w.]+)'", reason):
        return f"there is no key {match[1]!r}{_near_key(match[1], words)}"
    if match := re.search(r"[Uu]nrecognized arguments: (.*)", reason):
        word = match[1].split()[0].partition("=")[0]
        return f"there is no argument {word}{_near_key(word.lstrip('-'), words)}"
    if match := re.search(r"dot import path string: (\S+)", reason):
        return _not_here(match[1], path)
    if match := re.search(r"Problem with given class_path '([^']*)': (.*)", reason):
        return _not_importable(match[1], match[2])
    if match := re.search(r"does not correspond to a subclass of (\w+)", reason):
        return f"what is named here is no {match[1]}; quire components --kind {match[1].lower()} lists those"
    if match := re.search(r"arguments? (?:are|is) required: (.*)", reason):
        missing = re.sub(r"\b(fit|validate|test|predict)\.", "", match[1])
        return f"{missing} is missing" + (": name one, for example data: Digits" if missing == "data" else "")
    if match := re.search(r"Key ['\"]([\w.]+)['\"] is required", reason):
        return f"{match[1]} is missing"
    if match := re.search(r"Unable to load config ['\"](.*)['\"]", reason):
        return f"{match[1]!r} is neither keys nor a YAML file; write for example encoder: {{class_path: …}} below it"
    if match := re.search(r"(.*): expected one argument", reason):
        return f"{match[1]} needs a value"
    return reason


def _type_mismatch(reasons: list[str], value: str) -> str:
    """``'x' is not an int``, from the members of a union that all refused."""
    wanted: dict[str, None] = {}
    choices: list[str] = []
    for reason in reasons:
        got = re.search(r"Got value: (.*)", reason, re.S)
        value = _value(got[1].strip()) if got else value
        if match := re.search(r"Literal\[(.*?)\](?:\.|$|\s)", reason):
            choices += [c.strip(" '") for c in match[1].split(",")]
        elif match := re.search(r"Expected an? <class '([\w.]+)'>", reason):
            wanted[match[1].rpartition(".")[2]] = None
        elif match := re.search(r"Expected a (?!dot import)(\w+)", reason):
            wanted[match[1].lower()] = None
    wanted.pop("NoneType", None)
    if choices:
        return f"{value!r} is none of {', '.join(dict.fromkeys(choices))}{suggest(value, choices)}"
    names = [f"an {w}" if w[0] in "aeiou" else f"a {w}" for w in wanted]
    shown = repr(value if len(value) < 60 else value[:57] + "...")
    return f"{shown} is not {' or '.join(names)}" if names else ""


def _near_option(option: str, words: set[str]) -> str:
    head, _, rest = option.partition(".")
    if rest and (near := suggest(head, ["class_path", "init_args"])):
        return near
    return suggest(option, [*_options(words), "class_path", "init_args"])


def _near_key(key: str, words: set[str]) -> str:
    head, _, rest = key.partition(".")
    return suggest(rest.rpartition(".")[2], _options(words)) if head in TOP else suggest(head, TOP)


def _not_here(word: str, path: str) -> str:
    registry = load().registry
    if word in registry.entries:
        entry = registry.entries[word]
        kind = "data module" if entry.kind == "data" else entry.kind
        if entry.kind == "part":
            kind = " ".join([*entry.role, "part"])
        return f"{word} is a{'n' if kind[0] in 'aeiou' else ''} {kind}, which can't stand here"
    if "." in word:
        return _not_importable(word, "")
    broken = [f"{r.name} ({r.error})" for r in load().records.values() if r.error]
    hint = f"; broken plugins: {', '.join(broken)}" if broken else ""
    wanted = os.environ.get("QUIRE_PLUGINS")
    hint += f"; QUIRE_PLUGINS={wanted} leaves the others out" if wanted is not None else ""
    names = list(registry.entries)
    if path.startswith("model.optimizer"):
        import torch

        names = [n for n, c in vars(torch.optim).items() if isinstance(c, type) and n != "Optimizer"]
    elif path.startswith("trainer."):
        import lightning.pytorch as pl

        names += [*pl.callbacks.__all__, *(n for n in dir(pl.loggers) if n.endswith("Logger"))]
    near = suggest(word, names)
    where = ", ".join(names) if path.startswith("model.optimizer") else "quire components"
    return f"no installed component is named {word}{near or f'; {where} lists them'}{hint}"


def _not_importable(path: str, why: str) -> str:
    module, _, name = path.rpartition(".")
    package = path.partition(".")[0]
    if "has no attribute" in why:
        return f"{module} has no {name}{suggest(name, [n for n in dir(sys.modules.get(module)) if n[0] != '_'])}"
    if package.startswith("quire_") and (not why or f"No module named '{package}'" in why):
        return f"{path} needs a plugin that is not installed: pip install {package.replace('_', '-')}"
    if "Validation failed" in why or "required" in why:
        missing = re.search(r"Key ['\"]([\w.]+)['\"] is required|required: (.*)", why)
        return f"{name} needs {missing[1] or missing[2]}" if missing else why
    return f"{path} can't be imported{f' ({why})' if why else ''}: install it, or correct the path"


def _options(words: set[str]) -> list[str]:
    """Names of the options of every component that the run names, of Model and of the Trainer."""
    from lightning.pytorch import Trainer

    from quire.model import Model

    found: dict[str, None] = {}
    for cls in (*_classes(words), Model, Trainer):
        for base in cls.__mro__[:-1]:
            if "__init__" in base.__dict__:
                found |= dict.fromkeys(inspect.signature(base.__dict__["__init__"]).parameters)
    return [n for n in found if n not in ("self", "args", "kwargs")]


def _classes(words: set[str]) -> list[Any]:
    import torch

    entries = load().registry.entries
    named = [entries[w].load() for w in words if w in entries]
    named += [c for w in words if isinstance(c := getattr(torch.optim, w, None), type)]
    for word in words:
        module, _, name = word.rpartition(".")
        cls = getattr(sys.modules.get(module), name, None) if module else None
        if isinstance(cls, type):
            named.append(cls)
    return named
