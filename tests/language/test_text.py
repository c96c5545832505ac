from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch

import quire
from quire import ConfigError, DataError, Model
from quire.datasets.text import TextTokens, pieces, read_source
from quire.roles.language.models import CausalLM
from quire.roles.language.next_token import NextToken, score, scored
from quire.roles.language.ngrams import NGramStore
from quire.roles.language.text import BPE, Bytes, HFTokenizer, SentencePiece, Words

TEXT = "The cat sat on the mat.\nA naïve café, déjà vu!\n"
REAL = Path(os.environ.get("QUIRE_DATA", "/nowhere"))
needs_files = pytest.mark.skipif(not (REAL / "tokenizers").is_dir(), reason="QUIRE_DATA has no tokenizers folder")


@pytest.mark.parametrize("tokenizer", [Bytes(), BPE(300)])
def test_text_comes_back_and_special_ids_leave_no_trace(tokenizer):
    tokenizer.fit([TEXT * 20])
    ids = tokenizer.encode(TEXT)
    assert tokenizer.decode(ids) == TEXT
    assert tokenizer.decode([tokenizer.bos, *ids, tokenizer.eos, tokenizer.pad]) == TEXT
    assert min(ids) > 3 and max(ids) < tokenizer.vocab_size


def test_byte_ids_are_the_byte_plus_four():
    assert Bytes().encode("Aé") == [65 + 4, 0xC3 + 4, 0xA9 + 4]
    assert Bytes.vocab_size == 260


def test_words_are_the_most_frequent_and_the_rest_is_unknown():
    words = Words(7)
    words.fit(["b b a a c"])
    assert words.vocabulary() == ["a", "b"]
    assert words.encode("A b c") == [5, 6, 4]
    assert words.decode([5, 4]) == "a <unk>"


@pytest.mark.parametrize("make", [lambda: BPE(300), lambda: Words(40)])
def test_what_was_learnt_survives_as_text_and_has_a_fingerprint(make):
    learnt, again, other = make(), make(), make()
    learnt.fit([TEXT * 5])
    again.restore(learnt.state())
    other.fit(["completely different words " * 9])
    assert again.encode(TEXT) == learnt.encode(TEXT)
    assert again.fingerprint == learnt.fingerprint != other.fingerprint
    assert len(learnt.fingerprint) == 12


def test_word_numbers_follow_white_space():
    ids = Bytes().encode("ab  cd\ne")
    assert Bytes().words(ids) == [0, 0, 0, 0, 1, 1, 1, 2]


@needs_files
def test_gpt2_and_sentencepiece_files_are_read():
    gpt2 = HFTokenizer("$QUIRE_DATA/tokenizers")
    assert gpt2.vocab_size == 50257
    assert gpt2.encode("Hello world") == [15496, 995]  # GPT-2's published ids
    assert gpt2.decode([15496, 995]) == "Hello world"
    pieces_ = SentencePiece("$QUIRE_DATA/tokenizers/spm_test_1000.model")
    assert pieces_.vocab_size == 1000
    assert pieces_.decode(pieces_.encode("hello world")) == "hello world"


def test_tokenizers_that_are_not_there_are_named(tmp_path):
    with pytest.raises(ConfigError, match="nothing to load at"):
        HFTokenizer(str(tmp_path))
    with pytest.raises(ConfigError, match="no file at"):
        SentencePiece(str(tmp_path / "x.model"))
    (tmp_path / "x.model").write_text("no")
    with pytest.raises(ConfigError, match="not a sentencepiece model"):
        SentencePiece(str(tmp_path / "x.model"))
    with pytest.raises(ConfigError, match="never fitted"):
        BPE().encode("a")
    with pytest.raises(ConfigError, match="at least 260"):
        BPE(100)


def test_the_standard_library_is_text_enough_and_is_split_by_document():
    data = TextTokens(source="stdlib:docs", length=64)
    held = data.documents()
    assert len(held["train"]) > 5 * len(held["val"]) > 0
    assert not set(held["train"]) & {*held["val"], *held["test"]}
    batch = next(iter(data.train_dataloader()))
    assert batch["tokens"].shape == (64, 64)
    assert batch["mask"].all()
    assert data.spec["vocab_size"] == 260


@pytest.mark.parametrize("unit", ["line", "passage"])
def test_lines_and_passages_are_padded_rows_between_start_and_end(tmp_path, unit):
    (tmp_path / "a.txt").write_text("\n\n".join(f"line {i} of the text" for i in range(40)))
    data = TextTokens(source=str(tmp_path), unit=unit, length=32, batch_size=4, word_ids=True)
    batch = next(iter(data.train_dataloader()))
    assert (batch["tokens"][:, 0] == 1).all()
    lengths = batch["mask"].sum(1)
    assert all(batch["tokens"][i, n - 1] == 2 for i, n in enumerate(lengths.tolist()))
    assert (batch["word_ids"][~batch["mask"] | batch["special"]] == -1).all()
    assert batch["word_ids"].max() == 4


