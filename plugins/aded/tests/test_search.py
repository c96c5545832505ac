"""The tree search and what becomes of its paths."""

import random

import pytest

from quire_aded.search import Search, trie
from quire_aded.store import Trigrams

V = 50


def children(search, node=0):
    return [i for i, p in enumerate(search.parent) if p == node]


def noisy(seed=0, rows=400):
    source = random.Random(seed)
    return Trigrams.count([[source.randrange(12) for _ in range(rows)]], V)


def test_oracle_5_equal_priors_and_much_exploration_even_out_visits():
    store = Trigrams.count([[1, 2, c] for c in range(10, 15)], V)
    search = Search(store, c1=1e9)
    assert search.run(1, 2)
    visits = [search.visits[i] for i in children(search)]
    assert len(visits) == 5 and max(visits) - min(visits) <= 1 and sum(visits) == 150


def test_oracle_5_without_exploration_the_better_edge_gets_most_visits():
    store = Trigrams.count([[1, 2, 10]] * 8 + [[1, 2, 11], [1, 2, 12]], V)
    search = Search(store, c1=0.0)
    search.run(1, 2)
    visits = {search.token[i]: search.visits[i] for i in children(search)}
    assert visits[10] > sum(visits.values()) / 2


def test_oracle_5_a_fixed_seed_repeats():
    found = []
    for _ in range(2):
        search = Search(noisy())
        search.run(1, 2, seed=7)
        found.append((search.token, search.visits, search.total))
    assert found[0] == found[1]


def test_oracle_5_one_successor_a_row_drafts_the_chain_of_four():
    search = Search(Trigrams.count([list(range(1, 20))], V))
    search.run(1, 2)
    draft = trie(search.paths(24, 1), 64)
    assert draft.tokens == [3, 4, 5, 6] and draft.parents == [-1, 0, 1, 2]
    assert search.best_chain(1) == [3, 4, 5, 6]


def test_oracle_6_the_value_of_a_path_is_one_and_its_edges():
    store = Trigrams.count([[1, 2, 3], [2, 3, 4], [2, 3, 5]], V)
    search = Search(store, iterations=1)
    search.run(1, 2)
    assert search.total[0] == pytest.approx(2.5)  # 1 + 1 + .5


def test_every_descent_counts_once_on_each_node_above():
    search = Search(noisy())
    search.run(1, 2)
    assert search.visits[0] == 150
    for node in range(len(search.token)):
        below = children(search, node)
        assert sum(search.visits[i] for i in below) <= search.visits[node]
    assert max(search.level) <= 4


@pytest.mark.parametrize("nodes", [1, 2, 5, 12, 64])
def test_oracle_4_trees_are_trees_within_the_limit(nodes):
    search = Search(noisy())
    search.run(3, 4)
    draft = trie(search.paths(24, 1), nodes)
    assert 1 <= len(draft.tokens) <= nodes
    assert all(p < i for i, p in enumerate(draft.parents))
    assert len(set(zip(draft.parents, draft.tokens))) == len(draft.tokens)  # siblings distinct
    assert max(draft.depths()) <= 4
    for depth, parent in zip(draft.depths(), draft.parents):
        assert depth == (1 if parent < 0 else draft.depths()[parent] + 1)


def test_paths_with_most_distinct_tokens_go_first():
    draft = trie([[1, 2, 3, 4], [5, 5, 5], [6, 7]], 5)
    assert draft.tokens == [5, 5, 5, 6, 7]


def test_no_more_children_than_the_heaviest():
    store = Trigrams.count([[1, 2, c] for c in range(10, 40)], V)
    search = Search(store, top=12)
    search.run(1, 2)
    assert [search.token[i] for i in children(search)] == list(range(10, 22))  # ties by lower id


def test_an_unseen_bigram_has_no_tree():
    assert not Search(Trigrams(V)).run(1, 2)
