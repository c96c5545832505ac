from __future__ import annotations

import gzip
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from quire import ConfigError, DataError
from quire.data import check_batch
from quire.datasets.pair_files import in_words, numerals, read_pairs
from quire.datasets.pairs import Pairs
from quire.roles.language.contract import Caps
from quire.roles.language.rows import prompts_of, sources_of
from quire.roles.language.text import Bytes, Tokenizer

REAL = Path(os.environ.get("QUIRE_DATA", "/nowhere"))


def needs(name):
    return pytest.mark.skipif(not (REAL / name).is_dir(), reason=f"QUIRE_DATA has no {name} folder")


@pytest.fixture
def jsonl(tmp_path):
    def write(*rows, name="a.jsonl"):
        text = "\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows)
        file = tmp_path / name
        file.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
        return str(file)

    return write


def rows(count=40, **more):
    return [{"source": f"src {i}", "target": f"out {i}", **more} for i in range(count)]


def text(ids, mask):
    return Bytes().decode(ids[mask].tolist())


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_named_fields_become_source_and_framed_target(jsonl, name):
    data = Pairs(jsonl(*rows(), name=name), batch_size=4)
    batch = next(iter(data.val_dataloader()))
    assert [text(*r) for r in zip(batch["source"], batch["source_mask"])] == [p.source for p in data.texts("val")]
    assert (batch["tokens"][:, 0] == 1).all()
    assert all(t[m][-1] == 2 for t, m in zip(batch["tokens"], batch["mask"]))
    assert [text(*r) for r in zip(batch["tokens"], batch["mask"])] == [p.targets[0] for p in data.texts("val")]
    check_batch(batch)


def test_causal_rows_hold_source_start_target_end_and_say_where(jsonl):
    data = Pairs(jsonl({"source": "ab", "target": "c"}, *rows(30)), causal=True, batch_size=2)
    row = data.dataset("train")[0]
    assert row["tokens"].tolist() == [101, 102, 1, 103, 2]
    assert row["prompt_length"] == 3 and row["source_span"].tolist() == [0, 2]
    batch = {k: v[None] for k, v in row.items()}
    assert set(data.fields) == set(batch)
    assert prompts_of(batch, Caps(260)) == [[101, 102, 1]]
    assert sources_of(batch) == [[101, 102]]


def test_a_batch_is_as_wide_as_its_longest_row_and_lengths_are_said_once(jsonl):
    file = jsonl({"source": "a" * 30, "target": "b" * 9}, *rows(30))
    data = Pairs(file)
    assert data.spec["length"] == 30 + 11
    assert data.dataset("train").__getitems__([1, 2])["source"].shape == (2, 5)
    assert data.dataset("train").__getitems__([0, 2])["source"].shape == (2, 30)


def test_two_aligned_files_keep_their_lines_even_with_odd_line_marks(tmp_path):
    (tmp_path / "a.de.gz").write_bytes(gzip.compress("eins\u2028x\r\nzwei\r\ndrei\r\n".encode()))
    (tmp_path / "a.en").write_text("one\ntwo\nthree\n")
    pairs = read_pairs([str(tmp_path / "a.de.gz"), str(tmp_path / "a.en")], None, "", "")
    assert pairs == [("eins\u2028x", ("one",)), ("zwei", ("two",)), ("drei", ("three",))]


def test_scan_lines_are_commands_and_actions(tmp_path):
    (tmp_path / "a.txt").write_text("IN: jump twice OUT: I_JUMP I_JUMP\nIN: walk OUT: I_WALK\n")
    pairs = read_pairs(str(tmp_path / "a.txt"), "scan", "", "")
    assert pairs == [("jump twice", ("I_JUMP I_JUMP",)), ("walk", ("I_WALK",))]
    (tmp_path / "a.txt").write_text("IN: walk OUT: I_WALK\nwalk\n")
    with pytest.raises(DataError, match=r"a\.txt line 2 is not of the form"):
        read_pairs(str(tmp_path / "a.txt"), "scan", "", "")


def test_nested_keys_are_reached_with_a_point(jsonl):
    file = jsonl({"translation": {"de": "ja", "en": "yes"}})
    assert read_pairs(file, None, "translation.de", "translation.en") == [("ja", ("yes",))]


