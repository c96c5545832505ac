"""Reading pairs of texts: jsonl, two line-aligned files, SCAN's lines, a Hugging Face data set, or digits in words."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from quire.data import expand
from quire.datasets.text import read_text
from quire.errors import ConfigError, DataError

FORMATS = ("jsonl", "scan")


class Pair(NamedTuple):
    """A text and what it becomes; several targets are references of equal rank."""

    source: str
    targets: tuple[str, ...]


def read_pairs(path: str | list[str], form: str | None, source: str, target: str, key: str = "data.path") -> list[Pair]:
    """All pairs of a place.

    Args:
        path: A jsonl or SCAN file, a list of two line-aligned files (each plain or ``.gz``), or
            ``hf:NAME[:CONFIG][@SPLIT]``.
        form: ``jsonl`` or ``scan``; null tells it by the file's name.
        source: Key or column of the source; ``a.b`` looks inside.
        target: Key or column of the target: a string, or a list of references.
        key: The config's key, for messages.

    Raises:
        ConfigError: nothing at ``path``, or no way to tell its format.
        DataError: a broken file, unequal line counts, a missing key, an empty text, no pair at all.
    """
    if isinstance(path, list):
        pairs = list(_aligned(path, key))
    elif path.startswith("hf:"):
        pairs = [_pair(row, source, target, f"{path} row {i}") for i, row in enumerate(_table(path, key))]
    else:
        file = _file(path, key)
        form = form or ("jsonl" if re.search(r"\.jsonl?(\.gz)?$", file.name) else None)
        if form is None:
            raise ConfigError(
                f"{key}: the name {file.name} does not tell what it holds: set data.format to {' or '.join(FORMATS)},"
                " or give a list of two line-aligned files"
            )
        pairs = list(_jsonl(file, source, target) if form == "jsonl" else _scan(file))
    if not pairs:
        raise DataError(f"{key}: {path} holds no pair")
    return pairs


def _file(path: str, key: str) -> Path:
    file = expand(path)
    if not file.is_file():
        raise ConfigError(f"{key}: no file at {file}")
    return file


def _lines(file: Path) -> list[str]:
    lines = read_text(file).split("\n")  # not splitlines: it cuts at marks that are text, and alignment would be lost
    return [line.rstrip("\r") for line in (lines[:-1] if not lines[-1] else lines)]


def _aligned(paths: list[str], key: str) -> Iterator[Pair]:
    if len(paths) != 2:
        raise ConfigError(f"{key} is one file or a list of two line-aligned files, got {len(paths)}")
    left, right = (_file(p, key) for p in paths)
    sources, targets = _lines(left), _lines(right)
    if len(sources) != len(targets):
        raise DataError(
            f"{left} has {len(sources)} lines and {right} has {len(targets)}: line-aligned files have equally many"
        )
    for number, (a, b) in enumerate(zip(sources, targets), 1):
        yield _checked(a, [b], f"{left if not a.strip() else right} line {number}")


def _jsonl(file: Path, source: str, target: str) -> Iterator[Pair]:
    for number, line in enumerate(_lines(file), 1):
        if not line.strip():
            continue
        where = f"{file} line {number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{where} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise DataError(f"{where} is no JSON object with named fields")
        yield _pair(row, source, target, where)


def _scan(file: Path) -> Iterator[Pair]:
    for number, line in enumerate(_lines(file), 1):
        found = re.fullmatch(r"\s*IN:(.*?)OUT:(.*)", line)
        if found is None:
            raise DataError(f"{file} line {number} is not of the form 'IN: … OUT: …'")
        yield _checked(found[1], [found[2]], f"{file} line {number}")


def _table(path: str, key: str) -> Any:
    name, _, part = path.removeprefix("hf:").partition("@")
    name, _, config = name.partition(":")
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ConfigError("hf: sources need datasets: pip install datasets") from error
    try:
        return load_dataset(name, config or None, split=part or "train")
    except Exception as error:  # the library raises many kinds for one fact
        raise ConfigError(f"{key}: {path} can't be loaded: {error}") from error


def _pair(row: Mapping[str, Any], source: str, target: str, where: str) -> Pair:
    given, answers = _inside(row, source, where), _inside(row, target, where)
    return _checked(given, answers if isinstance(answers, list) else [answers], where)


def _inside(row: Mapping[str, Any], name: str, where: str) -> Any:
    value: Any = row
    for step in name.split("."):
        if not isinstance(value, Mapping) or step not in value:
            known = ", ".join(map(str, value)) if isinstance(value, Mapping) else "no fields"
            raise DataError(f"{where} has no key {name!r}, only {known}: set data.source and data.target")
        value = value[step]
    return value


def _checked(source: Any, targets: list[Any], where: str) -> Pair:
    for text, what in ((source, "source"), *((t, "target") for t in targets)):
        if not isinstance(text, str):
            raise DataError(f"{where}: the {what} is {type(text).__name__}, not text")
        if not text.strip():
            raise DataError(f"{where} has an empty {what}: remove it")
    if not targets:
        raise DataError(f"{where} has no target: its list is empty")
    return Pair(source.strip(), tuple(t.strip() for t in targets))


# ---- a task that every install has
ONES = str.split(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen"
    " seventeen eighteen nineteen"
)
TENS = str.split("twenty thirty forty fifty sixty seventy eighty ninety")


def in_words(number: int) -> str:
    """An English numeral below a million: 402007 → four hundred two thousand seven."""
    if number < 20:
        return ONES[number]
    if number < 100:
        rest = number % 10
        return TENS[number // 10 - 2] + (f" {ONES[rest]}" if rest else "")
    size, name = (1000, "thousand") if number >= 1000 else (100, "hundred")
    rest = number % size
    return f"{in_words(number // size)} {name}" + (f" {in_words(rest)}" if rest else "")


def numerals(count: int) -> list[Pair]:
    """``count`` different numbers of one to six digits, half below a thousand while there are any, and their words.

    Raises:
        ConfigError: ``count`` outside 3 to 100000.
    """
    if not 3 <= count <= 100_000:
        raise ConfigError(f"data.samples must be 3 to 100000 numbers, got {count}")
    chance = torch.Generator().manual_seed(0)
    small = torch.randperm(1000, generator=chance)[: count // 2]
    large = 1000 + torch.randperm(999_000, generator=chance)[: count - len(small)]
    both = torch.cat([small, large])
    chosen = both[torch.randperm(count, generator=chance)].tolist()
    return [Pair(str(n), (in_words(n),)) for n in chosen]
