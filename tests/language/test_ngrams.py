from __future__ import annotations

import json

import numpy as np
import pytest
from tests.language.toys import VOCAB, batch, language_model, prompts

from quire import ConfigError, DataError
from quire.contracts import Spec
from quire.roles.language.drafters import PromptCopy
from quire.roles.language.loop import Greedy, Speculative
from quire.roles.language.ngrams import NGramStore
from quire.roles.language.proof import assert_lossless


def counted(orders=(1, 2, 3), vocab=VOCAB, fingerprint="abc", seed=0):
    store = NGramStore(list(orders))
    source = np.random.default_rng(seed)
    store.add([source.integers(0, vocab, 300).tolist() for _ in range(3)], vocab, fingerprint)
    return store


def test_a_saved_store_is_mapped_and_gives_the_same_answers(tmp_path):
    store = counted()
    again = NGramStore([1, 2, 3], path=str(store.save(tmp_path / "n.safetensors")))
    assert all(isinstance(a, np.memmap) for t in again.tables.values() for a in t.values())
    for order in (1, 2, 3):
        contexts = np.concatenate([store.tables[order]["contexts"], np.full((3, order), VOCAB - 1)])
        assert np.array_equal(again.find(order, contexts), store.find(order, contexts))
        assert isinstance(again._keys(order).base, np.memmap)  # bisection reads the file, nothing is copied
        for context in contexts[::40].tolist():
            for a, b in zip(again.successors(order, context), store.successors(order, context)):
                assert np.array_equal(a, b)
    more = counted(seed=1)
    again.merge(more)  # a mapped store can be added to
    store.merge(more)
    assert np.array_equal(again.tables[2]["counts"], store.tables[2]["counts"])
    assert np.array_equal(again.find(3, more.tables[3]["contexts"]), store.find(3, more.tables[3]["contexts"]))


def test_a_store_that_is_saved_over_itself_stays_whole(tmp_path):
    file = counted().save(tmp_path / "n.safetensors")
    again = NGramStore([1, 2, 3], path=str(file))
    again.save(file)
    assert len(NGramStore([1, 2, 3], path=str(file))) == len(again) == len(counted())


def test_an_empty_store_knows_nothing_and_can_be_saved(tmp_path):
    again = NGramStore([1, 2], path=str(NGramStore([1, 2]).save(tmp_path / "n.safetensors")))
    assert (len(again), again.likeliest([1, 2])) == (0, None)


def test_the_likeliest_token_is_behind_the_longest_known_context():
    store = NGramStore([1, 2])
    store.add([[4, 5, 6], [4, 5, 6], [9, 5, 7], [8, 5, 7], [3, 5, 7]], VOCAB)
    assert store.likeliest([5]) == 7  # 3 of 5
    assert store.likeliest([4, 5]) == 6  # behind "4 5" always
    assert store.likeliest([2, 5]) == 7
    assert store.likeliest([6]) is None


def test_prompt_copy_follows_a_corpus_where_the_context_has_no_match():
    store = NGramStore([1, 2])
    store.add([[10, 11, 12, 13, 14, 15]], VOCAB)
    copy = PromptCopy(tokens=3, corpus=store)
    model = language_model().decoder
    copy.begin(model, [[5, 10, 11]], None)
    assert copy.propose(0, [5, 10, 11], 10).tokens == [12, 13, 14]
    assert copy.propose(1, [10, 11, 20, 10], 10).tokens == [11, 20, 10]  # the context comes first
    assert copy.propose(2, [30, 31], 10) is None
    assert copy.propose(3, [5, 10, 11], 2).tokens == [12, 13]


