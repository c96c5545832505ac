"""Tokenizer and collections: what a row holds, how splits are cut, what is refused."""

from __future__ import annotations

import gzip
import itertools
import json

import pytest
import torch

from quire import ConfigError, DataError
from quire.roles.language.text import HFTokenizer, Words
from quire_dupmae.beir import BeirFolder, write_example
from quire_dupmae.tokenizer import WordPiece
from quire_dupmae.triplets import RetrievalTriplets, docstrings


def small(**more):
    return RetrievalTriplets(limit=100, max_length=16, query_length=12, tokenizer=WordPiece(400), **more)


@pytest.fixture(scope="module")
def pairs():
    return small()


# ---- tokenizer
def test_the_same_texts_give_the_same_vocabulary_whatever_the_hash_seed():
    texts = [r["positive"] for r in docstrings()[:300]]
    marks = set()
    for _ in range(3):
        tok = WordPiece(600)
        tok.fit(texts)
        marks.add(tok.fingerprint)
    assert len(marks) == 1 and tok.vocab_size == 600


def test_pieces_of_a_word_share_its_number_and_specials_have_their_own(pairs):
    tok = pairs.tokenizer
    ids = [tok.bos, *tok.encode("zyxwv the end"), tok.eos]
    words = tok.words(ids)
    pieces = [tok.inner.id_to_token(i) for i in ids]
    assert words == sorted(words) and words[0] == 0
    for (a, b), piece in zip(itertools.pairwise(words), pieces[1:]):
        assert (a == b) == piece.startswith("##")


def test_a_special_token_s_name_in_a_text_is_text(pairs):
    assert not set(pairs.tokenizer.encode("a [MASK] in [CLS] text")) & pairs.tokenizer.special


