"""``quire reproduce universal``: does sharing one block over depth help on longer strings, and does ACT count?"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning.pytorch import seed_everything

from quire.data import DataModule
from quire.datasets.algorithmic import Algorithmic
from quire.model import Model
from quire.reproduce import Band, Claim, Results, arm_trainer, difference, mean, quiet, spread
from quire.roles.language.loop import Greedy
from quire_universal.decoder import UniversalDecoder
from quire_universal.encoder import UniversalEncoder
from quire_universal.facts import Facts
from quire_universal.halting import ACT
from quire_universal.metrics import CharAccuracy, SequenceAccuracy
from quire_universal.monitor import PonderMonitor
from quire_universal.objective import UniversalSeq2Seq

TRAIN, TEST, STEPS, BATCH, WIDTH = 10, 20, 2000, 64, 64
WEIGHTS = (0.0, 0.001, 0.01, 0.1)
UT, OWN, EQUAL = "UT", "own layers", "equal parameters"
OUT, IN = "out of length", "in length"


def _arms(task: str) -> dict[str, dict[str, Any]]:
    kinds = {
        UT: {"shared": True, "width": WIDTH},
        OWN: {"shared": False, "width": WIDTH},
        EQUAL: {"shared": False, "width": WIDTH // 2},  # four blocks of half the width: as many weights as one block
    }
    arms = {}
    for name, kind in kinds.items():
        for offset in (True, False):
            arms[f"{task} {name}{'' if offset else ', no offset'}"] = {"task": task, "offset": offset, **kind}
    return arms


class UniversalClaim(Claim):
    """Dehghani et al. 2018 on digit strings: one shared block against blocks of their own; and what ACT spends.

    The controls are the same model with a block for each step, at the same width and at a width with about as many
    parameters, each with and without a random start of positions, which alone helps length.
    """

    paper = "Universal Transformers, M. Dehghani, S. Gouws, O. Vinyals, J. Uszkoreit, L. Kaiser, ICLR 2019"
    statement = "on algorithmic tasks it does better than a Transformer; halting spends steps as the task needs them"
    budget = (
        f"digit strings of 1 to {TRAIN}, tested in free-running decoding on {TRAIN + 1} to {TEST}; {STEPS} batches of "
        f"{BATCH}, D {WIDTH}, 4 heads, F {4 * WIDTH}, 4 steps or layers; ACT: sort, at most 6 steps"
    )
    arms: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        **_arms("reverse"),
        **{f"sort ACT, ponder {w:g}": {"task": "sort", "offset": True, "ponder": w} for w in WEIGHTS},
    }
    extra: ClassVar[Mapping[str, Mapping[str, Mapping[str, Any]]]] = {
        "full": {
            **_arms("copy"),
            **_arms("add"),
            **{f"{t} ACT, ponder 0.01": {"task": t, "offset": True, "ponder": 0.01} for t in ("copy", "add")},
        },
        "long": {name.replace("copy", "copy 20-40"): {**how, "test": 40} for name, how in _arms("copy").items()},
        "facts": {"facts ACT, ponder 0.01": {"task": "facts", "offset": False, "ponder": 0.01, "width": 128}},
    }
    seeds = 3
    headline = OUT

    def run(self, arm: str, settings: Mapping[str, Any], seed: int, quick: bool, folder: Path) -> dict[str, float]:
        """Train one arm; test in and beyond the training length."""
        with quiet():
            seed_everything(seed, verbose=False)
            monitor = PonderMonitor(batches=1000, path=str(folder / "ponder.json"))
            model, inside, beyond = _parts(settings, seed, quick)
            trainer = arm_trainer(
                max_steps=40 if quick else STEPS,
                gradient_clip_val=1.0,
                callbacks=[monitor] if "ponder" in settings else [],
                default_root_dir=str(folder),
            )
            trainer.fit(model, datamodule=inside)
            found: dict[str, float] = {"parameters": float(sum(p.numel() for p in model.parameters()))}
            for name, data in ((IN, inside), (OUT, beyond)):
                if data is None:
                    continue
                logged = trainer.test(model, datamodule=data, verbose=False)[0]
                found[name] = logged["test/CharAccuracy"]
                found[f"{name}, whole"] = logged["test/SequenceAccuracy"]
                if "ponder" in settings and name == IN:
                    found |= _steps(monitor)
            return found

    def bands(self, results: Results) -> list[Band]:
        """Better beyond the training length at equal offsets; steps fall as their price rises."""
        bands = []
        for control in (OWN, EQUAL):
            a, b = f"reverse {UT}", f"reverse {control}"
            gaps = [results[a][s][OUT] - results[b][s][OUT] for s in results[a]]
            gap, needed = sum(gaps) / len(gaps), max(1, -(-2 * len(gaps) // 3))
            above = sum(g > 0 for g in gaps)
            text = f"reverse at {TRAIN + 1}-{TEST}, {UT} minus {control}"
            bands.append(Band(text, gap, ">= 0.05", gap >= 0.05))
            bands.append(Band(f"{text}: seeds above 0", float(above), f">= {needed}", above >= needed))
        steps = [mean(results, f"sort ACT, ponder {w:g}", "steps") for w in WEIGHTS]
        falls = all(a >= b for a, b in itertools.pairwise(steps)) and steps[0] > steps[-1]
        bands.append(Band("mean steps from ponder 0 to 0.1", steps[-1] - steps[0], "falling at each weight", falls))
        return bands

    def remarks(self, results: Results) -> list[str]:
        """Accuracies with spread, the offset's own share, and what was not shown."""
        said = []
        for arm in (f"reverse {UT}", f"reverse {OWN}", f"reverse {EQUAL}"):
            said.append(f"{arm} at {TRAIN + 1}-{TEST}: {mean(results, arm, OUT):.3f} ± {spread(results, arm, OUT):.3f}")
            offset, error = difference(results, arm, f"{arm}, no offset", OUT)
            said.append(f"{arm}: the random offset alone gives {offset:+.3f} (standard error {error:.3f})")
        steps = ", ".join(f"{w:g}: {mean(results, f'sort ACT, ponder {w:g}', 'steps'):.2f}" for w in WEIGHTS)
        said.append(f"mean steps by ponder weight: {steps}; steps are not time, halted positions are computed too")
        for arm in (a for a in results if "ACT" in a and _split(results, a)):
            grows = mean(results, arm, "steps, long") - mean(results, arm, "steps, short")
            said.append(f"{arm}: {grows:+.2f} steps from the shorter half of the sources to the longer")
        said.append("the paper's own data (WMT14, LAMBADA, bAbI) and numbers are not tested here")
        return said


