"""``quire reproduce PLUGIN``: a paper's claim at a stated budget, against its controls, with an honest verdict."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import logging
import math
import statistics
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from quire.commands import Arguments, table
from quire.errors import ConfigError, suggest
from quire.plugins import load, load_object

Results = dict[str, dict[int, dict[str, float]]]
"""arm → seed → metric → value."""


@dataclass(frozen=True)
class Band:
    """One requirement of a claim: what was measured, what was needed, whether it held (None: can't tell)."""

    text: str
    measured: float
    needed: str
    held: bool | None


class Claim:
    """A paper's claim scaled down. Subclass it, fill the attributes, write ``run`` and ``bands``.

    Attributes:
        paper: Title, authors, year.
        statement: The claim in the paper's words or sense, without numbers that aren't the paper's.
        budget: Data, steps, seeds: what a verdict holds for.
        arms: Arm → settings (plain values; part of the cache key), controls included.
        extra: Optional arm sets, run only with ``--arms NAME``: name → arms.
        seeds: Default number of seeds; ``quick_seeds`` with ``--quick``.
        headline: The metric drawn in the figure.
    """

    paper: ClassVar[str]
    statement: ClassVar[str]
    budget: ClassVar[str]
    arms: ClassVar[Mapping[str, Mapping[str, Any]]]
    extra: ClassVar[Mapping[str, Mapping[str, Mapping[str, Any]]]] = {}
    seeds: ClassVar[int] = 3
    quick_seeds: ClassVar[int] = 1
    headline: ClassVar[str]
    version: ClassVar[int] = 1
    """Raise it when ``run`` changes what it measures, so cached results are made anew."""

    def run(self, arm: str, settings: Mapping[str, Any], seed: int, quick: bool, folder: Path) -> dict[str, float]:
        """Metrics of one arm and seed. ``folder`` is its own, for pictures and checkpoints."""
        raise NotImplementedError

    def bands(self, results: Results) -> list[Band]:
        """The requirements, measured. The claim is reproduced when all hold."""
        raise NotImplementedError

    def remarks(self, results: Results) -> list[str]:
        """Sentences that belong beside the verdict: what was not shown, what was uncovered."""
        return []


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without Lightning's chatter and warnings: what an arm trains is reported by its metrics."""
    loggers = [logging.getLogger(f"lightning.{part}") for part in ("pytorch", "fabric")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)


def arm_trainer(**options: Any) -> Any:
    """A Trainer for one arm: one process on the CPU; no logger, checkpoints or validation unless asked for."""
    from lightning.pytorch import Trainer

    plain = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "limit_val_batches": 0,
        "num_sanity_val_steps": 0,
    }
    return Trainer(**{**plain, **options})


def mean(results: Results, arm: str, metric: str) -> float:
    """Mean over seeds."""
    return statistics.fmean(r[metric] for r in results[arm].values())


def spread(results: Results, arm: str, metric: str) -> float:
    """Standard deviation over seeds; 0 for one seed."""
    values = [r[metric] for r in results[arm].values()]
    return statistics.stdev(values) if len(values) > 1 else 0.0


def difference(results: Results, arm: str, control: str, metric: str) -> tuple[float, float]:
    """Mean paired difference arm − control over common seeds and its standard error (inf for one seed)."""
    seeds = sorted(set(results[arm]) & set(results[control]))
    deltas = [results[arm][s][metric] - results[control][s][metric] for s in seeds]
    error = statistics.stdev(deltas) / math.sqrt(len(deltas)) if len(deltas) > 1 else math.inf
    return statistics.fmean(deltas), error


def verdict(bands: list[Band]) -> str:
    """reproduced, not reproduced, or inconclusive (a band that can't be told, none that failed)."""
    if any(b.held is False for b in bands):
        return "not reproduced"
    return "inconclusive" if any(b.held is None for b in bands) or not bands else "reproduced"


def main(argv: list[str]) -> int:
    """``quire reproduce PLUGIN``. Exit code 0 for any honest verdict, 1 when an arm could not run."""
    parser = Arguments(prog="quire reproduce", description="run a plugin's claim against its controls")
    parser.add_argument("plugin", nargs="?", help="default: every plugin that registers a claim")
    parser.add_argument("--seeds", type=int, help="number of seeds")
    parser.add_argument("--arms", help="comma list of optional arm sets to add, for instance long")
    parser.add_argument("--quick", action="store_true", help="fewer seeds and steps: shows that it runs")
    parser.add_argument("--strict", action="store_true", help="exit code 1 unless reproduced")
    parser.add_argument("--fresh", action="store_true", help="ignore cached results")
    parser.add_argument("--folder", default="runs/reproduce", help="where results are kept")
    parser.add_argument("--json", action="store_true", help="print the result as JSON only")
    options = parser.parse_args(argv)
    claims = load().claims
    if options.plugin is not None and options.plugin not in claims:
        known = suggest(options.plugin, list(claims)) or f"; there are {', '.join(sorted(claims)) or 'none'}"
        raise ConfigError(f"no claim is registered for {options.plugin}{known}")
    names = [options.plugin] if options.plugin else sorted(claims)
    return max([reproduce(name, load_object(claims[name][0])(), options) for name in names], default=0)


