"""What ``quire matrix`` says holds: pairs that fit build, pairs that don't are refused with the reason it gives."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from quire import commands
from quire.errors import ConfigError
from quire.matching import refusal
from quire.mixing import mix
from quire.model import Model
from quire.plugins import load
from quire.testing.trial import tiny_of

KINDS = {entry.name: entry.kind for entry in load().registry}

# by role they fit; what each needs beyond that can't be read off a class
BEYOND = {
    ("TextAutoencoding", "VolumeEncoder"): "needs a VolumeDecoder",  # AriEL's two halves belong together
    ("TextAutoencoding", "Pooled"): "kl_weight",  # of a variational SentenceEncoder only
    ("CaseBasedReasoning", "VolumeEncoder"): "needs a VolumeDecoder",
    ("CaseBasedReasoning", "SentenceEncoder"): "vocab_size",  # labelled text has no vector to be reconstructed
    ("ExplainByPrototypes", "VolumeEncoder"): "needs a VolumeDecoder",
    ("ExplainByPrototypes", "SentenceEncoder"): "vocab_size",
    ("NearestMean", "VolumeEncoder"): "needs a VolumeDecoder",
    ("NearestNeighbours", "VolumeEncoder"): "needs a VolumeDecoder",
    ("MaskedReconstruction", "RetrievalEncoder"): "length",  # with target: TokenIds and a text of fixed length
    ("MaskedReconstruction", "MultiModalViT"): "channels|patch_values",  # several modalities: MaskedMultiTask
    ("ContextAutoencoding", "MultiModalViT"): "channels|patch_values",  # with one modality: configs/mixes
    ("ContextAutoencoding", "TextEncoder"): "length",  # with a masking and a target for rows
    ("ContextAutoencoding", "RetrievalEncoder"): "length",
    ("Contrastive", "MultiModalViT"): "lexical_k: 0",
    ("DistillKL", "MultiModalViT"): "lexical_k: 0",
    ("HybridSearch", "MultiModalViT"): "lexical_k: 0",
    ("PositionPrediction", "UniversalEncoder"): "adds positions",  # at every step, unless position: none
}
WHEN_RUN = {
    ("ContextAutoencoding", "FrameEncoder"): "2-D|frames",  # with a masking for rows
    ("NextToken", "HFSeq2Seq"): "source",  # Seq2SeqTokens is its objective
    ("NextToken", "Seq2SeqDecoder"): "source|codes",
    ("RoutedLoRA", "RoutedModel"): "routers are untrained",
    ("AFALoss", "SparseDictionary"): "is frozen",  # it trains encoders, and a saved dictionary is frozen by default
    ("DirectFeatureAttribution", "SparseDictionary"): "width|z site",  # with a dictionary saved for the data's site
}
WRAPPERS = ("Pooled", "SparseDictionary", "Pretrained")  # an object may hold the role that the class does not declare


def pairs() -> list[dict[str, Any]]:
    from contextlib import redirect_stdout
    from io import StringIO

    said = StringIO()
    with redirect_stdout(said):
        assert commands.matrix(["--json"]) == 0
    return json.loads(said.getvalue())


ALL = pairs()
FITS = [p for p in ALL if p["fits"] and p["asks"]]


def named(pair: dict[str, Any]) -> dict[str, list[str]]:
    return {KINDS[pair["part"]]: [pair["part"]], pair["slot"]: [pair["with"]]}


def check(pair: dict[str, Any], run: bool) -> None:
    beyond = (BEYOND | WHEN_RUN if run else BEYOND).get((pair["part"], pair["with"]))
    if beyond is None:
        config = mix(named(pair), run=run)
        assert re.search(rf"\b{pair['with']}\b", str(config["model"])) and pair["part"] in str(config["model"])
        return
    with pytest.raises(ConfigError, match=beyond):
        mix(named(pair), run=run)


@pytest.mark.parametrize("pair", FITS, ids=lambda p: f"{p['part']}-{p['with']}")
def test_a_pair_that_fits_builds(pair: dict[str, Any]) -> None:
    check(pair, run=False)


@pytest.mark.slow
@pytest.mark.parametrize("pair", FITS, ids=lambda p: f"{p['part']}-{p['with']}")
def test_a_pair_that_fits_trains(pair: dict[str, Any]) -> None:
    check(pair, run=True)


def test_a_pair_that_does_not_fit_is_refused_with_the_same_reason() -> None:
    """By ``quire mix``, which looks at the classes, and by the model, which looks at the objects."""
    refused = [p for p in ALL if not p["fits"]]
    assert len(refused) > 300
    for pair in refused:
        if "TokenEncoder" not in load().registry.entries[pair["with"]].role:  # mix may pool it
            with pytest.raises(ConfigError) as said:
                mix(named(pair), run=False)
            assert str(said.value) == pair["why"]


@pytest.mark.parametrize("objective", ["PositionPrediction", "SparseReconstruction", "CaseBasedReasoning"])
def test_the_model_says_what_the_matrix_says(objective: str) -> None:
    said = []
    for pair in ALL:
        if pair["part"] != objective or pair["slot"] != "encoder" or pair["fits"] or pair["with"] in WRAPPERS:
            continue
        parts = tiny_of(load().registry.get(pair["with"]).load())["model"]
        parts = {
            s: {"class_path": p} if isinstance(p, str) else p for s, p in parts.items() if s in ("encoder", "decoder")
        }
        if parts["encoder"]["class_path"].rpartition(".")[2] != pair["with"]:
            continue  # its own example shows it inside another part
        made = Model(**parts)
        said.append(refusal(load().registry.get(objective).load(), "encoder", made.encoder))
        assert said[-1] == pair["why"]
    assert len(said) > 3
