"""A dictionary from another project's files, standing where an encoder or a decoder is expected."""

from __future__ import annotations

import tempfile
from typing import Any, Literal

import torch

from quire.checkpoint import fingerprint
from quire.contracts import Decoder, Encoder, Spec, build
from quire.errors import ConfigError
from quire.recipe import adopt
from quire.roles.sparse.decoder import SparseDecoder
from quire.roles.sparse.encoder import SparseEncoder
from quire.roles.sparse.formats.files import read, write
from quire.roles.sparse.formats.weights import fill_decoder, fill_encoder, selector_of, spec_of
from quire.roles.sparse.selector import tiny_run

FORMAT = Literal["auto", "saelens", "dictionary_learning", "sparsify", "attention"]


class SparseDictionary(Encoder, Decoder):
    """Half of a dictionary in SAELens', dictionary_learning's, sparsify's or the attention-SAE release's files.

    What is made is a SparseEncoder or SparseDecoder with these weights; a new checkpoint holds them, so it reloads when
    the file is gone. Quire's own checkpoints are read by ``Pretrained``.

    Args:
        path: A folder, or either file of an attention-SAE pair.
        part: ``"encoder"`` or ``"decoder"``.
        format: Which format; ``"auto"`` goes by the files.
        freeze: Keep it in eval mode without gradients.

    Returns:
        As SparseEncoder, codes [N,K]; as SparseDecoder, [N,D].

    Raises:
        ConfigError: files that are no dictionary, hold code, or ask for something that Quire has no part for.
    """

    fields = ("activation",)

    def __new__(cls, path: str, part: str = "encoder", format: FORMAT = "auto", freeze: bool = True) -> Any:
        """The loaded half, not a ``SparseDictionary``."""
        if part not in ("encoder", "decoder"):
            raise ConfigError(f"SparseDictionary.part must be encoder or decoder, got {part!r}")
        weights, file = read(path, format)
        made: SparseEncoder | SparseDecoder
        if part == "encoder":
            made = SparseEncoder(
                latents=len(weights.W_enc),
                selector=selector_of(weights),
                subtract_bias=weights.subtract_bias and weights.b_dec is not None,
                encoder_bias=weights.b_enc is not None,
                norm=weights.norm,  # type: ignore[arg-type]
            )
        else:
            unit = bool(((weights.W_dec.float().norm(dim=1) - 1).abs() < 1e-3).all())
            made = SparseDecoder(bias=weights.b_dec is not None, unit_norm=unit)
        spec = spec_of(weights)
        build(made, Spec(spec))
        fill_encoder(made, weights) if isinstance(made, SparseEncoder) else fill_decoder(made, weights)
        origin = {
            "path": str(path),
            "sha256": fingerprint(file),
            "spec": spec,
            "freeze": freeze,
            "layer_decay": None,
            "metadata": weights.metadata,
        }
        adopt(made, origin)
        return made

    def __init__(self, path: str, part: str = "encoder", format: FORMAT = "auto", freeze: bool = True) -> None:
        super().__init__()  # read by the YAML parser; __new__ returns another class, so it never runs

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """A dictionary written to a temporary folder, its decoder trained further under a frozen encoder."""
        from quire.model import Model
        from quire.roles.sparse.selectors import TopK

        torch.manual_seed(0)
        model = Model(encoder=SparseEncoder(24, TopK(2)), decoder=SparseDecoder(), spec=Spec(width=8))
        model.configure_model()
        path = str(write(model, tempfile.mkdtemp()))
        run = tiny_run({"class_path": "TopK", "init_args": {"k": 2}})
        given = {"class_path": "SparseDictionary", "init_args": {"path": path}}
        loose = {**given["init_args"], "part": "decoder", "freeze": False}  # type: ignore[dict-item]
        run["model"] |= {"encoder": given, "decoder": {**given, "init_args": loose}}
        return run
