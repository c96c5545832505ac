"""Stored codes are the encoder's codes, whatever the batches were; weighted Jaccard is min over max."""

from __future__ import annotations

import argparse
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from scipy import sparse
from tests.activations.subjects import Ids, feed, transformers_model

from quire.contracts import Spec
from quire.datasets.activations import codes as stored
from quire.datasets.activations import harvest
from quire.datasets.activations.codes import CodeStore, CodeWriter, entries_of
from quire.datasets.activations.jaccard import weighted_jaccard
from quire.errors import ConfigError, DataError
from quire.model import Model
from quire.recipe import instantiate
from quire.roles.sites.subject import fingerprint_of

SUBJECT = transformers_model()
LATENTS = 23


def model(kind="TopK"):
    """An untrained dictionary."""
    selector = {"class_path": "TopK", "init_args": {"k": 4}} if kind == "TopK" else {"class_path": "ReLU"}
    torch.manual_seed(0)
    encoder = {"class_path": "SparseEncoder", "init_args": {"latents": LATENTS, "selector": selector}}
    made = Model(
        encoder=instantiate(encoder), decoder=instantiate({"class_path": "SparseDecoder"}), spec=Spec(width=32)
    )
    made.configure_model()
    return made.eval()


def data(**more):
    return feed(subject=SUBJECT, source=Ids(samples=30, ragged=True), **more)


def predicted(made, source, path):
    """Store codes by the callback."""
    from quire.datasets.activations.store_codes import StoreCodes

    trainer = pl.Trainer(accelerator="cpu", logger=False, callbacks=[StoreCodes(str(path))], enable_progress_bar=False)
    trainer.predict(made, datamodule=source)
    return CodeStore(path)


@pytest.mark.parametrize("kind", ["TopK", "ReLU"])
def test_a_store_holds_the_encoders_codes(tmp_path, kind):  # autointerp: cache to dense = direct encode
    made, source = model(kind), data()
    store = predicted(made, source, tmp_path)
    tensors = source.source.dataset("test").tensors
    assert store.latents == LATENTS and store.encoder == fingerprint_of(made.encoder) and len(store) == 15
    for i in range(len(store)):
        length = int(tensors["mask"][i].sum())
        tokens = tensors["tokens"][i, :length]
        x = source.subject.sites.read({"tokens": tokens[None]}, ["blocks.0.resid"]).values["blocks.0.resid"][0]
        direct = made.encoder({"activation": x}).dense()
        assert torch.allclose(store.dense(i), direct.detach(), atol=1e-5)
        row = store.row(i)
        assert torch.equal(row["token"], tokens) and torch.equal(row["position"], torch.arange(length))
        assert torch.equal(row["special"], tensors["special"][i, :length])
    counted = torch.zeros(LATENTS, dtype=torch.long)
    for latent in range(LATENTS):
        fired = store.latent(latent)
        counted[latent] = len(fired.rows)
        for row, at, value in list(zip(fired.rows.tolist(), fired.positions.tolist(), fired.activations.tolist()))[:5]:
            assert store.dense(row)[at, latent] == pytest.approx(value) != 0
    assert torch.equal(counted, store.counts) and int(counted.sum()) == store.header["entries"]


def test_batches_shards_and_analysis_change_nothing(tmp_path):
    made = model()
    first = predicted(made, data(batch_size=16), tmp_path / "a")
    other = predicted(made, data(batch_size=37, contexts=4), tmp_path / "b")
    whole = predicted(made, data(batch_size=4, analysis=True), tmp_path / "c")
    for store in (other, whole):
        assert torch.equal(store.counts, first.counts)
        assert np.abs(store.matrix - first.matrix).max() < 1e-5
    writer = CodeWriter(tmp_path / "d", LATENTS, "x", entries=50)  # many small runs
    for batch in data().predict_dataloader():
        with torch.no_grad():
            writer.add(made.encoder(batch), batch)
    assert np.abs(writer.finish().matrix - first.matrix).max() < 1e-5
    assert not list((tmp_path / "d").glob("run-*"))


def test_what_a_kill_left_of_an_earlier_store_is_not_counted(tmp_path):
    made = model()
    first = predicted(made, data(), tmp_path / "a")
    left = CodeWriter(tmp_path / "b", LATENTS, first.encoder)
    batch = next(iter(data().predict_dataloader()))
    left.add(made.encoder(batch), batch)
    left.runs.close()
    assert torch.equal(predicted(made, data(), tmp_path / "b").counts, first.counts)


def test_embeddings_pool_over_a_rows_tokens(tmp_path):
    made = model()
    store = predicted(made, data(), tmp_path)
    for pool, over in (("mean", lambda d: d.mean(0)), ("sum", lambda d: d.sum(0)), ("max", lambda d: d.amax(0))):
        got = store.embeddings(pool).toarray()
        for i in range(len(store)):
            assert np.allclose(got[i], over(store.dense(i)).numpy(), atol=1e-5)
    special = store.table["special"]
    assert np.allclose(store.embeddings("mean", special).toarray()[3], store.dense(3)[1:].mean(0).numpy(), atol=1e-5)
    with pytest.raises(DataError, match="sample 0 has no tokens after masking"):
        store.embeddings("mean", torch.ones_like(special))
    with pytest.raises(ConfigError, match="mean, sum or max"):
        store.embeddings("median")


