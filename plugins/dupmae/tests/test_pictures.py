"""The picture of strongest terms: what it marks as in the text, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from dupmae_toys import SPEC, encoder, texts

from quire import ConfigError, Model
from quire.reproduce import arm_trainer
from quire.roles.language.text import Bytes
from quire.roles.tokens.text import TextEncoder
from quire_dupmae import pictures
from quire_dupmae.pictures import TermPictures


def drawn(monkeypatch, tmp_path, made, batch):
    """What the callback would draw."""
    kept = {}
    monkeypatch.setattr(pictures, "draw", lambda file, rows: kept.update(file=file, rows=rows))
    callback = TermPictures(texts=2, terms=5)
    callback.on_train_batch_start(None, made, batch, 0)
    made.refer_tokenizer(Bytes())
    callback.on_train_end(arm_trainer(default_root_dir=tmp_path), made)
    return kept


def test_terms_are_the_largest_pooled_logits_and_marked_when_they_are_in_the_text(monkeypatch, tmp_path, capsys):
    made = Model(encoder=encoder(), spec=SPEC)
    made.configure_model()
    batch = texts(3, 10)
    kept = drawn(monkeypatch, tmp_path, made.train(), batch)
    assert made.training and kept["file"] == tmp_path / "terms.png"
    assert [len(bars) for _, bars in kept["rows"]] == [5, 5]
    with torch.no_grad():
        made.eval()
        logits = made.encoder.logits(made.encoder(batch))[:, 1:-1].amax(1)
    for (_, bars), own, given in zip(kept["rows"], logits, batch["tokens"][:, 1:-1].tolist()):
        best = own.topk(5)
        assert [v for _, v, _ in bars] == pytest.approx(best.values.tolist(), abs=1e-5)
        assert [inside for _, _, inside in bars] == [i in given for i in best.indices.tolist()]
    assert "of 10 strongest terms are in their text" in capsys.readouterr().out


def test_a_picture_is_written(tmp_path):
    pictures.draw(tmp_path / "new" / "terms.png", [("a $text$ of <marks>", [("word", 2.0, True), ("##s", 1.0, False)])])
    assert (tmp_path / "new" / "terms.png").stat().st_size > 1000


def test_an_encoder_without_a_head_and_no_bars_are_refused():
    made = Model(encoder=TextEncoder(16, 16, 16, 1, 2, lm_head=False))
    with pytest.raises(ConfigError, match="TermPictures needs 'lm_head'; TextEncoder"):
        TermPictures().setup(None, made, "fit")
    with pytest.raises(ConfigError, match="must be at least 1, got 0 and 14"):
        TermPictures(texts=0)
