"""``quire reproduce attn-sae``: few latents of attention outputs recover the loss; induction latents look back."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning.pytorch import seed_everything

from quire.datasets.activations.module import Activations
from quire.datasets.activations.opening import open_subject
from quire.datasets.activations.tiny import tiny_subject
from quire.datasets.text import TextTokens
from quire.model import Model
from quire.reproduce import Band, Claim, Results, arm_trainer, mean, quiet
from quire.roles.sites.subject import Subject
from quire.roles.sparse.card import measure
from quire.roles.sparse.decoder import SparseDecoder
from quire.roles.sparse.encoder import SparseEncoder
from quire.roles.sparse.objective import SparseReconstruction
from quire.roles.sparse.selectors import ReLU, TopK
from quire_attn_sae.repeats import SITE, Repeats, attention_model, source_hits
from quire_attn_sae.schedule import CosineWarmupRewarm

TRAINED = ("l1 1", "l1 2", "l1 4", "topk 8")
RANDOM, SHUFFLED, JUDGED = "random rows", "shuffled heads", "topk 8"
ZERO, MEAN, HIT = "recovered zero", "recovered mean", "source hit"


class AttentionClaim(Claim):
    """Kissane, Krzyzanowski et al. 2024 on small models: faithful at few latents, and latents that are induction's.

    Each arm's dictionary is trained twice: at a byte model of Python's library, where its rebuild is spliced in, and at
    a two-layer attention-only model of repeated sequences, which has an induction head.
    """

    paper = (
        "Interpreting Attention Layer Outputs with Sparse Autoencoders, Connor Kissane, Robert Krzyzanowski, Joseph "
        "Bloom, Arthur Conmy, Neel Nanda, 2024, arXiv 2406.17759"
    )
    statement = (
        "dictionaries of attention outputs recover most of the loss at few active latents, and show what heads do"
    )
    budget = (
        "the subject tiny (3 layers, width 64, bytes), z after block 1, F = 384, 700 steps of 512 tokens, no "
        "resampling, 20,000 held-out tokens; an attention-only model of 2 layers and 4 heads on repeats of period 8 to "
        "20, three heads of the second layer held even, F = 256, 300 steps, the 10 latents most of its induction head, "
        "20 strongest tokens each that have occurred before"
    )
    arms: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "l1 1": {"l1": 1.0},
        "l1 2": {"l1": 2.0},
        "l1 4": {"l1": 4.0},
        "topk 8": {"k": 8},
        RANDOM: {"k": 8, "random": True},
        SHUFFLED: {"k": 8, "shuffle": True},
    }
    seeds = 3
    quick_seeds = 1
    headline = ZERO

    def run(self, arm: str, settings: Mapping[str, Any], seed: int, quick: bool, folder: Path) -> dict[str, float]:
        """Train an arm's dictionaries and measure them; the subjects are shared by all arms of a process."""
        found: dict[str, float] = {}
        if not settings.get("shuffle"):  # its dictionary is the TopK arm's
            found |= _fidelity(settings, seed, quick)
        subject, loss = induction_subject(quick)
        data = _feed(subject, Repeats(64 if quick else 1536), seed, 8192)
        model = _trained(settings, data, 64 if quick else 256, 8 if quick else 300, seed)
        whole = _feed(subject, data.source, seed, 128, analysis=True)
        shuffle = torch.Generator().manual_seed(seed) if settings.get("shuffle") else None
        hits = source_hits(model, whole, 3 if quick else 10, 5 if quick else 20, shuffle)
        found |= {HIT: hits.hit, "head share": hits.share, "attends": hits.attention, "repeat CE": loss}
        return found

    def bands(self, results: Results) -> list[Band]:
        """Recovery at L0 < 20 in every seed; hits of induction's latents in every seed, against shuffled heads."""
        best = _worst(results, ZERO)
        against = _worst(results, MEAN)
        hit = min(r[HIT] for r in results[JUDGED].values())
        ratio = min(r[HIT] / max(results[SHUFFLED][s][HIT], 1e-9) for s, r in results[JUDGED].items())
        return [
            Band(
                "recovered loss (zero ablation) of the best arm at L0 < 20, worst seed",
                best,
                "> 0.8",
                _above(best, 0.8),
            ),
            Band("its recovered loss against mean ablation, worst seed", against, "> 0.7", _above(against, 0.7)),
            Band(f"source hit of {JUDGED}, worst seed", hit, "> 0.8", hit > 0.8),
            Band("source hit over shuffled heads', worst seed", ratio, "> 2", ratio > 2),
        ]

    def remarks(self, results: Results) -> list[str]:
        """Recovery with its price, the random control, what was not run."""
        said = []
        best, hit = _worst(results, ZERO), min(r[HIT] for r in results[JUDGED].values())
        if not best > 0.8:
            said.append(f"not reproduced: best recovery at L0 < 20 is {best:.3f} in the worst seed")
        if not hit > 0.8:
            said.append(f"not reproduced: induction source hit {hit:.3f} in the worst seed")
        for arm in (*TRAINED, RANDOM):
            numbers = {m: mean(results, arm, m) for m in ("L0", "FVU", "delta CE", ZERO, MEAN)}
            said.append(
                f"{arm}: at L0 {numbers['L0']:.1f} the loss rises by {numbers['delta CE']:.4f} nats, FVU"
                f" {numbers['FVU']:.3f}; recovered {numbers[ZERO]:.3f} of zero's, {numbers[MEAN]:.3f} of mean's damage"
            )
        gap = mean(results, JUDGED, "zero gap")
        said.append(f"zeroing this one layer costs {gap:.3f} nats only, so a recovered share rests on a small gap")
        other = mean(results, RANDOM, HIT)
        said.append(
            f"source hit of the random dictionary's latents: {other:.3f}; where it is as high, the hit shows what the"
            " head does and that attribution finds it, not that training helps; the 0.8 band is ours"
        )
        said.append("shuffled heads: the same latents, looked at through a head drawn for each token; chance is 1 in 4")
        said.append("GPT-2 small, GELU-2L, Gemma-2B and judging latents by hand, as the paper does, are not run here")
        return said


