"""``quire reproduce ariel``: do points of the cube say more, and lose less, than points of an autoencoder?"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch

from quire.reproduce import Band, Claim, Results, mean, quiet
from quire_ariel.callbacks import picture
from quire_ariel.errors import CapacityError
from quire_ariel.grammar import LONGEST, SPECIAL
from quire_ariel.measures import Words, fidelity, interval, marks, variety, words_of
from quire_ariel.sentence import SentenceCodes
from quire_ariel.speaking import points_like, said_again, speak
from quire_ariel.trial import Trial, autoencoder, language_model

DIMS = (1, 4, 16)
CONTROL = "language model"
AE, TRANSFORMER = "autoencoder", "Transformer"
VALID, BOTH, UNIQUE, EXACT = "valid", "valid unique", "unique", "held-out exact"


def cube_of(dims: int) -> str:
    """Name of an arm of the code."""
    return f"AriEL d={dims}"


class ArielClaim(Claim):
    """Celotti et al. 2020 on questions of a small grammar: the code at three widths, its language model, autoencoders.

    The language model's own ancestral sampling is the control that matters: uniform points of the cube have its law, so
    their variety is the language model's.
    """

    paper = "AriEL: volume coding for sentence generation, L. Celotti, S. Brodeur, J. Rouat, 2020, arXiv 2003.13600"
    statement = (
        "random points of the volume code give more valid and different sentences than random points of an autoencoder "
        "or VAE of the same width, and held-out sentences come back exactly; its statistics are those of ancestral "
        "sampling of the same model, at every width"
    )
    budget = (
        "QuestionGrammar, 8000 training and 400 test sentences, V 47, 2000 points; GRU 48/128, Adam 0.002, batch 128, "
        "8 epochs for the language model, 12 for autoencoders of 16 numbers; their points uniform in the box of the "
        "training encodings, for the VAEs also N(0, 1)"
    )
    arms: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        **{cube_of(d): {"dims": d} for d in DIMS},
        CONTROL: {"dims": 0},
        AE: {},
        "VAE .01": {"kl": 0.01},
        "VAE .02": {"kl": 0.02},
        "VAE .1": {"kl": 0.1},
        TRANSFORMER: {"transformer": True},
    }
    seeds = 3
    headline = BOTH
    version = 1

    def run(self, arm: str, settings: Mapping[str, Any], seed: int, quick: bool, folder: Path) -> dict[str, float]:
        """Draw sentences and say held-out ones again; the language model is shared by the arms of a seed."""
        with quiet():
            count = 500 if quick else 2000
            if "dims" in settings:
                return _volume(language_model(seed, quick), int(settings["dims"]), count, folder)
            return _autoencoder(autoencoder(settings, seed, quick), count)

    def bands(self, results: Results) -> list[Band]:
        """Valid and varied points, exact sentences, the language model's statistics, and an autoencoder behind."""
        bands = []
        for arm in map(cube_of, DIMS):
            for name, least in ((VALID, 0.95), (BOTH, 0.9)):
                value = mean(results, arm, name)
                bands.append(Band(f"{name} of {arm}", value, f">= {least}", value >= least))
            exact = mean(results, arm, EXACT)
            bands.append(Band(f"{EXACT} of {arm}", exact, "= 1", exact == 1))
            gaps = [abs(mean(results, arm, n) - mean(results, CONTROL, n)) for n in (VALID, UNIQUE, BOTH)]
            bands.append(Band(f"{arm} from its language model, largest gap", max(gaps), "<= 0.02", max(gaps) <= 0.02))
        lead = min(mean(results, arm, BOTH) for arm in map(cube_of, DIMS)) - mean(results, AE, BOTH)
        bands.append(Band(f"{BOTH}, AriEL minus {AE}", lead, ">= 0.1", lead >= 0.1))
        return bands

    def remarks(self, results: Results) -> list[str]:
        """What variety is, which control fails with a band, the VAEs' own points, volumes at every width."""
        said = ["variety of AriEL's points is the language model's: a uniform point has exactly its ancestral law"]
        for name, least in ((VALID, 0.95), (BOTH, 0.9)):
            if any(mean(results, arm, name) < least for arm in map(cube_of, DIMS)):
                own = mean(results, CONTROL, name)
                why = (
                    "and so is the control: the language model is short of training"
                    if own < least
                    else f"the control is not ({own:.3f}): the code is at fault"
                )
                said.append(f"{name} is below {least}, {why}")
        for arm in (a for a in results if a.startswith("VAE")):
            normal, kl = mean(results, arm, f"{BOTH}, N(0,1)"), mean(results, arm, "KL")
            flat = ": collapsed" if kl < 1 else ""
            said.append(f"{arm}: {BOTH} from N(0,1) {normal:.3f}; KL {kl:.1f} nats a sentence{flat}")
        tuned = max((a for a in results if a.startswith("VAE")), key=lambda a: mean(results, a, BOTH), default="")
        if tuned:
            said.append(f"best VAE by {BOTH}: {tuned}; the order of autoencoder and VAE is no claim")
        low, high = (mean(results, cube_of(16), f"{VALID}, {end}") for end in ("low", "high"))
        said.append(
            f"{VALID} of {cube_of(16)}: 95 % bootstrap interval over points {low:.3f} to {high:.3f}, mean of seeds"
        )
        said.append("the paper's own grammar, data and numbers are not tested here")
        return said