def test_hub_sets_are_read_by_name_config_and_split(monkeypatch):
    asked = []

    def load(name, config, split):
        asked.append((name, config, split))
        if name == "gone":
            raise OSError("no such set")
        return [{"translation": {"de": "ja", "en": "yes"}}]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load))
    keys = ("translation.de", "translation.en")
    assert read_pairs("hf:wmt/wmt14:de-en@test", None, *keys) == [("ja", ("yes",))]
    assert read_pairs("hf:own/set", None, *keys) == [("ja", ("yes",))]
    assert asked == [("wmt/wmt14", "de-en", "test"), ("own/set", None, "train")]
    with pytest.raises(DataError, match=r"hf:own/set row 0 has no key 'de', only translation: set data.source"):
        read_pairs("hf:own/set", None, "de", "en")
    with pytest.raises(ConfigError, match=r"data.path: hf:gone can't be loaded: no such set"):
        read_pairs("hf:gone", None, *keys)


def test_one_reference_is_drawn_for_each_epoch_and_all_are_kept_for_metrics(jsonl):
    file = jsonl(*({"source": f"s{i}", "target": ["x", "y", "z"]} for i in range(40)))
    data = Pairs(file)
    train = data.dataset("train")
    assert len(train) == 36
    drawn = []
    for epoch in range(3):
        train.epoch = epoch
        drawn.append([train.pair(i)[1][1] for i in range(36)])
        assert drawn[-1] == [train.pair(i)[1][1] for i in range(36)]
    assert drawn[0] != drawn[1] != drawn[2]
    assert len(set(drawn[0])) == 3
    assert all(t[1] == ord("x") + 4 for t in data.dataset("val").__getitems__([0, 1])["tokens"])
    assert data.texts("val")[0].targets == ("x", "y", "z")


def test_all_references_make_a_sample_each(jsonl):
    file = jsonl(*({"source": f"s{i}", "target": ["x", "y", "z"]} for i in range(40)))
    data = Pairs(file, references="all")
    assert len(data.dataset("train")) == 3 * 36
    assert len(data.dataset("val")) == 2


def test_no_source_is_both_trained_on_and_held_out(jsonl):
    file = jsonl(*({"source": f"s{i % 25}", "target": f"t{i}"} for i in range(100)))
    data = Pairs(file)
    seen = {p.source for p in data.texts("train")}
    assert not seen & {p.source for name in ("val", "test") for p in data.texts(name)}
    assert sum(len(data.texts(n)) for n in ("train", "val", "test")) == 100


def test_given_splits_are_used_and_only_missing_ones_are_held_out(jsonl):
    path, test = jsonl(*rows(40)), jsonl(*rows(7), name="t.jsonl")
    data = Pairs(path, test=test)
    assert [len(data.texts(n)) for n in ("train", "val", "test")] == [36, 4, 7]
    data = Pairs(path, val=test, test=test)
    assert [len(data.texts(n)) for n in ("train", "val", "test")] == [40, 7, 7]


def test_rows_over_the_limit_are_refused_cut_or_dropped(jsonl):
    file = jsonl({"source": "long source", "target": "long target"}, *rows(30))
    with pytest.raises(DataError, match=r"pair 0 of train has 11 source tokens, the limit is 8: raise data.source_len"):
        Pairs(file, source_length=8).dataset("train")
    with pytest.raises(DataError, match=r"13 target tokens, the limit is 9: raise data.target_length"):
        Pairs(file, target_length=9).dataset("train")
    cut = Pairs(file, source_length=8, target_length=9, long="cut")
    row = cut.dataset("train").__getitems__([0])
    assert text(row["source"][0], row["source_mask"][0]) == "long sou"
    assert row["tokens"][0].tolist() == [1, *Bytes().encode("long ta"), 2]
    assert cut.spec["length"] == 17
    drop = Pairs(file, source_length=8, long="drop")
    assert len(drop.dataset("train")) == len(cut.dataset("train")) - 1 == len(drop.texts("train"))


def test_numbers_are_read_out_and_none_is_held_out_and_seen():
    assert in_words(0) == "zero" and in_words(13) == "thirteen" and in_words(90) == "ninety"
    assert in_words(402_007) == "four hundred two thousand seven"
    assert in_words(999_999) == "nine hundred ninety nine thousand nine hundred ninety nine"
    pairs = numerals(4096)
    assert len(set(pairs)) == len({p.targets for p in pairs}) == 4096
    assert numerals(4096) == pairs
    with pytest.raises(ConfigError, match="samples"):
        Pairs(samples=2).dataset("train")


def test_the_few_label_subset_keeps_drawing_references(jsonl):
    file = jsonl(*({"source": f"s{i}", "target": ["x", "y", "z"]} for i in range(40)))
    data = Pairs(file, train_samples=8, batch_size=8)
    one, two = (next(iter(data.train_dataloader()))["tokens"].shape for _ in range(2))
    assert one == two == torch.Size([8, 3])
    assert len(data.dataset("train")) == 8 and data.dataset("train").fresh