def _worst(results: Results, metric: str) -> float:
    """The worst seed's value at its best trained arm with L0 < 20 (best by recovery from zeros); NaN without one."""
    values = []
    for seed in results[JUDGED]:
        arms = [r for a in TRAINED if (r := results[a][seed])["L0"] < 20 and not math.isnan(r[ZERO])]
        values.append(max(arms, key=lambda r: r[ZERO])[metric] if arms else math.nan)
    return math.nan if any(map(math.isnan, values)) else min(values)


def _above(value: float, least: float) -> bool | None:
    return None if math.isnan(value) else value > least


# ---- subjects, shared by the arms of a process
@functools.lru_cache(maxsize=2)
def text_subject(quick: bool) -> tuple[Subject, TextTokens]:
    """The byte model and its text."""
    name = "tiny-30s" if quick else "tiny"
    subject = open_subject(str(tiny_subject(name, 8 if quick else None)))
    made: Any = subject  # a subject that is open already stands for its name
    return subject, Activations(made, SITE, "stdlib:docs" if quick else "stdlib").source  # type: ignore[return-value]


@functools.lru_cache(maxsize=2)
def induction_subject(quick: bool) -> tuple[Subject, float]:
    """The attention-only model and its loss on repeats."""
    return attention_model(4 if quick else 250)


# ---- dictionaries
def _feed(subject: Any, source: Any, seed: int, buffer: int, **more: Any) -> Activations:
    size = 128 if more.get("analysis") else 512
    return Activations(subject, SITE, source, batch_size=size, buffer=buffer, seed=seed, **more)


def _trained(settings: Mapping[str, Any], data: Activations, latents: int, steps: int, seed: int) -> Model:
    """One arm's dictionary; a random one keeps its random rows and starts its bias as the others do."""
    seed_everything(seed, verbose=False)
    k = settings.get("k")
    encoder = SparseEncoder(latents, TopK(k) if k else ReLU())
    objective = SparseReconstruction(l1=settings.get("l1", 0.0), auxk=0.0)
    optimizer = functools.partial(torch.optim.Adam, lr=0.0 if settings.get("random") else 1e-3)
    model = Model(encoder, SparseDecoder(), objective, optimizer=optimizer, schedule=CosineWarmupRewarm(steps=50))
    with quiet():
        arm_trainer(max_steps=1 if settings.get("random") else steps).fit(model, datamodule=data)
    return model.eval()


def _fidelity(settings: Mapping[str, Any], seed: int, quick: bool) -> dict[str, float]:
    subject, text = text_subject(quick)
    data = _feed(subject, text, seed, 2048 if quick else 32_768)
    model = _trained(settings, data, 384, 8 if quick else 700, seed)
    card = measure(model.encoder, model.decoder, data, tokens=1024 if quick else 20_000)
    names = {"L0": "l0", "FVU": "fvu", "dead": "dead", "delta CE": "delta_ce", ZERO: "recovered_zero"}
    names |= {MEAN: "recovered_mean"}
    found = {ours: card.numbers[name] for ours, name in names.items()}
    return {**found, "zero gap": card.numbers["ce_zero"] - card.numbers["ce_clean"]}
