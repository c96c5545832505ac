"""Context Autoencoder for Self-Supervised Representation Learning (CAE; Chen et al. 2022) as a Quire plugin."""

from __future__ import annotations

from collections.abc import Callable

from quire.hooks import hookimpl

QUIRE_API = 1


@hookimpl
def quire_components(register: Callable) -> None:
    """Objective, regressor, decoder, targets, a small tokenizer, the picture."""
    register("quire_cae.objective.ContextAutoencoding", "objective")
    register("quire_cae.regressor.LatentRegressor", "part", "regressor")
    register("quire_cae.decoder.MaskedTokenDecoder", "decoder", "MaskedTokenDecoder")
    register("quire_cae.kmeans.KMeansPatches", "part", "target")
    register("quire_cae.hog.HogTarget", "part", "target")
    register("quire_cae.dalle.DalleTokenizer", "part", "target")
    register("quire_cae.clip.ClipTarget", "part", "target")
    register("quire_cae.vq.TokenizerIds", "part", "target")
    register("quire_cae.vq.PatchTokenizer", "encoder")
    register("quire_cae.vq.PatchTokenDecoder", "decoder", "PixelDecoder")
    register("quire_cae.pictures.CompletedImages", "callback")


@hookimpl
def quire_commands(register: Callable) -> None:
    """The safe way from DALL-E's pickled weights to safetensors."""
    register("cae-tokenizer", "quire_cae.convert.main", "DALL-E's pickled encoder as safetensors, no code run")


@hookimpl
def quire_claims(register: Callable) -> None:
    """The paper's claim, scaled down to scikit-learn's digits."""
    register("cae", "quire_cae.claim.RepresentationsBeatMae")
