"""FAST's feed: activations of one dialogue at a time, under its own chat template."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from quire.contracts import Component
from quire.data import DataModule, few, mix
from quire.datasets.activations.feed import Samples
from quire.datasets.activations.module import Activations
from quire.datasets.activations.rows import Rows
from quire.errors import ConfigError
from quire.roles.sites.subject import Subject
from quire_fast_sae.chats import SIDES, ChatText, check_special_ids
from quire_fast_sae.subject import STEPS, tiny_chat
from quire_fast_sae.template import Template

UNBUILT = 64
"""Tokens of a row for a subject that has no weights yet."""


class ChatActivations(Activations):
    """What feeds of chat models share: the subject ``tiny-chat`` and dialogues in the subject's tokens."""

    key: ClassVar[str]
    """Argument that says how long a row is."""
    default: ClassVar[int]
    """Its value where the subject takes as much."""
    recorded: ClassVar[tuple[str, ...]]
    """Arguments that rows depend on, for a harvested folder's header."""

    @property
    def subject(self) -> Subject | None:
        """The frozen subject, opened on first use."""
        if isinstance(self._subject, str) and self._subject in STEPS:
            self._subject = tiny_chat(self._subject)
        unbuilt = isinstance(self._subject, Component) and not self._subject.built
        if unbuilt and not isinstance(self._source, DataModule):  # random weights are made for bytes of chat
            self._source = self.chats(None, getattr(self, self.key) or UNBUILT)
        return super().subject

    @property
    def source(self) -> DataModule:
        """The dialogues, in the subject's own tokens."""
        if not isinstance(self._source, DataModule):
            subject = self.studied()
            if not isinstance(self._source, DataModule):
                if subject.tokenizer is None:
                    raise ConfigError(
                        f"subject {subject.name} has no tokenizer of its own: give data.source as a data module"
                    )
                self._source = self.chats(subject.tokenizer, self.most(subject.context))
        return self._source

    def most(self, context: int | None) -> int:
        """Longest row. Raises ``ConfigError`` when more is asked for than the subject takes."""
        asked: int | None = getattr(self, self.key)
        if asked is not None and context is not None and asked > context:
            raise ConfigError(
                f"data.{self.key} is {asked}, but subject {self.studied().name} takes {context} tokens: lower it"
            )
        return asked if asked is not None else min(self.default, context or self.default)

    def record(self, header: dict[str, Any] | None = None) -> dict[str, Any]:
        """What rows depend on: the subject and site, and how dialogues become tokens."""
        return {**super().record(header), "feed": type(self).__name__, **{k: getattr(self, k) for k in self.recorded}}

    def chats(self, tokenizer: Any, most: int) -> DataModule:
        """The data module of rows of at most ``most`` tokens."""
        raise NotImplementedError


