"""How a check answers: it returns when all is well, else it raises one of these."""

from __future__ import annotations


class Fault(AssertionError):
    """A component breaks a check. The message is a sentence for its author: what is wrong, and what to change."""


class Skip(Exception):
    """A check can't or needn't be made here, and why."""