def test_a_corpus_of_what_the_model_says_saves_passes_and_changes_no_id():
    model, rows = language_model(eos=None), prompts()
    truth = [r[0] for r in Greedy(20)(model, batch(rows)).tokens]
    store = NGramStore([1, 2, 3])
    store.add([p + t for p, t in zip(rows, truth)], VOCAB)
    plain, drafted = PromptCopy(), PromptCopy(corpus=store)
    for drafter in (plain, drafted):
        assert_lossless(model, Speculative(drafter, max_new_tokens=20), rows)
    passes = [Speculative(d, max_new_tokens=20)(model, batch(rows)).stats.target_forwards for d in (plain, drafted)]
    assert passes[1] <= passes[0] / 2


def test_an_empty_corpus_counts_the_runs_own_training_tokens():
    class Source:
        spec = Spec(vocab_size=VOCAB, tokenizer="abc", bos=1, eos=3)

        def dataset(self, split):
            import torch

            assert split == "train"
            rows = [[1, 20, 21, 22, 3, 1, 23, 24, 0, 0]]
            return [{"tokens": torch.tensor(r), "mask": torch.tensor(r) > 0} for r in rows]

    model = language_model()
    model.spec, model.datamodule = Source.spec, Source()
    copy = PromptCopy(corpus=NGramStore([1]))
    copy.bind(model)
    copy.begin(model.decoder, [[4]], None)
    assert copy.propose(0, [4, 20], 9).tokens == [21, 22, 3]  # nothing behind an end, nothing of padding
    assert copy.propose(1, [4, 23], 9).tokens == [24]
    assert copy.corpus.successors(1, [1])[0].tolist() == []
    assert copy.corpus.fingerprint == "abc"


def damaged(file, how):
    """The file's bytes with one kind of damage."""
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    if how == "cut":
        return data[: len(data) // 2]
    if how == "text":
        return b"not a store at all"
    if how == "nothing":
        return b""
    if how == "other tensors":
        header = {k: v for k, v in header.items() if not k.endswith("starts")}
    if how == "no header":
        del header["__metadata__"]
    if how == "header that is no record":
        header["__metadata__"] = {"quire": '["orders"]'}
    if how == "rows that do not fit":
        at = 8 + size + header["1.starts"]["data_offsets"][1]
        data = data[: at - 8] + (7).to_bytes(8, "little") + data[at:]
    if how == "rows of another kind":
        header["1.tokens"]["dtype"] = "F32"
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


@pytest.mark.parametrize(
    "how",
    [
        *("cut", "text", "nothing", "other tensors", "no header", "header that is no record"),
        *("rows that do not fit", "rows of another kind"),
    ],
)
def test_a_damaged_file_is_said_to_be_damaged(tmp_path, how):
    file = counted().save(tmp_path / "n.safetensors")
    file.write_bytes(damaged(file, how))
    with pytest.raises(DataError, match="n.safetensors is not an n-gram store, or is damaged: count it again"):
        NGramStore([1, 2, 3], path=str(file))


def test_a_store_of_another_order_vocabulary_or_tokenizer_is_named(tmp_path):
    file = counted().save(tmp_path / "n.safetensors")
    with pytest.raises(ConfigError, match=r"n.safetensors has no order 4; it has \[1, 2, 3\]"):
        NGramStore([4], path=str(file))
    with pytest.raises(ConfigError, match="no n-gram store at .*gone"):
        NGramStore([1], path=str(tmp_path / "gone"))
    copy = PromptCopy(corpus=NGramStore([1], path=str(file)))
    with pytest.raises(ConfigError, match=r"n.safetensors: .*built for vocabulary 50 \(abc\), the model has 60"):
        copy.begin(language_model(vocab_size=60).decoder, [[4]], None)
    model = language_model()
    model.spec, model.datamodule = {"vocab_size": VOCAB, "tokenizer": "xyz"}, None
    copy.bind(model)
    with pytest.raises(ConfigError, match=r"vocabulary 50 \(abc\), the model has 50 \(xyz\)"):
        copy.begin(model.decoder, [[4]], None)
    with pytest.raises(ConfigError, match="PromptCopy.corpus is an empty store and there is no data module"):
        PromptCopy(corpus=NGramStore()).begin(model.decoder, [[4]], None)
