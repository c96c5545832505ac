"""``quire reproduce first``: do routers that see the prompt beat blind sets of layers, in less time?"""

from __future__ import annotations

import random
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean, median
from typing import Any, ClassVar

import torch
from torch import Tensor

from quire.model import Model
from quire.reproduce import Band, Claim, Results, mean, spread
from quire.roles.language.loop import Greedy
from quire.roles.language.proof import batch_of
from quire_first.metrics import mean_jaccard
from quire_first.model import RoutedModel
from quire_first.trial import SKIPS, Trial, Validation, adapted, trained, wrapped

BASE, RANDOM, UNIFIED, FIXED = "base", "random skip", "unified skip", "best fixed set"
R, RL, LU, LN = "FiRST R", "FiRST R+L", "LoRA + unified", "LoRA without skip"
ACCURACY, SKIP, TIME = "token accuracy", "skip rate", "time / base"
SETS = 5


class FirstClaim(Claim):
    """Jain et al. 2024, reconstructed, on digit strings: routed layers against random, even and fixed ones.

    The ablations are those that the paper's public reviews asked for: adapters under evenly spaced skips, and adapters
    without skips. All arms of a seed share one backbone and one set of trained routers.
    """

    paper = (
        "FiRST: Finetuning Router-Selective Transformers for Input-Adaptive Latency Reduction, "
        "A. Jain, S. Sharma, K. Mukherjee, S. Pal, 2024, arXiv 2410.12513 (a reconstruction: there is no official code)"
    )
    statement = "choosing layers by the input lowers latency and keeps quality once adapters are tuned"
    budget = (
        "copy, reverse and sort of up to 6 digits; CausalLM 192 x 8, 600 batches of 64; routers 200, adapters of "
        "rank 8 200; a quarter of the layers skipped, the first and last never"
    )
    arms: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        BASE: {"skip": "none"},
        RANDOM: {"skip": "random"},
        UNIFIED: {"skip": "even"},
        FIXED: {"skip": "fixed"},
        R: {"skip": "routed"},
        RL: {"skip": "routed", "lora": True},
        LU: {"skip": "even", "lora": True},
        LN: {"skip": "none", "lora": True},
    }
    seeds = 1
    extra: ClassVar[Mapping[str, Mapping[str, Mapping[str, Any]]]] = {}
    headline = ACCURACY

    def run(self, arm: str, settings: Mapping[str, Any], seed: int, quick: bool, folder: Path) -> dict[str, float]:
        """One arm; the backbone and the routers of a seed are trained once a process."""
        trial = trained(seed, quick)
        found = [self._one(force, settings, trial) for force in _forces(settings["skip"], seed, trial)]
        return {name: fmean(f[name] for f in found) for name in found[0]}

    def _one(self, force: list[int] | None, settings: Mapping[str, Any], trial: Trial) -> dict[str, float]:
        model = wrapped(trial, force)
        if settings.get("lora"):
            model = adapted(model, trial)
        decoder: RoutedModel = model.decoder.eval()
        accuracy, on = judged(decoder, trial.held)
        found = {ACCURACY: accuracy, SKIP: 1 - float(on.float().mean())}
        found["task Jaccard"] = task_jaccard(~on, trial.held.task)
        found["pattern diversity"] = 1 - float(mean_jaccard(~on))
        return {**found, **timed(model, wrapped(trial, []), trial)}

    def bands(self, results: Results) -> list[Band]:
        """Routers beat blind sets at equal skip in every seed; adapted ones stay near the base, in less time."""
        bands = []
        for control in (UNIFIED, RANDOM):
            gap = min(results[R][s][ACCURACY] - results[control][s][ACCURACY] for s in results[R])
            bands.append(Band(f"accuracy of {R} minus {control}, worst seed", gap, "> 0", gap > 0))
        least = min(r[SKIP] for r in results[R].values())
        bands.append(Band(f"skip rate of {R}, least of the seeds", least, ">= 0.23", least >= 0.23))
        lost = max(results[BASE][s][ACCURACY] - results[RL][s][ACCURACY] for s in results[RL])
        bands.append(Band(f"accuracy of {BASE} minus {RL}, worst seed", lost, "<= 0.03", lost <= 0.03))
        ratio = mean(results, RL, TIME)
        bands.append(Band(f"time a token of {RL} / {BASE}, routers inside", ratio, "<= 0.85", ratio <= 0.85))
        return bands

    def remarks(self, results: Results) -> list[str]:
        """Reconstruction; each arm at its skip; whether routing depends on the input; what was not run."""
        said = ["reconstruction: the paper's body was not read; gate, pooling, threshold and rank are ours"]
        for arm in results:
            said.append(
                f"{arm}: accuracy {mean(results, arm, ACCURACY):.3f} ± {spread(results, arm, ACCURACY):.3f} at skip "
                f"{mean(results, arm, SKIP):.2f}, {mean(results, arm, TIME):.2f} of the base's time a token"
            )
        for arm in (R, RL):
            index = mean(results, arm, "task Jaccard")
            if index > 0.999:
                said.append(f"routing is not input-adaptive here: {arm} skips the same layers in every task")
            else:
                said.append(f"{arm}: Jaccard index of skipped layers across tasks {index:.2f} (1: not input-adaptive)")
        gap = mean(results, RL, ACCURACY) - mean(results, LU, ACCURACY)
        said.append(f"{RL} minus {LU}: {gap:+.3f} accuracy: what routing adds where adapters make up for skips")
        said.append("the paper's models (Llama-3-8B) and data (WMT, CNN/DM) are not run here")
        return said


