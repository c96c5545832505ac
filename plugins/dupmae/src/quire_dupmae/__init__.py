"""DupMAE: the Duplex Masked Auto-Encoder, RetroMAE v2 (Xiao et al. 2022, arXiv 2211.08769) as a Quire plugin."""

from __future__ import annotations

from collections.abc import Callable

from quire.hooks import hookimpl

QUIRE_API = 1


@hookimpl
def quire_components(register: Callable) -> None:
    """Encoder, decoder, pretraining and fine-tuning objectives, embedding, search, data, metrics."""
    register("quire_dupmae.encoder.RetrievalEncoder", "encoder", "TokenEncoder")
    register("quire_dupmae.decoder.DuplexDecoder", "decoder")
    register("quire_dupmae.objective.DuplexAutoencoding", "objective")
    register("quire_dupmae.objective.BagOfWords", "objective")
    register("quire_dupmae.tuning.Contrastive", "objective")
    register("quire_dupmae.tuning.DistillKL", "objective")
    register("quire_dupmae.masking.WholeWordMask", "part", "word-masking")
    register("quire_dupmae.embedding.HybridEmbedding", "part", "embedding")
    register("quire_dupmae.tokenizer.WordPiece", "part", "tokenizer")
    register("quire_dupmae.search.HybridSearch", "sampler")
    register("quire_dupmae.triplets.RetrievalTriplets", "data")
    register("quire_dupmae.beir.BeirFolder", "data")
    register("quire_dupmae.metrics.MRR", "metric")
    register("quire_dupmae.metrics.NDCG", "metric")
    register("quire_dupmae.metrics.RecallAtK", "metric")
    register("quire_dupmae.pictures.TermPictures", "callback")


@hookimpl
def quire_commands(register: Callable) -> None:
    """Files that transformers and sentence-transformers read."""
    register("export-retriever", "quire_dupmae.export.main", "a checkpoint's encoder for sentence-transformers")


@hookimpl
def quire_claims(register: Callable) -> None:
    """The paper's claim, scaled down to Python's own docstrings."""
    register("dupmae", "quire_dupmae.claim.DuplexHelpsRetrieval")