# ---- arms
def _worth(trial: Trial, rows: Sequence[Sequence[int]]) -> dict[str, float]:
    grammar = trial.data.grammar
    drawn = words_of(rows, grammar.words, SPECIAL, {trial.eos})
    found = variety(drawn, grammar, trial.known)
    for name, each in marks(drawn, grammar).items():
        found[f"{name}, low"], found[f"{name}, high"] = interval(each)
    return found


def _again(trial: Trial) -> dict[str, float]:
    said: list[list[int]] = []
    for batch in trial.test():
        said += said_again(trial.model, batch, LONGEST + 1)
    meant = [body for batch in trial.test() for body in trial.bodies(batch)]
    found = fidelity(said, meant)
    again: list[Words] = words_of(said, trial.data.grammar.words, SPECIAL, {trial.eos})
    valid = sum(map(trial.data.grammar.valid, again)) / len(again)
    return {EXACT: found["exact"], "held-out tokens": found["tokens"], "held-out valid": valid}


def _volume(trial: Trial, dims: int, count: int, folder: Path) -> dict[str, float]:
    cube = trial.model.decoder
    chance = torch.Generator().manual_seed(trial.seed)
    if not dims:
        return _worth(trial, cube.ancestral(count, chance).rows())
    cube.latent_dim = dims
    points = torch.rand(count, dims, dtype=torch.float64, generator=chance)
    found = _worth(trial, cube.decode(points).rows()) | _again(trial)
    volumes, bits, sides = 0.0, 0.0, 1.0
    for batch in trial.test():
        try:
            codes = cube.encode(batch["tokens"], batch["mask"])
        except CapacityError:
            continue  # counted by held-out exact
        volumes += float((2**codes.log2_volume).sum())
        bits -= float(codes.log2_volume.sum())
        sides = min(sides, float((codes.high - codes.low).min()))
    picture(folder / "cube.png", trial.model, trial.data)
    return found | {"volume": volumes, "bits": bits / trial.data.held_out, "smallest side": sides}


def _autoencoder(trial: Trial, count: int) -> dict[str, float]:
    model, chance = trial.model, torch.Generator().manual_seed(trial.seed)
    with torch.no_grad():
        codes = [model.encoder(batch) for batch in trial.train()]
    vectors = torch.cat([c.vector for c in codes])
    speaker = functools.partial(speak, model.decoder, count=count, most=LONGEST + 1)
    found = _worth(trial, speaker(codes=points_like(vectors, count, chance))) | _again(trial)
    if codes[0].logvar is not None:
        normal = SentenceCodes(torch.randn(count, vectors.shape[1], generator=chance))
        found |= {
            f"{k}, N(0,1)": v for k, v in _worth(trial, speaker(codes=normal)).items() if k in (VALID, UNIQUE, BOTH)
        }
        found["KL"] = trial.divergence(codes)
    return found
