"""The feeds that FAST is compared with: text, templated or raw, joined and cut into blocks."""

from __future__ import annotations

from typing import Any

import torch

from quire.contracts import Component
from quire.data import DataModule, Fields, mix
from quire.errors import ConfigError
from quire_fast_sae.chats import ChatText, check_special_ids
from quire_fast_sae.instances import ChatActivations, tiny_feed
from quire_fast_sae.subject import raw_text
from quire_fast_sae.template import Template
from quire_fast_sae.tokenizer import ChatBytes


class BlockActivations(ChatActivations):
    """What a model holds at a site on blocks of joined texts: block training, the control of Li, Ye et al. 2025.

    With ``templated`` the same dialogues as ``InstructActivations``, each under its template, are joined and cut where
    a block is full, BT(F); without it raw text is, BT(P). Tokens see whatever stands before them in their block.

    Args:
        subject: ``tiny-chat``, or what ``Activations`` takes.
        site: As in ``Activations``.
        source: Dialogues as for ``InstructActivations``; without ``templated``, text as for ``TextTokens``.
        block: Tokens of a block; null is 2048, or the subject's limit where that is lower.
        templated: Join dialogues under their templates; false joins raw text.
        template: A Jinja template over ``messages``; null takes the tokenizer's own.
        dedup_ngram: Words of the runs that duplicate dialogues are told by; 0 drops equal texts only.
        special_ids: ``template`` marks what the template writes around the contents; a list marks these ids.
        **kwargs: Arguments of ``Activations``; ``train_samples`` counts blocks.

    Returns:
        As ``Activations``; ``instance`` is the block.

    Raises:
        ConfigError: a block longer than the subject takes, or a text shorter than one block.
    """

    key, default = "block", 2048
    recorded = ("block", "templated", "template", "dedup_ngram", "special_ids")

    def __init__(
        self,
        subject: Component | str | None = "tiny-chat",
        site: str | list[str] = "blocks.1.resid",
        source: DataModule | str | list[str] = "stdlib",
        block: int | None = None,
        templated: bool = True,
        template: str | None = None,
        dedup_ngram: int = 20,
        special_ids: str | list[int] = "template",
        **kwargs: Any,
    ) -> None:
        super().__init__(subject, site, source, **kwargs)  # type: ignore[arg-type]
        if block is not None and block < 2:
            raise ConfigError(f"data.block must be at least 2 tokens, got {block}")
        if not templated and isinstance(source, list):
            raise ConfigError("data.source must be one text source without templated, not a list")
        self.block, self.templated, self.template = block, templated, template
        self.dedup_ngram, self.special_ids = dedup_ngram, check_special_ids(special_ids)
        if not isinstance(source, DataModule):
            self._offer(("token",))

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """A dictionary of what a small language model with random weights holds of joined dialogues."""
        return tiny_feed(cls.__name__, block=32)

    def chats(self, tokenizer: Any, most: int) -> DataModule:
        """Rows of exactly one block."""
        name: Any = self._source
        if not self.templated:
            made = raw_text(most, tokenizer or ChatBytes(), source=name, seed=self.seed)
            made._fitted = True  # the subject knows these ids: nothing is learnt anew
            return made
        single = ChatText(name, tokenizer, self.template, 10**9, "right", self.special_ids, self.dedup_ngram)
        Template(single.tokenizer, self.template)
        return Joined(single, most, self.seed)


class Joined(DataModule):
    """The rows of another data module behind each other, in a seeded order, cut into blocks.

    Args:
        single: A data module of instances.
        block: Tokens of a block.
        seed: Of the order.
    """

    fields = ("tokens", "mask", "special")

    def __init__(self, single: ChatText, block: int, seed: int) -> None:
        super().__init__(seed=seed)
        self.single, self.block = single, block

    @property
    def tokenizer(self) -> Any:
        """That of the instances."""
        return self.single.tokenizer

    def sizes(self) -> dict[str, Any]:
        """Those of the instances, with a block as the length."""
        return {**self.single.sizes(), "length": self.block}

    def split(self, name: str) -> Fields:
        """Blocks of one split; what doesn't fill a last one is left out."""
        rows = self.single.dataset(name)
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(mix(self.seed, 5)))  # type: ignore[arg-type]
        made = {}
        for field, parts in (("tokens", rows.tokens), ("special", rows.special)):  # type: ignore[attr-defined]
            stream = torch.cat([parts[i] for i in order.tolist()])
            count = len(stream) // self.block
            if not count:
                raise ConfigError(
                    f"data.block is {self.block} tokens, but the {name} dialogues of {', '.join(self.single.names)}"
                    f" have {len(stream)} in all: lower it"
                )
            made[field] = stream[: count * self.block].view(count, self.block)
        return Fields(mask=torch.ones_like(made["tokens"], dtype=torch.bool), **made)
