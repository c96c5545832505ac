"""What a volume code refuses, before anything is lost."""

from __future__ import annotations

from quire.errors import DataError


class CapacityError(DataError):
    """A sentence that its box, its probabilities or ``max_length`` can't hold: it would decode to another one."""


class ZeroVolumeError(DataError):
    """A sentence with a token of probability 0: its box is empty."""


class PointError(DataError, ValueError):
    """A point that is not in the cube."""
