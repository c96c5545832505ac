"""``quire harvest``: a subject's activations, or a dictionary's codes of them, on disk."""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from pathlib import Path
from typing import Any

import torch

from quire.commands import Arguments
from quire.data import expand
from quire.datasets.activations.codes import CodeWriter, merge
from quire.datasets.activations.feed import as_batch
from quire.datasets.activations.module import Activations
from quire.datasets.activations.shards import FORMAT, HEADER, Writer, compare, read_header, shards_of, write_header
from quire.errors import ConfigError, suggest
from quire.roles.probes.command import read_data

SPLITS = ("train", "val", "test")
TRUE = {"bf16-true": torch.bfloat16, "16-true": torch.float16, "64-true": torch.float64}


def main(argv: list[str]) -> int:
    """Harvest; a run that was cut short goes on where it stopped, and reads nothing twice."""
    options, rest = _parser().parse_known_args(argv)
    if not options.data:
        raise ConfigError("quire harvest needs data: add --data Activations --data.subject NAME --data.site SITE")
    source = read_data(["--data", options.data, *rest])
    if not isinstance(source, Activations):
        raise ConfigError(f"quire harvest needs activations; {options.data} is no Activations data module")
    if options.list_sites:
        subject = source.subject
        print("\n".join(subject.sites.names() if subject is not None else []))
        return 0
    if not options.out:
        raise ConfigError("quire harvest needs a folder: add --out FOLDER")
    names = [n for n in options.splits.split(",") if n]
    for name in names:
        if name not in SPLITS:
            raise ConfigError(f"no split is named {name}{suggest(name, SPLITS) or '; there are ' + ', '.join(SPLITS)}")
    run(source, expand(options.out), names, options)
    return 0


def _parser() -> Arguments:
    parser = Arguments(prog="quire harvest", description="store what a subject holds at a site", allow_abbrev=False)
    parser.add_argument("--data", help="a data module, with --data.KEY VALUE as in lightning fit")
    parser.add_argument("--out", help="the folder; one folder a split inside")
    parser.add_argument("--splits", default="train,val", help="some of train,val,test (default: train,val)")
    parser.add_argument("--tokens", type=int, help="stop a split after this many rows (default: all)")
    parser.add_argument("--shard-rows", type=int, default=65536, help="rows of a file (default: 65536)")
    parser.add_argument("--codes", help="a checkpoint with a sparse encoder: store its codes, not activations")
    parser.add_argument("--list-sites", action="store_true", help="print the subject's sites and end")
    parser.add_argument("--accelerator", default="cpu", help="cpu, cuda, mps, auto (default: cpu)")
    parser.add_argument("--devices", default="1", help="as in lightning fit (default: 1)")
    parser.add_argument("--strategy", default="auto", help="as in lightning fit (default: auto)")
    parser.add_argument("--precision", default="32-true", help="as in lightning fit (default: 32-true)")
    return parser


def run(source: Activations, folder: Path, names: list[str], options: argparse.Namespace) -> None:
    """Every split, on Fabric's devices."""
    from lightning.fabric import Fabric

    try:
        devices = int(options.devices) if options.devices.lstrip("-").isdigit() else options.devices
        fabric = Fabric(
            accelerator=options.accelerator, strategy=options.strategy, devices=devices, precision=options.precision
        )
    except (ValueError, TypeError, RuntimeError) as error:
        said = str(error).split("\n")[0]
        raise ConfigError(f"quire harvest: {said}; quire doctor shows what this machine has") from error
    fabric.launch()
    source.folder = None
    subject = source.studied()
    subject.to(fabric.device)
    if options.precision in TRUE:
        subject.part.to(TRUE[options.precision])
    encoder = None if options.codes is None else _encoder(options.codes, fabric.device)
    for name in names:
        place = folder / name
        place.mkdir(parents=True, exist_ok=True)
        started = time.perf_counter()
        with fabric.autocast() if options.precision.endswith("mixed") else contextlib.nullcontext():
            rows, fresh = (_codes if encoder is not None else _activations)(
                source, name, place, fabric, options, encoder
            )
        if fabric.global_rank == 0:
            spent = time.perf_counter() - started
            print(f"{name}: {rows} rows in {place}, {fresh} of them new, {fresh / max(spent, 1e-9):.0f} a second")


