"""Text as tokens: the standard library's own documentation and source, files, or a Hugging Face data set."""

from __future__ import annotations

import gzip
import sysconfig
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from quire.data import DataModule, Fields, expand
from quire.errors import ConfigError, DataError
from quire.roles.language.text import Bytes, Tokenizer

Item = TypeVar("Item")


class TextTokens(DataModule):
    """Rows of token ids from text.

    Args:
        source: ``stdlib`` (Python's own library source and language reference, embedded in every install),
            ``stdlib:docs`` or ``stdlib:code`` for one half, a file or folder (``.txt``, ``.py``, ``.md``, ``.gz``),
            or ``hf:NAME`` for a Hugging Face data set with a ``text`` column.
        unit: ``block`` (documents joined and cut into full rows), ``line`` or ``passage`` (one row each, padded).
        length: Tokens a row.
        tokenizer: Default ``Bytes``; learnt on the training split where it learns.
        word_ids: Also give ``word_ids`` for whole-word masks.
        split: Share of the documents that train; the rest is validation and test, half each.
        **kwargs: Arguments of ``DataModule``.

    Raises:
        ConfigError: an unknown unit, a missing source, ``split`` outside (0, 1), or a text shorter than one row.
    """

    fields = ("tokens", "mask", "special")

    def __init__(
        self,
        source: str = "stdlib",
        unit: str = "block",
        length: int = 128,
        tokenizer: Tokenizer | None = None,
        word_ids: bool = False,
        split: float = 0.9,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if unit not in ("block", "line", "passage"):
            raise ConfigError(f"TextTokens.unit is block, line or passage, got {unit!r}")
        if length < 2:
            raise ConfigError(f"TextTokens.length must be at least 2, got {length}")
        if not 0 < split < 1:
            raise ConfigError(f"TextTokens.split must be in (0, 1), got {split}")
        self.source, self.unit, self.length, self.word_ids, self.share = source, unit, length, word_ids, split
        self._tokenizer = tokenizer or Bytes()
        self._documents: dict[str, list[str]] | None = None
        self._fitted = False
        if word_ids:
            self.fields = (*type(self).fields, "word_ids")  # type: ignore[misc, assignment]

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """A small language model on the standard library's text."""
        from quire.roles.language.accept import tiny_speculative

        return tiny_speculative({})

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer, fitted on the training documents on first use."""
        if not self._fitted:
            self._tokenizer.fit(self.documents()["train"])
            self._fitted = True
        return self._tokenizer

    def sizes(self) -> dict[str, Any]:
        """vocab_size, length and the special ids."""
        return token_sizes(self.tokenizer, self.length)

    def documents(self) -> dict[str, list[str]]:
        """Documents of each split: every k-th one by name is held out."""
        if self._documents is None:
            texts = read_source(self.source)
            if self.unit == "line":
                texts = [line for t in texts for line in t.splitlines() if line.strip()]
            if self.unit == "passage":
                texts = [p.strip() for t in texts for p in t.split("\n\n") if p.strip()]
            texts = texts if len(texts) > 2 else pieces(texts)
            train, held = held_out(texts, self.share)
            self._documents = {"train": train, "val": held[::2], "test": held[1::2] or held}
        return self._documents

    def split(self, name: str) -> Fields:
        """Encode one split."""
        tok = self.tokenizer
        end = [] if tok.eos is None else [tok.eos]
        encoded = [tok.encode(t) for t in self.documents()[name]]
        if self.unit == "block":
            stream = torch.tensor([i for ids in encoded for i in (*ids, *end)])
            count = len(stream) // self.length
            if not count:
                raise ConfigError(
                    f"TextTokens: the {name} text of {self.source} has {len(stream)} tokens,"
                    f" fewer than one row of {self.length}"
                )
            tokens = stream[: count * self.length].view(count, self.length)
            mask = torch.ones_like(tokens, dtype=torch.bool)
        else:
            start = [] if tok.bos is None else [tok.bos]
            rows = [[*start, *ids[: self.length - len(start) - len(end)], *end] for ids in encoded if ids]
            tokens, mask = ragged(rows, self.length, tok.pad)
        special = torch.zeros_like(mask)
        for i in tok.special:
            special |= tokens == i
        fields = {"tokens": tokens, "mask": mask, "special": special}
        if self.word_ids:
            words = [tok.words(row) for row in tokens.tolist()]
            fields["word_ids"] = torch.tensor(words).masked_fill(special | ~mask, -1)
        return Fields(**fields)


def token_sizes(tok: Tokenizer, length: int) -> dict[str, Any]:
    """What a text module says of itself: vocabulary, length of a row, special ids and the tokenizer's fingerprint."""
    return {
        "vocab_size": tok.vocab_size,
        "length": length,
        "pad": tok.pad,
        "bos": tok.bos,
        "eos": tok.eos,
        "mask_id": tok.mask,
        "tokenizer": tok.fingerprint,
    }


def held_out(items: list[Item], share: float) -> tuple[list[Item], list[Item]]:
    """(train, held): every k-th item is held out, so that about ``share`` of them train."""
    every = max(2, round(1 / (1 - share)))
    train = [t for i, t in enumerate(items) if i % every != every - 1]
    return train, items[every - 1 :: every]


def ragged(rows: list[list[int]], length: int, pad: int) -> tuple[Tensor, Tensor]:
    """Right-padded ids and mask [N,length]."""
    tokens = torch.full((len(rows), length), pad, dtype=torch.long)
    mask = torch.zeros(len(rows), length, dtype=torch.bool)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = True
    return tokens, mask


def pieces(texts: list[str], size: int = 20_000) -> list[str]:
    """One long text as documents of about ``size`` characters, cut at line ends, so that it can be split."""
    out: list[str] = []
    for text in texts:
        held: list[str] = []
        count = 0
        for line in text.splitlines(keepends=True):
            held.append(line)
            count += len(line)
            if count >= size:
                out.append("".join(held))
                held, count = [], 0
        if held:
            out.append("".join(held))
    return (
        out
        if len(out) > 2
        else [t[i : i + max(1, len(t) // 10)] for t in texts for i in range(0, len(t), max(1, len(t) // 10))]
    )


def read_source(source: str) -> list[str]:
    """Documents of a source, sorted by name."""
    if source in ("stdlib", "stdlib:docs", "stdlib:code"):
        return standard_library(source)
    if source.startswith("hf:"):
        return hub(source.removeprefix("hf:"))
    path = expand(source)
    if not path.exists():
        raise ConfigError(f"TextTokens.source: nothing at {path}")
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if _is_text(p))
    if not files:
        raise ConfigError(f"TextTokens.source: {path} holds no .txt, .md, .py or .gz file")
    return [read_text(f) for f in files]


def _is_text(path: Path) -> bool:
    return path.suffix in (".txt", ".md", ".py") or path.name.endswith((".txt.gz", ".md.gz"))


def read_text(path: Path) -> str:
    """A plain or gzipped UTF-8 file. Raises ``DataError`` naming it when it is neither."""
    try:
        raw = path.read_bytes()
        return (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode()
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not {'gzipped ' if path.suffix == '.gz' else ''}UTF-8 text: {error}") from error


def standard_library(which: str) -> list[str]:
    """Python's top-level library modules, and the topics of its language reference, sorted by name."""
    texts: list[str] = []
    if which != "stdlib:code":
        from pydoc_data.topics import topics

        texts += [topics[k] for k in sorted(topics)]
    if which != "stdlib:docs":
        texts += [read_text(p) for p in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))]
    return texts


def hub(name: str) -> list[str]:
    """The ``text`` column of a Hugging Face data set's training split."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ConfigError("hf: sources need datasets: pip install datasets") from error
    try:
        table = load_dataset(name, split="train")
    except Exception as error:  # the library raises many kinds for one fact
        raise ConfigError(f"TextTokens.source: hf:{name} can't be loaded: {error}") from error
    if "text" not in table.column_names:
        raise ConfigError(f"TextTokens.source: hf:{name} has no text column, only {', '.join(table.column_names)}")
    return list(table["text"])
