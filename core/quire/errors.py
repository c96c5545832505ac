"""Errors that a user meets: one sentence that names the key or file and the remedy."""

from __future__ import annotations


class QuireError(Exception):
    """Base of all errors that Quire raises on purpose. The command line prints only its message."""

    exit_code = 1


class ConfigError(QuireError, ValueError):
    """What was asked for can't be: a wrong key, value, size or pair of components. Exit code 2."""

    exit_code = 2


class DataError(QuireError):
    """What was read is broken or out of range: a file, a field of a batch, a loss. Exit code 1."""


def suggest(word: str, known: list[str] | tuple[str, ...]) -> str:
    """``'; did you mean X?'`` with the nearest of ``known``, or an empty string."""
    from difflib import get_close_matches

    lower = {name.lower(): name for name in known if name != word}
    near = [lower[n] for n in get_close_matches(word.lower(), list(lower), n=2, cutoff=0.65)]
    return f"; did you mean {' or '.join(near)}?" if near else ""
