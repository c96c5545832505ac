"""eps_LBO against its theory, and how tokens are chosen and counted."""

import logging

import pytest
import torch
from topafa_toys import D, F, feed, model_of, noise, unit_rows

from quire import ConfigError, DataError, Spec
from quire.contracts import Losses
from quire.reproduce import arm_trainer, quiet
from quire.roles.sparse.card import measure
from quire.roles.sparse.codes import SparseCodes
from quire.roles.sparse.selectors import ReLU, TopK
from quire_topafa.metric import EpsLBO
from quire_topafa.norms import eps_lbo, norms
from quire_topafa.plot import ZFPlot, draw, edges
from quire_topafa.selector import TopAFA


class Rows:
    """A decoder with rows and maybe a bias."""

    def __init__(self, rows, bias=None):
        self.W_dec, self.b_dec = rows, bias


def judged(x, f, rows, bias=None):
    return eps_lbo(*norms({"activation": x}, f, Rows(rows, bias)), f.shape[-1])


# ---- oracles
def test_oracle_an_orthonormal_square_dictionary_has_eps_0():
    """|f| = |x| to 3e-6 in fp32."""
    rows = torch.linalg.qr(noise(D, D)).Q
    x = noise(50, D, seed=1)
    code = x @ rows.T
    a, b = norms({"activation": x}, code, Rows(rows))
    assert torch.allclose(a, b, rtol=3e-6) and float(judged(x, code, rows).max()) < 1e-6


@pytest.mark.parametrize("active", [2, 5, 30])
def test_oracle_it_is_a_lower_bound_on_the_largest_overlap(active):
    """x = f W exactly, unit rows: eps_LBO <= max |d_i . d_j| (pilot: .0005 to .008 against .757)."""
    rows = unit_rows()
    f = torch.zeros(200, F).scatter(1, noise(200, F, seed=2).topk(active, 1).indices, noise(200, F, seed=3).abs() + 0.1)
    overlap = (rows @ rows.T - torch.eye(F)).abs().max()
    found = judged(f @ rows, f, rows)
    assert float(found.max()) <= float(overlap) and float(found.min()) >= 0


def test_by_hand_with_the_bias_as_a_latent_that_is_always_on():
    """|x|² = 25, |f~|² = 4² + 3² x 2² ... : (25 - 13) / (1 x 13) with h = 2."""
    rows, x = torch.tensor([[2.0, 0], [0, 1]]), torch.tensor([[3.0, 4.0]])
    f = torch.tensor([[1.0, 0.0]])  # f~ = (2, 0), and a bias of norm 3
    assert float(judged(x, f, rows, torch.tensor([0.0, 3.0]))) == pytest.approx((25 - 13) / 13)
    assert float(judged(x, f, rows)) == pytest.approx((25 - 4) / 4)


def test_short_and_whole_codes_give_the_same_as_do_both_units():
    for norm in ("none", "layer", "global_rms"):
        model = model_of(TopK(4), norm=norm)
        x = 3 * noise(20, D, seed=4) + 1
        reading = model.encoder.read({"activation": x})
        codes = reading.codes
        short = norms({"activation": x}, codes, model.decoder)
        whole = norms({"activation": x}, codes.replace(values=codes.dense(), indices=None), model.decoder)
        assert torch.allclose(short[0], reading.x.norm(dim=1), rtol=1e-4)
        assert torch.allclose(short[1], whole[1])


# ---- tokens
def batch_of(model, lengths, seed=0):
    """Rows of sequences, in order."""
    total = sum(lengths)
    instance = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    position = torch.cat([torch.arange(n) for n in lengths])
    fields = {"activation": noise(total, D, seed=seed), "instance": instance, "position": position}
    return {**fields, "special": position == 1}


def parts(batch, *sizes):
    return [dict(zip(batch, values)) for values in zip(*(v.split(list(sizes)) for v in batch.values()))]


def seen_by(metric, model, *batches):
    metric.build(Spec(codes=model.encoder.sizes()))
    for batch in batches:
        with torch.no_grad():
            metric.observe(model, batch, Losses({}, outputs={"codes": model.encoder(batch)}))
    return metric


def test_special_tokens_are_left_out_unless_types_are_asked_for():
    model = model_of(TopK(4)).eval()
    batch = batch_of(model, [5, 4])
    metric = seen_by(EpsLBO(report="mean"), model, batch)
    every = eps_lbo(*norms(batch, model.encoder(batch), model.decoder), F)
    assert float(metric.compute()) == pytest.approx(float(every[~batch["special"]].double().mean()))
    split = seen_by(EpsLBO(by_token_type=True, report="mean"), model, batch)
    assert float(split.compute()) == pytest.approx(float(metric.compute()))
    assert split.by_type()["special"]["mean"] == pytest.approx(float(every[batch["special"]].mean()))
    assert split.by_type()["first"]["mean"] == pytest.approx(float(every[batch["position"] == 0].mean()))


