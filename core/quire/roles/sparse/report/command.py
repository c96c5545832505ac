"""``quire report RUN``: what the latents of a trained dictionary fire on, in one HTML file."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from quire.commands import Arguments
from quire.errors import ConfigError


def main(argv: list[str]) -> int:
    """Write the page of a run; the data comes from the run's own config, ``--data.KEY VALUE`` changes it."""
    parser = Arguments(
        prog="quire report", description="one HTML page of what a dictionary's latents fire on", allow_abbrev=False
    )
    parser.add_argument("run", help="a run's folder, a checkpoint, or a dictionary in another project's files")
    parser.add_argument("--out", help="the file (default: report.html in the run's folder)")
    parser.add_argument("--latents", default="40", help="how many, or which: 3,17,40 (default: 40)")
    parser.add_argument("--tokens", type=int, default=50_000, help="tokens that are read (default: 50000)")
    parser.add_argument("--contexts", type=int, default=12, help="contexts of a latent (default: 12)")
    parser.add_argument("--width", type=int, default=110, help="characters of a context (default: 110)")
    parser.add_argument("--split", choices=["train", "val", "test"], default="val", help="(default: val)")
    parser.add_argument("--member", type=int, default=0, help="which of a DictionaryBank (default: 0)")
    parser.add_argument("--data", help="another data module than the run's")
    options, rest = parser.parse_known_args(argv)
    for name in ("tokens", "contexts", "width"):
        if getattr(options, name) < 1:
            raise ConfigError(f"--{name} must be at least 1, got {getattr(options, name)}")
    count, numbers = which(options.latents)
    return write(options, rest, count, numbers)


def which(given: str) -> tuple[int, list[int]]:
    """``40`` is a number of latents, ``3,17`` (or ``3,``) is which. Raises ``ConfigError`` for anything else."""
    try:
        words = [int(word) for word in given.split(",") if word.strip()]
    except ValueError:
        words = []
    if not words or min(words) < 0 or ("," not in given and words[0] < 1):
        raise ConfigError(f"--latents takes how many (40) or which (3,17 or 3,), got {given!r}")
    return (0, list(dict.fromkeys(words))) if "," in given else (words[0], [])


def write(options: argparse.Namespace, rest: list[str], count: int, numbers: list[int]) -> int:
    """Load, gather, render."""
    from quire.roles.sparse.report.gather import Wanted, gather
    from quire.roles.sparse.report.page import render
    from quire.roles.sparse.result import Card

    checkpoint, folder = find(options.run)
    encoder, decoder, site = parts(checkpoint, options.member)
    data = data_of(folder, options.data, [*([] if site is None else ["--data.site", site]), *rest])
    wanted = Wanted(
        split=options.split,
        tokens=options.tokens,
        count=count,
        numbers=numbers,
        contexts=options.contexts,
        width=options.width,
    )
    report = gather(encoder, decoder, data, wanted, f"{folder.parent.name or folder.name}: latents of a dictionary")
    for card in (folder / "card.json", folder / f"card-{options.member}.json"):
        report.card = Card.read(card) if card.is_file() else report.card
    file = Path(options.out) if options.out else folder / "report.html"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(render(report), encoding="utf-8")
    print(f"wrote {file}: {len(report.latents)} latents, {file.stat().st_size / 1e6:.1f} MB")
    return 0


def parts(checkpoint: Path, number: int) -> tuple[Any, Any, str | None]:
    """Encoder, decoder and, of a bank's member, its site.

    Raises:
        ConfigError: no sparse encoder in it, or no such member.
    """
    from quire.checkpoint import load
    from quire.roles.sparse.bank import DictionaryBank
    from quire.roles.sparse.decoder import SparseDecoder
    from quire.roles.sparse.encoder import SparseEncoder
    from quire.roles.sparse.formats.dictionary import SparseDictionary

    if checkpoint.is_dir() and not (checkpoint / "model.safetensors").is_file():
        path = str(checkpoint)
        return SparseDictionary(path).eval(), SparseDictionary(path, part="decoder").eval(), None
    model, site = load(checkpoint), None
    bank = None if model.objective is None else model.objective.role(DictionaryBank)
    if bank is not None:
        if not 0 <= number < len(bank.members):
            raise ConfigError(f"--member {number} is outside 0..{len(bank.members) - 1}")
        model, site = bank.member(number), bank.members[number].site
    encoder = None if model.encoder is None else model.encoder.role(SparseEncoder)
    if encoder is None:
        raise ConfigError(f"{checkpoint} has no sparse encoder to report on")
    return encoder, None if model.decoder is None else model.decoder.role(SparseDecoder), site


def find(run: str) -> tuple[Path, Path]:
    """The checkpoint and the folder of a run. Raises ``ConfigError`` when there is none."""
    from quire.cli import newest_checkpoint
    from quire.data import expand

    place = expand(run)
    if place.is_file():
        return place, place.parent.parent if place.parent.name == "checkpoints" else place.parent
    if not place.is_dir():
        raise ConfigError(f"there is no run {run}: give a run's folder, such as runs/sparse_tiny/version_0")
    foreign = ("cfg.json", "ae.pt", "sae.safetensors", "sae_weights.safetensors")
    if any((place / name).is_file() for name in ("model.safetensors", *foreign)):  # exported, or another project's
        return place, place
    written = sorted((place / "checkpoints").glob("*.ckpt"), key=lambda p: p.stat().st_mtime_ns)
    checkpoint = written[-1] if written else Path(newest_checkpoint(place))
    return checkpoint, checkpoint.parent.parent


def data_of(folder: Path, name: str | None, rest: list[str]) -> Any:
    """The data module: the one of the run's config, or a named one, with ``--data.KEY VALUE`` on top."""
    import yaml

    from quire.roles.probes.command import read_data

    if name is not None:
        return read_data(["--data", name, *rest])
    file = folder / "config.yaml"
    said = yaml.safe_load(file.read_text(encoding="utf-8")).get("data") if file.is_file() else None
    if not said:
        raise ConfigError(f"{folder} has no config.yaml that says which data: add --data Activations --data.KEY VALUE")
    return read_data(["--data", json.dumps(said), *rest])
