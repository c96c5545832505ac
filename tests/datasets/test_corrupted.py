from __future__ import annotations

import itertools
import random
from collections import Counter

import pytest
import torch

from quire import ConfigError, DataError
from quire.datasets.corrupted import KINDS, CopyEdits, CorruptedText, confuse, corrupt, edited, prose
from quire.roles.language.text import BPE, Bytes

WORDS = str.split("we see there that a cat walks on red roofs")


def one(kind, at=4, words=WORDS):
    """The words with one slip of a kind, and the slip's place found by trying seeds."""
    for seed in range(500):
        out = corrupt(words, 1 / len(words), [kind], random.Random(seed))
        if out[:at] == words[:at] and out[at : at + 1] != words[at : at + 1] and out != words:
            return out
    raise AssertionError(kind)


def test_each_kind_does_what_it_says():
    assert one("drop") == str.split("we see there that cat walks on red roofs")
    assert one("swap") == str.split("we see there that cat a walks on red roofs")
    assert one("confuse")[4] in ("an", "the") and len(one("confuse")) == len(WORDS)
    doubled = [corrupt(WORDS, 0.1, ["double"], random.Random(s)) for s in range(50)]
    assert all(sum((Counter(d) - Counter(WORDS)).values()) == 1 and len(d) == len(WORDS) + 1 for d in doubled)
    assert all(any(a == b for a, b in itertools.pairwise(d)) for d in doubled)


def test_confusion_keeps_marks_and_capitals():
    chance = random.Random(0)
    assert confuse("(Their,", chance) == "(There,"
    assert confuse("cats.", chance) == "cat."
    assert confuse("roof", chance) == "roofs"
    assert confuse('"."', chance).count('"') == 2


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_ever_corrupted_away(kind):
    for words in (["a"], ["a", "b"], ["x"] * 5):
        for seed in range(30):
            assert corrupt(words, 1.0, [kind], random.Random(seed))


def test_a_swap_at_the_end_moves_the_last_word_forward():
    found = {tuple(corrupt(["x", "y"], 0.5, ["swap"], random.Random(s))) for s in range(20)}
    assert found == {("y", "x")}


@pytest.mark.parametrize("rate", [0.0, 0.05, 0.3])
def test_the_share_of_slips_is_the_rate(rate):
    words = [f"w{i}" for i in range(20)]
    changed = [len(corrupt(words, rate, ["drop"], random.Random(s))) for s in range(2000)]
    assert abs(1 - sum(changed) / (20 * 2000) - rate) < 0.005


def test_slips_are_a_function_of_seed_epoch_and_index_alone():
    data, again, other = CorruptedText(), CorruptedText(), CorruptedText(seed=1)
    train, twin, third = (d.dataset("train") for d in (data, again, other))
    first = [train.words(i) for i in range(200)]
    assert first == [twin.words(i) for i in range(199, -1, -1)][::-1]
    assert first != [third.words(i) for i in range(200)]
    train.epoch = 1
    assert first != [train.words(i) for i in range(200)]
    held, far = data.dataset("val"), other.dataset("val")
    before = [held.words(i) for i in range(100)]
    held.epoch = 1
    assert before == [held.words(i) for i in range(100)] == [far.words(i) for i in range(100)]


def test_source_is_corrupted_target_is_clean_and_lines_are_never_shared():
    data = CorruptedText(batch_size=64)
    batch = next(iter(data.test_dataloader()))
    text = Bytes().decode
    for i, pair in enumerate(data.texts("test")[:64]):
        assert text(batch["source"][i][batch["source_mask"][i]].tolist()) == pair.source
        assert text(batch["tokens"][i][batch["mask"][i]].tolist()) == pair.targets[0]
        assert batch["tokens"][i, 0] == 1
    splits = [{" ".join(w) for w in data.rows(n)} for n in ("train", "val", "test")]
    assert not (splits[0] & splits[1] or splits[0] & splits[2] or splits[1] & splits[2])
    assert sum(p.source != p.targets[0] for p in data.texts("test")) > len(splits[2]) / 3


def test_lines_fit_the_length_and_long_ones_are_cut_between_words():
    data = CorruptedText(unit="sentence", length=48, tokenizer=BPE(400))
    for name in ("train", "val"):
        assert max(len(data.tokenizer.encode(" ".join(w))) for w in data.rows(name)) <= 48
        assert min(map(len, data.rows(name))) >= 4
    loader = iter(data.train_dataloader())
    assert all(b["source"].shape[1] <= 96 and b["tokens"].shape[1] <= 50 for _, b in zip(range(4), loader))


def test_causal_rows_mark_the_corrupted_part(tmp_path):
    data = CorruptedText(causal=True, batch_size=4)
    batch = next(iter(data.train_dataloader()))
    assert set(data.fields) <= set(batch)
    for row, (start, end), prompt in zip(batch["tokens"], batch["source_span"].tolist(), batch["prompt_length"]):
        assert start == 0 and prompt == end + 1 and row[end] == 1 and (row[:end] > 3).all()


def test_only_prose_counts():
    assert prose(str.split('The "cat" (it\'s red) walks.'))
    assert not prose(str.split("x = y + 1"))
    assert not prose(str.split("A fine heading ******"))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"unit": "page"}, "unit is line or sentence, got 'page'"),
        ({"kinds": ["drop", "lose"]}, "kinds are one or more of drop, double, swap, confuse"),
        ({"kinds": []}, "kinds are one or more"),
        ({"rate": 1.5}, r"a number in \[0, 1\] or two in rising order, got 1.5"),
        ({"rate": [0.2, 0.1]}, "two in rising order"),
        ({"length": 1}, "length of at least 2"),
    ],
)
def test_arguments_out_of_range_are_refused(given, said):
    with pytest.raises(ConfigError, match=said):
        CorruptedText(**given)


def test_a_source_without_prose_is_named(tmp_path):
    (tmp_path / "a.txt").write_text("1 2 3 4 5\n" * 9)
    with pytest.raises(DataError, match="has 0 lines of prose with at least 4 words"):
        CorruptedText(str(tmp_path / "a.txt")).dataset("train")
    with pytest.raises(ConfigError, match="nothing at"):
        CorruptedText(str(tmp_path / "b.txt")).dataset("train")


@pytest.mark.parametrize(("rate", "changed"), [(0.0, 0), (0.1, 6), (0.3, 19)])  # of 64
def test_copies_have_exactly_so_many_edits(rate, changed):
    batch = CopyEdits(rate=rate, samples=64).dataset("test").__getitems__([0, 1, 2])
    source, target = batch["source"], batch["tokens"][:, 1:-1]
    assert ((source != target).sum(1) == changed).all()
    assert all(len(set(s.tolist())) == 64 for s in source)
    assert (batch["tokens"][:, 0] == 1).all() and (batch["tokens"][:, -1] == 2).all()


def test_an_edit_brings_in_an_id_that_the_source_lacks():
    ids = list(range(4, 14))
    new = edited(ids, 1.0, 20, torch.Generator().manual_seed(0))
    assert not set(new) & set(ids) and max(new) < 20


def test_copies_in_one_row_and_bad_numbers():
    row = CopyEdits(length=6, vocab_size=32, causal=True, samples=8).dataset("train")[0]
    assert row["tokens"].shape == (14,) and row["prompt_length"] == 7 and row["source_span"].tolist() == [0, 6]
    with pytest.raises(ConfigError, match="vocab_size 32 has 28 ids"):
        CopyEdits(length=28, vocab_size=32)
    with pytest.raises(ConfigError, match=r"rate in \[0, 1\]"):
        CopyEdits(rate=-0.1)
