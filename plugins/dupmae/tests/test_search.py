"""Search and what judges it: hand-made rankings, an index that is kept, and one that is stale."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from dupmae_toys import encoder
from scipy import sparse

from quire import ConfigError, Losses, Model
from quire.reproduce import arm_trainer
from quire_dupmae import bm25
from quire_dupmae.embedding import HybridEmbedding, Vectors
from quire_dupmae.metrics import MRR, NDCG, RecallAtK, discounted_gain, recall
from quire_dupmae.search import HybridSearch, Index
from quire_dupmae.tokenizer import WordPiece
from quire_dupmae.triplets import RetrievalTriplets


def data(**more):
    return RetrievalTriplets(limit=60, max_length=16, query_length=12, tokenizer=WordPiece(400), **more)


def ran(sampler, module, metrics=(), source=None):
    """What predict gives, and the model."""
    source = source or data()
    model = Model(encoder=module, sampler=sampler, metrics=list(metrics), spec=source.spec)
    trainer = arm_trainer()
    rows = [row for batch in trainer.predict(model, datamodule=source) for row in batch]
    return rows, model, source


# ---- metrics
def test_relevant_at_ranks_1_3_and_none_is_a_reciprocal_rank_of_4_9ths():
    metric = MRR(10)
    for ranking in ([5, 1, 2], [1, 2, 5], [1, 2, 3]):
        metric.update(ranking, {5: 1.0})
    assert metric.compute().item() == pytest.approx(0.4444, abs=1e-4)
    assert metric.label == "MRR@10"


def test_one_relevant_at_rank_2_is_an_ndcg_of_063():
    assert discounted_gain([1, 5], {5: 1.0}, 10) == pytest.approx(0.6309, abs=1e-4)


def test_gains_are_linear_and_the_best_order_is_cut_off_too():
    gains = {1: 3.0, 2: 1.0}
    assert discounted_gain([2, 1], gains, 10) == pytest.approx((1 + 3 / np.log2(3)) / (3 + 1 / np.log2(3)))
    assert discounted_gain([9, 1], {i: 1.0 for i in range(1, 9)}, 2) == pytest.approx(
        (1 / np.log2(3)) / (1 + 1 / np.log2(3))
    )


def test_the_cutoff_counts_and_a_query_without_relevant_documents_does_not():
    metric = MRR(2)
    metric.update([1, 2, 5], {5: 1.0})
    metric.update([1, 2, 5], {5: 0.0})
    assert metric.compute().item() == 0.0 and metric.count == 1
    assert recall([1, 5, 7, 9], {5: 1.0, 9: 2.0, 3: 1.0, 1: 0.0}, 3) == pytest.approx(1 / 3)
    assert torch.isnan(NDCG().compute())
    with pytest.raises(ConfigError, match=r"RecallAtK.cutoff must be at least 1, got 0"):
        RecallAtK(0)


def test_in_validation_a_batch_s_own_documents_are_ranked_and_pretraining_has_none():
    metric = MRR()
    metric.observe(None, {}, Losses({"mlm": torch.zeros(())}))  # type: ignore[arg-type]
    assert metric.count == 0
    scores = torch.tensor([[0.0, 2.0, 1.0], [3.0, 1.0, 2.0]])
    outputs = {"scores": scores, "own": torch.tensor([2, 0])}
    metric.observe(None, {}, Losses({"contrastive": torch.zeros(())}, None, outputs))  # type: ignore[arg-type]
    assert metric.compute().item() == pytest.approx((1 / 2 + 1) / 2)


# ---- search
def test_the_index_ranks_by_dense_plus_lexical_and_breaks_ties_by_place():
    lexical = sparse.csr_array(np.array([[0.0, 2.0], [1.0, 0.0], [1.0, 0.0]], dtype=np.float32))
    index = Index(["a", "b", "c"], np.array([[1.0], [2.0], [2.0]], dtype=np.float32), lexical, "x")
    order, told = index.search(Vectors(torch.tensor([[1.0], [-1.0]]), torch.tensor([[0.0, 3.0], [0.0, 0.0]])), 2)
    assert order.tolist() == [[0, 1], [0, 1]]
    assert told.tolist() == [[7.0, 2.0], [-1.0, -2.0]]


def test_every_document_finds_itself_and_metrics_read_the_rankings():
    source = data()
    module = encoder()
    part = HybridEmbedding(lexical_k=30)
    metrics = [MRR(10), RecallAtK(60)]
    rows, model, source = ran(HybridSearch(embedding=part, top=60), module, metrics, source)
    assert len(rows) == 12 and set(rows[0]) == {"query", "documents", "numbers", "scores"}
    assert rows[0]["query"] == source.collection.splits["test"][0].name
    assert all(sorted(r["numbers"]) == list(range(60)) for r in rows)
    assert metrics[1].compute().item() == 1.0
    expected = [
        1 / (1 + r["numbers"].index(next(iter(q.relevant)))) for r, q in zip(rows, source.collection.splits["test"])
    ]
    assert metrics[0].compute().item() == pytest.approx(np.mean([e if e >= 0.1 else 0.0 for e in expected]))
    model.sampler.embedding.dense = True
    index: Index = model.sampler.made
    found = Vectors(
        torch.from_numpy(index.dense / np.linalg.norm(index.dense, axis=1, keepdims=True)), torch.zeros(60, 0)
    )
    same = Index(index.names, found.dense.numpy(), sparse.csr_array((60, 0)), "")
    assert (same.search(found, 1)[0][:, 0] == np.arange(60)).mean() == 1.0


def test_the_index_is_kept_read_again_and_refused_for_other_weights(tmp_path):
    place, module = tmp_path / "index", encoder()
    part = HybridEmbedding(lexical_k=30)
    first, model, source = ran(HybridSearch(str(place), 10, part), module)
    assert {p.name for p in place.iterdir()} == {"dense.npy", "lexical.npz", "index.json"}
    assert sparse.load_npz(place / "lexical.npz").nnz == 60 * 30
    again, _, _ = ran(HybridSearch(str(place), 10, part), module, source=source)
    assert again == first
    with torch.no_grad():
        model.encoder.module.base_model.embeddings.LayerNorm.weight.mul_(2)
    with pytest.raises(ConfigError, match="was made by other weights, settings or documents: delete it"):
        ran(HybridSearch(str(place), 10, part), module, source=source)
    (place / "dense.npy").write_bytes(b"no array")
    with pytest.raises(ConfigError, match="holds no index"):
        Index.load(place)


def test_a_run_of_predict_forgets_the_index_of_earlier_weights():
    source, module = data(), encoder()
    model = Model(encoder=module, sampler=HybridSearch(top=3), spec=source.spec)
    trainer = arm_trainer()
    first = trainer.predict(model, datamodule=source)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter))
    assert trainer.predict(model, datamodule=source) != first


def test_search_needs_a_data_module_with_documents():
    model = Model(encoder=encoder(), sampler=HybridSearch(), spec=data().spec)
    model.configure_model()
    with pytest.raises(ConfigError, match="needs a data module with documents; there is none"):
        model.sampler(model, {})
    with pytest.raises(ConfigError, match="HybridSearch.top must be at least 1"):
        HybridSearch(top=0)


def test_a_search_over_training_queries_is_mined_for_negatives(tmp_path):
    rows, _, _ = ran(HybridSearch(top=5), encoder(), source=data(predict_split="train"))
    file = tmp_path / "predictions.jsonl"
    file.write_text("\n".join(json.dumps(r) for r in rows))
    mined = data(negatives=2, negatives_from=str(file))
    query = mined.collection.splits["train"][0]
    assert query.negatives == [n for n in rows[0]["numbers"] if n not in query.relevant][:2]
    with pytest.raises(ConfigError, match="negatives_from: no file at"):
        _ = data(negatives=2, negatives_from="nowhere.jsonl").collection


def test_bm25_finds_the_document_with_the_rare_word():
    documents = ["apple tree", "apple pie recipe", "zebra stripes", "pie crust"]
    assert list(bm25.rank(documents, ["zebra", "apple pie", "nothing here"], 4)) == [[2], [1, *sorted([0, 3])], []] or (
        [r[:1] for r in bm25.rank(documents, ["zebra", "apple pie"], 4)] == [[2], [1]]
    )
    (told,) = bm25.scores(documents, [("apple pie", [1, 2])])
    assert told[0] > told[1] == 0.0
