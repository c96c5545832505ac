"""HybridSearch: embed a corpus once, keep it as an index, rank documents by exact inner product."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning.pytorch import Callback
from scipy import sparse

from quire.contracts import Batch, Sampler
from quire.data import expand
from quire.errors import ConfigError
from quire.roles.tokens.contract import TokenEncoder
from quire_dupmae.embedding import HybridEmbedding, Vectors
from quire_dupmae.retrieval import RetrievalData

if TYPE_CHECKING:
    from quire.model import Model


@dataclass
class Index:
    """An embedded corpus.

    Attributes:
        names: Ids of the N documents.
        dense: [N,d] float32.
        lexical: [N,V] sparse, the kept terms.
        fingerprint: Of the weights, the embedding and the corpus.
    """

    names: list[str]
    dense: np.ndarray
    lexical: sparse.csr_array
    fingerprint: str

    def search(self, queries: Vectors, top: int) -> tuple[np.ndarray, np.ndarray]:
        """Numbers and scores [Q,top] of the best documents, best first, ties in corpus order."""
        found = queries.dense.float().cpu().numpy() @ self.dense.T
        if self.lexical.shape[1]:
            found = found + (self.lexical @ queries.lexical.float().cpu().numpy().T).T
        order = np.argsort(-found, axis=1, kind="stable")[:, :top]
        return order, np.take_along_axis(found, order, 1)

    def save(self, folder: Path) -> None:
        """Write ``dense.npy``, ``lexical.npz`` and ``index.json``."""
        folder.mkdir(parents=True, exist_ok=True)
        np.save(folder / "dense.npy", self.dense)
        sparse.save_npz(folder / "lexical.npz", self.lexical)
        said = {"names": self.names, "fingerprint": self.fingerprint}
        (folder / "index.json").write_text(json.dumps(said) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Index:
        """Read what ``save`` wrote.

        Raises:
            ConfigError: a folder that holds no index.
        """
        try:
            said = json.loads((folder / "index.json").read_text(encoding="utf-8"))
            dense, lexical = np.load(folder / "dense.npy"), sparse.load_npz(folder / "lexical.npz")
            return cls(said["names"], dense, sparse.csr_array(lexical), said["fingerprint"])
        except (OSError, ValueError, KeyError) as error:
            raise ConfigError(f"HybridSearch.index: {folder} holds no index ({error}): delete it") from error


class _Forget(Callback):
    """Drop an index that earlier weights made."""

    def __init__(self, search: HybridSearch) -> None:
        self.search = search

    def on_predict_start(self, trainer: Any, pl_module: Any) -> None:
        """Before the first query."""
        self.search.refer("made", None)


class HybridSearch(Sampler):
    """Rank the data module's documents for each query, exactly, by dense plus lexical inner product. Xiao et al. 2022.

    The corpus is embedded when the first query comes. Needs a data module with documents, such as RetrievalTriplets or
    BeirFolder, and one query a row.

    Args:
        index: Folder of the index: read where it exists, else written; null writes ``index`` beside the run's log,
            where there is one.
        top: Documents of each ranking.
        embedding: How texts become vectors; null is the dense vector alone.

    Needs:
        encoder: TokenEncoder, with ``lm_head`` for a lexical part. Fields: query, query_mask, query_id.

    Returns:
        A row for each query: query (its id), documents (ids, best first), numbers (their places in the corpus), scores.

    Raises:
        ConfigError: a data module without documents, an index of other weights or documents.
    """

    encoder: TokenEncoder
    fields = ("query", "query_mask", "query_id")

    def __init__(self, index: str | None = None, top: int = 1000, embedding: HybridEmbedding | None = None) -> None:
        super().__init__()
        if top < 1:
            raise ConfigError(f"HybridSearch.top must be at least 1, got {top}")
        self.index, self.top, self.embedding = index, top, embedding or HybridEmbedding(lexical_k=0)
        self.refer("made", None)

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """Contrastive training on docstrings, then search."""
        from quire_dupmae.tuning import Contrastive

        return Contrastive.tiny()

    def check(self, model: Model) -> None:
        """The lexical part needs a vocabulary head."""
        for capability in sorted(self.embedding.needs() - set(model.encoder.capabilities)):
            name = type(model.encoder).__name__
            raise ConfigError(f"HybridEmbedding needs {capability!r} of {name}: set lexical_k: 0")

    def callbacks(self) -> list[Callback]:
        """An index lives for one run of ``predict``."""
        return [_Forget(self)]

    def forward(self, model: Model, batch: Batch) -> list[dict[str, Any]]:
        """Rankings of one batch of queries."""
        data = model.datamodule
        if not isinstance(data, RetrievalData):
            have = "there is none" if data is None else f"{type(data).__name__} has none"
            raise ConfigError(
                f"HybridSearch needs a data module with documents; {have}: use RetrievalTriplets or BeirFolder"
            )
        if self.made is None:
            self.refer("made", self._open(model, data))
        index: Index = self.made
        queries = self.embedding(model.encoder, batch["query"], batch["query_mask"], query=True)
        numbers, values = index.search(queries, self.top)
        names = [data.query_name(i) for i in batch["query_id"].tolist()]
        return [
            {"query": q, "documents": [index.names[i] for i in row], "numbers": row, "scores": told}
            for q, row, told in zip(names, numbers.tolist(), values.tolist())
        ]

    def _open(self, model: Model, data: RetrievalData) -> Index:
        mark = self.fingerprint(model, data)
        folder = None if self.index is None else expand(self.index)
        if folder is not None and (folder / "index.json").exists():
            found = Index.load(folder)
            if found.fingerprint != mark:
                raise ConfigError(
                    f"HybridSearch.index: {folder} was made by other weights, settings or documents: delete it, or "
                    "give another folder"
                )
            return found
        found = embed_corpus(model, data, self.embedding, mark)
        trainer = model.trainer
        if folder is None and trainer.loggers:
            folder = Path(trainer.log_dir or ".") / "index"  # asked on every rank: it waits for rank 0
        if folder is not None and trainer.is_global_zero:
            found.save(folder)
        return found

    def fingerprint(self, model: Model, data: RetrievalData) -> str:
        """12 hex digits over the encoder's weights, the embedding's settings, the documents and their length."""
        digest = hashlib.sha256()
        for name, value in model.encoder.state_dict().items():
            digest.update(name.encode())
            digest.update(value.detach().float().cpu().numpy().tobytes())
        part = self.embedding
        digest.update(repr((part.lexical_k, part.lexical_activation, part.dense, data.max_length)).encode())
        for name, text in zip(data.collection.names, data.collection.texts):
            digest.update(f"{name}\0{text}\0".encode())
        return digest.hexdigest()[:12]


@torch.no_grad()
def embed_corpus(model: Model, data: RetrievalData, embedding: HybridEmbedding, fingerprint: str = "") -> Index:
    """Embed all documents of a data module with the model's encoder."""
    dense, lexical = [], []
    for tokens, mask in data.documents():
        found = embedding(model.encoder, tokens.to(model.device), mask.to(model.device))
        dense.append(found.dense.float().cpu().numpy())
        lexical.append(sparse.csr_array(found.lexical.float().cpu().numpy()))
    together = sparse.vstack(lexical) if lexical[0].shape[1] else sparse.csr_array((sum(map(len, dense)), 0))
    return Index(list(data.collection.names), np.concatenate(dense), sparse.csr_array(together), fingerprint)