def test_gzipped_files_are_read_and_broken_ones_named(tmp_path):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"hello"))
    assert read_source(str(tmp_path)) == ["hello"]
    (tmp_path / "a.txt.gz").write_bytes(b"not gzip")
    with pytest.raises(DataError, match=r"a\.txt\.gz is not gzipped UTF-8"):
        read_source(str(tmp_path))
    with pytest.raises(ConfigError, match="nothing at"):
        read_source(str(tmp_path / "missing"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="holds no"):
        read_source(str(tmp_path / "empty"))


def test_a_text_shorter_than_one_row_is_named(tmp_path):
    (tmp_path / "a.txt").write_text("short")
    with pytest.raises(ConfigError, match="fewer than one row of 128"):
        TextTokens(source=str(tmp_path)).train_dataloader()
    assert "".join(pieces(["abc" * 50])) == "abc" * 50


def test_loss_counts_real_tokens_behind_the_prompt_only():
    batch = {
        "tokens": torch.tensor([[5, 6, 7, 8, 0], [0, 5, 6, 7, 8]]),
        "mask": torch.tensor([[1, 1, 1, 1, 0], [0, 1, 1, 1, 1]]).bool(),
        "prompt_length": torch.tensor([2, 2]),
    }
    assert scored(batch, prompt=False).int().tolist() == [[0, 1, 1, 0], [0, 0, 1, 1]]
    assert scored(batch, prompt=True).int().tolist() == [[1, 1, 1, 0], [0, 1, 1, 1]]
    logits = torch.zeros(2, 4, 11)
    losses = score(logits, batch["tokens"], scored(batch, False), 0.0, True, "next")
    assert losses["next"].item() == pytest.approx(np.log(11))  # chance
    assert losses["z"].item() == pytest.approx(np.log(11) ** 2)
    assert losses.metrics["bits_per_token"]().item() == pytest.approx(np.log2(11))


def test_a_loaded_language_model_reads_and_writes_text(tmp_path):
    data = TextTokens(source="stdlib:docs", length=32, batch_size=8, tokenizer=BPE(300), train_samples=64)
    model = Model(decoder=CausalLM(width=16, depth=1, heads=2), objective=NextToken())
    run = pl.Trainer(
        default_root_dir=tmp_path,
        accelerator="cpu",
        max_steps=2,
        limit_val_batches=1,
        logger=False,
        enable_progress_bar=False,
    )
    run.fit(model, datamodule=data)
    again = quire.load(run.checkpoint_callback.best_model_path)
    assert again.tokenizer.fingerprint == data.spec["tokenizer"]
    assert again.tokenizer.decode(again.tokenizer.encode("a loop")) == "a loop"
    folder = quire.export(model, tmp_path / "out")
    assert quire.load(folder).tokenizer.encode("a loop") == again.tokenizer.encode("a loop")


# ---- n-grams
A, B, C = 5, 6, 7


def test_ngrams_count_successors_by_context():
    store = NGramStore([1, 2])
    store.add([[A, B, A, C, A, B]], 10)  # superposed's fixture
    assert [x.tolist() for x in store.successors(1, [A])] == [[B, C], [2, 1]]
    assert [x.tolist() for x in store.successors(2, [B, A])] == [[C], [1]]
    assert store.successors(2, [C, C])[0].tolist() == []
    assert store.find(1, np.array([[A], [9], [C]])).tolist() == [0, -1, 2]


def test_ngrams_never_span_documents_and_shards_merge_to_one_pass():
    texts = [np.random.default_rng(i).integers(0, 300, 200).tolist() for i in range(4)]
    whole, left, right = NGramStore([1, 3]), NGramStore([1, 3]), NGramStore([1, 3])
    whole.add(texts, 300)
    left.add(texts[:2], 300)
    right.add(texts[2:], 300)
    left.merge(right)
    for order in (1, 3):
        for name in ("contexts", "starts", "tokens", "counts"):
            assert np.array_equal(left.tables[order][name], whole.tables[order][name])
    assert int(whole.tables[3]["counts"].sum()) == 4 * (200 - 3)


def test_a_store_is_saved_without_pickle_and_refuses_what_is_not_its_own(tmp_path):
    store = NGramStore([1, 2])
    store.add([[A, B, A, C, A, B]], 10, "abc")
    file = store.save(tmp_path / "n.safetensors")
    again = NGramStore([2], path=str(file))
    assert again.successors(2, [B, A])[0].tolist() == [C]
    again.need(10, "abc")
    with pytest.raises(ConfigError, match=r"built for vocabulary 10 \(abc\), the model has 20 \(xyz\)"):
        again.need(20, "xyz")
    with pytest.raises(ConfigError, match="has no order 5"):
        NGramStore([5], path=str(file))
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(DataError, match="is not an n-gram store, or is damaged"):
        NGramStore([1], path=str(file))
    with pytest.raises(ConfigError, match="no n-gram store at"):
        NGramStore([1], path=str(tmp_path / "none"))


def test_the_words_state_is_json():
    words = Words(20)
    words.fit(["x y"])
    assert json.loads(words.state()) == ["x", "y"]
