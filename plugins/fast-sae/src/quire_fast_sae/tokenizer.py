"""Bytes with three marks of chat: the smallest tokenizer that has a chat template, for FAST (Li, Ye et al. 2025)."""

from __future__ import annotations

import re
from typing import Any

from quire.roles.language.text import Tokenizer

MARKS = {"<U>": 256, "<A>": 257, "<E>": 258}
NAMES = {**{i: mark for mark, i in MARKS.items()}, 259: "<pad>"}
TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'assistant' %}<A>{{ message.content }}<E>"
    "{% else %}<U>{{ message.content }}{% endif %}"
    "{% endfor %}"
)


class ChatBytes(Tokenizer):
    """Bytes of UTF-8 as ids 0 to 255, then user 256, assistant 257, end 258 and padding 259, with a chat template.

    In text the marks are ``<U>``, ``<A>`` and ``<E>``. A dialogue is ``<U>question<A>answer<E>``, turn after turn; a
    system turn looks like a user's.
    """

    vocab_size, pad, bos, eos, mask = 260, 259, None, 258, None
    chat_template = TEMPLATE

    def encode(self, text: str) -> list[int]:
        """One id a byte or mark."""
        pieces = re.split(r"(<[UAE]>)", text)
        return [i for p in pieces for i in ([MARKS[p]] if p in MARKS else p.encode())]

    def decode(self, ids: list[int]) -> str:
        """Marks leave no trace; bytes that are not UTF-8 become the replacement character."""
        return bytes(i for i in ids if i < 256).decode(errors="replace")

    def name_of(self, i: int) -> str:
        """How reports call an id."""
        return NAMES.get(i) or self.decode([i])

    def vocabulary(self) -> list[str]:
        """The byte values and the marks."""
        return [*(f"{b:02x}" for b in range(256)), *NAMES.values()]

    @property
    def special(self) -> frozenset[int]:
        """Marks and padding."""
        return frozenset(NAMES)

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """A small language model of chat."""
        from quire_fast_sae.chats import ChatText

        run = ChatText.tiny()
        run["data"]["init_args"]["tokenizer"] = cls.__name__
        return run
