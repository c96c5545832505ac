"""Who is studied, on what, and how wide its sites are."""

from __future__ import annotations

from typing import Any

import torch

from quire.contracts import Batch, Component
from quire.data import DataModule, expand
from quire.datasets.activations import shards
from quire.datasets.activations.forwards import moved
from quire.datasets.activations.opening import open_subject
from quire.datasets.activations.rows import Rows
from quire.datasets.text import TextTokens
from quire.errors import ConfigError
from quire.roles.sites.anatomy import input_width
from quire.roles.sites.subject import Subject


class Studied(DataModule):
    """A data module that owns a frozen subject and what it reads.

    Args:
        subject: See ``open_subject``; null where only a folder is read.
        sites: Sites that are read in one forward pass.
        source: What ``TextTokens`` takes, or a data module.
        length: Tokens of a row of text.
        target_site: Another site, for transcoders.
        folder: A harvested folder.
        **kwargs: Arguments of ``DataModule``.
    """

    def __init__(
        self,
        subject: Component | str | None,
        sites: list[str],
        source: DataModule | str,
        length: int | None,
        target_site: str | None,
        folder: str | None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self._subject: Any = subject
        self._source: Any = source
        self.sites, self.length, self.target_site = sites, length, target_site
        self.folder = None if folder is None else expand(folder)
        self._widths: dict[str, int] = {}

    # ---- subject and source
    @property
    def subject(self) -> Subject | None:
        """The frozen subject, opened on first use; None where only a folder is read."""
        if self._subject is None or isinstance(self._subject, Subject):
            return self._subject
        given = self._source if isinstance(self._source, DataModule) else None
        unbuilt = isinstance(self._subject, Component) and not self._subject.built
        if unbuilt and given is None:
            given = self._source = TextTokens(str(self._source), length=self.length or 64, seed=self.seed)
        self._subject = open_subject(self._subject, given, self.seed)
        return self._subject

    def studied(self) -> Subject:
        """The subject. Raises ``ConfigError`` where only a folder is read."""
        subject = self.subject
        if subject is None:
            raise ConfigError("data.subject is null: what is asked for needs the subject itself")
        return subject

    @property
    def source(self) -> DataModule:
        """Where the subject's inputs come from; text in the subject's own tokens."""
        if isinstance(self._source, DataModule):
            return self._source
        subject = self.studied()
        if isinstance(self._source, DataModule):  # made for a subject that had no weights yet
            return self._source
        if subject.tokenizer is None:
            raise ConfigError(f"subject {subject.name} has no tokenizer of its own: give data.source as a data module")
        most = subject.context
        length = self.length or min(128, most or 128)
        if most is not None and length > most:
            raise ConfigError(f"data.length is {length}, but subject {subject.name} takes {most} tokens: lower it")
        made = TextTokens(self._source, length=length, tokenizer=subject.tokenizer, seed=self.seed)
        made._fitted = True  # the subject knows these ids: nothing is learnt anew
        self._source = made
        return made

    @property
    def tokenizer(self) -> Any:
        """The subject's tokenizer; kept in the checkpoints of what is trained on it."""
        own = None if self.subject is None else self.subject.tokenizer
        return getattr(self._source, "tokenizer", None) if own is None else own

    # ---- sizes
    def sizes(self) -> dict[str, Any]:
        """width, site, subject; heads and head_width at z and heads sites; the source's vocabulary and tokenizer."""
        if self.folder is not None and self._subject is None:
            return dict(self._header()["spec"])
        subject, widths = self.studied(), self.widths()
        place = subject.sites.place(self.sites[0])
        said: dict[str, Any] = {"width": widths[self.sites[0]], "site": self.sites[0], "subject": subject.name}
        if len(self.sites) > 1:
            said |= {"sites": self.sites, "widths": [widths[s] for s in self.sites]}
        if place.heads:
            whole = widths[self.sites[0]] if place.side == "input" else input_width(place.module)
            said |= {"heads": place.heads, "head_width": whole // place.heads}
        if self.target_site:
            said["target_width"] = widths[self.target_site]
        if self.tokenizer is not None:
            said |= {"vocab_size": self.tokenizer.vocab_size, "tokenizer": self.tokenizer.fingerprint}
        return said

    def widths(self) -> dict[str, int]:
        """Width of each site, from a small forward pass or a folder's header."""
        if not self._widths and self.folder is not None and self._subject is None:
            said = self._header()["spec"]
            self._widths = dict(zip(said.get("sites", self.sites), said.get("widths", [said["width"]])))
        if not self._widths:
            subject = self.studied()
            if subject.language and subject.steps is not None and not getattr(subject.steps, "crosses", False):
                pad = getattr(getattr(subject.root, "config", None), "pad_token_id", 0)
                batch: Batch = {"tokens": torch.full((1, 2), int(not pad))}  # transformers warns of padding
            else:
                batch = Rows(self.source.dataset("train"), 1, False, 1, 0).batch([0])
            wanted = [*self.sites, *([self.target_site] if self.target_site else [])]
            found = subject.sites.read(moved(batch, subject.device), wanted)
            self._widths = {s: x.shape[-1] for s, x in found.values.items()}
        return self._widths

    def _header(self) -> dict[str, Any]:
        assert self.folder is not None
        for name in ("train", "val", "test"):
            if (self.folder / name).is_dir():
                return shards.read_header(self.folder / name)
        raise ConfigError(f"{self.folder} is not a harvested folder: it has no train, val or test")
