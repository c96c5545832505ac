"""Fine-tuning: who is a negative of whom, what is gathered, what the teacher says."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from dupmae_toys import SPEC, encoder, texts

from quire import ConfigError, Model
from quire.contracts import Spec, build
from quire.roles.tokens.text import TextEncoder
from quire_dupmae.embedding import HybridEmbedding
from quire_dupmae.tuning import Contrastive, DistillKL, warn_of_twins


def model(objective, **given):
    made = Model(encoder=given.get("encoder", encoder(dense_dim=8)), objective=objective, spec=SPEC)
    made.configure_model()
    return made.eval()


def pairs(rows=4, negatives=0):
    query, positive = texts(rows, 8, seed=1), texts(rows, 12, seed=2, lengths=[12, 9, 7, 12][:rows])
    batch = {"query": query["tokens"], "query_mask": query["mask"]}
    batch |= {"positive": positive["tokens"], "positive_mask": positive["mask"]}
    if negatives:
        other = texts(rows * negatives, 12, seed=3)
        batch["negative"] = other["tokens"].view(rows, negatives, 12)
        batch["negative_mask"] = other["mask"].view(rows, negatives, 12)
    return batch


def test_every_document_of_the_batch_is_a_negative_and_the_own_one_the_answer():
    made, batch = model(Contrastive(temperature=2.0)), pairs(4, 2)
    losses = made.objective(made, batch)
    dense = [made.encoder.dense(made.encoder({"tokens": t, "mask": m})) for t, m in (
        (batch["query"], batch["query_mask"]), (batch["positive"], batch["positive_mask"]),
        (batch["negative"].flatten(0, 1), batch["negative_mask"].flatten(0, 1)))]  # fmt: skip
    scores = dense[0] @ torch.cat(dense[1:]).T / 2.0
    assert scores.shape == (4, 12)
    expected = -scores.log_softmax(1).diagonal().mean()
    assert losses["contrastive"].item() == pytest.approx(expected.item(), abs=1e-5)
    assert losses.outputs["own"].tolist() == [0, 1, 2, 3]
    assert float(losses.metrics["in_batch_accuracy"]()) == (scores.argmax(1) == torch.arange(4)).float().mean()


def test_equal_vectors_cost_the_logarithm_of_the_number_of_documents():
    made, batch = model(Contrastive()), pairs(4, 2)
    with torch.no_grad():
        made.encoder.projection.weight.zero_()
    assert made.objective(made, batch)["contrastive"].item() == pytest.approx(math.log(12), abs=1e-6)


def test_hybrid_scores_add_the_lexical_part_of_ordinary_tokens():
    part = HybridEmbedding(lexical_k=10)
    made, batch = model(Contrastive(embedding=part)), pairs()
    found = made.objective(made, batch).outputs["scores"]
    with torch.no_grad():
        logits = [made.encoder.logits(made.encoder({"tokens": t, "mask": m})) for t, m in (
            (batch["query"], batch["query_mask"]), (batch["positive"], batch["positive_mask"]))]  # fmt: skip
        asked = logits[0][:, 1:-1].amax(1)  # without start and end
        kept = torch.stack(
            [row[1 : n - 1].amax(0) for row, n in zip(logits[1], batch["positive_mask"].sum(1).tolist())]
        )
        top = kept.topk(10).indices
        lexical = torch.stack([(q * d)[t].sum() for q in asked for d, t in zip(kept, top)]).view(4, 4)
    dense = model_scores(made, batch)
    assert torch.allclose(found - dense, lexical, atol=1e-3)


def model_scores(made, batch):
    part = HybridEmbedding(lexical_k=0)
    build(part, Spec({**SPEC, "codes": made.encoder.sizes()}))
    q, d = (part(made.encoder, batch[n], batch[f"{n}_mask"]) for n in ("query", "positive"))
    return q.dense @ d.dense.T


def test_gradients_reach_projection_and_vocabulary_head():
    made = model(Contrastive(embedding=HybridEmbedding(lexical_k=10))).train()
    made.objective(made, pairs())["contrastive"].backward()
    assert [n for n, p in made.named_parameters() if p.grad is None] == []


def test_a_sparse_query_keeps_its_own_largest_terms_too():
    made, batch = model(Contrastive()), pairs()
    part = HybridEmbedding(lexical_k=5, sparsify_query=True)
    build(part, Spec({**SPEC, "codes": made.encoder.sizes()}))
    assert (part(made.encoder, batch["query"], batch["query_mask"], query=True).lexical != 0).sum(1).tolist() == [5] * 4
    part.sparsify_query = False
    assert (part(made.encoder, batch["query"], batch["query_mask"], query=True).lexical != 0).sum(1).min() > 5


def test_the_student_that_scores_as_its_teacher_has_no_divergence():
    made, batch = model(DistillKL(temperature=2.0)), pairs(4, 3)
    scores = made.objective(made, {**batch, "teacher_scores": torch.zeros(4, 4)}).outputs["scores"]
    own = torch.stack([torch.cat([scores[i, i : i + 1], scores[i, 4 + 3 * i : 7 + 3 * i]]) for i in range(4)])
    same = made.objective(made, {**batch, "teacher_scores": own.detach() * 4.0 / 2.0})  # the scores are divided already
    assert same["distill"].item() == pytest.approx(0.0, abs=1e-5)
    told = torch.tensor([[0.0, 1.0, 2.0, 3.0]]).expand(4, -1)
    p, q = (told / 2).softmax(1), own.softmax(1)
    other = made.objective(made, {**batch, "teacher_scores": told})
    assert other["distill"].item() == pytest.approx((p * (p / q).log()).sum(1).mean().item(), abs=1e-5)  # batchmean
    assert made.objective.weights == {"contrastive": 1e-4}


def test_duplicates_in_a_batch_are_told_as_false_negatives():
    made, batch = model(Contrastive()), pairs()
    batch["positive"][3] = batch["positive"][0]
    batch["positive_mask"][3] = batch["positive_mask"][0]
    with pytest.warns(UserWarning, match="1 of 4 documents in the batch are duplicates, which are false negatives"):
        made.objective(made, batch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_twins(torch.tensor([[1, 2], [1, 3]]))


def test_core_s_text_encoder_is_tuned_by_its_first_token():
    made = model(Contrastive(), encoder=TextEncoder(width=16, depth=1, heads=2))
    batch = pairs()
    codes = made.encoder({"tokens": batch["query"], "mask": batch["query_mask"]})
    part = made.objective.embedding
    assert torch.equal(part(made.encoder, batch["query"], batch["query_mask"]).dense, codes.values[:, 0])


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Contrastive(temperature=0), "Contrastive.temperature must be above 0, got 0"),
        (lambda: DistillKL(contrastive_weight=-1), "contrastive_weight must be at least 0"),
        (lambda: HybridEmbedding(lexical_k=-1), "lexical_k must be at least 0"),
        (lambda: HybridEmbedding(lexical_k=0, dense=False), "lexical_k must be at least 0"),
        (lambda: HybridEmbedding(lexical_activation="tanh"), "must be none, relu or log1p_relu, got 'tanh'"),
        (lambda: model(Contrastive(embedding=HybridEmbedding(40000))), "lexical_k=40000 exceeds the vocabulary 50"),
        (
            lambda: model(Contrastive(embedding=HybridEmbedding(5)), encoder=TextEncoder(lm_head=False)),
            "HybridEmbedding needs 'lm_head'; TextEncoder .*set lexical_k: 0",
        ),
    ],
)
def test_bad_arguments_are_one_sentence(make, said):
    with pytest.raises(ConfigError, match=said):
        make()
