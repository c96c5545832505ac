"""The chart of a decoding benchmark: tokens per CPU second as a ratio to transformers' greedy, with quartiles."""

from __future__ import annotations

from pathlib import Path
from typing import Any

COLORS = ("#6b6b6b", "#1f6fb2", "#c8641b", "#2f855a")
REACH = 0.14  # half the height of a whisker's end, in rows


def draw(report: dict[str, Any], file: Path) -> None:
    """One panel a task and one line a sampler: a dot at batch 1, a ring for the batch, whiskers to the quartiles."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    tasks = report["tasks"]
    rows = [row for task in tasks for row in task["rows"]]
    labels = list(dict.fromkeys(_label(row) for row in rows))
    models = list(dict.fromkeys(row["model"] for row in rows))
    colors = {model: COLORS[i % len(COLORS)] for i, model in enumerate(models)}
    figure = Figure(figsize=(3.6 + 2.9 * len(tasks), 1.9 + 0.34 * len(labels)), layout="constrained")
    panels = figure.subplots(1, len(tasks), sharey=True, squeeze=False)[0]
    for axes, task in zip(panels, tasks):
        axes.axvline(1, color="#999999", linewidth=1, zorder=0)
        for row in task["rows"]:
            _mark(axes, labels.index(_label(row)), row["ratio"], colors[row["model"]], hollow=row["batch"] > 1)
        axes.set_title(f"{Path(task['model']).name}: {task['task']}", fontsize=10)
        axes.set_ylim(len(labels) - 0.5, -0.5)
        axes.set_xlim(0, 1.1 * max(row["ratio"]["q3"] for row in task["rows"]))
        axes.grid(axis="x", color="#e6e6e6", linewidth=0.7)
        axes.set_axisbelow(True)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
    panels[0].set_yticks(range(len(labels)), labels, fontsize=9)
    for tick, label in zip(panels[0].get_yticklabels(), labels):
        tick.set_color(colors[next(row["model"] for row in rows if _label(row) == label)])
    batch = max(row["batch"] for row in rows)
    if batch > 1:
        marks = [
            Line2D([], [], linestyle="", marker="o", color="#333333", markersize=6, label="batch 1"),
            Line2D(
                [], [], linestyle="", marker="o", color="#333333", markersize=6, mfc="white", label=f"batch {batch}"
            ),
        ]
        figure.legend(handles=marks, loc="outside upper right", ncols=2, fontsize=8, frameon=False)
    base = tasks[0]["rows"][0]
    rounds = f"{report['repeats']} round" + "s" * (report["repeats"] > 1)
    figure.supxlabel(
        f"tokens per CPU second relative to {base['sampler']} ({base['model']}, batch 1)\n"
        f"median and quartiles of {rounds}, {report['new_tokens']} new tokens",
        fontsize=9,
    )
    figure.savefig(str(file), dpi=140)


def _mark(axes: Any, at: int, ratio: dict[str, float], color: str, hollow: bool) -> None:
    axes.plot([ratio["q1"], ratio["q3"]], [at, at], color=color, linewidth=1.6, solid_capstyle="butt", zorder=2)
    for end in (ratio["q1"], ratio["q3"]):
        axes.plot([end, end], [at - REACH, at + REACH], color=color, linewidth=1.1, zorder=2)
    axes.plot([ratio["median"]], [at], "o", color=color, mfc="white" if hollow else color, markersize=6, zorder=3)
    axes.annotate(
        f"{ratio['median']:.2f}",
        (ratio["median"], at),
        xytext=(0, -15 if hollow else 7),  # the two of a line never meet
        textcoords="offset points",
        ha="center",
        fontsize=8,
        color="#333333",
    )


def _label(row: dict[str, Any]) -> str:
    return f"{row['sampler']} · {row['model']}"
