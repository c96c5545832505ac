"""What a check is given: one registered component."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from quire.registry import Entry
from quire.testing.trial import Trial, needed, trial_of


@dataclass(frozen=True)
class Subject:
    """One component under test."""

    entry: Entry

    @functools.cached_property
    def cls(self) -> type:
        """Its class."""
        return self.entry.load()

    @property
    def name(self) -> str:
        """Its short name."""
        return self.entry.name

    @property
    def trial(self) -> Trial:
        """Its tiny run. Raises ``Fault`` when it declares none."""
        return trial_of(self.cls)

    def trained(self) -> Any:
        """The component in the model of its short run. Raises ``Skip`` when there was none."""
        ran = needed(lambda: self.trial.ran(), "trains")
        return needed(lambda: _present(ran.made.find(self.cls)), "constructs")

    def built(self) -> Any:
        """The component as built, untrained. Raises ``Skip`` when it can't be."""
        made = needed(lambda: self.trial.made(), "constructs")
        return needed(lambda: _present(made.find(self.cls)), "constructs")


def exemption(cls: type, check: str, detail: str = "") -> str | None:
    """The reason a class gives in ``exempt`` for not keeping a check, or None."""
    for key, reason in getattr(cls, "exempt", {}).items():
        name, _, pattern = key.partition(":")
        if name == check and (fnmatchcase(detail, pattern) if pattern else not detail):
            return str(reason).strip()
    return None


def _present(found: Any) -> Any:
    if found is None:
        raise LookupError("it is not in its own tiny run")
    return found