def test_it_is_restored_from_its_state_and_the_same_in_transformers(pairs, tmp_path):
    from transformers import AutoTokenizer

    tok, again = pairs.tokenizer, WordPiece(400)
    again.restore(tok.state())
    text = "Return the number of bytes written."
    assert again.encode(text) == tok.encode(text) and again.fingerprint == tok.fingerprint
    tok.to_transformers(8).save_pretrained(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs(text, truncation=True)["input_ids"] == [tok.bos, *tok.encode(text)[:6], tok.eos]
    taken = WordPiece(path=str(tmp_path))
    taken.fit([])
    assert taken.encode(text) == tok.encode(text)
    assert (taken.pad, taken.bos, taken.eos, taken.mask) == (0, 2, 3, 4)
    assert taken.words(taken.encode("zyxwv")) == tok.words(tok.encode("zyxwv"))


def test_a_byte_level_tokenizer_s_words_begin_with_a_space(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    names = ["<s>", "<pad>", "</s>", "<mask>"]
    inner.train_from_iterator(
        ["low lower lowest newest x y z"] * 9, trainers.BpeTrainer(special_tokens=names, vocab_size=270)
    )
    roles = dict(zip(("cls_token", "pad_token", "sep_token", "mask_token"), names))
    PreTrainedTokenizerFast(tokenizer_object=inner, **roles).save_pretrained(tmp_path)
    tok = WordPiece(path=str(tmp_path))
    ids = [tok.inner.token_to_id("<s>"), *tok.encode("lower xyz low"), tok.inner.token_to_id("</s>")]
    assert (tok.bos, tok.eos) == (0, 2)
    assert len(set(tok.words(ids))) == 5  # start, three words, end
    pieces = [tok.inner.encode(w).ids for w in ("lower", "xyz", "low")]
    assert len(ids) == 2 + sum(map(len, pieces)) and tok.words([9, 9, 0, 9]) == [0, 0, 1, 2]


def test_a_tokenizer_without_mask_or_start_token_is_refused_by_name(tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({"<p>": 0, "<e>": 1, "<m>": 2}, "<e>"))
    PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<p>", eos_token="<e>").save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=f"tokenizer {tmp_path} has no CLS token"):
        WordPiece(path=str(tmp_path)).fit([])
    with pytest.raises(ConfigError, match="tokenizer HFTokenizer has no CLS token"):
        _ = RetrievalTriplets(limit=100, tokenizer=HFTokenizer(str(tmp_path))).tokenizer
    with pytest.raises(ConfigError, match="WordPiece.size must be at least 300"):
        WordPiece(100)


# ---- docstrings
def test_the_query_is_not_left_inside_its_document():
    rows = docstrings()
    assert len(rows) > 1000
    assert len({r["positive"] for r in rows}) == len(rows)
    inside = sum(r["query"] in r["positive"] for r in rows)
    assert inside < 0.02 * len(rows)  # a few bodies repeat their first line themselves


def test_splits_are_disjoint_a_fifth_is_for_the_test_and_the_same_every_time(pairs):
    splits = pairs.collection.splits
    names = [q.name for split in splits.values() for q in split]
    assert len(set(names)) == len(names) == 100
    assert [len(splits[n]) for n in ("train", "val", "test")] == [75, 5, 20]
    assert [q.text for q in small().collection.splits["test"]] == [q.text for q in splits["test"]]


def test_a_row_is_a_query_its_document_and_where_it_is_in_the_corpus(pairs):
    row, tok = pairs.dataset("test")[3], pairs.tokenizer
    query = pairs.collection.splits["test"][3]
    document = pairs.collection.texts[int(row["relevant"][0])]
    assert row["tokens"].tolist() == row["positive"].tolist()
    assert row["tokens"][row["mask"]].tolist() == [2, *tok.encode(document)[:14], 3]
    assert row["query"][row["query_mask"]].tolist() == [2, *tok.encode(query.text)[:10], 3]
    assert pairs.query_name(int(row["query_id"])) == query.name
    ordinary = row["mask"] & ~row["special"]
    assert torch.equal(row["word_ids"] >= 0, ordinary)
    assert not ordinary[0]
    corpus = torch.cat([tokens for tokens, _ in pairs.documents()])
    assert torch.equal(corpus[row["relevant"][0]], row["tokens"])


def test_hard_negatives_are_bm25_s_best_that_are_not_relevant():
    data = small(negatives=3, teacher=True)
    row = data.dataset("train")[0]
    query = data.collection.splits["train"][0]
    assert row["negative"].shape == (3, 16) and row["teacher_scores"].shape == (4,)
    assert not set(query.negatives) & set(query.relevant)
    told = row["teacher_scores"]
    assert told[1] >= told[2] >= told[3]


# ---- files
def write(folder, rows):
    file = folder / "pairs.jsonl.gz"
    file.write_bytes(gzip.compress("\n".join(json.dumps(r) for r in rows).encode()))
    return str(file)


def test_triplets_of_a_file_keep_their_own_negatives_and_scores(tmp_path):
    rows = [
        {"query": f"word{i} asks", "positive": f"answer word{i}", "negative": [f"other word{i}"], "scores": [2.0, i]}
        for i in range(40)
    ]
    rows[7]["negative"] = "a string is a list of one"
    source = write(tmp_path, rows)
    data = RetrievalTriplets(source, tokenizer=WordPiece(300), negatives=1, teacher=True)
    first = data.dataset("train")[2]
    assert data.tokenizer.decode(first["negative"][0].tolist()).endswith("word2")
    assert first["teacher_scores"].tolist() == [2.0, 2.0]
    assert len(data.collection.texts) == 80


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"query": "a"}], "line 1: no positive; a row needs query and positive as text"),
        ([{"query": "a", "positive": "b"}, {"query": " ", "positive": "b"}], "line 2: no query"),
        ([["a", "b"]], "line 1: not a JSON object"),
    ],
)
def test_rows_of_another_form_are_refused_with_their_line(rows, said, tmp_path):
    with pytest.raises(DataError, match=said):
        _ = RetrievalTriplets(write(tmp_path, rows)).collection


def test_a_passage_of_one_word_is_a_row_and_an_empty_one_is_refused(tmp_path):
    rows = [{"query": f"query {i}", "positive": "word" if not i else f"some text {i}"} for i in range(20)]
    data = RetrievalTriplets(write(tmp_path, rows), tokenizer=WordPiece(300), max_length=8)
    row = data.dataset("train")[0]
    assert set(row["word_ids"][~row["special"]].tolist()) == {1}
    rows[17]["positive"] = "\u200b\u0007"  # nothing that a tokenizer keeps
    data = RetrievalTriplets(write(tmp_path, rows), tokenizer=WordPiece(300))
    with pytest.raises(DataError, match="document 17 has no tokens after tokenisation"):
        data.dataset("train")


# ---- BEIR
@pytest.fixture
def folder(tmp_path):
    return write_example(tmp_path / "beir")


def beir(folder, **more):
    return BeirFolder(str(folder), max_length=16, query_length=12, tokenizer=WordPiece(400), **more)