def test_harvest_stores_codes_too_and_goes_on_where_it_stopped(tmp_path, monkeypatch):
    made = model()
    first = predicted(made, data(), tmp_path / "a")
    monkeypatch.setattr(harvest, "_encoder", lambda path, device: made.encoder)
    monkeypatch.setattr(harvest, "CodeWriter", lambda *a: CodeWriter(*a, entries=60))
    add, calls = CodeWriter.add, iter(range(100))

    def fails(self, *args):
        if next(calls) == 2:
            raise KeyboardInterrupt
        add(self, *args)

    options = harvest._parser().parse_args(["--codes", "here"])
    monkeypatch.setattr(CodeWriter, "add", fails)
    with pytest.raises(KeyboardInterrupt):
        harvest.run(data(), tmp_path / "b", ["test"], options)
    with pytest.raises(DataError, match="not finished"):
        CodeStore(tmp_path / "b/test")
    fewer = harvest._parser().parse_args(["--codes", "here", "--tokens", "50"])
    with pytest.raises(ConfigError, match="harvested with data.tokens None, not 50"):  # else runs of two plans mix
        harvest.run(data(), tmp_path / "b", ["test"], fewer)
    harvest.run(data(), tmp_path / "b", ["test"], options)
    store = CodeStore(tmp_path / "b/test", encoder=first.encoder)
    assert np.abs(store.matrix - first.matrix).max() < 1e-5 and torch.equal(store.counts, first.counts)
    harvest.run(data(), tmp_path / "b", ["test"], options)  # nothing to do
    assert isinstance(options, argparse.Namespace)


def test_bad_stores_are_said(tmp_path):
    made = model()
    store = predicted(made, data(), tmp_path / "a")
    with pytest.raises(ConfigError, match=r"another encoder \(hash .*, not other\)"):
        CodeStore(tmp_path / "a", encoder="other")
    with pytest.raises(ConfigError, match="another encoder"):
        CodeWriter(tmp_path / "a", LATENTS, "other")
    with pytest.raises(ConfigError, match=r"latent 23 is outside 0..22"):
        store.latent(LATENTS)
    with pytest.raises(ConfigError, match="row 99 is not in"):
        store.row(99)
    with pytest.raises(ConfigError, match="needs the field position"):
        entries_of(torch.ones(2, 3), {"instance": torch.arange(2)})
    bad = torch.tensor([[0.0, float("nan")]])
    with pytest.raises(DataError, match="codes of sample 7 are not finite"):
        entries_of(bad, {"instance": torch.tensor([7]), "position": torch.tensor([0])})
    with pytest.raises(DataError, match="no latent fired"):
        CodeWriter(Path(tmp_path / "b"), 3, "x").finish()
    assert stored.SHARDS == 5


# ---- weighted Jaccard
def test_weighted_jaccard_is_min_over_max():  # mona oracles
    assert weighted_jaccard(torch.tensor([1.0, 2, 0]), torch.tensor([2.0, 1, 1])).tolist() == [0.4]
    source = torch.Generator().manual_seed(0)
    x = torch.rand(20, 30, generator=source) * (torch.rand(20, 30, generator=source) > 0.7)
    p = torch.rand(4, 30, generator=source) * (torch.rand(4, 30, generator=source) > 0.5)
    dense = torch.minimum(x[:, None], p[None]).sum(-1) / torch.maximum(x[:, None], p[None]).sum(-1)
    assert torch.allclose(weighted_jaccard(x, p).float(), dense, atol=1e-6)
    assert torch.equal(weighted_jaccard(sparse.csr_matrix(x.numpy()), p), weighted_jaccard(x, p))
    assert torch.allclose(weighted_jaccard(x, x).diagonal(), torch.ones(20, dtype=torch.float64))
    assert torch.allclose(weighted_jaccard(x, x), weighted_jaccard(x, x).T)
    assert weighted_jaccard(3 * x[0], x[0])[0] == pytest.approx(1 / 3)
    a, b = torch.tensor([1.0, 1, 0, 1]), torch.tensor([0.0, 1, 1, 1])
    assert weighted_jaccard(a, b)[0] == 0.5  # sets: 2 of 4
    assert weighted_jaccard(torch.zeros(3), torch.zeros(3))[0] == 0
    away = 1 - weighted_jaccard(x, x)
    assert (away[:, None, :] <= away[:, :, None] + away[None] + 1e-12).all()  # triangle


def test_weighted_jaccard_refuses_signed_codes_and_other_widths():
    with pytest.raises(ConfigError, match="non-negative codes; minimum is -0.83: add ReLU or use cosine"):
        weighted_jaccard(torch.tensor([[0.2, -0.83]]), torch.ones(2))
    with pytest.raises(ConfigError, match="one width, got 2 and 3"):
        weighted_jaccard(torch.ones(2), torch.ones(3))
    with pytest.raises(DataError, match="finite"):
        weighted_jaccard(torch.tensor([float("nan"), 1]), torch.ones(2))
