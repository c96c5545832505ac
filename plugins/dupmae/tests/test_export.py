"""What transformers and sentence-transformers read gives the numbers that Quire gives."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from dupmae_toys import encoder

import quire
from quire import ConfigError, Model
from quire.__main__ import execute
from quire.roles.tokens.text import TextEncoder
from quire_dupmae.embedding import HybridEmbedding
from quire_dupmae.encoder import RetrievalEncoder
from quire_dupmae.export import to_sentence_transformers, to_transformers
from quire_dupmae.objective import SMALL
from quire_dupmae.tokenizer import WordPiece
from quire_dupmae.triplets import RetrievalTriplets

TEXTS = ["Return the number of bytes written.", "word", "Start the listener, then wait until every task is done."]


@pytest.fixture(scope="module")
def data():
    return RetrievalTriplets(limit=60, max_length=16, query_length=12, tokenizer=WordPiece(400))


def trained(data, **given):
    model = Model(
        encoder=RetrievalEncoder({**SMALL, "num_hidden_layers": 2}, **{"dense_dim": 8, **given}), spec=data.spec
    )
    model.configure_model()
    model.refer_tokenizer(data.tokenizer)
    return model.eval()


def embedded(model, data, **given):
    part = HybridEmbedding(**given)
    part.build(quire.Spec({**model.spec, "codes": model.encoder.sizes()}))
    with torch.no_grad():
        return part(model.encoder, *data.encode(TEXTS, 16, "text", TEXTS))


def test_transformers_reads_encoder_head_and_tokenizer(data, tmp_path):
    from transformers import pipeline

    model = trained(data)
    to_transformers(model, tmp_path)
    fill = pipeline("fill-mask", model=str(tmp_path), tokenizer=str(tmp_path), device="cpu", top_k=3)
    told = fill("return the [MASK] of bytes")
    tok = data.tokenizer
    ids = [tok.bos, *tok.encode("return the"), tok.mask, *tok.encode("of bytes"), tok.eos]
    with torch.no_grad():
        logits = model.encoder.logits(model.encoder({"tokens": torch.tensor([ids])}))[0, ids.index(tok.mask)]
    assert [t["token"] for t in told] == logits.topk(3).indices.tolist()


@pytest.mark.parametrize("given", [{}, {"dense_dim": None}, {"pooling": "mean"}])
def test_sentence_transformers_gives_the_same_dense_vectors(given, data, tmp_path):
    st = pytest.importorskip("sentence_transformers")
    model = trained(data, **given)
    to_sentence_transformers(model, tmp_path)
    theirs = st.SentenceTransformer(str(tmp_path / "dense"), device="cpu")
    ours = embedded(model, data, lexical_k=0).dense.numpy()
    assert np.allclose(theirs.encode(TEXTS), ours, atol=1e-4)
    assert theirs.similarity_fn_name == "dot"


def test_sentence_transformers_gives_the_same_terms_but_for_the_ends_tokens(data, tmp_path):
    st = pytest.importorskip("sentence_transformers")
    model = trained(data)
    to_sentence_transformers(model, tmp_path)
    theirs = st.SparseEncoder(str(tmp_path / "lexical"), device="cpu").encode(TEXTS).to_dense()
    tokens, mask = data.encode(TEXTS, 16, "text", TEXTS)
    with torch.no_grad():
        codes = model.encoder({"tokens": tokens, "mask": mask})
        logits = model.encoder.logits(codes).masked_fill(~mask[..., None], -1e9)
    assert torch.allclose(theirs, logits.amax(1).relu().log1p(), atol=1e-4)
    ours = embedded(model, data, lexical_k=400, lexical_activation="log1p_relu").lexical
    assert bool((ours <= theirs + 1e-4).all()) and ours.any()


def test_the_command_writes_a_checkpoint_s_encoder(data, tmp_path, capsys):
    model = trained(data)
    quire.export(model, tmp_path / "kept")
    assert execute(["export-retriever", str(tmp_path / "kept"), str(tmp_path / "out"), "--plain"]) == 0
    assert "wrote" in capsys.readouterr().out
    assert (tmp_path / "out" / "model.safetensors").is_file() and (tmp_path / "out" / "tokenizer.json").is_file()


def test_what_has_another_form_is_refused(data, tmp_path):
    model = Model(encoder=TextEncoder(width=16, depth=1, heads=2), spec=data.spec)
    model.configure_model()
    with pytest.raises(ConfigError, match=r"needs a RetrievalEncoder; model.encoder is TextEncoder"):
        to_transformers(model, tmp_path)
    other = Model(encoder=encoder(), spec=data.spec)
    other.configure_model()
    with pytest.raises(ConfigError, match="needs the WordPiece tokenizer that the run used; it is NoneType"):
        to_transformers(other, tmp_path)
