"""Pairs of texts as tokens: translation, correction, instructions, commands; for seq2seq and for causal models."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.utilities import rank_zero_info

from quire.data import DataModule
from quire.datasets.pair_files import FORMATS, Pair, numerals, read_pairs
from quire.datasets.pair_rows import CAUSAL_FIELDS, PAIR_FIELDS, PairRows
from quire.datasets.text import held_out, token_sizes
from quire.errors import ConfigError, DataError
from quire.roles.language.text import Bytes, Tokenizer


class PairText(DataModule):
    """What modules of text pairs share. Subclass it and write ``texts``, ``lengths`` and ``split``.

    Args:
        tokenizer: One for both sides; default ``Bytes``; learnt on the training pairs where it learns.
        causal: One row for decoder-only models: source, start token, target, end token.
        **kwargs: Arguments of ``DataModule``.

    Raises:
        ConfigError: a tokenizer without an end token.
    """

    fields = PAIR_FIELDS

    def __init__(self, tokenizer: Tokenizer | None = None, causal: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.causal = causal
        self._tokenizer = tokenizer or Bytes()
        self._fitted = False
        if causal:
            self.fields = CAUSAL_FIELDS  # type: ignore[misc, assignment]

    def texts(self, name: str) -> list[Pair]:
        """Source and every reference of a split's samples; sample i of val and test has ``index`` i."""
        raise NotImplementedError

    def lengths(self) -> tuple[int, int]:
        """Most tokens of a source, and of a target with its start and end."""
        raise NotImplementedError

    def learnt_from(self) -> list[str]:
        """Texts that the tokenizer learns from."""
        return [t for pair in self.texts("train") for t in (pair.source, *pair.targets)]

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer, fitted on the training pairs on first use."""
        if not self._fitted:
            self._tokenizer.fit(self.learnt_from())
            self._fitted = True
            if self._tokenizer.eos is None:
                raise ConfigError(
                    f"{type(self).__name__} needs a tokenizer with an end token; {type(self._tokenizer).__name__}"
                    " of data.tokenizer has none"
                )
        return self._tokenizer

    def framed(self, ids: list[int]) -> list[int]:
        """Target ids between the start token (padding where the tokenizer has none) and the end token."""
        tok = self.tokenizer
        return [tok.pad if tok.bos is None else tok.bos, *ids, int(tok.eos or 0)]

    def sizes(self) -> dict[str, Any]:
        """vocab_size, length (source and target together) and the special ids."""
        return token_sizes(self.tokenizer, sum(self.lengths()))


class Pairs(PairText):
    """Pairs of texts from files, a Hugging Face data set, or made on the spot (numbers and their English words).

    Fields: source [B,S], source_mask, tokens [B,T] (start, target, end), mask; causal: tokens and mask [B,S+T],
    prompt_length [B], source_span [B,2]. A batch is as wide as its longest row.

    Args:
        path: ``generated``; a ``.jsonl`` file; a list of two line-aligned files; ``hf:NAME[:CONFIG][@SPLIT]``; or a
            file in ``format``. Files may be ``.gz``.
        val: The same for validation; null holds samples of ``path`` out, none of whose sources is trained on.
        test: The same for test; null likewise.
        source: Key or column of the source; ``a.b`` looks inside.
        target: Key or column of the target; a list in it is several references of one source.
        format: ``jsonl``, or ``scan`` for lines ``IN: … OUT: …``; null tells it by the file's name.
        references: What training does with several references: ``one``, drawn anew each epoch, or ``all``, each a
            sample. Validation and test score the first; ``texts`` has them all.
        source_length: Most tokens of a source; null takes the longest there is.
        target_length: Most tokens of a target, start and end included; null takes the longest there is.
        long: What happens to longer ones: ``error``, ``cut`` or ``drop``, which say how many.
        samples: Numbers to make, of ``generated``.
        split: Share of ``path`` that trains where it is also held out from.
        tokenizer: One for both sides; default ``Bytes``; learnt on the training pairs where it learns.
        causal: One row for decoder-only models: source, start token, target, end token.
        **kwargs: Arguments of ``DataModule``.

    Raises:
        ConfigError: a missing file, an unknown ``format``, ``references`` or ``long``, or a number out of range.
        DataError: broken or empty files, unequal line counts, a missing key, an empty text, a row over the limit.
    """

    def __init__(
        self,
        path: str | list[str] = "generated",
        val: str | list[str] | None = None,
        test: str | list[str] | None = None,
        source: str = "source",
        target: str = "target",
        format: str | None = None,
        references: str = "one",
        source_length: int | None = None,
        target_length: int | None = None,
        long: str = "error",
        samples: int = 8192,
        split: float = 0.9,
        tokenizer: Tokenizer | None = None,
        causal: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(tokenizer, causal, **kwargs)
        for key, value, allowed in (
            ("format", format, (None, *FORMATS)),
            ("references", references, ("one", "all")),
            ("long", long, ("error", "cut", "drop")),
        ):
            if value not in allowed:
                raise ConfigError(f"Pairs.{key} is {', '.join(str(a) for a in allowed if a)}, got {value!r}")
        if not 0 < split < 1:
            raise ConfigError(f"Pairs.split must be in (0, 1), got {split}")
        if min(source_length or 1, (target_length or 3) - 2) < 1 or 0 in (source_length, target_length):
            raise ConfigError(
                f"Pairs needs source_length of at least 1 and target_length of at least 3 (start, one token, end),"
                f" got {source_length} and {target_length}"
            )
        self.path, self.places, self.source, self.target = path, {"val": val, "test": test}, source, target
        self.format, self.references, self.long = format, references, long
        self.limits, self.samples, self.share = (source_length, target_length), samples, split
        self._read: dict[str, list[Pair]] = {}
        self._encoded: dict[str, list[tuple[list[int], list[list[int]]]]] = {}
        self._kept: dict[str, list[Pair]] = {}

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """A few numbers in words."""
        from quire.datasets.algorithmic import Algorithmic

        data = {"class_path": "Pairs", "init_args": {"samples": 160, "batch_size": 16, "train_samples": 64}}
        return {"model": Algorithmic.tiny()["model"], "data": data}

    def pairs(self) -> dict[str, list[Pair]]:
        """All pairs of each split, as read."""
        if not self._read:
            whole = self._from(self.path, "path")
            given = {name: self._from(place, name) for name, place in self.places.items() if place}
            missing = [name for name in self.places if name not in given]
            if missing:
                held = set(held_out(list(dict.fromkeys(p.source for p in whole)), self.share)[1])
                out = [p for p in whole if p.source in held]
                whole = [p for p in whole if p.source not in held]
                given |= {name: out[i :: len(missing)] for i, name in enumerate(missing)}
                if len(out) < len(missing) or not whole:
                    raise DataError(
                        f"data.path: {self.path} has {len(whole) + len(out)} pairs, too few to hold"
                        f" {' and '.join(missing)} out: give files for them"
                    )
            self._read = {"train": whole, **given}
        return self._read

    def _from(self, place: str | list[str], key: str) -> list[Pair]:
        if place == "generated":
            return numerals(self.samples)
        return read_pairs(place, self.format, self.source, self.target, f"data.{key}")

    def learnt_from(self) -> list[str]:
        """Sources and all references of the training pairs."""
        return [t for pair in self.pairs()["train"] for t in (pair.source, *pair.targets)]

    def encoded(self, name: str) -> list[tuple[list[int], list[list[int]]]]:
        """Ids of a split's samples: a source and its targets, rows over the limits treated as ``long`` says."""
        if name not in self._encoded:
            tok, rows, kept, over = self.tokenizer, [], [], 0
            for number, pair in enumerate(self.pairs()[name]):
                source = tok.encode(pair.source)
                if not source:
                    raise DataError(
                        f"the tokenizer makes nothing of the source {pair.source!r} (pair {number} of {name})"
                    )
                texts = pair.targets if name == "train" else pair.targets[:1]
                targets = [self.framed(tok.encode(t)) for t in texts]
                fits = [self._fits(source, target, name, number) for target in targets]
                over += not all(fits)
                if self.long == "cut":
                    source, targets = source[: self.limits[0]], [self._cut(t) for t in targets]
                else:
                    targets = [t for t, good in zip(targets, fits) if good]
                for some in [[t] for t in targets] if self.references == "all" else [targets] if targets else []:
                    rows.append((source, some))
                    kept.append(pair)
            if over:
                done = "cut" if self.long == "cut" else "dropped"
                rank_zero_info(f"Pairs: {over} of {len(self.pairs()[name])} {name} pairs are over the limit: {done}")
            self._encoded[name], self._kept[name] = rows, kept
        return self._encoded[name]

    def _fits(self, source: list[int], target: list[int], name: str, number: int) -> bool:
        for ids, limit, what in ((source, self.limits[0], "source"), (target, self.limits[1], "target")):
            if limit is not None and len(ids) > limit:
                if self.long == "error":
                    raise DataError(
                        f"pair {number} of {name} has {len(ids)} {what} tokens, the limit is {limit}:"
                        f" raise data.{what}_length, or set data.long to cut or drop"
                    )
                return False
        return True

    def _cut(self, target: list[int]) -> list[int]:
        limit = self.limits[1]
        return target if limit is None or len(target) <= limit else [*target[: limit - 1], target[-1]]

    def texts(self, name: str) -> list[Pair]:
        """Source and every reference of a split's samples; sample i of val and test has ``index`` i."""
        self.encoded(name)
        return self._kept[name]

    def lengths(self) -> tuple[int, int]:
        """The limits, or the longest source and target of all splits."""
        rows = [row for name in ("train", "val", "test") for row in self.encoded(name)]
        longest = max((len(s) for s, _ in rows), default=1), max((len(t) for _, ts in rows for t in ts), default=3)
        return self.limits[0] or longest[0], self.limits[1] or longest[1]

    def split(self, name: str) -> PairRows:
        """One split; a training sample with several references draws one for each epoch."""
        return PairRows(self.encoded(name), self.tokenizer.pad, self.causal, self.seed, fresh=name == "train")
