"""Dialogues as rows of tokens, each under its own chat template."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from quire.data import DataModule
from quire.datasets.activations.rows import Instances
from quire.datasets.text import held_out, token_sizes
from quire.errors import ConfigError, DataError
from quire.roles.language.text import Tokenizer
from quire_fast_sae.dedup import kept
from quire_fast_sae.dialogues import Dialogue, check_roles, is_empty, read_dialogues, words_of
from quire_fast_sae.template import Template
from quire_fast_sae.tokenizer import ChatBytes

SIDES = ("right", "left")


class ChatText(DataModule):
    """One row a dialogue: rendered by a chat template, its special tokens kept, never joined to another. FAST, 2025.

    Samples that share a run of words with an earlier one are dropped before splits are served, training first, so
    nothing held out is trained on. Language models train on the answers only (``prompt_length``), unless their
    objective scores prompts too.

    Args:
        source: ``stdlib``, a ``.json`` or ``.jsonl`` file, a folder of them, or ``hf:NAME``; or a list of these.
        tokenizer: Default ``ChatBytes``.
        template: A Jinja template over ``messages``; null takes the tokenizer's own.
        max_tokens: Longest row.
        truncate: Which side of a longer one is cut: ``right`` or ``left``.
        special_ids: ``template`` marks what the template writes around the contents; a list marks these ids.
        dedup_ngram: Words of the runs that duplicates are told by; 0 drops equal texts only.
        split: Share of the dialogues that train; the rest is validation and test, half each.
        **kwargs: Arguments of ``DataModule``.

    Returns:
        ``tokens`` [B,T], ``mask`` [B,T], ``special`` [B,T], ``prompt_length`` [B]: what stands before the last answer.

    Raises:
        ConfigError: no template, no such source, or a number out of range.
        DataError: a broken file, an unknown role, or two start tokens.
    """

    fields = ("tokens", "mask", "special", "prompt_length")

    def __init__(
        self,
        source: str | list[str] = "stdlib",
        tokenizer: Tokenizer | None = None,
        template: str | None = None,
        max_tokens: int = 8192,
        truncate: str = "right",
        special_ids: str | list[int] = "template",
        dedup_ngram: int = 20,
        split: float = 0.9,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.names = [source] if isinstance(source, str) else list(source)
        if truncate not in SIDES:
            raise ConfigError(f"data.truncate is {' or '.join(SIDES)}, got {truncate!r}")
        if max_tokens < 1 or dedup_ngram < 0 or not 0 < split < 1 or not self.names:
            raise ConfigError(
                "data needs a source, max_tokens of at least 1, dedup_ngram of at least 0 and split in (0, 1), got"
                f" {source}, {max_tokens}, {dedup_ngram} and {split}"
            )
        self.special_ids = check_special_ids(special_ids)
        self.tokenizer = tokenizer or ChatBytes()
        self.template, self.max_tokens, self.truncate = template, max_tokens, truncate
        self.dedup_ngram, self.share = dedup_ngram, split
        self.empty = self.duplicates = 0
        self._dialogues: dict[str, list[Dialogue]] | None = None

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """A small language model of lines of the standard library's reference."""
        small = {"class_path": "CausalLM", "init_args": {"width": 32, "depth": 1, "heads": 2}}
        data = {"source": "stdlib:docs", "max_tokens": 64, "batch_size": 16, "train_samples": 512}
        adam = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.003}}
        model = {"decoder": small, "objective": "NextToken", "optimizer": adam}
        return {"model": model, "data": {"class_path": "ChatText", "init_args": data}}

    def sizes(self) -> dict[str, Any]:
        """vocab_size, length and the special ids."""
        return token_sizes(self.tokenizer, self.max_tokens)

    def dialogues(self) -> dict[str, list[Dialogue]]:
        """Dialogues of each split, none of them empty or a duplicate."""
        if self._dialogues is None:
            groups = [g for name in self.names for g in read_dialogues(name)]
            number = 0
            for group in groups:
                for dialogue in group:
                    check_roles(dialogue, number)
                    number += 1
            said = [[d for d in group if not is_empty(d)] for group in groups]
            self.empty = number - sum(map(len, said))
            train, held = held_out([g for g in said if g], self.share)
            parts = {"train": train, "val": held[::2], "test": held[1::2] or held}
            self._dialogues = self._distinct({name: [d for g in some for d in g] for name, some in parts.items()})
            rank_zero_info(
                f"{number} dialogues: {self.empty} are empty and {self.duplicates} repeat a run of words: dropped"
            )
        return self._dialogues

    def _distinct(self, splits: dict[str, list[Dialogue]]) -> dict[str, list[Dialogue]]:
        every = [(name, d) for name, some in splits.items() for d in some]
        stay = kept((words_of(d) for _, d in every), self.dedup_ngram)
        self.duplicates = len(every) - len(stay)
        return {name: [every[i][1] for i in stay if every[i][0] == name] for name in splits}

    def split(self, name: str) -> Instances:
        """Encode one split."""
        dialogues = self.dialogues()[name]
        if not dialogues:
            raise DataError(f"data.source: {', '.join(self.names)} has no dialogue for the {name} split")
        template = Template(self.tokenizer, self.template)
        by_place = isinstance(self.special_ids, str)
        tokens, special, prompts = [], [], []
        chosen = torch.tensor([] if by_place else list(self.special_ids), dtype=torch.long)
        for number, dialogue in enumerate(dialogues):
            made = template.encode(dialogue, number, strict=by_place)
            whole = torch.tensor(made.ids)
            marked = torch.tensor(made.scaffolding) if by_place else torch.isin(whole, chosen)
            cut = max(0, len(whole) - self.max_tokens)
            tokens.append(_cut(whole, cut, self.truncate))
            special.append(_cut(marked, cut, self.truncate))
            start = made.prompt - (cut if self.truncate == "left" else 0)
            prompts.append(max(0, min(start, len(tokens[-1]))))
        return Chats(tokens, special, self.tokenizer.pad, prompt_length=torch.tensor(prompts))


class Chats(Instances):
    """Instances of which some can be taken."""

    def take(self, chosen: Tensor) -> Chats:
        """The instances at these places."""
        places = chosen.tolist()
        special = None if self.special is None else [self.special[i] for i in places]
        fields = {k: v[chosen] for k, v in self.fields.items()}
        return Chats([self.tokens[i] for i in places], special, self.pad, **fields)


def check_special_ids(given: str | list[int]) -> str | list[int]:
    """``template`` or ids. Raises ``ConfigError`` for another word."""
    if isinstance(given, str) and given != "template":
        raise ConfigError(f"data.special_ids is template or a list of ids, got {given!r}")
    return given


def _cut(row: Tensor, over: int, side: str) -> Tensor:
    if not over:
        return row
    return row[:-over] if side == "right" else row[over:]
