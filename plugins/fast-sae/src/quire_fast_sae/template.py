"""From a dialogue to tokens by a chat template, and which of them are the template's own."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from typing import Any

from quire.errors import ConfigError, DataError
from quire.roles.language.text import Tokenizer
from quire_fast_sae.dialogues import Dialogue

OPEN, SHUT = "\ue000", "\ue001"
"""Private-use characters around the number that stands for a turn's content."""


@dataclass
class Encoded:
    """One dialogue as tokens.

    Attributes:
        ids: T ids.
        scaffolding: T flags: a token that holds nothing of a turn's content.
        prompt: Tokens before the last answer begins; T where the last turn is no answer.
    """

    ids: list[int]
    scaffolding: list[bool]
    prompt: int


class Template:
    """A chat template with its tokenizer.

    Args:
        tokenizer: With a template of its own, unless ``text`` is given.
        text: A Jinja template over ``messages``.

    Raises:
        ConfigError: neither has a template.
    """

    def __init__(self, tokenizer: Tokenizer, text: str | None = None) -> None:
        self.tokenizer = tokenizer
        self.inner: Any = getattr(tokenizer, "inner", None)
        own = getattr(tokenizer, "chat_template", None) or getattr(self.inner, "chat_template", None)
        if text is None and not own:
            raise ConfigError(f"tokenizer has no chat_template; pass template=… ({type(tokenizer).__name__})")
        self.text = str(text or own)
        self._pieces = functools.lru_cache(maxsize=4096)(self._marked)

    # ---- text
    def render(self, dialogue: Dialogue) -> str:
        """The whole text that the model sees."""
        from jinja2 import TemplateError

        try:
            if hasattr(self.inner, "apply_chat_template"):
                return str(self.inner.apply_chat_template(dialogue, chat_template=self.text, tokenize=False))
            return str(self._compiled.render(messages=dialogue, add_generation_prompt=False, **self._tokens))
        except TemplateError as error:  # templates refuse orders of roles that their model never saw
            turns = ", ".join(turn["role"] for turn in dialogue)
            raise DataError(f"the chat template refuses a dialogue of the turns {turns}: {error}") from error

    def pieces(self, dialogue: Dialogue) -> list[tuple[int, str]]:
        """The rendered text in order: (-1, scaffolding) and (number of a turn, its content as it is rendered).

        Raises:
            DataError: contents that change what is around them.
        """
        text, at, made = self.render(dialogue), 0, []
        marked = self._pieces(tuple(turn["role"] for turn in dialogue))
        for i, (turn, piece) in enumerate(marked):
            if turn >= 0:
                behind = next((p for t, p in marked[i + 1 :] if t < 0 and p), None)
                content = self._content(dialogue[turn]["content"], text, at, behind)
                made.append((turn, content))
                at += len(content)
            elif text.startswith(piece, at):
                made.append((-1, piece))
                at += len(piece)
            else:
                raise self._unclear(dialogue)
        if at != len(text):
            raise self._unclear(dialogue)
        return made

    def _content(self, content: str, text: str, at: int, behind: str | None) -> str:
        """The content as it stands at a place: as given or trimmed, else all up to the scaffolding behind it."""
        for given in dict.fromkeys((content, content.strip(), content.lstrip(), content.rstrip())):
            if text.startswith(given, at) and (behind is None or text.startswith(behind, at + len(given))):
                return given
        found = len(text) if behind is None else text.find(behind, at)
        return text[at : max(found, at)]

    def _unclear(self, dialogue: Dialogue) -> DataError:
        shown = dialogue[0]["content"][:40] if dialogue else ""
        return DataError(
            f"the chat template renders the dialogue that begins with {shown!r} otherwise than its roles alone: what is"
            " scaffolding can't be told; give data.special_ids as a list of ids"
        )

    def _marked(self, roles: tuple[str, ...]) -> list[tuple[int, str]]:
        stand_in = [{"role": role, "content": f"{OPEN}{i}{SHUT}"} for i, role in enumerate(roles)]
        parts = re.split(f"{OPEN}(\\d+){SHUT}", self.render(stand_in))
        return [(int(p), "") if i % 2 else (-1, p) for i, p in enumerate(parts) if i % 2 or p]

    @functools.cached_property
    def _compiled(self) -> Any:
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        def refuse(message: str) -> None:
            raise TemplateError(message)

        around = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        around.globals["raise_exception"] = refuse
        try:
            return around.from_string(self.text)
        except TemplateError as error:
            raise ConfigError(f"data.template is no Jinja template: {error}") from error

    @functools.cached_property
    def _tokens(self) -> dict[str, str]:
        name = getattr(self.tokenizer, "name_of", None)
        ids = {"bos_token": self.tokenizer.bos, "eos_token": self.tokenizer.eos, "pad_token": self.tokenizer.pad}
        return {k: "" if i is None or name is None else name(i) for k, i in ids.items()}

    # ---- tokens
    def encode(self, dialogue: Dialogue, number: int, strict: bool = True) -> Encoded:
        """Tokens of one dialogue, exactly as the whole text is tokenised.

        Args:
            dialogue: The turns.
            number: Of the instance, for errors.
            strict: Refuse a template whose scaffolding can't be told from the contents; False takes all for content.

        Raises:
            DataError: two start tokens, or nothing at all.
        """
        try:
            pieces = self.pieces(dialogue)
        except DataError:
            if strict:
                raise
            pieces = [(0, self.render(dialogue))]
        last = max((t for t, _ in pieces), default=-1)
        answer = last if last > 0 and dialogue[last]["role"] == "assistant" else None
        made = self._whole(pieces, answer) if getattr(self.inner, "is_fast", False) else self._apart(pieces, answer)
        bos = self.tokenizer.bos
        if bos is not None and made.ids[:2] == [bos, bos]:
            raise DataError(
                f"instance {number} starts with two start tokens (id {bos}): the template writes one and the tokenizer"
                " adds another; take bos_token out of the template, or load the tokenizer with add_bos_token: false"
            )
        if not made.ids:
            raise DataError(f"the chat template makes nothing of instance {number}")
        return made

    def _whole(self, pieces: list[tuple[int, str]], answer: int | None) -> Encoded:
        """By the places of the tokens in the text."""
        made = self.inner("".join(p for _, p in pieces), add_special_tokens=False, return_offsets_mapping=True)
        spans, at = [], 0
        for turn, piece in pieces:
            if turn >= 0 and piece:
                spans.append((turn, at, at + len(piece)))
            at += len(piece)
        flags, prompt, now = [], len(made["input_ids"]), 0
        for place, (start, end) in enumerate(made["offset_mapping"]):
            while now < len(spans) and spans[now][2] <= start:
                now += 1
            inside = now < len(spans) and max(start, spans[now][1]) < min(end, spans[now][2])
            flags.append(not inside)
            if inside and spans[now][0] == answer:
                prompt = min(prompt, place)
        return Encoded(list(made["input_ids"]), flags, prompt)

    def _apart(self, pieces: list[tuple[int, str]], answer: int | None) -> Encoded:
        """Piece by piece, for tokenizers that don't tell places."""
        ids: list[int] = []
        flags: list[bool] = []
        prompt = None
        for turn, piece in pieces:
            prompt = len(ids) if turn == answer and prompt is None else prompt
            some = self.tokenizer.encode(piece)
            ids += some
            flags += [turn < 0] * len(some)
        return Encoded(ids, flags, len(ids) if prompt is None else prompt)


def name_of(tokenizer: Any, i: int) -> str:
    """How reports call an id."""
    own = getattr(tokenizer, "name_of", None)
    if own is not None:
        return str(own(i))
    inner: Any = getattr(tokenizer, "inner", None)
    if hasattr(inner, "convert_ids_to_tokens"):
        return str(inner.convert_ids_to_tokens(i))
    text = "" if tokenizer is None else tokenizer.decode([i])
    return text or str(i)