def _split(results: Results, arm: str) -> bool:
    return all("steps, long" in r and "steps, short" in r for r in results[arm].values())


def _parts(settings: Mapping[str, Any], seed: int, quick: bool) -> tuple[Model, DataModule, DataModule | None]:
    width = int(settings.get("width", WIDTH))
    ponder = settings.get("ponder")
    test = int(settings.get("test", TEST))
    inside: DataModule
    beyond: DataModule | None = None
    count = 512 if quick else 32768
    if settings["task"] == "facts":
        inside = Facts(samples=count, batch_size=BATCH, seed=seed)
    else:
        inside = Algorithmic(settings["task"], TRAIN, TRAIN, count, batch_size=BATCH, seed=seed)
        beyond = Algorithmic(settings["task"], TRAIN, test, 512 if quick else 4096, batch_size=BATCH, seed=seed)

    def shape() -> dict[str, Any]:
        return {
            "width": width,
            "heads": 4,
            "ffn": 4 * width,
            "steps": 4,
            "dropout": 0.0,
            "position": "random_offset" if settings["offset"] else "coordinate",
            "max_offset": 2 * test,
            "shared": settings.get("shared", True),
            "halting": None if ponder is None else ACT(max_steps=6),
        }

    model = Model(
        encoder=UniversalEncoder(**shape()),
        decoder=UniversalDecoder(**shape()),
        objective=UniversalSeq2Seq(ponder=ponder or 0.0, smoothing=0.0),
        sampler=Greedy(max_new_tokens=2 * test + 2),
        metrics=[CharAccuracy(), SequenceAccuracy()],
        optimizer=functools.partial(torch.optim.Adam, lr=0.001),
    )
    return model, inside, beyond


def _steps(monitor: PonderMonitor) -> dict[str, float]:
    """Mean steps of both sides over the test set; of the shorter and longer half of the sources; by label."""
    table = monitor.table()
    every = [v for side in table.values() for v in side["token"].values()]
    found = {"steps": sum(v["steps"] * v["positions"] for v in every) / sum(v["positions"] for v in every)}
    by_length = {int(k): v for k, v in table["encoder"]["length"].items()}
    middle = (min(by_length) + max(by_length)) / 2
    for name, chosen in (
        ("steps, short", [v for k, v in by_length.items() if k <= middle]),
        ("steps, long", [v for k, v in by_length.items() if k > middle]),
    ):
        if chosen:
            found[name] = sum(v["steps"] * v["positions"] for v in chosen) / sum(v["positions"] for v in chosen)
    if len(table["encoder"]["task"]) == 3:
        found |= {f"steps, {int(k) + 1} facts": v["steps"] for k, v in table["encoder"]["task"].items()}
    return found
