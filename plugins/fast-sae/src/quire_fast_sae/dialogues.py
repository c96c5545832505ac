"""Dialogues from files, a Hugging Face data set, or made of the standard library's lines."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from quire.data import expand
from quire.datasets.text import read_text, standard_library
from quire.errors import ConfigError, DataError

Turn = dict[str, str]
Dialogue = list[Turn]
"""Turns with ``role`` and ``content``."""

ROLES = ("system", "user", "assistant", "tool")
ALIASES = {"human": "user", "prompter": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}
LISTS = ("messages", "conversations", "conversation", "dialogue", "dialog", "turns")
ASKED = ("instruction", "prompt", "question", "query")
ANSWERED = ("output", "response", "answer", "completion")
QUESTION, ANSWER = 26, 32
"""Most bytes of a generated turn."""


def read_dialogues(source: str) -> list[list[Dialogue]]:
    """Dialogues of a source, in groups that are held out together.

    Args:
        source: ``stdlib`` (``stdlib:docs``, ``stdlib:code``): pairs of neighbouring lines of Python's own library, a
            group a document; a ``.json`` or ``.jsonl`` file (``.gz`` too) or a folder of them; ``hf:NAME``,
            ``hf:NAME:CONFIG``, with ``@SPLIT`` behind.

    Raises:
        ConfigError: nothing there.
        DataError: a broken file, or a record that is no dialogue.
    """
    if source in ("stdlib", "stdlib:docs", "stdlib:code"):
        return [lines_in_pairs(text) for text in standard_library(source)]
    if source.startswith("hf:"):
        return [[d] for i, r in enumerate(_hub(source[3:])) for d in dialogues_of(r, f"{source}, record {i}")]
    path = expand(source)
    if not path.exists():
        raise ConfigError(f"data.source: nothing at {path}: give stdlib, a .json or .jsonl file, a folder, or hf:NAME")
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file() and _is_json(p))
    if not files:
        raise ConfigError(f"data.source: {path} holds no .json, .jsonl or .gz file")
    return [[dialogue] for file in files for dialogue in _file(file)]


def lines_in_pairs(text: str) -> list[Dialogue]:
    """Two lines that follow each other as question and answer, cut to 26 and 32 bytes."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return [[_turn("user", _cut(a, QUESTION)), _turn("assistant", _cut(b, ANSWER))] for a, b in _pairs(lines)]


def _pairs(lines: list[str]) -> Iterator[tuple[str, str]]:
    return zip(lines[::2], lines[1::2])


def _cut(text: str, size: int) -> str:
    return text.encode()[:size].decode(errors="ignore")


def _turn(role: str, content: str) -> Turn:
    return {"role": role, "content": content}


def dialogues_of(record: Any, where: str) -> list[Dialogue]:
    """The dialogues of one record of a file.

    It holds a list of turns (``messages`` or ``conversations``; ``role`` and ``content`` or ``from`` and ``value``), or
    an instruction with ``input`` and an answer, or several of these under ``instances``.

    Raises:
        DataError: none of these.
    """
    if isinstance(record, list):
        return [[_of_turn(t, where) for t in record]]
    if isinstance(record, Mapping):
        turns = next((record[k] for k in LISTS if isinstance(record.get(k), (list, tuple))), None)
        if turns is not None:
            return [[_of_turn(t, where) for t in turns]]
        asked = next((k for k in ASKED if isinstance(record.get(k), str)), None)
        if asked and isinstance(record.get("instances"), list):
            return [_asked(record[asked], one) for one in record["instances"] if isinstance(one, Mapping)]
        if asked and any(isinstance(record.get(k), str) for k in ANSWERED):
            return [_asked(record[asked], record)]
    have = ", ".join(map(str, record)) if isinstance(record, Mapping) else type(record).__name__
    raise DataError(
        f"{where} is no dialogue (it has {have}): give {LISTS[0]} or {LISTS[1]}, or one of {', '.join(ASKED)} with"
        f" one of {', '.join(ANSWERED)}"
    )


def _asked(instruction: str, record: Mapping[str, Any]) -> Dialogue:
    more = record.get("input")
    answer = next((record[k] for k in ANSWERED if isinstance(record.get(k), str)), "")
    question = f"{instruction}\n{more}" if isinstance(more, str) and more.strip() else instruction
    return [_turn("user", question), _turn("assistant", answer)]


def _of_turn(turn: Any, where: str) -> Turn:
    if not isinstance(turn, Mapping):
        raise DataError(f"{where} has a turn that is a {type(turn).__name__}: give role and content")
    role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    if not isinstance(role, str) or not isinstance(content, (str, type(None))):
        raise DataError(f"{where} has a turn without role and content as text: it has {', '.join(map(str, turn))}")
    return _turn(ALIASES.get(role, role), content or "")


def check_roles(dialogue: Dialogue, number: int) -> None:
    """Raise ``DataError`` for a turn of an unknown role."""
    for turn in dialogue:
        if turn["role"] not in ROLES:
            raise DataError(
                f"instance {number} has a turn with role {turn['role']!r}; roles are {', '.join(ROLES)}"
                f" ({', '.join(ALIASES)} are read as these)"
            )


def is_empty(dialogue: Dialogue) -> bool:
    """Whether nothing is said in it."""
    return not any(turn["content"].strip() for turn in dialogue)


def words_of(dialogue: Dialogue) -> str:
    """All contents, for the search for duplicates."""
    return "\n".join(turn["content"] for turn in dialogue)


def _is_json(path: Path) -> bool:
    name = path.name.removesuffix(".gz")
    return name.endswith((".json", ".jsonl"))


def _file(path: Path) -> Iterator[Dialogue]:
    text = read_text(path)
    if path.name.removesuffix(".gz").endswith(".json"):
        records = _parsed(text, str(path))
        records = records if isinstance(records, list) else [records]
        for i, record in enumerate(records):
            yield from dialogues_of(record, f"{path}, record {i}")
        return
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: JSON may hold other line ends raw
        if line.strip():
            where = f"{path}, line {number}"
            yield from dialogues_of(_parsed(line, where), where)


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise DataError(f"{where} is not JSON: {error}") from error


def _hub(name: str) -> Any:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ConfigError("hf: sources need datasets: pip install 'quire-fast-sae[hub]'") from error
    name, _, split = name.partition("@")
    name, _, config = name.partition(":")
    try:
        return load_dataset(name, config or None, split=split or "train")
    except Exception as error:  # the library raises many kinds for one fact
        raise ConfigError(f"data.source: hf:{name} can't be loaded: {error}") from error
