"""Dialogues from files and lines; duplicates; what is wrong with them is said by number and name."""

from __future__ import annotations

import gzip
import json

import pytest
from fast_toys import dialogues, said, write

from quire.data import expand
from quire.errors import ConfigError, DataError
from quire_fast_sae.chats import ChatText
from quire_fast_sae.dedup import kept
from quire_fast_sae.dialogues import dialogues_of, lines_in_pairs, read_dialogues


@pytest.mark.parametrize(
    ("texts", "stay"),
    [
        (["a b c", "x a b", "p q r"], [0, 2]),  # oracle: the 1st and 3rd
        (["a b", "a b c d", "c d e"], [0, 2]),  # oracle: what goes leaves nothing behind
        (["a", "b", "a", "a b"], [0, 1, 3]),  # shorter than n: equal texts only
    ],
)
def test_a_text_goes_when_it_shares_an_ngram_with_one_that_was_kept(texts, stay):
    assert kept(texts, 2) == stay


def test_without_ngrams_only_equal_texts_go():
    assert kept(["a b c", "x a b", "a b c"], 0) == [0, 1]


def test_generated_turns_are_neighbouring_lines_within_their_bytes():
    made = lines_in_pairs("first line\n\n" + "é" * 40 + "\nthird\n")
    assert made == [said("first line", "é" * 16)]
    every = [d for group in read_dialogues("stdlib:docs") for d in group]
    assert all(len(d[0]["content"].encode()) <= 26 and len(d[1]["content"].encode()) <= 32 for d in every)


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"messages": said("q", "a")}, [said("q", "a")]),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, [said("q", "a")]),
        ({"instruction": "q", "input": "", "output": "a"}, [said("q", "a")]),
        ({"instruction": "q", "input": "x", "response": "a"}, [said("q\nx", "a")]),
        ({"question": "q", "answer": "a"}, [said("q", "a")]),
        (
            {"instruction": "q", "instances": [{"input": "1", "output": "a"}, {"input": "2", "output": "b"}]},
            [said("q\n1", "a"), said("q\n2", "b")],
        ),
        (said("q", "a", "r"), [said("q", "a", "r")]),
    ],
)
def test_records_of_the_usual_shapes_are_read(record, expected):
    assert dialogues_of(record, "here") == expected


def test_files_folders_and_gzip(tmp_path):
    write(tmp_path / "a.jsonl", dialogues(3))
    with gzip.open(tmp_path / "b.json.gz", "wt") as handle:
        json.dump([{"question": "q", "answer": "a"}], handle)
    assert len(read_dialogues(str(tmp_path))) == 4
    (tmp_path / "c.jsonl").write_text('{"question": \n')
    with pytest.raises(DataError, match="line 1 is not JSON"):
        read_dialogues(str(tmp_path))
    with pytest.raises(ConfigError, match="nothing at"):
        read_dialogues(str(tmp_path / "none"))
    with pytest.raises(DataError, match="is no dialogue"):
        dialogues_of({"text": "x"}, "here")


def test_empty_dialogues_are_skipped_and_counted(tmp_path):
    some = [*dialogues(20), said("", "  "), []]
    data = ChatText(write(tmp_path / "x.jsonl", some))
    assert sum(map(len, data.dialogues().values())) == 20 and data.empty == 2


def test_an_unknown_role_is_named_with_its_instance(tmp_path):
    some = dialogues(6)
    some[4][0]["role"] = "robot"
    with pytest.raises(DataError, match="instance 4 has a turn with role 'robot'; roles are system, user"):
        ChatText(write(tmp_path / "x.jsonl", some)).dialogues()


def test_nothing_held_out_is_trained_on(tmp_path):
    some = dialogues(30)
    data = ChatText(write(tmp_path / "x.jsonl", [*some, *some]), dedup_ngram=0)
    parts = data.dialogues()
    words = [{json.dumps(d) for d in parts[name]} for name in ("train", "val", "test")]
    assert data.duplicates == 30 and sum(map(len, words)) == 30
    assert words[0] and words[1] and not words[0] & (words[1] | words[2])


@pytest.mark.parametrize("name", ["instructions_small", "gsm8k"])
def test_real_instructions_are_read(name):
    if not expand(f"$QUIRE_DATA/{name}").is_dir():
        pytest.skip(f"needs $QUIRE_DATA/{name}, which is not here")
    data = ChatText(f"$QUIRE_DATA/{name}", max_tokens=256)
    assert len(data.dialogues()["train"]) > 5000 and data.duplicates > 0
    rows = data.dataset("val")
    first = data.dialogues()["val"][0]
    whole = f"{first[0]['content']}{first[1]['content']}".encode()[:200]
    assert data.tokenizer.decode(rows.tokens[0].tolist()).encode()[:200] == whole
    assert int(rows.lengths.max()) == 256 or int(rows.lengths.max()) < 256


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"truncate": "middle"}, "data.truncate is right or left, got 'middle'"),
        ({"special_ids": "marks"}, "data.special_ids is template or a list of ids, got 'marks'"),
        ({"max_tokens": 0}, "max_tokens of at least 1"),
        ({"source": []}, "needs a source"),
    ],
)
def test_wrong_arguments_are_refused(given, sentence):
    with pytest.raises(ConfigError, match=sentence):
        ChatText(**given)
