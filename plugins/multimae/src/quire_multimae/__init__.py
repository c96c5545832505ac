"""MultiMAE: Multi-modal Multi-task Masked Autoencoders (Bachmann et al., ECCV 2022) as a Quire plugin."""

from __future__ import annotations

from collections.abc import Callable

from quire.hooks import hookimpl

QUIRE_API = 1


@hookimpl
def quire_components(register: Callable) -> None:
    """Encoder, adapters, masking, decoder, objective, data."""
    register("quire_multimae.encoder.MultiModalViT", "encoder", "TokenEncoder")
    register("quire_multimae.decoder.MultiTaskDecoder", "decoder", ("CellDecoder", "MultiTaskDecoder"))
    register("quire_multimae.objective.MaskedMultiTask", "objective")
    register("quire_multimae.adapters.PatchAdapter", "part", "modality-adapter")
    register("quire_multimae.adapters.ClassMapAdapter", "part", "modality-adapter")
    register("quire_multimae.masking.DirichletMask", "part", "masking")
    register("quire_multimae.standardize.TruncatedStandardize", "part", "transform")
    register("quire_multimae.derived.DerivedModalities", "part", "transform")
    register("quire_multimae.digits.DigitModalities", "data")
    register("quire_multimae.shapes.Shapes", "data")
    register("quire_multimae.folders.PairedFolders", "data")
    register("quire_multimae.stereo.StereoCrops", "data")
    register("quire_multimae.sampler.CrossModal", "sampler")
    register("quire_multimae.pictures.ModalityPictures", "callback")


@hookimpl
def quire_commands(register: Callable) -> None:
    """Pseudo labels for PairedFolders."""
    register(
        "pseudo-label", "quire_multimae.pseudo.main", "make a modality's files from the images', for PairedFolders"
    )


@hookimpl
def quire_claims(register: Callable) -> None:
    """The paper's claim, scaled down to digits and their edges."""
    register("multimae", "quire_multimae.claim.CrossModalTransfer")
