"""Questions of the small grammar as tokens, their closed vocabulary, SCAN's commands. For Celotti et al. 2020."""

from __future__ import annotations

import json
import random
from typing import Any

from quire.data import DataModule, Fields, expand
from quire.datasets.text import TextTokens, ragged, read_text, token_sizes
from quire.errors import ConfigError
from quire.roles.language.text import Tokenizer, Words
from quire_ariel.grammar import LONGEST, SPECIAL, Grammar, questions


class ClosedWords(Tokenizer):
    """A closed list of words: pad 0, start 1, end 2, then the words in order; used by ``QuestionGrammar``.

    Made for Celotti et al. 2020's toy grammar, whose vocabulary is known beforehand.

    Args:
        words: Every word, without spaces; null takes the small grammar's.

    Raises:
        ConfigError: a word that is not in the list is encoded.
    """

    pad, bos, eos, mask = 0, 1, 2, None

    def __init__(self, words: list[str] | None = None) -> None:
        super().__init__()
        self.restore(json.dumps(list(questions().words) if words is None else list(words)))

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """A small language model of a text of these words."""
        from quire_ariel.decoder import tiny_volume

        return {
            **tiny_volume(),
            "data": {"class_path": "QuestionGrammar", "init_args": {**SMALL, "tokenizer": "ClosedWords"}},
        }

    def encode(self, text: str) -> list[int]:
        """One id a word."""
        found = [self.ids.get(w) for w in text.split()]
        if None in found:
            raise ConfigError(f"the word {text.split()[found.index(None)]!r} is not among the {len(self.listed)} words")
        return [i for i in found if i is not None]

    def decode(self, ids: list[int]) -> str:
        """Words joined by spaces."""
        return " ".join(self.listed[i - SPECIAL] for i in ids if i >= SPECIAL)

    def words(self, ids: list[int]) -> list[int]:
        """Every id is a word."""
        return list(range(len(ids)))

    def vocabulary(self) -> list[str]:
        """The words, with their ids."""
        return [f"{i}:{w}" for w, i in self.ids.items()]

    def state(self) -> str:
        """The words as JSON."""
        return json.dumps(self.listed)

    def restore(self, state: str) -> None:
        """From JSON."""
        self.listed: list[str] = json.loads(state)
        self.ids = {w: i + SPECIAL for i, w in enumerate(self.listed)}
        self.vocab_size = SPECIAL + len(self.listed)


SMALL: dict[str, Any] = {"sentences": 128, "held_out": 16, "batch_size": 16}


class QuestionGrammar(DataModule):
    """Questions such as "is the very old cat chasing a dog ?", drawn from a grammar whose validity can be decided.

    The toy setting of Celotti et al. 2020 with a grammar of our own: theirs was not published. Validation and test
    sentences are all different and none is in training; training sentences may repeat.

    Args:
        sentences: Training sentences.
        held_out: Sentences of validation, and as many of test.
        seed: Of what is drawn, and of the order.
        vocabulary: Tokens, at least 47; above that, made-up words.
        tokenizer: Null makes the grammar's own.
        batch_size: Sentences per step and process.
        **kwargs: Arguments of ``DataModule``.

    Returns:
        ``tokens`` [B,T] start, words, end; ``mask``.

    Raises:
        ConfigError: no sentences, or more held out than the grammar can spare.
    """

    fields = ("tokens", "mask")

    def __init__(
        self,
        sentences: int = 8000,
        held_out: int = 400,
        seed: int = 0,
        vocabulary: int = 47,
        tokenizer: ClosedWords | None = None,
        batch_size: int = 128,
        **kwargs: Any,
    ) -> None:
        super().__init__(batch_size=batch_size, seed=seed, **kwargs)
        if sentences < 1 or held_out < 1:
            raise ConfigError(
                f"QuestionGrammar needs sentences and held_out of at least 1, got {sentences}, {held_out}"
            )
        self.grammar: Grammar = questions(vocabulary)
        if 4 * held_out > self.grammar.size():
            raise ConfigError(
                f"QuestionGrammar.held_out={held_out}: the grammar has {self.grammar.size()} sentences, hold out fewer"
            )
        self.sentences, self.held_out = sentences, held_out
        self.tokenizer = ClosedWords(list(self.grammar.words)) if tokenizer is None else tokenizer
        self._drawn: dict[str, list[list[str]]] | None = None

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """A small language model of questions under the cube."""
        from quire_ariel.decoder import tiny_volume

        return tiny_volume()

    def sizes(self) -> dict[str, Any]:
        """vocab_size, length and the special ids."""
        return token_sizes(self.tokenizer, LONGEST + 1)

    def drawn(self) -> dict[str, list[list[str]]]:
        """The words of every split."""
        if self._drawn is None:
            chance = random.Random(self.seed)
            held: dict[tuple[str, ...], None] = {}
            while len(held) < 2 * self.held_out:
                held[tuple(self.grammar.draw(chance))] = None
            rest = [list(s) for s in held]
            train: list[list[str]] = []
            while len(train) < self.sentences:
                words = self.grammar.draw(chance)
                if tuple(words) not in held:
                    train.append(words)
            self._drawn = {"train": train, "val": rest[: self.held_out], "test": rest[self.held_out :]}
        return self._drawn

    def split(self, name: str) -> Fields:
        """One split as rows of ids."""
        tok = self.tokenizer
        rows = [[1, *(tok.ids[w] for w in words), 2] for words in self.drawn()[name]]
        tokens, mask = ragged(rows, LONGEST + 1, tok.pad)
        return Fields(tokens=tokens, mask=mask)


class ScanCommands(TextTokens):
    """The commands of SCAN, without their actions: 20 910 different short sentences. For Celotti et al. 2020's code.

    Args:
        root: Folder with ``simple_train.txt.gz`` and ``simple_test.txt.gz``, lines of ``IN: command OUT: actions``.
        length: Tokens a row, start and end included.
        **kwargs: Arguments of ``DataModule``.

    Returns:
        ``tokens`` [B,T] start, words, end; ``mask``, ``special``.

    Raises:
        ConfigError: no such files.
    """

    def __init__(self, root: str = "$QUIRE_DATA/scan", length: int = 16, **kwargs: Any) -> None:
        super().__init__(source=root, unit="line", length=length, tokenizer=Words(size=24), **kwargs)

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """Needs the files, so the tiny run reads them from ``$QUIRE_DATA``."""
        from quire_ariel.decoder import tiny_volume

        data = {"root": "$QUIRE_DATA/scan", "batch_size": 16, "train_samples": 64}
        return {**tiny_volume(), "data": {"class_path": "ScanCommands", "init_args": data}}

    def documents(self) -> dict[str, list[str]]:
        """Train as SCAN's simple split; its test commands are validation and test in turn."""
        if self._documents is None:
            found = {}
            for name in ("train", "test"):
                file = expand(self.source) / f"simple_{name}.txt.gz"
                if not file.is_file():
                    raise ConfigError(f"ScanCommands.root: no {file.name} in {file.parent}")
                lines = read_text(file).splitlines()
                found[name] = [line.partition(" OUT:")[0].removeprefix("IN: ") for line in lines if line]
            self._documents = {"train": found["train"], "val": found["test"][::2], "test": found["test"][1::2]}
        return self._documents
