"""What a decoding benchmark decodes: the scripted copy task, or prompts from a file."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quire.data import expand
from quire.errors import ConfigError, DataError

FIRST = 4  # ids below are special tokens in most vocabularies


@dataclass(frozen=True)
class Task:
    """Prompts of one kind.

    Attributes:
        name: For the table.
        prompts: Rows of ids.
        scripts: For each prompt the ids that a scripted model emits behind it; None: the model decides.
    """

    name: str
    prompts: list[list[int]]
    scripts: list[list[int]] | None = None


def copies(
    edits: int,
    count: int,
    length: int,
    new_tokens: int,
    vocab_size: int,
    ends: Collection[int] = (),
    seed: int = 0,
) -> Task:
    """Passages to be copied with ``edits`` percent of the tokens replaced by others.

    Args:
        edits: Percent, 0 to 100; exactly that many places, at random.
        count: Prompts; they get longer by two tokens each, so a batch is ragged.
        length: Tokens of the shortest prompt, at least; a prompt is never shorter than its continuation.
        new_tokens: Tokens of each continuation.
        vocab_size: Of the model.
        ends: Ids that would end a row; not used.
        seed: Of passages and edits.
    """
    source = random.Random(seed)
    ids = [i for i in range(min(FIRST, vocab_size - 1), vocab_size) if i not in ends]
    prompts, scripts = [], []
    for row in range(count):
        size = max(length, new_tokens) + 2 * row
        enough = 2 * size <= len(ids)  # distinct ids, so that a copied place is found by its last token already
        drawn = source.sample(ids, 2 * size) if enough else source.choices(ids, k=2 * size)
        passage, others = drawn[:size], drawn[size:]
        script = passage[:new_tokens]
        for place in source.sample(range(new_tokens), round(edits * new_tokens / 100)):
            script[place] = others[place]
        prompts.append(passage)
        scripts.append(script)
    return Task(f"copy, {edits}% edits", prompts, scripts)


def from_file(path: str, count: int, encode: Callable[[str], list[int]]) -> Task:
    """The first ``count`` prompts of a file.

    Args:
        path: ``.txt`` (one prompt a line) or ``.jsonl`` (``prompt`` or ``text``, or ``tokens``: ids), plain or ``.gz``.
        count: Most prompts taken.
        encode: Text → ids.

    Raises:
        ConfigError: no such file, or another kind of file.
        DataError: a line that is no prompt, or no prompts at all.
    """
    from quire.datasets.text import read_text

    file = expand(path)
    if not file.is_file():
        raise ConfigError(f"--prompts: no file {file}")
    kind = Path(file.name.removesuffix(".gz")).suffix
    if kind not in (".txt", ".jsonl"):
        raise ConfigError(f"--prompts takes .txt or .jsonl, plain or .gz; got {file.name}")
    rows: list[list[int]] = []
    for number, line in enumerate(read_text(file).splitlines(), 1):
        if line.strip() and len(rows) < count:
            ids = encode(line) if kind == ".txt" else _ids(line, f"{file}, line {number}", encode)
            if ids:
                rows.append(ids)
    if not rows:
        raise DataError(f"{file} holds no prompts: write one a line")
    return Task(file.name, rows)


def _ids(line: str, where: str, encode: Callable[[str], list[int]]) -> list[int]:
    try:
        content: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where} is not JSON: {error.msg}") from error
    found = content if isinstance(content, dict) else {}
    tokens, text = found.get("tokens"), found.get("prompt", found.get("text"))
    if isinstance(tokens, list) and all(isinstance(t, int) for t in tokens):
        return tokens
    if isinstance(text, str):
        return encode(text)
    raise DataError(f"{where} has no prompt: give prompt or text (a string) or tokens (ids)")
