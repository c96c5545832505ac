"""The pure part: bags, chunks, running maxima, the decoder's layer. Numbers are from the spec."""

from __future__ import annotations

import math

import pytest
import torch

from quire_dupmae.embedding import HybridEmbedding, Vectors, keep_largest, scores
from quire_dupmae.modules import HIDDEN, DuplexLayer, bag_loss, bag_weights, chunked_cross_entropy, pooled_logits

IDS = torch.tensor([[7, 7, 9, 0, 0]])
REAL = torch.tensor([[True, True, True, False, False]])


@pytest.mark.parametrize(("target", "wanted"), [("frequency", 1.33442), ("set", 1.50108)])
def test_the_bag_s_loss_by_hand(target, wanted):
    logits = torch.zeros(1, 12)
    logits[0, 7], logits[0, 9] = 2.0, 1.0
    assert bag_loss(logits, IDS, REAL, target).item() == pytest.approx(wanted, abs=1e-5)


def test_uniform_logits_over_bert_s_vocabulary_cost_its_logarithm():
    assert bag_loss(torch.zeros(1, 30522), IDS, REAL).item() == pytest.approx(10.3262, abs=1e-4)


@pytest.mark.parametrize("target", ["frequency", "set"])
def test_the_bag_sums_to_one_its_loss_is_at_least_its_entropy_and_padding_changes_nothing(target):
    weights = bag_weights(IDS, REAL, target)
    assert weights.sum(1).tolist() == [1.0]
    bag = torch.zeros(1, 12).scatter_add(1, IDS, weights)
    entropy = -(bag[bag > 0] * bag[bag > 0].log()).sum()
    best = bag_loss(bag.clamp(min=1e-30).log(), IDS, REAL, target)
    assert best.item() == pytest.approx(entropy.item(), abs=1e-5)
    other = torch.randn(1, 12, generator=torch.Generator().manual_seed(0))
    assert bag_loss(other, IDS, REAL, target) > entropy
    assert torch.equal(bag_loss(other, IDS[:, :3], REAL[:, :3], target), bag_loss(other, IDS, REAL, target))


def test_repeats_weigh_more_by_frequency_and_not_in_the_set():
    assert bag_weights(IDS, REAL, "frequency")[0, :3].tolist() == pytest.approx([1 / 3] * 3)
    assert bag_weights(IDS, REAL, "set")[0, :3].tolist() == pytest.approx([0.25, 0.25, 0.5])


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_chunks_change_neither_the_loss_nor_its_gradient(chunk):
    torch.manual_seed(0)
    head, labels = torch.nn.Linear(8, 40), torch.randint(0, 40, (30,))
    whole, parts = (torch.randn(30, 8, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in "ab")
    expected = torch.nn.functional.cross_entropy(head(whole), labels)
    found = chunked_cross_entropy(parts, labels, head, chunk)
    assert found.item() == pytest.approx(expected.item(), abs=1e-6)
    found.backward(), expected.backward()
    assert torch.allclose(parts.grad, whole.grad, atol=1e-7)


def test_no_tokens_cost_nothing_and_stay_attached():
    hidden = torch.zeros(0, 8, requires_grad=True)
    loss = chunked_cross_entropy(hidden, torch.zeros(0, dtype=torch.long), torch.nn.Linear(8, 4), 16)
    assert loss.item() == 0.0 and loss.requires_grad


@pytest.mark.parametrize("chunk", [2, 5, 1000])
def test_the_running_maximum_is_the_maximum_over_kept_tokens(chunk):
    torch.manual_seed(0)
    head, hidden = torch.nn.Linear(8, 40), torch.randn(2, 9, 8, requires_grad=True)
    keep = torch.tensor([[True] * 9, [True] * 4 + [False] * 5])
    found = pooled_logits(hidden, keep, head, chunk)
    expected = torch.stack([head(hidden[0]).amax(0), head(hidden[1, :4]).amax(0)])
    assert torch.allclose(found, expected, atol=1e-6)
    (gradient,) = torch.autograd.grad(found.sum(), hidden)
    assert not gradient[1, 4:].any()  # a maximum over padded zeros would reach them
    assert pooled_logits(hidden, torch.zeros_like(keep), head, chunk).max() < HIDDEN / 2


def test_the_layer_looks_only_where_it_may_and_its_residual_is_the_query():
    torch.manual_seed(0)
    layer = DuplexLayer(8, 2, 16, 0.0)
    queries, contents = torch.randn(1, 4, 8), torch.randn(1, 4, 8, requires_grad=True)
    visible = torch.rand(1, 4, 4) < 0.5
    visible[0, :, 0] = True
    out = layer(queries, contents, visible)
    for i in range(4):
        (gradient,) = torch.autograd.grad(out[0, i].square().sum(), contents, retain_graph=True)
        assert torch.equal(gradient[0].abs().sum(1) > 0, visible[0, i])
    with torch.no_grad():
        for part in (layer.out, layer.down):
            part.weight.zero_()
        assert torch.allclose(layer(queries, contents, visible), layer.norm2(layer.norm1(queries)))


# ---- the hybrid score
H_Q, H_D = torch.tensor([[0.5, -1.0]]), torch.tensor([[1.0, 2.0]])
U_Q, U_D = torch.tensor([[0.0, 3.0, -1.0, 2.0, 0.5]]), torch.tensor([[1.0, -2.0, 4.0, 0.5, 3.0]])


@pytest.mark.parametrize(("k", "wanted"), [(0, -1.5), (2, -4.0), (5, -9.0)])  # by hand, in the spec
def test_the_score_is_dense_plus_the_document_s_k_terms(k, wanted):
    kept = keep_largest(U_D, k) if k else U_D[:, :0]
    query = Vectors(H_Q, U_Q if k else U_Q[:, :0])
    assert scores(query, Vectors(H_D, kept)).item() == pytest.approx(wanted)
    together = torch.cat([H_Q, query.lexical], 1) @ torch.cat([H_D, kept], 1).T
    assert together.item() == pytest.approx(wanted)


def test_all_terms_kept_are_the_exact_inner_product():
    assert torch.equal(keep_largest(U_D, 5), U_D)
    assert keep_largest(U_D, 2).nonzero()[:, 1].tolist() == [2, 4]


@pytest.mark.parametrize(
    ("activation", "wanted"), [("none", -0.5), ("relu", 0.0), ("log1p_relu", 0.0), ("log1p_relu", math.log(3))]
)
def test_activations_of_a_pooled_logit(activation, wanted):
    logit = 2.0 if wanted > 1 else -0.5

    class Flat:
        @staticmethod
        def logits(hidden):
            return torch.full((*hidden.shape[:-1], 6), logit)

    part = HybridEmbedding(6, activation)

    class Codes:
        values, mask = torch.zeros(1, 3, 4), torch.ones(1, 3, dtype=torch.bool)

    assert part.terms(Flat(), Codes(), torch.tensor([[5, 5, 5]]), False)[0].tolist() == pytest.approx([wanted] * 6)
