"""WordPiece: BERT's kind of tokenizer, learnt on the training split or taken from a folder or the hub."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from typing import Any

from quire.data import expand
from quire.errors import ConfigError
from quire.roles.language.text import Tokenizer

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
NAMES = {"pad": "PAD", "bos": "CLS", "eos": "SEP", "mask": "mask"}
"""Attribute of the role → what a masked language model calls the token."""


def _pipeline(vocabulary: dict[str, int]) -> Any:
    from tokenizers import Tokenizer as Inner
    from tokenizers import decoders, models, normalizers, pre_tokenizers

    inner = Inner(models.WordPiece(vocabulary or {"[UNK]": 0}, unk_token="[UNK]"))
    inner.normalizer = normalizers.BertNormalizer(lowercase=True)
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.decoder = decoders.WordPiece()
    return inner


class WordPiece(Tokenizer):
    """Lower-cased word pieces with the tokens of a masked language model; Devlin et al. 2019, arXiv 1810.04805.

    ``bos`` is the CLS token and ``eos`` the SEP token.

    Args:
        size: Vocabulary learnt on the training split, the five special ids included.
        path: A folder or hub name whose fast tokenizer is taken instead (BERT's, RoBERTa's); null learns one.

    Raises:
        ConfigError: ``size`` below 300, nothing at ``path``, or a tokenizer without CLS, SEP, PAD or mask token.
    """

    def __init__(self, size: int = 4096, path: str | None = None) -> None:
        super().__init__()
        if size < 300:
            raise ConfigError(f"WordPiece.size must be at least 300, got {size}")
        self.size, self.path, self._inner = size, path, None
        if path is None:  # a vocabulary read from files tells its own
            self.vocab_size, self.pad, self.bos, self.eos, self.mask = size, 0, 2, 3, 4

    @classmethod
    def tiny_arguments(cls) -> dict[str, Any]:
        """A few pieces."""
        return {"size": 400}

    def fit(self, texts: Iterable[str]) -> None:
        """Learn the pieces, unless they come from files."""
        if self.path is not None:
            self._take()
            return
        given = list(texts)
        scratch = _pipeline({})
        counts = Counter(c for t in given for c in scratch.normalizer.normalize_str(t) if not c.isspace())
        letters = sorted(sorted(counts, key=lambda c: (-counts[c], c))[:200])
        from tokenizers import trainers

        trainer = trainers.WordPieceTrainer(
            vocab_size=max(self.size, len(SPECIAL) + 2 * len(letters)),
            special_tokens=[*SPECIAL, *letters, *(f"##{c}" for c in letters)],  # else ids of letters differ by run
            initial_alphabet=letters,
            limit_alphabet=len(letters),
            show_progress=False,
        )
        scratch.train_from_iterator(given, trainer)
        inner = _pipeline(scratch.get_vocab())
        inner.add_special_tokens(SPECIAL)
        self._use(inner, {"pad": 0, "bos": 2, "eos": 3, "mask": 4})

    def _take(self) -> None:
        from transformers import AutoTokenizer

        folder = expand(self.path or "")
        try:
            found = AutoTokenizer.from_pretrained(str(folder) if folder.exists() else self.path)
        except Exception as error:  # the library raises many kinds for one fact
            raise ConfigError(f"WordPiece.path: no tokenizer at {self.path}") from error
        ids = {"pad": found.pad_token_id, "bos": found.cls_token_id, "eos": found.sep_token_id}
        ids["mask"] = found.mask_token_id
        for name, value in ids.items():
            if value is None:
                raise ConfigError(
                    f"tokenizer {self.path} has no {NAMES[name]} token: use one of a masked language model"
                )
        self._use(found.backend_tokenizer, ids)

    def _use(self, inner: Any, ids: dict[str, int]) -> None:
        self._inner = inner
        inner.no_padding()
        inner.no_truncation()
        inner.encode_special_tokens = True  # "[MASK]" in a text is text
        self.pad, self.bos, self.eos, self.mask = (ids[n] for n in ("pad", "bos", "eos", "mask"))
        self.vocab_size = inner.get_vocab_size()
        self._mark = "##" if any(w.startswith("##") for w in inner.get_vocab()) else ""

    @property
    def inner(self) -> Any:
        """The library's tokenizer."""
        if self._inner is None:
            if self.path is None:
                raise ConfigError("WordPiece was never fitted: run fit, or load a checkpoint")
            self._take()
        return self._inner

    def encode(self, text: str) -> list[int]:
        """Ids of the pieces."""
        return self.inner.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        """Special ids are skipped."""
        return self.inner.decode([i for i in ids if i not in self.special])

    def words(self, ids: list[int]) -> list[int]:
        """A piece that begins with ``##`` belongs to the word before it; elsewhere a word begins with a space."""
        out, word, before = [], -1, True  # behind a special token a word begins
        for i in ids:
            piece = self.inner.id_to_token(i)
            inside = piece.startswith("##") if self._mark else piece[:1] not in ("Ġ", "▁")
            if i in self.special or before or not inside:
                word += 1
            before = i in self.special
            out.append(word)
        return out

    def vocabulary(self) -> list[str]:
        """Entries with their ids."""
        return [f"{i}:{w}" for w, i in self.inner.get_vocab().items()]

    def state(self) -> str:
        """The library's JSON and the special ids."""
        ids = {n: getattr(self, n) for n in ("pad", "bos", "eos", "mask")}
        return json.dumps({"ids": ids, "tokenizer": self.inner.to_str()})

    def restore(self, state: str) -> None:
        """From that JSON."""
        from tokenizers import Tokenizer as Inner

        kept = json.loads(state)
        self._use(Inner.from_str(kept["tokenizer"]), kept["ids"])

    def to_transformers(self, length: int) -> Any:
        """The same as a fast tokenizer of transformers, which adds CLS and SEP and cuts at ``length``."""
        from tokenizers import Tokenizer as Inner
        from tokenizers import processors
        from transformers import PreTrainedTokenizerFast

        inner = Inner.from_str(self.inner.to_str())
        pad, first, last, mask = (inner.id_to_token(i) for i in (self.pad, self.bos, self.eos, self.mask))
        inner.post_processor = processors.TemplateProcessing(
            single=f"{first} $A {last}",
            pair=f"{first} $A {last} $B {last}",
            special_tokens=[(first, self.bos), (last, self.eos)],
        )
        return PreTrainedTokenizerFast(
            tokenizer_object=inner,
            pad_token=pad,
            cls_token=first,
            sep_token=last,
            mask_token=mask,
            model_max_length=length,
            model_input_names=["input_ids", "attention_mask"],
        )
