"""When a row ends: judged token by token, also inside an accepted path."""

from __future__ import annotations

from collections.abc import Callable, Sequence


class StopRule:
    """End of one row: an end token, an exact number of tokens, a string, or the user's own rule.

    Args:
        eos_ids: Tokens that end the row; the token itself is emitted.
        max_new_tokens: Exact limit.
        strings: Texts that end the row as soon as the decoded continuation holds one.
        decode: ids → text, needed with ``strings``.
        rule: The user's own: emitted ids → end?
    """

    def __init__(
        self,
        eos_ids: Sequence[int],
        max_new_tokens: int,
        strings: Sequence[str] = (),
        decode: Callable[[list[int]], str] | None = None,
        rule: Callable[[list[int]], bool] | None = None,
    ) -> None:
        self.eos = frozenset(eos_ids)
        self.limit, self.strings, self.decode, self.rule = max_new_tokens, tuple(strings), decode, rule
        self.emitted: list[int] = []
        self.reason: str | None = "length" if max_new_tokens <= 0 else None

    def feed(self, tokens: Sequence[int]) -> list[int]:
        """Take tokens in order until the row ends; returns those that were emitted."""
        taken: list[int] = []
        for token in tokens:
            if self.reason is not None:
                break
            self.emitted.append(token)
            taken.append(token)
            self.reason = self.judge(self.emitted)
        return taken

    @property
    def left(self) -> int:
        """Tokens that may still come."""
        return 0 if self.reason else self.limit - len(self.emitted)

    def judge(self, emitted: list[int]) -> str | None:
        """Why a continuation ends with its last token, or None; nothing is fed, so beams may ask for candidates."""
        if emitted[-1] in self.eos:
            return "eos"
        if self.strings and self.decode is not None:
            text = self.decode(emitted[-64:])  # a stop string is shorter than 64 tokens
            if any(s in text for s in self.strings):
                return "stop"
        if self.rule is not None and self.rule(emitted):
            return "stop"
        return "length" if len(emitted) >= self.limit else None