def test_titles_ask_for_their_text_and_no_query_is_used_for_training(folder):
    data = beir(folder)
    train = data.collection.splits["train"]
    assert all(q.name.startswith("title of ") for q in train)
    for query in train:
        document = data.collection.texts[next(iter(query.relevant))]
        assert document.startswith(query.text) and query.positive[:40] in document
        assert not query.positive.startswith(query.text)
    assert {n: len(data.collection.splits[n]) for n in ("val", "test")} == {"val": 20, "test": 20}


def test_trec_s_four_columns_and_grades_are_read_and_cut_by_order(folder):
    judged = {f"q-{n}": n for n in [json.loads(r)["_id"] for r in (folder / "corpus.jsonl").read_text().splitlines()]}
    for file in (folder / "qrels").iterdir():
        file.unlink()
    (folder / "qrels").rmdir()
    others = list(judged.values())
    lines = [
        f"{q} 0 {d} 1\n{q} 0 {others[i - 1]} 3\n{q} 0 {others[i - 2]} 0" for i, (q, d) in enumerate(judged.items())
    ]
    (folder / "qrels.trec.txt").write_text("\n".join(lines))
    data = beir(folder, pairs="qrels")
    splits = data.collection.splits
    assert [len(splits[n]) for n in ("train", "val", "test")] == [2 * 16, 8, 16]  # a row for each judged document
    row = data.dataset("test")[0]
    assert row["gain"].tolist() == [3.0, 1.0]  # the best is the positive; grade 0 isn't relevant
    assert {q.name for q in splits["train"]}.isdisjoint(q.name for q in splits["test"])


def test_a_query_without_a_judged_document_is_left_out_and_named(folder):
    with (folder / "queries.jsonl").open("a") as queries:
        queries.write(json.dumps({"_id": "lonely", "text": "who asks this"}) + "\n")
    with pytest.warns(UserWarning, match="1 queries have no judged document and are left out: lonely"):
        splits = beir(folder).collection.splits
    assert "lonely" not in {q.name for split in splits.values() for q in split}
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n")
    with pytest.raises(DataError, match="no query of the test split has a judged document"):
        _ = beir(folder).collection


def test_absent_ids_are_told_by_the_first_three_and_their_number(folder):
    with (folder / "qrels" / "test.tsv").open("a") as qrels:
        qrels.writelines(f"q-assert\tnone{i}\t1\n" for i in range(5))
    with pytest.raises(DataError, match="the qrels name 5 documents that the corpus lacks: none0, none1, none2, …"):
        _ = beir(folder).collection


def test_an_empty_document_is_refused_or_left_out(folder):
    with (folder / "corpus.jsonl").open("a") as corpus:
        corpus.write(json.dumps({"_id": "17", "title": "", "text": ""}) + "\n")
    data = beir(folder)
    with pytest.raises(DataError, match="document 17 has no tokens .*set data.drop_empty: true"):
        list(data.documents())
    data = beir(folder, drop_empty=True)
    assert "17" not in data.collection.names and len(list(data.documents())) == 1


@pytest.mark.parametrize(
    ("break_it", "kind", "said"),
    [
        (lambda f: (f / "corpus.jsonl").unlink(), ConfigError, "has no corpus.jsonl or corpus.jsonl.gz"),
        (
            lambda f: [(f / "qrels" / n).unlink() for n in ("dev.tsv", "test.tsv")],
            ConfigError,
            "neither qrels/test.tsv",
        ),
        (lambda f: (f / "qrels" / "dev.tsv").write_text("h\na b\n"), DataError, "line 2: needs query, document, grade"),
        (lambda f: (f / "queries.jsonl").write_text("{"), DataError, "queries.jsonl, line 1: not JSON"),
    ],
)
def test_files_of_another_form_are_refused_by_name(break_it, kind, said, folder):
    break_it(folder)
    with pytest.raises(kind, match=said):
        _ = beir(folder).collection


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"max_length": 2}, "RetrievalTriplets.max_length must be at least 3"),
        ({"negatives": -1}, "negatives must be at least 0"),
        ({"teacher": True}, "negatives must be at least 1, got 0"),
        ({"predict_split": "all"}, "predict_split must be test, val or train"),
        ({"limit": 3}, "limit must be at least 20 pairs"),
    ],
)
def test_bad_arguments_are_one_sentence(given, said):
    with pytest.raises(ConfigError, match=said):
        RetrievalTriplets(**given)


def test_words_as_a_tokenizer_serve_too():
    data = RetrievalTriplets(limit=60, tokenizer=Words(300))
    assert data.dataset("train")[0]["tokens"][0] == 1
