"""Tokenizers: text ↔ ids, with a fingerprint that stores and drafters compare, kept inside the checkpoint."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from quire.contracts import Part
from quire.errors import ConfigError


class Tokenizer(Part):
    """Role of a tokenizer.

    Attributes:
        vocab_size: Ids run from 0 to this.
        pad, bos, eos, mask: Special ids; None where there is none.
    """

    vocab_size: int = 0
    pad: int = 0
    bos: int | None = None
    eos: int | None = None
    mask: int | None = None

    def fit(self, texts: Iterable[str]) -> None:
        """Learn the vocabulary once; the default has nothing to learn."""

    def encode(self, text: str) -> list[int]:
        """Text → ids, no special ids added."""
        raise NotImplementedError

    def decode(self, ids: list[int]) -> str:
        """Ids → text; special ids leave no trace."""
        raise NotImplementedError

    def words(self, ids: list[int]) -> list[int]:
        """Number of the word that each id belongs to, from 0; a new word starts behind white space."""
        out, word, open_word = [], -1, False
        for i in ids:
            piece = self.decode([i])
            if not piece.strip():
                open_word = False
                out.append(max(word, 0))
                continue
            if piece[:1].isspace() or not open_word:
                word += 1
            open_word = not piece[-1:].isspace()
            out.append(word)
        return out

    def vocabulary(self) -> list[str]:
        """Every entry, in id order or sorted: what the fingerprint covers."""
        raise NotImplementedError

    def state(self) -> str:
        """What was learnt, as text for the checkpoint."""
        return ""

    def restore(self, state: str) -> None:
        """Take up ``state``."""

    @property
    def fingerprint(self) -> str:
        """First 12 hex digits of SHA-256 over kind, sorted vocabulary and special ids."""
        special = [self.pad, self.bos, self.eos, self.mask]
        content = json.dumps([type(self).__name__, sorted(self.vocabulary()), special])
        return hashlib.sha256(content.encode()).hexdigest()[:12]

    @property
    def special(self) -> frozenset[int]:
        """The special ids."""
        return frozenset(i for i in (self.pad, self.bos, self.eos, self.mask) if i is not None)

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """A small language model over this tokenizer."""
        from quire.roles.language.accept import tiny_speculative

        run = tiny_speculative({})
        run["data"]["init_args"]["tokenizer"] = {"class_path": cls.__name__, "init_args": cls.tiny_arguments()}
        return run

    @classmethod
    def tiny_arguments(cls) -> dict[str, Any]:
        """Arguments of the tiny example."""
        return {}


class Bytes(Tokenizer):
    """Bytes of UTF-8: pad 0, bos 1, eos 2, mask 3, byte b is b + 4; 260 ids."""

    vocab_size, pad, bos, eos, mask = 260, 0, 1, 2, 3

    def encode(self, text: str) -> list[int]:
        """One id a byte."""
        return [b + 4 for b in text.encode()]

    def decode(self, ids: list[int]) -> str:
        """Bytes that are not UTF-8 become the replacement character."""
        return bytes(i - 4 for i in ids if i >= 4).decode(errors="replace")

    def vocabulary(self) -> list[str]:
        """The byte values."""
        return [f"{b:02x}" for b in range(256)]


class BPE(Tokenizer):
    """Byte-level byte-pair encoding, learnt on the training split with the ``tokenizers`` library.

    Args:
        size: Vocabulary, special ids included; at least 260.

    Raises:
        ConfigError: ``size`` below 260, or used before it was fitted.
    """

    pad, bos, eos, mask = 0, 1, 2, 3

    def __init__(self, size: int = 4096) -> None:
        super().__init__()
        if size < 260:
            raise ConfigError(f"BPE.size must be at least 260 (bytes and special ids), got {size}")
        self.vocab_size = size
        self._inner: Any = None

    @classmethod
    def tiny_arguments(cls) -> dict[str, Any]:
        """A few merges."""
        return {"size": 300}

    def fit(self, texts: Iterable[str]) -> None:
        """Learn merges; fewer than ``size`` entries if the text has no more."""
        tokenizers = _tokenizers()
        inner = tokenizers.Tokenizer(tokenizers.models.BPE())
        inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = tokenizers.decoders.ByteLevel()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=self.vocab_size,
            special_tokens=["<pad>", "<bos>", "<eos>", "<mask>"],
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        inner.train_from_iterator(texts, trainer)
        self._inner = inner

    @property
    def inner(self) -> Any:
        """The library's tokenizer."""
        if self._inner is None:
            raise ConfigError("BPE was never fitted: run fit, or load a checkpoint")
        return self._inner

    def encode(self, text: str) -> list[int]:
        """Ids of the merges."""
        return self.inner.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        """Special ids are skipped."""
        return self.inner.decode([i for i in ids if i > 3], skip_special_tokens=True)

    def vocabulary(self) -> list[str]:
        """Entries of the library's vocabulary with their ids."""
        return [f"{i}:{w}" for w, i in self.inner.get_vocab().items()]

    def state(self) -> str:
        """The library's JSON."""
        return self.inner.to_str()

    def restore(self, state: str) -> None:
        """From the library's JSON."""
        self._inner = _tokenizers().Tokenizer.from_str(state)


