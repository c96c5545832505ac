"""Plugins made on the spot: installed for the length of a test, whole or with one thing broken."""

from __future__ import annotations

import importlib
import itertools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from quire.plugins import load
from quire.testing import faults, processes, trial

NUMBERS = itertools.count()

METADATA = "Metadata-Version: 2.1\nName: quire-planted-NN\nVersion: 0.1\n"


@contextmanager
def planted(folder: Path, monkeypatch, files: dict[str, str]) -> Iterator[str]:
    """Install a package of these files (``NN`` becomes a number of its own) for a while; gives the plugin's name.

    Files under ``../quire_neighbour_NN`` make a second plugin.
    """
    number = str(next(NUMBERS))
    root = folder / f"site{number}"
    names = ["planted", *(["neighbour"] if any(f.startswith("../") for f in files) else [])]
    points = "".join(f"{n}-{number} = quire_{n}_{number}\n" for n in names)
    info = f"../quire_planted_{number}-0.1.dist-info"
    every = {**files, f"{info}/METADATA": METADATA, f"{info}/entry_points.txt": f"[quire]\n{points}"}
    for path, text in every.items():
        file = root / f"quire_planted_{number}" / path.replace("NN", number)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text.replace("NN", number).lstrip("\n"), encoding="utf-8")
    with monkeypatch.context() as patch:
        patch.syspath_prepend(str(root))
        patch.setenv("PYTHONPATH", str(root), prepend=":")
        patch.setenv("QUIRE_PLUGINS", ",".join(f"{n}-{number}" for n in names))
        _forget()
        yield f"planted-{number}"
    for name in [m for m in sys.modules if m.partition(".")[0].endswith(f"_{number}") and m.startswith("quire_")]:
        del sys.modules[name]
    _forget()


def _forget() -> None:
    load.cache_clear()
    importlib.invalidate_caches()
    trial.forget()
    processes.run_fresh.cache_clear()


def broken(files: dict[str, str], *edits: tuple[str, ...]) -> dict[str, str]:
    """The same files with each edit made: (old, new) in parts.py, or (old, new, file); old is there exactly once."""
    made = dict(files)
    for old, new, *rest in edits:
        file = rest[0] if rest else "parts.py"
        assert made[file].count(old) == 1, f"{old!r} is {made[file].count(old)} times in {file}"
        made[file] = made[file].replace(old, new)
    return made


def finds(folder: Path, monkeypatch, files: dict[str, str], checks: str, words: str, *scopes: str) -> None:
    """The kit finds faults by exactly these checks (names, spaced), and one fault has these words in it."""
    with planted(folder, monkeypatch, files) as name:
        found = faults(name, *scopes)
    assert {check for check, _ in found} == set(checks.split()), found
    assert words in " | ".join(found.values())
