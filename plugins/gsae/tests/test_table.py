"""Both selections of one dictionary, and the effect of steering."""

import math

import pytest
import torch
from gsae_toys import D, K, N, feed, model_of, noise

from quire import ConfigError
from quire.checkpoint import export
from quire.reproduce import arm_trainer, quiet
from quire.roles.sparse.jumprelu import JumpReLU
from quire.roles.sparse.selectors import BatchTopK, TopK
from quire_gsae.selectors import GradBatchTopK, GradTopK
from quire_gsae.steering import SteeringEffect, spread_latents, steering_effect
from quire_gsae.table import SENTENCE, SelectionTable, both, selecting, table_text, trained_with

BATCH = {"activation": noise(N, D, seed=5), "grad": 30 * noise(N, D, seed=2)}


@pytest.mark.parametrize(("plain", "graded"), [(TopK, GradTopK), (BatchTopK, GradBatchTopK)])
def test_what_a_dictionary_was_trained_with_does_not_limit_its_selection(plain, graded):
    ours, theirs = model_of(graded(K)).eval(), model_of(plain(K)).eval()
    found = {}
    for how in ("plain", "grad"):
        for name, model in (("ours", ours), ("theirs", theirs)):
            selector = model.encoder.selector
            with selecting(model.encoder, how):
                found[name, how] = model.encoder(BATCH).dense()
            assert model.encoder.selector is selector
    assert torch.equal(found["ours", "plain"], found["theirs", "plain"])
    assert torch.equal(found["ours", "grad"], found["theirs", "grad"])
    assert not torch.equal(found["ours", "grad"], found["ours", "plain"])
    assert ours.encoder.selector.select_at_eval == "plain"


def test_a_selector_without_an_order_is_refused():
    with (
        pytest.raises(ConfigError, match="JumpReLU has no gradient form"),
        selecting(model_of(JumpReLU()).encoder, "grad"),
    ):
        pass


def test_both_cards_are_of_the_same_tokens_and_sparsity():
    model = model_of(GradTopK(K))
    cards = both(model.encoder, model.decoder, feed(), tokens=200)
    assert cards["plain"]["ce_clean"] == cards["grad"]["ce_clean"]
    assert cards["plain"]["l0"] == pytest.approx(cards["grad"]["l0"], abs=0.1)
    assert cards["plain"]["delta_ce"] != cards["grad"]["delta_ce"] and model.training
    text = table_text({trained_with(model.encoder): cards})
    assert "| GradTopK beta 1 |" in text and SENTENCE in text and "delta_ce" in text


@pytest.mark.filterwarnings("ignore")
def test_the_callback_puts_another_dictionary_beside(tmp_path, capsys):
    export(model_of(TopK(K)).eval(), tmp_path / "other")
    model = model_of(GradTopK(K))
    table = SelectionTable(against=str(tmp_path / "other"), tokens=100)
    with quiet():
        trainer = arm_trainer(max_steps=2, limit_val_batches=1, callbacks=[table], default_root_dir=tmp_path)
        trainer.fit(model, datamodule=feed())
    out = capsys.readouterr().out
    assert list(table.rows) == ["GradTopK beta 1", "TopK"] and "| TopK |" in out and SENTENCE in out
    assert math.isfinite(float(trainer.callback_metrics["val/selection/grad/delta_ce"]))


def test_data_without_gradients_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="SelectionTable selects by gradient too: set data.with_grad: true"), quiet():
        arm_trainer(max_steps=1, callbacks=[SelectionTable()]).fit(model_of(TopK(K)), datamodule=feed(with_grad=False))
    with pytest.raises(ConfigError, match="tokens must be at least 1"):
        SelectionTable(tokens=0)


# ---- steering
def test_nothing_is_steered_by_nothing_and_more_by_more():
    data = feed()
    subject, rows = data.studied(), noise(3, D, seed=4)
    batch = data.rows("val").batch([0, 1, 2, 3])
    none, some, more = (steering_effect(subject, data.sites[0], rows, batch, alpha=a) for a in (0.0, 1.0, 3.0))
    assert bool((none == 0).all()) and bool((more > some).all()) and bool((some > 0).all())
    scaled = steering_effect(subject, data.sites[0], 7 * rows, batch, alpha=1.0)
    assert torch.allclose(scaled, some)  # directions are taken at norm 1
    with pytest.raises(ConfigError, match="at least 2 contexts"):
        steering_effect(subject, data.sites[0], rows, data.rows("val").batch([0]))


def test_latents_are_spread_over_frequencies_and_dead_ones_left_out():
    fired = torch.tensor([0.0, 5, 9, 1, 0, 7])
    assert spread_latents(fired, 2).tolist() == [2, 3]
    assert spread_latents(fired, 10).tolist() == [2, 5, 1, 3]
    assert not len(spread_latents(torch.zeros(4), 2))


@pytest.mark.filterwarnings("ignore")
def test_the_metric_is_logged_in_validation():
    model = model_of(GradTopK(K))
    metric = SteeringEffect(contexts=4, latents=3)
    metric.build(type(model.spec)({**model.spec, "codes": model.encoder.sizes()}))
    metric.bind(model)
    model.metrics.append(metric)
    with quiet():
        found = arm_trainer(limit_val_batches=1).validate(model, datamodule=feed(), verbose=False)
    assert found[0]["val/SteeringEffect"] > 0


def test_steering_needs_a_subject():
    with pytest.raises(ConfigError, match="contexts of at least 2"):
        SteeringEffect(contexts=1)
