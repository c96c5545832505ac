"""A trained encoder as folders that transformers and sentence-transformers read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from quire.commands import Arguments
from quire.errors import ConfigError
from quire_dupmae.encoder import RetrievalEncoder
from quire_dupmae.tokenizer import WordPiece


def _parts(model: Any) -> tuple[RetrievalEncoder, WordPiece, int]:
    encoder, tokenizer = model.encoder, model.tokenizer
    if not isinstance(encoder, RetrievalEncoder):
        raise ConfigError(f"export-retriever needs a RetrievalEncoder; model.encoder is {type(encoder).__name__}")
    if not isinstance(tokenizer, WordPiece):
        raise ConfigError(
            f"export-retriever needs the WordPiece tokenizer that the run used; it is {type(tokenizer).__name__}"
        )
    return encoder, tokenizer, int(encoder.built_layout.cells)


def to_transformers(model: Any, folder: str | Path) -> Path:
    """Write encoder, MLM head and tokenizer for ``AutoModelForMaskedLM`` and ``AutoTokenizer``.

    Args:
        model: A loaded model with a RetrievalEncoder and its WordPiece tokenizer.
        folder: Where to; made if missing.

    Returns:
        The folder.

    Raises:
        ConfigError: another encoder or tokenizer.
    """
    encoder, tokenizer, length = _parts(model)
    encoder.save_pretrained(folder)
    tokenizer.to_transformers(length).save_pretrained(str(folder))
    return Path(folder)


def to_sentence_transformers(model: Any, folder: str | Path) -> Path:
    """Write ``dense``, a SentenceTransformer, and ``lexical``, a SparseEncoder, beside ``transformers``.

    The dense one is Transformer, Pooling (cls or mean) and, with ``dense_dim``, Dense without bias; the lexical one the
    MLM head with SpladePooling: max over tokens of log(1 + relu(logit)), all that library has, so it equals
    ``lexical_activation: log1p_relu`` but for the start and end tokens, which it counts.

    Args:
        model: A loaded model.
        folder: Where to; made if missing.

    Returns:
        The folder.

    Raises:
        ConfigError: sentence-transformers isn't installed, another encoder or tokenizer.
    """
    try:
        from sentence_transformers import SentenceTransformer, SparseEncoder
        from sentence_transformers.base.modules import Dense, Transformer
        from sentence_transformers.sentence_transformer.modules import Pooling
        from sentence_transformers.sparse_encoder.modules import SpladePooling
    except ImportError as error:
        raise ConfigError("export-retriever needs sentence-transformers: pip install 'quire-dupmae[export]'") from error
    encoder, _, _ = _parts(model)
    target = Path(folder)
    plain = str(to_transformers(model, target / "transformers"))
    modules: list[Any] = [Transformer(plain), Pooling(encoder.width, pooling_mode=encoder.pooling)]
    if encoder.dense_dim is not None:
        import torch

        head = Dense(encoder.width, encoder.dense_dim, bias=False, activation_function=torch.nn.Identity())
        head.load_state_dict({"linear.weight": encoder.projection.weight.detach().cpu()})
        modules.append(head)
    SentenceTransformer(modules=modules, device="cpu", similarity_fn_name="dot").save(str(target / "dense"))
    masked = Transformer(plain, transformer_task="fill-mask")
    SparseEncoder(modules=[masked, SpladePooling("max")], device="cpu").save(str(target / "lexical"))
    return target


def main(argv: list[str]) -> int:
    """``quire export-retriever CHECKPOINT FOLDER [--plain]``."""
    import quire

    parser = Arguments(prog="quire export-retriever", description="write an encoder for sentence-transformers")
    parser.add_argument("checkpoint", help="a .ckpt file or a folder written by quire.export")
    parser.add_argument("folder", help="where to")
    parser.add_argument("--plain", action="store_true", help="only the folder that transformers reads")
    options = parser.parse_args(argv)
    model = quire.load(options.checkpoint)
    write = to_transformers if options.plain else to_sentence_transformers
    print(f"wrote {write(model, options.folder)}")
    return 0
