"""n-gram probabilities of candidates, vectorised, against counting by hand."""

from collections import Counter

import numpy as np
import pytest

from quire.roles.language.ngrams import NGramStore
from quire_superposed.evidence import Evidence

A, B, C = 0, 1, 2


def by_hand(documents, lengths, weights, text, token):
    q = 0.0
    for n, w in zip(lengths, weights):
        if len(text) < n:
            continue
        context = tuple(text[-n:])
        after = Counter(d[i + n] for d in documents for i in range(len(d) - n) if tuple(d[i : i + n]) == context)
        q += w * after[token] / after.total() if after else 0.0
    return q


def test_oracle_5_the_fixture_of_two_orders():
    store = NGramStore(orders=[1, 2])
    store.add([[A, B, A, C, A, B]], 3)
    q = Evidence(store, [1, 2], [0.3, 0.7]).of(np.array([[B, A]]), np.array([[A, B, C]]))
    assert q[0] == pytest.approx([0.0, 0.2, 0.8], abs=1e-12)


@pytest.mark.parametrize("vocab", [7, 4096, 32000, 200_000])
def test_every_candidate_agrees_with_counting_by_hand(vocab):
    source = np.random.default_rng(0)
    letters = np.concatenate([np.arange(4), [vocab - 1]])
    documents = [source.choice(letters, n).tolist() for n in (300, 5, 200, 3)]
    lengths, weights = [1, 2, 3, 5, 7], [0.1, 0.2, 0.3, 0.2, 0.1]
    store = NGramStore(orders=lengths)
    store.add(documents, vocab)
    texts = [documents[0][i : i + n].copy() for i, n in ((3, 9), (50, 7), (100, 2), (20, 1))] + [[vocab - 1] * 8, []]
    tails = np.array([([-1] * 7 + t)[-7:] for t in texts])
    tokens = np.tile(letters, (len(texts), 1))
    evidence = Evidence(store, lengths, weights)
    found = evidence.of(tails, tokens)
    want = [[by_hand(documents, lengths, weights, t, int(v)) for v in letters] for t in texts]
    np.testing.assert_allclose(found, want, atol=1e-12)
    np.testing.assert_allclose(evidence.everywhere(tails, vocab)[:, letters], want, atol=1e-12)
    assert found[0].sum() > 0.5 and found[-1].sum() == 0


def test_a_store_merged_from_shards_gives_the_same():
    source = np.random.default_rng(1)
    documents = [source.integers(0, 6, 80).tolist() for _ in range(4)]
    one, two, both = (NGramStore(orders=[1, 3]) for _ in range(3))
    one.add(documents[::2], 6)
    two.add(documents[1::2], 6)
    both.add(documents, 6)
    one.merge(two)
    tails, tokens = source.integers(0, 6, (40, 3)), source.integers(0, 6, (40, 4))
    a, b = (Evidence(s, [1, 3], [0.4, 0.6]).of(tails, tokens) for s in (one, both))
    np.testing.assert_array_equal(a, b)


def test_an_empty_store_and_foreign_tokens_have_no_evidence():
    store = NGramStore(orders=[1, 2])
    store.add([], 5)
    tails, tokens = np.array([[1, 2]]), np.array([[1, 4, 9]])
    assert not Evidence(store, [1, 2], [0.5, 0.5]).of(tails, tokens).any()
    store.add([[1, 2, 4]], 5)
    evidence = Evidence(store, [1, 2], [0.5, 0.5])
    assert evidence.of(tails, tokens)[0] == pytest.approx([0, 1, 0])
    assert not evidence.of(np.array([[7, 2 + 5]]), tokens).any()


@pytest.mark.parametrize("shape", [(1, 3), (60, 9), (600, 30)])
def test_bisections_do_not_grow_with_prompts_drafts_and_candidates(shape, monkeypatch):
    source = np.random.default_rng(0)
    store = NGramStore(orders=[1, 2, 3, 4, 5])
    store.add([source.integers(0, 9, 500).tolist()], 4096)
    evidence = Evidence(store, [1, 2, 3, 4, 5], [0.1] * 5)
    calls, bisect = [], np.searchsorted

    def counted(keys, wanted):
        calls.append(wanted.shape)
        return bisect(keys, wanted)

    monkeypatch.setattr(np, "searchsorted", counted)
    rows, candidates = shape
    evidence.of(source.integers(0, 9, (rows, 5)), source.integers(0, 9, shape))
    assert calls == [(rows,), (rows, candidates)] * 5