class Words(Tokenizer):
    """A closed vocabulary of lower-cased words and marks; the rest is ``<unk>``.

    Args:
        size: Vocabulary, the five special ids included; the most frequent words are kept, ties by spelling.

    Raises:
        ConfigError: ``size`` below 6.
    """

    pad, bos, eos, mask, unknown = 0, 1, 2, 3, 4

    def __init__(self, size: int = 8192) -> None:
        super().__init__()
        if size < 6:
            raise ConfigError(f"Words.size must be at least 6, got {size}")
        self.vocab_size = size
        self.restore("[]")

    @classmethod
    def tiny_arguments(cls) -> dict[str, Any]:
        """A few words."""
        return {"size": 200}

    def fit(self, texts: Iterable[str]) -> None:
        """Count words."""
        counts: Counter[str] = Counter()
        for text in texts:
            counts.update(self.split(text))
        ordered = sorted(counts, key=lambda w: (-counts[w], w))[: self.vocab_size - 5]
        self.restore(json.dumps(ordered))

    @staticmethod
    def split(text: str) -> list[str]:
        """Words and single marks, lower-cased."""
        return re.findall(r"\w+|[^\w\s]", text.lower())

    def encode(self, text: str) -> list[int]:
        """One id a word."""
        return [self._ids.get(w, self.unknown) for w in self.split(text)]

    def decode(self, ids: list[int]) -> str:
        """Words joined by spaces."""
        return " ".join("<unk>" if i == self.unknown else self._words[i - 5] for i in ids if i >= 4)

    def words(self, ids: list[int]) -> list[int]:
        """Every id is a word."""
        return list(range(len(ids)))

    def vocabulary(self) -> list[str]:
        """The words."""
        return self._words

    def state(self) -> str:
        """The words as JSON."""
        return json.dumps(self._words)

    def restore(self, state: str) -> None:
        """From JSON."""
        self._words: list[str] = json.loads(state)
        self._ids = {w: i + 5 for i, w in enumerate(self._words)}