class Endless(Tokenizer):
    vocab_size = 300

    def encode(self, text):
        return [ord(c) for c in text if c.isalpha()]

    def vocabulary(self):
        return []


def test_a_tokenizer_without_end_or_with_nothing_for_a_source_is_refused(jsonl, monkeypatch):
    with pytest.raises(ConfigError, match="needs a tokenizer with an end token; Endless of data.tokenizer has none"):
        Pairs(jsonl(*rows()), tokenizer=Endless()).dataset("train")
    monkeypatch.setattr(Endless, "eos", 2)
    with pytest.raises(DataError, match=r"makes nothing of the source '12' \(pair 0 of train\)"):
        Pairs(jsonl({"source": "12", "target": "a"}, *rows()), tokenizer=Endless()).dataset("train")


@pytest.mark.parametrize(
    ("content", "error", "said"),
    [
        ([{"src": "a", "target": "b"}], DataError, r"line 1 has no key 'source', only src, target: set data.source"),
        ([{"source": "a", "target": "b"}, "{"], DataError, r"line 2 is not JSON"),
        (["[1]"], DataError, r"line 1 is no JSON object"),
        ([{"source": 3, "target": "b"}], DataError, r"the source is int, not text"),
        ([{"source": " ", "target": "b"}], DataError, r"line 1 has an empty source"),
        ([{"source": "a", "target": ""}], DataError, r"line 1 has an empty target"),
        ([{"source": "a", "target": []}], DataError, r"line 1 has no target"),
        ([], DataError, r"a\.jsonl holds no pair"),
        (rows(3), DataError, r"has 3 pairs, too few to hold val and test out"),
    ],
)
def test_broken_jsonl_is_named_by_line(jsonl, content, error, said):
    with pytest.raises(error, match=said):
        Pairs(jsonl(*content)).dataset("train")


def test_unequal_missing_and_broken_files_are_named(tmp_path):
    a, b = tmp_path / "a.de", tmp_path / "a.en"
    a.write_text("eins\nzwei\n")
    with pytest.raises(ConfigError, match=r"data.path: no file at .*a\.en"):
        Pairs([str(a), str(b)]).dataset("train")
    b.write_text("one\ntwo\nthree\n")
    with pytest.raises(DataError, match=r"a\.de has 2 lines and .*a\.en has 3: line-aligned"):
        Pairs([str(a), str(b)]).dataset("train")
    b.write_text("one\n\n")
    with pytest.raises(DataError, match=r"a\.en line 2 has an empty target"):
        Pairs([str(a), str(b)]).dataset("train")
    with pytest.raises(ConfigError, match="a list of two line-aligned files, got 1"):
        Pairs([str(a)]).dataset("train")
    with pytest.raises(ConfigError, match=r"data.val: no file at"):
        Pairs([str(a), str(a)], val=str(b) + ".jsonl").dataset("train")
    (tmp_path / "x.jsonl.gz").write_bytes(b"plain")
    with pytest.raises(DataError, match=r"x\.jsonl\.gz is not gzipped UTF-8"):
        Pairs(str(tmp_path / "x.jsonl.gz")).dataset("train")
    with pytest.raises(ConfigError, match=r"a\.de does not tell what it holds: set data.format"):
        Pairs(str(a)).dataset("train")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"format": "csv"}, "Pairs.format is jsonl, scan"),
        ({"references": "two"}, "Pairs.references is one, all"),
        ({"long": "wrap"}, "Pairs.long is error, cut, drop"),
        ({"split": 1.0}, r"Pairs.split must be in \(0, 1\)"),
        ({"source_length": 0}, "source_length of at least 1"),
        ({"target_length": 2}, "target_length of at least 3"),
    ],
)
def test_arguments_out_of_range_are_refused(given, said):
    with pytest.raises(ConfigError, match=said):
        Pairs(**given)


@needs("jfleg")
def test_jfleg_has_four_references():
    data = Pairs("$QUIRE_DATA/jfleg/dev.jsonl.gz", test="$QUIRE_DATA/jfleg/test.jsonl.gz", source="src", target="refs")
    assert [len(data.texts(n)) for n in ("train", "val", "test")] == [679, 75, 747]  # 754 and 747 lines in its README
    assert {len(p.targets) for p in data.texts("test")} == {4}


@needs("scan")
def test_scan_length_split_has_its_published_sizes():
    path, test = ("$QUIRE_DATA/scan/length_" + p + ".txt.gz" for p in ("train", "test"))
    data = Pairs(path, val=test, test=test, format="scan")
    assert [len(data.texts(n)) for n in ("train", "test")] == [16990, 3920]
