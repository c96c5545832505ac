"""Where and how the kit runs what it is given: in a folder of its own, without the network, without chatter."""

from __future__ import annotations

import atexit
import functools
import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from quire.testing.offline import offline


@functools.lru_cache(maxsize=1)
def folder() -> Path:
    """A temporary folder of this process, removed when it ends."""
    made = Path(tempfile.mkdtemp(prefix="quire-kit-"))
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    return made


@contextmanager
def working_in(place: Path) -> Iterator[None]:
    """Run in another working directory."""
    before = os.getcwd()
    place.mkdir(parents=True, exist_ok=True)
    os.chdir(place)
    try:
        yield
    finally:
        os.chdir(before)


@contextmanager
def quietly() -> Iterator[list[str]]:
    """Without the network, Lightning's chatter and warnings, in a folder of its own; gives the hosts asked for."""
    loggers = [logging.getLogger(f"lightning.{part}") for part in ("pytorch", "fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), working_in(folder()), offline() as asked:
            warnings.simplefilter("ignore")
            yield asked
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)


@contextmanager
def temporary_files() -> Iterator[None]:
    """Temporary files of what runs inside lie in this process' folder and go with it."""
    before = tempfile.tempdir
    tempfile.tempdir = str(folder())
    try:
        yield
    finally:
        tempfile.tempdir = before
