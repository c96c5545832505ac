"""What a decoding benchmark found: rows with medians and quartiles, as text, Markdown and JSON."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from functools import reduce
from statistics import median
from typing import Any

import torch

from quire.roles.language.bench_arms import Arm, Run
from quire.roles.language.stats import Stats

HEAD = ["sampler", "model", "batch", "tok/s", "ratio", "decode tok/s", "wall tok/s", "first ms", "passes", "accepted"]
DEPTHS = (1, 2, 4, 8)  # shown; result.json has all


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    q1, _, q3 = (
        torch.tensor(list(values), dtype=torch.float64)
        .quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64))
        .tolist()
    )
    return {"median": float(median(values)), "q1": q1, "q3": q3}


def rate(runs: list[Run], clock: str, rest_only: bool = False) -> float:
    """New tokens a second of one round; without the prefill and its token with ``rest_only``."""
    rows = [row for run in runs for row in run.rows]
    tokens = sum(len(row) - rest_only for row in rows)
    seconds = sum(getattr(run, f"rest_{clock}") + (0 if rest_only else getattr(run, f"first_{clock}")) for run in runs)
    return tokens / max(seconds, 1e-9)


def summarise(arms: list[Arm]) -> list[dict[str, Any]]:
    """One row an arm. ``ratio`` is to the first arm, round by round; ``to_alone`` to the same sampler at batch 1."""
    alone = {(arm.name, arm.model): arm for arm in arms if arm.batch == 1}
    rows = []
    for arm in arms:
        cpu = [rate(r, "cpu") for r in arm.rounds]
        base = [rate(r, "cpu") for r in arms[0].rounds]
        own = [rate(r, "cpu") for r in alone[arm.name, arm.model].rounds]
        calls = arm.rounds[0]
        stats = [run.stats for run in calls if run.stats is not None]
        total = reduce(Stats.merge, stats) if stats else None
        row: dict[str, Any] = {
            "sampler": arm.name,
            "model": arm.model,
            "batch": arm.batch,
            "tokens_per_cpu_second": spread(cpu),
            "ratio": spread([a / b for a, b in zip(cpu, base)]),
            "to_alone": spread([a / b for a, b in zip(cpu, own)]),
            "decode_tokens_per_cpu_second": spread([rate(r, "cpu", True) for r in arm.rounds]),
            "tokens_per_wall_second": spread([rate(r, "wall") for r in arm.rounds]),
            "first_token_cpu_ms": spread([1e3 * run.first_cpu for r in arm.rounds for run in r]),
            "first_token_wall_ms": spread([1e3 * run.first_wall for r in arm.rounds for run in r]),
            "new_tokens": sum(len(row) for run in calls for row in run.rows),
            "calls": len(calls),
            "forwards": sum(run.forwards for run in calls),
            "accepted_by_depth": total.per_depth_accept() if total is not None else {},
            "drafting": spread([_drafting(r) for r in arm.rounds]) if total is not None else None,
            "stats": total.to_dict() if total is not None else None,
        }
        rows.append(row)
    return rows


def _drafting(runs: list[Run]) -> float:
    """Share of the target passes' time that drafting took on top."""
    stats = [run.stats for run in runs if run.stats is not None]
    return sum(s.draft_ms for s in stats) / max(1e-9, sum(s.verify_ms for s in stats))


def cells(row: dict[str, Any]) -> list[str]:
    """A row of the table, under ``HEAD``."""
    ratio, accepted = row["ratio"], {int(d): share for d, share in row["accepted_by_depth"].items()}
    shown = [f"{accepted[d]:.2f}" for d in DEPTHS if d in accepted]
    per_call = row["forwards"] / row["calls"]
    return [
        row["sampler"],
        row["model"],
        str(row["batch"]),
        _quartiles(row["tokens_per_cpu_second"], 0),
        f"{ratio['median']:.2f} ({ratio['q1']:.2f}-{ratio['q3']:.2f})",
        f"{row['decode_tokens_per_cpu_second']['median']:.0f}",
        f"{row['tokens_per_wall_second']['median']:.0f}",
        f"{row['first_token_wall_ms']['median']:.1f}",
        f"{per_call:.1f}",
        " ".join(shown),
    ]


def _quartiles(found: dict[str, float], digits: int) -> str:
    return f"{found['median']:.{digits}f} ({found['q1']:.{digits}f}-{found['q3']:.{digits}f})"


def markdown(report: dict[str, Any]) -> str:
    """``table.md``."""
    lines = ["# quire bench language", "", f"`{report['command']}`", "", report["machine"], "", *legend(report)]
    for task in report["tasks"]:
        lines += ["", f"## {task['model']}: {task['task']}", "", _load(task), ""]
        lines += ["| " + " | ".join(HEAD) + " |", "|" + " --- |" * len(HEAD)]
        lines += ["| " + " | ".join(cells(row)) + " |" for row in task["rows"]]
        lines += ["", *(f"Left out: {said}" for said in task["left_out"])]
    return "\n".join(lines).rstrip() + "\n"


def text(task: dict[str, Any]) -> str:
    """One task for a terminal."""
    from quire.commands import table

    lines = [f"{task['model']}: {task['task']}; {_load(task)}", table([cells(row) for row in task["rows"]], HEAD)]
    return "\n".join([*lines, *(f"left out: {said}" for said in task["left_out"])])


def legend(report: dict[str, Any]) -> list[str]:
    """What the columns are."""
    base = report["tasks"][0]["rows"][0]
    return [
        f"{report['new_tokens']} new tokens a prompt, {report['repeats']} rounds, arms in turn, {report['threads']} "
        "thread(s), a round of warm-up not counted. tok/s: new tokens per second of process CPU time with the prefill, "
        f"median (quartiles); ratio: to {base['sampler']} ({base['model']}), round by round; decode tok/s: without the "
        "prefill; first ms: wall time to the first token; passes: of the model in a call, prefill included; accepted: "
        f"share of drafted tokens that stood at depth {', '.join(map(str, DEPTHS))}. On a CPU Quire's arms keep linear "
        "weights column by column, as a prediction run does.",
    ]


def machine() -> str:
    """What the numbers were taken on."""
    found = (
        f"{platform.machine()}, {os.cpu_count()} cores; Python {platform.python_version()}, torch {torch.__version__}"
    )
    try:
        import transformers
    except ImportError:
        return found
    return f"{found}, transformers {transformers.__version__}"


def _load(task: dict[str, Any]) -> str:
    return "load " + " to ".join(f"{x:.1f}" for x in task["load"])
