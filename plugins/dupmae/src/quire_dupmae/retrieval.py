"""What retrieval data modules share: a corpus, queries with judged documents, hard negatives, all as padded ids."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from quire.data import SPLITS, DataModule, Fields, Loader
from quire.datasets.text import ragged, token_sizes
from quire.errors import ConfigError, DataError
from quire.roles.language.text import Tokenizer
from quire_dupmae import bm25
from quire_dupmae.tokenizer import NAMES, WordPiece

FIELDS = ("tokens", "mask", "special", "word_ids", "query", "query_mask", "query_id", "positive", "positive_mask")
JUDGED = ("relevant", "gain")


@dataclass
class Query:
    """One query and what is known about it.

    Attributes:
        name: Its id.
        text: What is asked.
        relevant: Document number → gain above 0; the first one is the positive of training.
        positive: Text of the positive where it isn't the document as it stands.
        negatives: Numbers of hard negatives.
        scores: A teacher's scores of the positive and the negatives.
    """

    name: str
    text: str
    relevant: dict[int, float]
    positive: str | None = None
    negatives: list[int] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)


@dataclass
class Collection:
    """Documents by number, and the queries of each split."""

    names: list[str]
    texts: list[str]
    splits: dict[str, list[Query]]

    @functools.cached_property
    def queries(self) -> list[Query]:
        """Of all splits, in the order of their numbers."""
        return [q for name in SPLITS for q in self.splits[name]]


class RetrievalData(DataModule):
    """Documents, queries and judgements as padded ids. A subclass writes ``collect``; Xiao et al. 2022.

    A training row is a query with its positive. ``tokens`` is the positive's whole document, so the same rows serve
    pretraining. ``predict`` reads the queries of ``predict_split``; the documents come from ``documents``.

    Args:
        max_length: Tokens of a document, start and end included.
        query_length: Tokens of a query.
        tokenizer: Default a ``WordPiece`` learnt on the training documents and queries.
        negatives: Hard negatives K of each training row; 0 for none.
        negatives_from: ``bm25``, the highest-ranked documents that aren't judged relevant; or the
            ``predictions.jsonl`` that ``HybridSearch`` left for the training queries (``predict_split: train``).
        teacher: Whether rows carry ``teacher_scores`` of the positive and the negatives: the file's, or BM25's.
        predict_split: Whose queries ``predict`` answers: test, val or train.
        **kwargs: Arguments of ``DataModule``.
    """

    def __init__(
        self,
        max_length: int = 64,
        query_length: int = 32,
        tokenizer: Tokenizer | None = None,
        negatives: int = 0,
        negatives_from: str = "bm25",
        teacher: bool = False,
        predict_split: str = "test",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        mine = type(self).__name__
        for name, value in (("max_length", max_length), ("query_length", query_length)):
            if value < 3:
                raise ConfigError(f"{mine}.{name} must be at least 3 (start, a token, end), got {value}")
        if negatives < 0 or (teacher and not negatives):
            raise ConfigError(f"{mine}.negatives must be at least {int(teacher)}, got {negatives}")
        if predict_split not in SPLITS:
            raise ConfigError(f"{mine}.predict_split must be test, val or train, got {predict_split!r}")
        self.max_length, self.query_length, self.predict_split = max_length, query_length, predict_split
        self.negatives, self.negatives_from, self.teacher = negatives, negatives_from, teacher
        self._tokenizer = tokenizer or WordPiece()
        self._fitted = False
        self._collection: Collection | None = None
        more = ("negative", "negative_mask") if negatives else ()
        self.fields = (*FIELDS, *JUDGED, *more, *(("teacher_scores",) if teacher else ()))  # type: ignore[misc]

    def collect(self) -> Collection:
        """Read the source."""
        raise NotImplementedError

    # ---- texts
    @property
    def collection(self) -> Collection:
        """Documents and queries, read once, with hard negatives where they are asked for."""
        if self._collection is None:
            found = self.collect()
            for queries in found.splits.values():
                _without_unjudged(queries, type(self).__name__)
            if self.negatives:
                self._add_negatives(found)
            self._collection = found
        return self._collection

    def _add_negatives(self, found: Collection) -> None:
        mined = None if self.negatives_from == "bm25" else bm25.mined(self.negatives_from, found.names)
        queries = found.queries
        if mined is None:
            ranked = bm25.rank(found.texts, [q.text for q in queries if not q.negatives], 4 * self.negatives + 20)
        for query in queries:
            if not query.negatives:
                order = next(ranked) if mined is None else mined.get(query.name, [])
                query.negatives = [d for d in order if d not in query.relevant]
            query.negatives = query.negatives[: self.negatives]
            have = len(query.negatives)
            if have < self.negatives:  # a query with few candidates: the next documents of the corpus
                more = (d for d in range(len(found.names)) if d not in query.relevant and d not in query.negatives)
                query.negatives += [d for _, d in zip(range(self.negatives - have), more)]
            if len(query.negatives) < self.negatives:
                raise DataError(
                    f"query {query.name} has {len(query.negatives)} negatives, {self.negatives} are asked for"
                )
        if self.teacher and not all(q.scores for q in queries):
            told = bm25.scores(found.texts, [(q.text, [next(iter(q.relevant)), *q.negatives]) for q in queries])
            for query, given in zip(queries, told):
                query.scores = query.scores or given

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer, fitted on the training texts on first use.

        Raises:
            ConfigError: one without start, end or mask token.
        """
        if not self._fitted:
            train = self.collection.splits["train"]
            texts = self.collection.texts
            self._tokenizer.fit(t for q in train for t in (q.text, texts[next(iter(q.relevant))]))
            self._fitted = True
            for name in ("bos", "eos", "mask"):
                if getattr(self._tokenizer, name) is None:
                    raise ConfigError(
                        f"tokenizer {type(self._tokenizer).__name__} has no {NAMES[name]} token: use one of a masked "
                        "language model, such as WordPiece"
                    )
        return self._tokenizer

    def sizes(self) -> dict[str, Any]:
        """vocab_size, length and the special ids."""
        return token_sizes(self.tokenizer, max(self.max_length, self.query_length))

    def encode(self, texts: list[str], length: int, what: str, names: list[str]) -> tuple[Tensor, Tensor]:
        """Texts as ids [N,length] between start and end, and their mask.

        Raises:
            DataError: a text without tokens.
        """
        tok = self.tokenizer
        assert tok.bos is not None and tok.eos is not None  # checked when it was fitted
        rows = []
        for name, text in zip(names, texts):
            ids = tok.encode(text)[: length - 2]
            if not ids:
                raise DataError(f"{what} {name} has no tokens after tokenisation{self.remedy}")
            rows.append([tok.bos, *ids, tok.eos])
        return ragged(rows, length, tok.pad)

    remedy = ": remove it from the data"

    def documents(self, batch_size: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """All documents in order, as batches of ids [B,T] and mask."""
        found, size = self.collection, batch_size or 4 * self.batch_size
        for start in range(0, len(found.texts), size):
            part = slice(start, start + size)
            yield self.encode(found.texts[part], self.max_length, "document", found.names[part])

    # ---- rows
    def split(self, name: str) -> Fields:
        """One split as tensors: a row for each query and, in training, each of its positives."""
        found, tok = self.collection, self.tokenizer
        queries = found.splits[name]
        first = [next(iter(q.relevant)) for q in queries]
        names = [found.names[d] for d in first]
        tokens, mask = self.encode([found.texts[d] for d in first], self.max_length, "document", names)
        own = [found.texts[d] if q.positive is None else q.positive for q, d in zip(queries, first)]
        positive, positive_mask = self.encode(own, self.max_length, "document", names)
        asked, asked_mask = self.encode(
            [q.text for q in queries], self.query_length, "query", [q.name for q in queries]
        )
        special = ~mask
        for i in tok.special:
            special |= tokens == i
        numbers = torch.tensor([tok.words(row) for row in tokens.tolist()])
        start = sum(len(found.splits[s]) for s in SPLITS[: SPLITS.index(name)])
        rows = {
            **{"tokens": tokens, "mask": mask, "special": special, "word_ids": numbers.masked_fill(special, -1)},
            **{"query": asked, "query_mask": asked_mask, "query_id": torch.arange(len(queries)) + start},
            **{"positive": positive, "positive_mask": positive_mask, **_judgements(queries)},
        }
        if self.negatives:
            flat = [d for q in queries for d in q.negatives]
            ids, real = self.encode(
                [found.texts[d] for d in flat], self.max_length, "document", [found.names[d] for d in flat]
            )
            rows["negative"], rows["negative_mask"] = (t.view(len(queries), self.negatives, -1) for t in (ids, real))
        if self.teacher:
            rows["teacher_scores"] = torch.tensor([q.scores[: 1 + self.negatives] for q in queries])
        return Fields(**rows)

    def query_name(self, number: int) -> str:
        """The id of query ``query_id``."""
        return self.collection.queries[number].name

    def predict_dataloader(self) -> Loader:
        """The queries of ``predict_split``, in order."""
        return self.loader(self.predict_split)


def _judgements(queries: list[Query]) -> dict[str, Tensor]:
    most = max(len(q.relevant) for q in queries)
    relevant, gain = torch.full((len(queries), most), -1), torch.zeros(len(queries), most)
    for row, query in enumerate(queries):
        relevant[row, : len(query.relevant)] = torch.tensor(list(query.relevant))
        gain[row, : len(query.relevant)] = torch.tensor(list(query.relevant.values()))
    return {"relevant": relevant, "gain": gain}


def _without_unjudged(queries: list[Query], source: str) -> None:
    idle = [q.name for q in queries if not q.relevant]
    if idle:
        few = ", ".join(idle[:3]) + (", …" if len(idle) > 3 else "")
        warnings.warn(f"{source}: {len(idle)} queries have no judged document and are left out: {few}", stacklevel=3)
        queries[:] = [q for q in queries if q.relevant]