def _activations(source: Activations, name: str, place: Path, fabric: Any, options: Any, _: Any) -> tuple[int, int]:
    chunks, rank, world = source.forwards(name), fabric.global_rank, fabric.world_size
    plan = cut(chunks, chunks.plan(0, False, rank, world), options.tokens, world)
    wanted = header_of(source, name, options, world)
    if (place / HEADER).is_file():
        compare(place, read_header(place), wanted)
    fabric.barrier("header")
    if rank == 0 and not (place / HEADER).is_file():
        write_header(place, {**wanted, "complete": False})
    writer = Writer(place, rank, options.shard_rows)
    before = sum(int(said["rows"]) for _, said in writer.done)
    for number in range(writer.next, len(plan)):
        writer.add(chunks.read(plan[number]))
    writer.close()
    fabric.barrier("shards")
    rows = sum(int(said["rows"]) for _, said in shards_of(place))
    if rank == 0:
        first = shards_of(place)[0][0]
        write_header(place, {**wanted, "complete": True, "rows": rows, "fields": _fields(first)})
    fabric.barrier("done")
    return rows, sum(int(said["rows"]) for _, said in writer.done) - before


def _codes(source: Activations, name: str, place: Path, fabric: Any, options: Any, encoder: Any) -> tuple[int, int]:
    from quire.roles.sites.subject import fingerprint_of

    chunks, rank, world = source.forwards(name), fabric.global_rank, fabric.world_size
    plan = cut(chunks, chunks.plan(0, False, rank, world), options.tokens, world)
    said = {"encoder": fingerprint_of(encoder), "latents": encoder.latents, **header_of(source, name, options, world)}
    if (place / HEADER).is_file():
        compare(place, header := read_header(place), said)
        if header.get("complete"):
            return chunks.fed(plan), 0
    fabric.barrier("header")
    if rank == 0 and not (place / HEADER).is_file():
        write_header(place, {**said, "kind": "codes", "complete": False})
    writer = CodeWriter(place, encoder.latents, said["encoder"], rank)
    start, fresh = writer.runs.next, 0
    for number in range(start, len(plan)):
        batch = as_batch(chunks.read(plan[number]), source.sites, [source.widths()[s] for s in source.sites])
        with torch.no_grad():
            writer.add(encoder(batch), batch)
        fresh += len(batch["activation"])
    writer.runs.close()
    fabric.barrier("runs")
    if rank == 0:
        merge(place, said)
    fabric.barrier("done")
    return chunks.fed(plan), fresh


def header_of(source: Activations, name: str, options: Any, world: int) -> dict[str, Any]:
    """What the rows depend on: a run that differs in any of it is refused."""
    given = source._source
    subject = source.studied()
    said = {"format": FORMAT, "subject": subject.name, "split": name, "world": world, "tokens": options.tokens}
    said |= {"source": given if isinstance(given, str) else type(given).__name__, "contexts": source.contexts}
    sizes = json.loads(json.dumps(source.sizes()))
    return {**said, **source.record(), "spec": sizes, "precision": options.precision}


def cut(chunks: Any, plan: list[Any], most: int | None, world: int) -> list[Any]:
    """The first chunks that hold this rank's share of ``most`` rows."""
    if most is None:
        return plan
    if most < 1:
        raise ConfigError(f"--tokens must be at least 1, got {most}")
    kept, count = [], 0
    for what in plan:
        if count * world >= most:
            break
        kept.append(what)
        count += chunks.fed([what])
    return kept


def _fields(file: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(file, "pt") as handle:
        return sorted(handle.keys())


def _encoder(path: str, device: Any) -> Any:
    from quire.checkpoint import load
    from quire.roles.sparse.encoder import SparseEncoder

    model = load(expand(path) if not path.startswith("hf:") else path)
    encoder = None if model.encoder is None else model.encoder.role(SparseEncoder)
    if encoder is None:
        raise ConfigError(f"--codes {path} has no sparse encoder")
    return encoder.to(device).eval()
