"""The weights: counting, learning, files."""

import pickle

import numpy as np
import pytest

from quire.errors import ConfigError, DataError
from quire.roles.language.ngrams import NGramStore
from quire_aded.store import Trigrams

V = 50


def entries(store):
    keys = np.repeat(store.keys, np.diff(store.starts))
    return list(zip(keys.tolist(), store.tokens.tolist(), store.weights.tolist()))


def test_rows_of_a_corpus_sum_to_one_and_never_span_documents():
    store = Trigrams.count([[1, 2, 3], [1, 2, 4], [1, 2, 4], [7, 8]], V)
    assert store.row(1, 2) == ([4, 3], pytest.approx([2 / 3, 1 / 3]))
    assert len(store) == 1 and store.row(2, 3) == ([], [])


def test_oracle_3_three_tokens_give_one_bump_and_two_none():
    store = Trigrams(V)
    store.observe([1, 2], 0.04, 3.0)
    assert len(store) == 0
    store.observe([1, 2, 3], 0.04, 3.0)
    assert len(store) == 1 and store.row(1, 2) == ([3], pytest.approx([0.04]))


def test_oracle_3_a_trigram_that_passes_through_the_window_gains_56_hundredths():
    store, text = Trigrams(V), list(range(40))
    for n in range(3, 41):
        store.observe(text[max(0, n - 16) : n], 0.04, 3.0)
    assert store.row(10, 11) == ([12], pytest.approx([0.56]))  # 14 bumps


def test_oracle_3_no_weight_exceeds_the_cap_and_delta_0_changes_nothing():
    store = Trigrams.count([[1, 2, 3]], V)
    for _ in range(100):
        store.observe([1, 2, 3, 1, 2, 4], 0.04, 3.0)
    assert store.row(1, 2) == ([3, 4], [3.0, 3.0])
    still = Trigrams.count([[1, 2, 3]], V)
    still.observe([1, 2, 4, 5], 0.0, 3.0)
    assert still.row(1, 2) == ([3], [1.0]) and not still.changed


def test_ema_keeps_a_row_a_distribution():
    store = Trigrams.count([[1, 2, 3], [1, 2, 4]], V)
    store.observe([1, 2, 4], 0.1, 3.0, "ema")
    assert store.row(1, 2) == ([4, 3], pytest.approx([0.55, 0.45]))


def test_oracle_8_saved_and_loaded_is_equal_observations_included(tmp_path):
    store = Trigrams.count([[1, 2, 3, 4, 5], [2, 3, 9]], V, "ab12")
    store.observe([2, 3, 9, 7], 0.5, 3.0)
    back = Trigrams.load(store.save(tmp_path / "m.safetensors"))
    assert (back.vocab_size, back.fingerprint, len(back)) == (V, "ab12", len(store))
    for a in range(10):
        for b in range(10):
            assert back.row(a, b)[0] == store.row(a, b)[0]
            assert back.row(a, b)[1] == pytest.approx(store.row(a, b)[1])


def test_oracle_8_two_shards_merged_equal_one_pass():
    documents = [[1, 2, 3, 1, 2, 4], [1, 2, 3, 5], [2, 3, 1, 2]]
    left, right = NGramStore([2]), NGramStore([2])
    left.add(documents[:1], V)
    right.add(documents[1:], V)
    left.merge(right)
    assert entries(Trigrams.normalised(left)) == entries(Trigrams.count(documents, V))


def test_oracle_8_the_heaviest_are_kept_on_load_ties_by_lower_id_without_renormalising(tmp_path):
    store = Trigrams.count([[1, 2, c] for c in (9, 5, 7, 3, 9)], V)
    back = Trigrams.load(store.save(tmp_path / "m.safetensors"), top=3)
    assert back.row(1, 2) == ([9, 3, 5], pytest.approx([0.4, 0.2, 0.2]))


def test_rows_are_bounded_the_rarest_and_the_oldest_go():
    store = Trigrams.count([[1, 2, 3], [1, 2, 3], [4, 5, 6], [7, 8, 9]], V, max_rows=2)
    assert len(store) == 2 and store.row(1, 2)[0] == [3] and store.row(7, 8)[0] == []
    free = Trigrams(V, max_rows=2)
    free.observe([1, 2, 3, 4, 5], 0.04, 3.0)
    assert len(free) == 2 and free.row(1, 2)[0] == [] and free.row(3, 4)[0] == [5]


def test_reading_many_rows_at_once_survives_the_bound():
    store = Trigrams.count([list(range(40))], V, max_rows=5)
    assert len(store.rows([i * V + i + 1 for i in range(30)])) == 30


def test_a_store_of_another_vocabulary_is_refused_with_both_named():
    with pytest.raises(ConfigError, match=r"built for vocab 32000 \(ab12\), model has 50257 \(cd34\)"):
        Trigrams(32000, "ab12").need(50257, "cd34")


def test_a_pickle_is_refused_and_a_missing_file_named(tmp_path):
    bad = tmp_path / "m.safetensors"
    bad.write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(DataError, match="a pickle never is"):
        Trigrams.load(bad)
    with pytest.raises(ConfigError, match="nowhere.safetensors"):
        Trigrams.load(tmp_path / "nowhere.safetensors")
