"""``quire probe CHECKPOINT --data NAME``: every probe on a frozen encoder, in one table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from quire.commands import Arguments
from quire.errors import ConfigError, suggest
from quire.plugins import load as installed

if TYPE_CHECKING:
    from quire.data import DataModule
    from quire.roles.probes.watch import Watch

PROBES = ("knn", "linear", "attentive", "health")


def main(argv: list[str]) -> int:
    """Judge a checkpoint's frozen encoder; prints a table and writes CSV, JSON and a figure."""
    parser = Arguments(prog="quire probe", description="judge a checkpoint's frozen encoder", allow_abbrev=False)
    parser.add_argument("checkpoint", help="a .ckpt file, an exported folder, or hf:owner/name")
    parser.add_argument("--data", help="a data module, with --data.KEY VALUE as in lightning fit")
    parser.add_argument("--split", choices=["val", "test"], default="test", help="judged split (default: test)")
    parser.add_argument("--probes", default=",".join(PROBES), help=f"some of {','.join(PROBES)}")
    parser.add_argument("--pooling", choices=["mean", "class"], default="mean")
    parser.add_argument("--max-train", type=int, help="training samples that a probe learns from (default: all)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, mps (default: cpu)")
    parser.add_argument("--folder", help="where to write (default: probe-DATA beside the checkpoint)")
    parser.add_argument("--json", action="store_true", help="print JSON for programs")
    options, rest = parser.parse_known_args(argv)
    names = [n for n in options.probes.split(",") if n]
    for name in names:
        if name not in PROBES:
            raise ConfigError(f"no probe is named {name}{suggest(name, PROBES) or '; there are ' + ', '.join(PROBES)}")
    if not options.data:
        raise ConfigError("quire probe needs data: add --data NAME, for example --data Digits")
    if options.max_train is not None and options.max_train < 1:
        raise ConfigError(f"--max-train must be at least 1, got {options.max_train}")
    source = read_data(["--data", options.data, *rest])
    return judge(options.checkpoint, source, names, options)


def read_data(argv: list[str]) -> DataModule:
    """The data module of ``--data NAME --data.KEY VALUE``, read as ``lightning fit`` reads it.

    Raises:
        ConfigError: an unknown name or key, in one sentence.
    """
    import re

    from jsonargparse import ArgumentParser

    from quire.data import DataModule
    from quire.parse_errors import one_line

    words = {word for item in argv for word in re.split(r"[=\s\[\]{},:\"']+", item)}
    installed().registry.import_named(words)

    class Parser(ArgumentParser):
        def error(self, message: str, ex: Exception | None = None) -> NoReturn:
            raise ConfigError(one_line(message, words)) from ex

    parser = Parser(prog="quire probe")
    parser.add_subclass_arguments(DataModule, "data")
    return parser.instantiate(parser.parse_args(argv)).data


def judge(path: str, source: DataModule, names: list[str], options: Any) -> int:
    """Load, run the probes, print, write."""
    import torch

    from quire.checkpoint import load
    from quire.roles.probes.subject import Subject, check_reads, untouched

    model = load(path)
    if model.encoder is None:
        raise ConfigError(f"{path} has no encoder to probe")
    try:
        device = torch.device(options.device)
        model.to(device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"--device {options.device} can't be used here: {error}") from error
    source.prepare_data()
    source.setup("test")
    folder = Path(options.folder) if options.folder else _beside(path, type(source).__name__)
    subject = Subject(model.encoder, source, device, model, model.seed)
    found: dict[str, Any] = {}
    for name, probe in _probes(names, options, model.encoder).items():
        if isinstance(probe, str):
            found[name] = probe
            continue
        check_reads(model.encoder, source.offered(), type(source).__name__, probe.fields, probe)
        probe.fits(model.encoder)
        with untouched(model, device):
            probe.measure(subject, options.split)
        found[name] = probe
    _report(found, folder, options.json)
    return 0


def _probes(names: list[str], options: Any, encoder: Any) -> dict[str, Watch | str]:
    """The probes by name; a sentence instead of one that can't judge this encoder."""
    from quire.matching import refusal
    from quire.roles.probes.attentive import AttentiveProbe
    from quire.roles.probes.health import Health
    from quire.roles.probes.knn import KNNProbe
    from quire.roles.probes.linear import LinearProbe

    made: dict[str, Watch | str] = {}
    for name in names:
        probe: Watch
        if name == "knn":
            probe = KNNProbe(pooling=options.pooling, max_train=options.max_train or 10000)
        elif name == "linear":
            probe = LinearProbe(pooling=options.pooling, max_train=options.max_train)
        elif name == "attentive":
            probe = AttentiveProbe(max_train=options.max_train)
        else:
            probe = Health(pooling=options.pooling)
        made[name] = refusal(type(probe), "encoder", encoder) or probe
    return made


def _report(found: dict[str, Any], folder: Path, as_json: bool) -> None:
    from quire.roles.probes.health import Health
    from quire.roles.probes.probe import Probe
    from quire.roles.probes.report import text, write

    rows = [row for probe in found.values() if isinstance(probe, Probe) for row in probe.latest()]
    health = next((p for p in found.values() if isinstance(p, Health)), None)
    skipped = {name: said for name, said in found.items() if isinstance(said, str)}
    if rows:
        write([r.plain() for r in rows], folder, "probes")
    line = [health.show(folder)] if health else []
    if as_json:
        record = {"rows": [r.plain() for r in rows], "health": health.rows[-1] if health else None, "skipped": skipped}
        print(json.dumps(record, indent=2))
        return
    lines = [text(rows)] if rows else []
    lines += [*line, *(f"left out: {said}" for said in skipped.values()), f"wrote files into {folder}"]
    print("\n".join(lines))


def _beside(path: str, data: str) -> Path:
    if path.startswith("hf:"):
        return Path("runs") / f"probe-{data}"
    place = Path(path).expanduser()
    return (place if place.is_dir() else place.parent) / f"probe-{data}"