def reproduce(name: str, claim: Claim, options: argparse.Namespace) -> int:
    """Run what isn't cached, print and write the table, the figure and the verdict."""
    arms = dict(claim.arms)
    for extra in (options.arms or "").split(",") if options.arms else ():
        if extra not in claim.extra:
            have = f"; it has {', '.join(claim.extra)}" if claim.extra else "; it has none"
            raise ConfigError(f"{name} has no optional arm set {extra!r}{have}")
        arms |= claim.extra[extra]
    count = options.seeds if options.seeds is not None else claim.quick_seeds if options.quick else claim.seeds
    if count < 1:
        raise ConfigError(f"--seeds must be at least 1, got {count}")
    root = Path(options.folder) / name
    results: Results = {}
    failed: list[str] = []
    for seed in range(count):
        for arm, settings in arms.items():
            try:
                results.setdefault(arm, {})[seed] = _cached(claim, arm, settings, seed, options, root)
            except Exception as error:  # one arm's failure must not hide the others' results
                failed.append(f"{arm}, seed {seed}: {type(error).__name__}: {error}")
    if failed:
        print("could not run:\n  " + "\n  ".join(failed))
        return 1
    report = summarise(name, claim, results, options.quick)
    root.mkdir(parents=True, exist_ok=True)
    (root / "result.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    draw(claim, results, root / "result.png", report["verdict"])
    print(
        json.dumps(report, indent=2)
        if options.json
        else text(report, results) + f"\nwrote {root}/result.json, result.png"
    )
    return 1 if options.strict and report["verdict"] != "reproduced" else 0


def _cached(
    claim: Claim, arm: str, settings: Mapping[str, Any], seed: int, options: argparse.Namespace, root: Path
) -> dict[str, float]:
    key = json.dumps([type(claim).__name__, claim.version, arm, settings, seed, options.quick], sort_keys=True)
    folder = root / f"{arm.replace(' ', '-')}-{seed}-{hashlib.sha256(key.encode()).hexdigest()[:10]}"
    file = folder / "metrics.json"
    if file.is_file() and not options.fresh:
        return json.loads(file.read_text(encoding="utf-8"))["metrics"]
    folder.mkdir(parents=True, exist_ok=True)
    start = time.process_time()
    metrics = {k: float(v) for k, v in claim.run(arm, settings, seed, options.quick, folder).items()}
    cost = time.process_time() - start
    if not options.json:
        shown = ", ".join(f"{k} {v:.4g}" for k, v in metrics.items())
        print(f"{arm}, seed {seed}: {shown} ({cost:.0f} CPU-s)", flush=True)
    record = {"arm": arm, "settings": dict(settings), "seed": seed, "metrics": metrics, "cpu_seconds": round(cost, 1)}
    partial = file.with_suffix(".part")
    partial.write_text(json.dumps(record, indent=2), encoding="utf-8")
    partial.replace(file)  # whole or not at all: a kill leaves no half result
    return metrics


def summarise(name: str, claim: Claim, results: Results, quick: bool) -> dict[str, Any]:
    """Everything a reader needs, as plain values."""
    bands = claim.bands(results)
    metrics = list(next(iter(next(iter(results.values())).values())))
    return {
        "plugin": name,
        "paper": claim.paper,
        "claim": claim.statement,
        "budget": claim.budget + (" (quick: reduced, its verdict says little)" if quick else ""),
        "seeds": len(next(iter(results.values()))),
        "headline": claim.headline,
        "arms": {
            arm: {
                m: {"mean": mean(results, arm, m), "sd": spread(results, arm, m)}
                for m in metrics
                if _has(results, arm, m)
            }
            for arm in results
        },
        "bands": [{"text": b.text, "measured": b.measured, "needed": b.needed, "held": b.held} for b in bands],
        "verdict": verdict(bands),
        "remarks": claim.remarks(results),
    }


def _has(results: Results, arm: str, metric: str) -> bool:
    return all(metric in r for r in results[arm].values())


def text(report: dict[str, Any], results: Results) -> str:
    """The report for a terminal."""
    metrics = list(next(iter(report["arms"].values())))
    rows = [
        [arm, *(f"{v[m]['mean']:.4g} ± {v[m]['sd']:.2g}" if m in v else "" for m in metrics)]
        for arm, v in report["arms"].items()
    ]
    lines = [
        report["paper"],
        f"claim: {report['claim']}",
        f"budget: {report['budget']}; {report['seeds']} seeds, mean ± sd",
        "",
    ]
    lines += [table(rows, ["arm", *metrics]), ""]
    word = {True: "holds", False: "FAILS", None: "can't tell"}
    lines += [f"{word[b['held']]}: {b['text']}: {b['measured']:.4g}, needed {b['needed']}" for b in report["bands"]]
    lines += [f"note: {r}" for r in report["remarks"]]
    return "\n".join([*lines, f"verdict: {report['verdict']} (for this budget)"])


def draw(claim: Claim, results: Results, file: Path, said: str) -> None:
    """Bars of the headline metric per arm, mean and standard deviation, each seed a dot."""
    from matplotlib.figure import Figure

    arms = [a for a in results if _has(results, a, claim.headline)]
    figure = Figure(figsize=(1.6 + 1.1 * len(arms), 4.2), layout="constrained")
    axes = figure.add_subplot()
    axes.bar(range(len(arms)), [mean(results, a, claim.headline) for a in arms], color="#9bb7d4", width=0.65)
    axes.errorbar(
        range(len(arms)),
        [mean(results, a, claim.headline) for a in arms],
        [spread(results, a, claim.headline) for a in arms],
        fmt="none",
        ecolor="#333333",
        capsize=4,
    )
    for i, arm in enumerate(arms):
        values = [r[claim.headline] for r in results[arm].values()]
        axes.plot([i] * len(values), values, "o", color="#1f3b57", markersize=4)
    axes.set_xticks(range(len(arms)), [a.replace(" ", "\n") for a in arms], fontsize=8)
    axes.set_ylabel(claim.headline)
    axes.set_title(f"{said} (for this budget)", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(str(file), dpi=140)
