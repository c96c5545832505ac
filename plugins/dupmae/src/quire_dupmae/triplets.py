"""RetrievalTriplets: queries with a positive and negatives, from Python's own docstrings or from a file."""

from __future__ import annotations

import ast
import functools
import gzip
import json
import sysconfig
from pathlib import Path
from typing import Any

from quire.data import expand
from quire.errors import ConfigError, DataError
from quire_dupmae.retrieval import Collection, Query, RetrievalData

OUTSIDE = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "ensurepip", "turtledemo"}


class RetrievalTriplets(RetrievalData):
    """Pairs of a query and its document: docstrings (first line, rest) or rows of a jsonl file. Xiao et al. 2022.

    Docstrings come from the standard library of the running Python, in every install: about 3400 in 3.11. The query is
    taken out of its document. A fifth of the pairs is the test split, one in twenty validation.

    Args:
        source: ``docstrings``, or a ``.jsonl`` or ``.jsonl.gz`` file whose rows have query and positive (strings) and,
            where there are some, negative (a list) and scores (a teacher's, of the positive and each negative).
        limit: Keep only this many pairs, evenly spread; null keeps all.
        max_length: Tokens of a document, start and end included.
        query_length: Tokens of a query.
        tokenizer: Default a ``WordPiece`` learnt on the training texts.
        negatives: Hard negatives K of each row; 0 for none.
        negatives_from: ``bm25`` or the ``predictions.jsonl`` of a search; a row's own negatives go before.
        teacher: Whether rows carry ``teacher_scores``: the file's, or BM25's.
        predict_split: Whose queries ``predict`` answers: test, val or train.
        **kwargs: Arguments of ``DataModule``.

    Returns:
        Fields tokens, mask, special, word_ids [B,T] of the document; query [B,S]; positive [B,T]; relevant, gain [B,R];
        negative [B,K,T] and teacher_scores [B,1+K] where they are asked for.

    Raises:
        ConfigError: no such file, a length below 3.
        DataError: a row without query or positive, a document without tokens.
    """

    def __init__(self, source: str = "docstrings", limit: int | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if limit is not None and limit < 20:
            raise ConfigError(f"RetrievalTriplets.limit must be at least 20 pairs, got {limit}")
        self.source, self.limit = source, limit

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """Contrastive training with two BM25 negatives."""
        from quire_dupmae.tuning import tiny_tuning

        return tiny_tuning({"class_path": "Contrastive"}, negatives=2)

    def collect(self) -> Collection:
        """Read pairs, number the documents, cut the splits."""
        rows = docstrings() if self.source == "docstrings" else _rows(expand(self.source))
        if self.limit is not None and self.limit < len(rows):
            rows = [rows[i * len(rows) // self.limit] for i in range(self.limit)]
        numbers: dict[str, int] = {}
        splits: dict[str, list[Query]] = {"train": [], "val": [], "test": []}
        for place, row in enumerate(rows):
            positive = numbers.setdefault(row["positive"], len(numbers))
            others = [numbers.setdefault(t, len(numbers)) for t in row.get("negative", [])]
            name = "test" if place % 5 == 4 else "val" if place % 20 == 3 else "train"
            query = Query(str(place), row["query"], {positive: 1.0}, None, others, list(row.get("scores", [])))
            splits[name].append(query)
        return Collection([str(i) for i in range(len(numbers))], list(numbers), splits)


@functools.lru_cache(maxsize=1)
def _read_docstrings() -> tuple[tuple[str, str], ...]:
    found: dict[str, str] = {}
    root = Path(sysconfig.get_paths()["stdlib"])
    for file in sorted(root.rglob("*.py")):
        if OUTSIDE & set(file.relative_to(root).parts[:-1]):
            continue
        try:
            tree = ast.parse(file.read_text(encoding="utf-8"))
        except (SyntaxError, ValueError, OSError):  # a distribution may hold templates
            continue
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                first, _, rest = (ast.get_docstring(node) or "").partition("\n")
                body = " ".join(rest.split())
                if len(first.split()) >= 3 and len(body.split()) >= 8:
                    found.setdefault(body, first)
    return tuple((first, body) for body, first in found.items())


def docstrings() -> list[dict[str, Any]]:
    """First lines of at least 3 words and bodies of at least 8, by file; a body is there once."""
    return [{"query": first, "positive": body} for first, body in _read_docstrings()]


def _rows(file: Path) -> list[dict[str, Any]]:
    rows = []
    for place, row in enumerate(read_jsonl(file, "RetrievalTriplets.source"), 1):
        others = row.get("negative", [])
        row["negative"] = [others] if isinstance(others, str) else others
        for key in ("query", "positive"):
            if not isinstance(row.get(key), str) or not row[key].strip():
                raise DataError(f"{file}, line {place}: no {key}; a row needs query and positive as text")
        rows.append(row)
    return rows


def read_jsonl(file: Path, key: str) -> list[dict[str, Any]]:
    """Objects of a jsonl file, gzipped or not.

    Raises:
        ConfigError: no such file.
        DataError: a line that isn't a JSON object.
    """
    if not file.is_file():
        raise ConfigError(f"{key}: no file at {file}")
    rows = []
    try:
        raw = file.read_bytes()
        text = (gzip.decompress(raw) if file.suffix == ".gz" else raw).decode()
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise DataError(f"{file} is not UTF-8 text: {error}") from error
    for place, line in enumerate(text.splitlines(), 1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{file}, line {place}: not JSON ({error})") from error
        if not isinstance(row, dict):
            raise DataError(f"{file}, line {place}: not a JSON object")
        rows.append(row)
    return rows