@pytest.mark.parametrize("sizes", [(12,), (5, 7), (3, 4, 5), (6, 6)])
def test_the_last_token_of_each_row_is_found_whatever_the_batches(sizes):
    model = model_of(TopK(4)).eval()
    batch = batch_of(model, [5, 4, 3])
    metric = seen_by(EpsLBO(tokens="last", report="mean"), model, *parts(batch, *sizes))
    every = eps_lbo(*norms(batch, model.encoder(batch), model.decoder), F)
    assert float(metric.compute()) == pytest.approx(float(every[[4, 8, 11]].double().mean()))
    metric.reset()
    assert not len(metric._all("metric", metric.values, metric.kinds)[0])


def test_quantiles_and_the_tokens_without_a_latent_are_told(caplog):
    metric = EpsLBO()
    metric.update(torch.tensor([3.0, 1.0, 2.0, torch.inf, torch.inf]))
    with caplog.at_level(logging.WARNING):
        assert float(metric.compute()) == 2.0
    said = metric.summary()
    assert said["mean"] == 2.0 and said["infinite"] == 2 and said["q05"] == 1.0 and said["q95"] == 3.0
    assert caplog.text.count("2 tokens have no active latent") == 1
    f = SparseCodes(torch.zeros(2, F), None, F)
    assert norms({"activation": noise(2, D)}, f, Rows(unit_rows()))[1].tolist() == [0, 0]
    assert eps_lbo(torch.ones(1), torch.zeros(1), F).tolist() == [float("inf")]


def test_the_card_has_mean_and_quantiles():
    model = model_of(TopAFA())
    data = feed()
    metric = EpsLBO(by_token_type=True)
    metric.build(Spec(codes=model.encoder.sizes()))
    for _ in range(2):  # a second card starts anew
        card = measure(model.encoder, model.decoder, data, tokens=160, splice=False, extra=[metric])
    batch = next(iter(data.val_dataloader()))
    model.eval()
    every = eps_lbo(*norms(batch, model.encoder(batch), model.decoder), F)
    assert len(metric._all("card", [v for v, _ in metric._card], [k for _, k in metric._card])[0]) == 160
    assert torch.allclose(metric._card[0][0], every)
    assert card["eps_lbo_q05"] <= card["eps_lbo_median"] <= card["eps_lbo_q95"] and card["eps_lbo_infinite"] == 0
    assert card["eps_lbo_first"] > 0


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("selector", [ReLU(), TopK(4), TopAFA()])
def test_it_is_logged_in_validation_for_any_selector(selector, tmp_path):
    model = model_of(selector)
    metric, plot = EpsLBO(), ZFPlot(points=100)
    metric.build(Spec(codes=model.encoder.sizes()))
    model.metrics.append(metric)
    with quiet():
        trainer = arm_trainer(limit_val_batches=2, callbacks=[plot], default_root_dir=tmp_path)
        found = trainer.validate(model, datamodule=feed(), verbose=False)[0]
    assert found["val/EpsLBO"] > 0 and found["val/zf/norm_ratio"] > 0 and len(plot.x) == 100
    assert list(tmp_path.rglob("zf.png"))


def test_bands_hold_the_diagonal_and_open_at_1(tmp_path):
    x = torch.tensor([2.0])
    lower, upper = edges(x, 0.5)
    assert float(lower) == pytest.approx(2 / 1.5**0.5) and float(upper) == pytest.approx(2 / 0.5**0.5)
    assert float(edges(x, 1.0)[1]) == float("inf")
    draw(x, x, [0.25, 1.0], tmp_path / "one.png")
    assert (tmp_path / "one.png").stat().st_size > 1000


def test_what_cannot_work_is_refused_in_a_sentence():
    empty = unit_rows().clone()
    empty[17] = 0
    refused = [
        (lambda: eps_lbo(torch.ones(1), torch.ones(1), 1), ValueError, "EpsLBO needs at least 2 latents"),
        (lambda: EpsLBO().build(Spec(codes={"latents": 1})), ValueError, "EpsLBO needs at least 2 latents"),
        (lambda: EpsLBO(tokens="first"), ConfigError, "tokens must be all or last"),
        (lambda: EpsLBO(report="max"), ConfigError, "report must be mean or one of q05"),
        (lambda: judged(noise(2, D), noise(2, F), empty), DataError, "decoder row 17 has zero norm"),
        (lambda: norms({"activation": noise(2, D)}, noise(2, F), object()), ConfigError, "object has no W_dec"),
        (lambda: ZFPlot(bands=[0.5, 1.5]), ConfigError, r"bands must lie in \(0, 1\]"),
        (lambda: ZFPlot(points=0), ConfigError, "points must be at least 1"),
    ]
    for make, kind, says in refused:
        with pytest.raises(kind, match=says):
            make()