class HFTokenizer(Tokenizer):
    """A transformers tokenizer from a folder, a hub name, or GPT-2's two files.

    Args:
        path: A folder or hub name for ``AutoTokenizer``; or a folder with ``gpt2_vocab.json`` and
            ``gpt2_merges.txt`` (also ``vocab.json`` and ``merges.txt``; ``.gz`` too).

    Raises:
        ConfigError: nothing there that can be read.
    """

    def __init__(self, path: str) -> None:
        super().__init__()
        from quire.data import expand

        self.path = path
        folder = expand(path)
        found = _gpt2_files(folder)
        self.inner = _gpt2(*found) if found else _auto(str(folder) if folder.exists() else path)
        self.vocab_size = len(self.inner)
        self.bos, self.eos = self.inner.bos_token_id, self.inner.eos_token_id
        self.mask = self.inner.mask_token_id
        self.pad = self.inner.pad_token_id if self.inner.pad_token_id is not None else (self.eos or 0)

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """Needs files, so the tiny run reads them from ``$QUIRE_DATA``."""
        run = super().tiny()
        run["data"]["init_args"]["tokenizer"]["init_args"] = {"path": "$QUIRE_DATA/tokenizers"}
        return run

    def encode(self, text: str) -> list[int]:
        """No special ids added."""
        return self.inner.encode(text, add_special_tokens=False)

    def decode(self, ids: list[int]) -> str:
        """Special ids are skipped."""
        return self.inner.decode(ids, skip_special_tokens=True)

    def vocabulary(self) -> list[str]:
        """Entries with their ids."""
        return [f"{i}:{w}" for w, i in self.inner.get_vocab().items()]


class SentencePiece(Tokenizer):
    """A sentencepiece model file.

    Args:
        path: The ``.model`` file.

    Raises:
        ConfigError: no such file, or not a sentencepiece model.
    """

    def __init__(self, path: str) -> None:
        super().__init__()
        from quire.data import expand

        try:
            import sentencepiece
        except ImportError as error:
            raise ConfigError("SentencePiece needs sentencepiece: pip install 'quire[text]'") from error
        file = expand(path)
        if not file.is_file():
            raise ConfigError(f"SentencePiece: no file at {file}")
        try:
            self.inner = sentencepiece.SentencePieceProcessor(model_file=str(file))
        except RuntimeError as error:
            raise ConfigError(f"SentencePiece: {file} is not a sentencepiece model") from error
        self.vocab_size = self.inner.get_piece_size()
        ids = (self.inner.bos_id(), self.inner.eos_id(), self.inner.pad_id())
        self.bos, self.eos = (i if i >= 0 else None for i in ids[:2])
        self.pad = ids[2] if ids[2] >= 0 else max(self.inner.unk_id(), 0)

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """Needs a file, so the tiny run reads it from ``$QUIRE_DATA``."""
        run = super().tiny()
        path = "$QUIRE_DATA/tokenizers/spm_test_1000.model"
        run["data"]["init_args"]["tokenizer"]["init_args"] = {"path": path}
        return run

    def encode(self, text: str) -> list[int]:
        """Pieces' ids."""
        return self.inner.encode(text)

    def decode(self, ids: list[int]) -> str:
        """Control pieces leave no trace."""
        return self.inner.decode(ids)

    def vocabulary(self) -> list[str]:
        """The pieces, by id."""
        return [self.inner.id_to_piece(i) for i in range(self.vocab_size)]


def _tokenizers() -> Any:
    try:
        import tokenizers
        import tokenizers.decoders
        import tokenizers.models
        import tokenizers.pre_tokenizers
        import tokenizers.trainers
    except ImportError as error:
        raise ConfigError("BPE needs tokenizers: pip install 'quire[text]'") from error
    return tokenizers


def _gpt2_files(folder: Path) -> tuple[Path, Path] | None:
    for prefix in ("gpt2_", ""):
        for ending in ("", ".gz"):
            pair = folder / f"{prefix}vocab.json{ending}", folder / f"{prefix}merges.txt{ending}"
            if all(p.is_file() for p in pair) and not (folder / "tokenizer.json").is_file():
                return pair
    return None


def _gpt2(vocab: Path, merges: Path) -> Any:
    from transformers import PreTrainedTokenizerFast

    tokenizers = _tokenizers()

    def read(path: Path) -> str:
        raw = path.read_bytes()
        return (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode()

    pairs = [tuple(line.split(" ")) for line in read(merges).splitlines() if line and not line.startswith("#version")]
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(json.loads(read(vocab)), pairs))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    end = "<|endoftext|>"
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token=end, eos_token=end)


def _auto(path: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path)
    except Exception as error:  # the library raises many kinds for one fact
        raise ConfigError(
            f"HFTokenizer: nothing to load at {path}: give a folder with tokenizer files or a hub name"
        ) from error