def _forces(kind: str, seed: int, trial: Trial) -> list[list[int] | None]:
    """Layers to skip, one list a run whose results are averaged; None asks the routers."""
    free = list(trial.free)
    if kind == "routed":
        return [None]
    if kind == "none":
        return [[]]
    if kind == "random":
        source = random.Random(seed)
        return [sorted(source.sample(free, SKIPS)) for _ in range(SETS)]
    if kind == "fixed":
        return [trial.favourites]
    gap = len(free) / SKIPS
    return [[free[int(gap * i + gap / 2)] for i in range(SKIPS)]]


# ---- measures
@torch.no_grad()
def judged(decoder: RoutedModel, held: Validation) -> tuple[float, Tensor]:
    """Share of answer tokens right, teacher forced, and the routing [B,N]."""
    given, seen = held.tokens[:, :-1], held.mask[:, :-1]
    logits, routing = decoder.routed(None, given, seen, held.prompt_length)
    places = torch.arange(1, held.tokens.shape[1])
    counts = held.mask[:, 1:] & (places >= held.prompt_length[:, None])
    right = (logits.argmax(-1) == held.tokens[:, 1:]) & counts
    return float(right.sum() / counts.sum()), routing.on


def task_jaccard(skipped: Tensor, task: Tensor) -> float:
    """Mean Jaccard index of skipped layers [B,N] over pairs of prompts from different tasks."""
    members = skipped.double()
    both = members @ members.T
    either = members.sum(1)[:, None] + members.sum(1)[None] - both
    index = torch.where(either > 0, both / either.clamp(min=1), torch.ones_like(either))
    return float(index[task[:, None] != task[None]].mean())


def timed(model: Model, plain: Model, trial: Trial) -> dict[str, float]:
    """CPU time a token, prompt and routers inside, beside the whole model's, which decodes in turn with it."""
    sampler = Greedy(trial.new_tokens)
    spent: dict[str, list[float]] = {"arm": [], "base": []}
    sides = {"arm": model, "base": plain}
    for side in sides.values():
        side.decoder.eval()
        side.decoder.base._caps = _endless(side.decoder.base._caps)
    for turn, prompt in enumerate([trial.prompts[0], *trial.prompts]):
        for name, side in sides.items():
            given = batch_of([prompt], side.decoder, {})
            start = time.process_time()
            made = sampler(side, given)
            if turn:
                spent[name].append((time.process_time() - start) / made.stats.new_tokens)
    each = {name: median(values) for name, values in spent.items()}
    return {"ms/token": 1e3 * each["arm"], TIME: each["arm"] / each["base"]}


def _endless(caps: Any) -> Any:
    from dataclasses import replace

    return replace(caps, eos_ids=())  # arms that stop at different places would not be compared at equal lengths