class InstructActivations(ChatActivations):
    """What a chat model holds at a site, one dialogue at a time from position 0 under its own template. FAST, 2025.

    A dialogue is never joined to another and sees nothing but itself: forward passes hold dialogues of about one
    length, padded on the right. The buffer then mixes tokens of many dialogues, as in ``Activations``. Any encoder,
    selector and objective can be trained on it.

    Args:
        subject: ``tiny-chat``, or what ``Activations`` takes.
        site: As in ``Activations``.
        source: ``stdlib``, a ``.json`` or ``.jsonl`` file, a folder of them, ``hf:NAME``, a list of these, or a data
            module with one instance a row.
        template: A Jinja template over ``messages``; null takes the tokenizer's own.
        max_tokens: Longest dialogue; null is 8192, or the subject's limit where that is lower.
        truncate: Which side of a longer one is cut: ``right`` or ``left``.
        contexts: Dialogues in one forward pass.
        batch_size: Rows a batch; samples in analysis.
        dtype: What rows are kept in: ``float32``, ``bfloat16`` or ``float16``; batches are fp32.
        buffer: Most rows that are mixed.
        keep: Share of the buffer that stays behind at each refill, in [0, 1).
        length_buckets: Width of a class of lengths, in tokens; dialogues of one class run together.
        dedup_ngram: Words of the runs that duplicates are told by; 0 drops equal texts only.
        special_ids: ``template`` marks what the template writes around the contents; a list marks these ids.
        with_grad: Also ``grad``, of the loss of the dialogue's own tokens.
        **kwargs: Further arguments of ``Activations``.

    Returns:
        As ``Activations``: ``instance`` is the dialogue, ``special`` the template's scaffolding. ``predict`` gives a
        sampler that reads ``tokens`` whole dialogues, with ``prompt_length`` before the last answer.

    Raises:
        ConfigError: a tokenizer without a chat template, a subject that takes fewer tokens, a number out of range.
        DataError: a broken file, an unknown role, two start tokens.
    """

    key, default = "max_tokens", 8192
    recorded = ("template", "max_tokens", "truncate", "dedup_ngram", "special_ids")

    def __init__(
        self,
        subject: Component | str | None = "tiny-chat",
        site: str | list[str] = "blocks.1.resid",
        source: DataModule | str | list[str] = "stdlib",
        template: str | None = None,
        max_tokens: int | None = None,
        truncate: str = "right",
        contexts: int = 32,
        batch_size: int = 4096,
        dtype: str = "float32",
        buffer: int = 262_144,
        keep: float = 0.5,
        length_buckets: int = 64,
        dedup_ngram: int = 20,
        special_ids: str | list[int] = "template",
        with_grad: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            subject,
            site,
            source,  # type: ignore[arg-type]
            contexts=contexts,
            batch_size=batch_size,
            dtype=dtype,
            buffer=buffer,
            keep=keep,
            with_grad=with_grad,
            **kwargs,
        )
        if length_buckets < 1:
            raise ConfigError(f"data.length_buckets must be at least 1 token, got {length_buckets}")
        if truncate not in SIDES:
            raise ConfigError(f"data.truncate is {' or '.join(SIDES)}, got {truncate!r}")
        if max_tokens is not None and max_tokens < 1:
            raise ConfigError(f"data.max_tokens must be at least 1, got {max_tokens}")
        self.template, self.max_tokens, self.truncate = template, max_tokens, truncate
        self.length_buckets, self.dedup_ngram = length_buckets, dedup_ngram
        self.special_ids = check_special_ids(special_ids)
        if not isinstance(source, DataModule):
            self._offer(("token",))

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """A dictionary of what a small language model with random weights holds of dialogues."""
        return tiny_feed(cls.__name__)

    def chats(self, tokenizer: Any, most: int) -> ChatText:
        """One row a dialogue."""
        names: Any = self._source
        made = ChatText(
            names,
            tokenizer,
            self.template,
            most,
            self.truncate,
            self.special_ids,
            self.dedup_ngram,
            seed=self.seed,
        )
        Template(made.tokenizer, self.template)  # refuses a tokenizer without one before files are read
        return made

    def rows(self, name: str) -> Rows:
        """One split: every dialogue for itself, about one length a forward pass."""
        data: Any = self.source.dataset(name)
        if name == "train" and self.train_samples is not None:
            data = few(data, self.train_samples, self.seed)
        return ByLength(data, self.contexts, self.drop_special, self.seed, self.length_buckets)

    def setup(self, stage: str) -> None:
        """As in ``Activations``; a sampler of ``predict`` may read whole dialogues."""
        super().setup(stage)
        if self._whole():
            self.fields = (*self.fields, "tokens", "mask", "index", "prompt_length")  # type: ignore[misc, assignment]

    def _whole(self) -> bool:
        if self.trainer is None or self.trainer.state.fn != "predict" or self.analysis:
            return False
        sampler = getattr(self.trainer.lightning_module, "sampler", None)
        return sampler is not None and "tokens" in sampler.reads("predict")

    def predict_dataloader(self) -> Any:
        """The test split in order: rows of activations, or whole dialogues for a sampler that reads tokens."""
        if not self._whole():
            return super().predict_dataloader()
        rows, (world, rank) = self.rows("test"), self._place()
        return Samples(lambda epoch: rows.plan(epoch, False, rank, world), rows.batch)


class ByLength(Rows):
    """Instances, those of about one length in a forward pass.

    Args:
        data: The split.
        contexts: Instances in a forward pass.
        drop_special: Special tokens are not fed.
        seed: Of the order.
        width: Tokens that lengths of one class differ by at most.
    """

    def __init__(self, data: Any, contexts: int, drop_special: bool, seed: int, width: int) -> None:
        super().__init__(data, contexts, drop_special, None, seed)
        self.width = width

    def plan(self, epoch: int, shuffle: bool, rank: int = 0, world: int = 1) -> list[list[int]]:
        """Indices of each forward pass: classes of length apart, passes and what is in them in random order."""
        order = (self.lengths > 0).nonzero().squeeze(1)  # a row of padding alone has nothing to read
        total = len(order)
        draws = torch.Generator().manual_seed(mix(self.seed, 1, epoch))
        if shuffle:
            order = order[torch.randperm(total, generator=draws)]
        order = order[: total // world * world][rank::world] if total >= world else order
        order = order[((self.lengths[order] - 1) // self.width).argsort(stable=True)]
        passes = order.split(self.contexts) if total else ()
        if shuffle:
            passes = tuple(passes[i] for i in torch.randperm(len(passes), generator=draws).tolist())
        return [part.tolist() for part in passes]


def tiny_feed(name: str, **more: Any) -> dict[str, Any]:
    """A small run on a feed: what ``tiny()`` of this plugin's components is made from."""
    small = {"class_path": "CausalLM", "init_args": {"width": 16, "depth": 2, "heads": 2, "rope": False}}
    given = {"subject": small, "source": "stdlib:docs", "train_samples": 64, "batch_size": 64, "buffer": 1024, **more}
    encoder = {
        "class_path": "SparseEncoder",
        "init_args": {"latents": 32, "selector": {"class_path": "TopK", "init_args": {"k": 4}}},
    }
    adam = {"class_path": "torch.optim.Adam", "init_args": {"lr": 0.003}}
    return {
        "model": {
            "encoder": encoder,
            "decoder": "SparseDecoder",
            "objective": "SparseReconstruction",
            "optimizer": adam,
        },
        "data": {"class_path": name, "init_args": given},
    }
