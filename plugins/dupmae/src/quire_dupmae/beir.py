"""BeirFolder: a corpus, queries and relevance judgements in BEIR's or TREC's files."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from quire.data import expand
from quire.errors import ConfigError, DataError
from quire_dupmae.retrieval import Collection, Query, RetrievalData
from quire_dupmae.triplets import read_jsonl

FILES = {"train": ("train",), "val": ("dev", "val"), "test": ("test",)}


class BeirFolder(RetrievalData):
    """A retrieval collection: ``corpus.jsonl``, ``queries.jsonl`` and qrels, gzipped or not. Thakur et al. 2021.

    Judgements are ``qrels/{train,dev,test}.tsv`` (BEIR: query, document, grade under a header) or one ``qrels*``
    file of TREC's four columns, whose queries are then cut into splits by their order.

    Args:
        path: The folder.
        pairs: What trains: ``titles``, each document's title asks for its text, so every query stays for evaluation; or
            ``qrels``, training queries with each of their judged documents.
        drop_empty: Leave out documents without title and text; false refuses them.
        max_length: Tokens of a document, start and end included.
        query_length: Tokens of a query.
        tokenizer: Default a ``WordPiece`` learnt on the training texts.
        negatives: Hard negatives K of each row; 0 for none.
        negatives_from: ``bm25`` or the ``predictions.jsonl`` of a search over the training queries.
        teacher: Whether rows carry BM25's ``teacher_scores``.
        predict_split: Whose queries ``predict`` answers: test, val or train.
        **kwargs: Arguments of ``DataModule``.

    Returns:
        The fields of ``RetrievalTriplets``; gains [B,R] are the grades.

    Raises:
        ConfigError: a missing file, titles asked of a corpus without any.
        DataError: qrels that name absent ids, a document without tokens, a split without judged queries.
    """

    remedy = "; set data.drop_empty: true to leave such documents out"

    def __init__(
        self, path: str, pairs: Literal["titles", "qrels"] = "titles", drop_empty: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        if pairs not in ("titles", "qrels"):
            raise ConfigError(f"BeirFolder.pairs must be titles or qrels, got {pairs!r}")
        self.path, self.pairs, self.drop_empty = path, pairs, drop_empty

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """A few documents of the language reference, written to a temporary folder."""
        import tempfile

        from quire_dupmae.tuning import tiny_tuning

        run = tiny_tuning({"class_path": "Contrastive"})
        folder = write_example(Path(tempfile.mkdtemp()))
        sizes = {"max_length": 16, "query_length": 12, "batch_size": 16}
        run["data"] = {
            "class_path": "BeirFolder",
            "init_args": {"path": str(folder), "tokenizer": run["data"]["init_args"]["tokenizer"], **sizes},
        }
        return run

    def collect(self) -> Collection:
        """Read the three files and check that they speak of the same ids."""
        folder = expand(self.path)
        corpus = read_jsonl(_file(folder, "corpus"), "BeirFolder.path")
        asked = {str(r["_id"]): str(r["text"]) for r in read_jsonl(_file(folder, "queries"), "BeirFolder.path")}
        known = {str(r["_id"]) for r in corpus}
        if self.drop_empty:
            corpus = [r for r in corpus if (str(r.get("title") or "") + str(r.get("text") or "")).strip()]
        names = [str(r["_id"]) for r in corpus]
        number = {name: i for i, name in enumerate(names)}
        judged = read_qrels(folder)
        told = {d for split in judged.values() for grades in split.values() for d in grades}
        _absent(told - known, "documents that the corpus lacks")
        _absent({q for split in judged.values() for q in split} - set(asked), "queries that queries.jsonl lacks")
        graded = {
            split: [
                Query(q, asked[q], {number[d]: g for d, g in sorted(ds.items(), key=_best) if g > 0 and d in number})
                for q, ds in found.items()
            ]
            for split, found in judged.items()
        }
        unasked = set(asked) - {q for found in judged.values() for q in found}
        next(reversed(graded.values())).extend(Query(q, asked[q], {}) for q in asked if q in unasked)  # left out, aloud
        splits = self._cut(graded)
        texts = [_whole(r) for r in corpus]
        if self.pairs == "titles":
            splits["train"] = _titles(corpus, names)
        for split, found in splits.items():
            if not any(q.relevant for q in found):
                raise DataError(f"BeirFolder: no query of the {split} split has a judged document")
        return Collection(names, texts, splits)

    def _cut(self, graded: dict[str, list[Query]]) -> dict[str, list[Query]]:
        if self.pairs == "qrels" and "train" in graded:
            graded["train"] = _one_each(graded["train"])
        if {"val", "test"} <= set(graded):
            return {"train": graded.get("train", []), "val": graded["val"], "test": graded["test"]}
        whole = [q for found in graded.values() for q in found]
        if self.pairs == "titles":  # every query is for evaluation
            return {"train": [], "val": whole[::5], "test": [q for i, q in enumerate(whole) if i % 5]}
        test = [q for i, q in enumerate(whole) if i % 5 > 2]
        return {"train": _one_each([q for i, q in enumerate(whole) if i % 5 < 2]), "val": whole[2::5], "test": test}


def _best(graded: tuple[str, float]) -> float:
    return -graded[1]


def _one_each(queries: list[Query]) -> list[Query]:
    """A training row for each judged document: it comes first, the others stay relevant."""
    return [
        Query(q.name, q.text, {d: q.relevant[d], **{o: g for o, g in q.relevant.items() if o != d}})
        for q in queries
        for d in q.relevant
    ]


def _whole(row: dict[str, Any]) -> str:
    title, text = str(row.get("title") or "").strip(), str(row.get("text") or "").strip()
    return text if text.startswith(title) else f"{title} {text}".strip()


def _titles(corpus: list[dict[str, Any]], names: list[str]) -> list[Query]:
    found = []
    for i, row in enumerate(corpus):
        title, body = str(row.get("title") or "").strip(), _whole(row)
        rest = body[len(title) :].strip(" .\n")
        if title and rest:  # the query must not stay in its document
            found.append(Query(f"title of {names[i]}", title, {i: 1.0}, rest))
    if not found:
        raise ConfigError("BeirFolder.pairs is titles, but no document has a title and a text: set pairs: qrels")
    return found


def _file(folder: Path, name: str) -> Path:
    for ending in (".jsonl", ".jsonl.gz"):
        if (folder / f"{name}{ending}").is_file():
            return folder / f"{name}{ending}"
    raise ConfigError(f"BeirFolder.path: {folder} has no {name}.jsonl or {name}.jsonl.gz")


def _absent(ids: set[str], what: str) -> None:
    if ids:
        raise DataError(
            f"the qrels name {len(ids)} {what}: {', '.join(sorted(ids)[:3])}{', …' if len(ids) > 3 else ''}"
        )


def read_qrels(folder: Path) -> dict[str, dict[str, dict[str, float]]]:
    """Split → query → document → grade; one file without a split's name is ``all``.

    Raises:
        ConfigError: no qrels.
        DataError: a line of another form.
    """
    named = {
        split: file
        for split, words in FILES.items()
        for word in words
        if (file := folder / "qrels" / f"{word}.tsv").is_file()
    }
    single = sorted(f for f in folder.glob("qrels*") if f.is_file())
    if not named and len(single) != 1:
        have = "several qrels files" if single else "neither qrels/test.tsv nor a qrels file"
        raise ConfigError(f"BeirFolder.path: {folder} has {have}: it takes qrels/*.tsv or one file")
    files = named or {"all": single[0]}
    found: dict[str, dict[str, dict[str, float]]] = {}
    for split, file in files.items():
        grades: dict[str, dict[str, float]] = {}
        for place, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            cells = line.split()
            if not cells or (place == 1 and not _number(cells[-1])):  # BEIR's header
                continue
            if len(cells) not in (3, 4) or not _number(cells[-1]):
                raise DataError(f"{file}, line {place}: needs query, document, grade (or TREC's four columns)")
            grades.setdefault(cells[0], {})[cells[-2]] = float(cells[-1])
        found[split] = grades
    return found


def _number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def write_example(folder: Path) -> Path:
    """A small collection in BEIR's form, of the language reference that every Python carries."""
    import json
    from pydoc_data.topics import topics

    names = [k for k in sorted(topics) if len(topics[k].split()) > 60][:40]
    (folder / "qrels").mkdir(parents=True)
    with (folder / "corpus.jsonl").open("w", encoding="utf-8") as corpus:
        for name in names:
            title, _, text = topics[name].strip().partition("\n")
            corpus.write(json.dumps({"_id": name, "title": title, "text": " ".join(text.split())}) + "\n")
    with (folder / "queries.jsonl").open("w", encoding="utf-8") as queries:
        for name in names:
            asked = " ".join(topics[name].split()[-8:])
            queries.write(json.dumps({"_id": f"q-{name}", "text": asked}) + "\n")
    for split, chosen in (("dev", names[::2]), ("test", names[1::2])):
        lines = ["query-id\tcorpus-id\tscore", *(f"q-{n}\t{n}\t1" for n in chosen)]
        (folder / "qrels" / f"{split}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder
