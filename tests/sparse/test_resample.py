"""Oracles of the resampling recipe (attn-sae)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.sparse.test_training import trained
from tests.sparse.toys import D, F, model_of, rows

from quire import ConfigError
from quire.datasets.planted import PlantedFeatures
from quire.roles.sparse.resample import Resample, race_keys, restart


def test_rows_are_drawn_in_proportion_to_their_error_squared() -> None:
    """Errors (1, 3) give .1 and .9."""
    errors = torch.tensor([1.0, 3.0])
    first = [int(race_keys(errors, seed).argmin()) for seed in range(4000)]
    assert sum(first) / len(first) == pytest.approx(0.9, abs=0.02)
    keys = race_keys(torch.tensor([0.0, 1.0, 2.0]), 0)
    assert not torch.isfinite(keys[0]) and len(set(keys.tolist())) == 3  # each arrives once: no replacement


def test_a_restart_touches_dead_latents_only() -> None:
    model = model_of(dtype=torch.float32)
    optimizer = torch.optim.Adam(model.parameters())
    sum(model.objective(model, {"activation": rows(dtype=torch.float32)}).values()).backward()
    optimizer.step()
    before = {n: v.clone() for n, v in model.state_dict().items()}
    moments = {n: optimizer.state[p]["exp_avg"].clone() for n, p in model.named_parameters()}
    dead = torch.zeros(F, dtype=torch.bool)
    dead[[3, 50]] = True
    x = rows(2, dtype=torch.float32, seed=9)
    restart(model.encoder, model.decoder, dead, x, 0.2, optimizer)
    made = x - model.decoder.b_dec
    unit = made / made.norm(dim=1, keepdim=True)
    assert torch.allclose(model.decoder.W_dec[dead], unit, atol=1e-6)
    mean = before["encoder.W_enc"][~dead].norm(dim=1).mean()
    assert torch.allclose(model.encoder.W_enc[dead], 0.2 * mean * unit, atol=1e-6)
    assert model.encoder.b_enc[dead].tolist() == [0, 0]
    for name in ("encoder.W_enc", "encoder.b_enc", "decoder.W_dec"):
        assert torch.equal(model.state_dict()[name][~dead], before[name][~dead])
        state = optimizer.state[dict(model.named_parameters())[name]]["exp_avg"]
        assert float(state[dead].abs().max()) == 0 and torch.equal(state[~dead], moments[name][~dead])


def test_when_all_are_dead_the_norm_is_one() -> None:
    model = model_of(dtype=torch.float32)
    restart(model.encoder, model.decoder, torch.ones(F, dtype=torch.bool), rows(F, dtype=torch.float32), 0.2)
    assert torch.allclose(model.encoder.W_enc.norm(dim=1), torch.full((F,), 0.2))


def planted() -> PlantedFeatures:
    return PlantedFeatures(width=D, features=24, samples=512, batch_size=64)


def test_training_restarts_what_never_fired() -> None:
    call = Resample(every=3, times=1, cutoff=0.0)
    model, _ = trained(steps=8, callbacks=[call], data=planted())
    assert call.steps == [3]
    plain, _ = trained(steps=8, data=planted())
    assert float((model.decoder.W_dec - plain.decoder.W_dec).abs().max()) > 0.01
    assert torch.allclose(model.decoder.W_dec.norm(dim=1), torch.ones(F), atol=1e-6)


def test_without_dead_latents_nothing_happens() -> None:
    call = Resample(every=3, times=1, cutoff=0.0)
    model, _ = trained(steps=4, callbacks=[call], data=planted(), selector=None, latents=40)  # k = 32 of 40
    plain, _ = trained(steps=4, data=planted(), selector=None, latents=40)
    assert call.steps == [] and torch.equal(model.decoder.W_dec, plain.decoder.W_dec)


def test_more_dead_latents_than_inputs_and_no_error_at_all(caplog: pytest.LogCaptureFixture) -> None:
    model = model_of(dtype=torch.float32)
    for errors, says in ((torch.ones(4), "96 dead latents but 4 inputs"), (torch.zeros(4), "rebuilt without error")):
        call = Resample(cutoff=1.0)
        call._fired, call._tokens = torch.zeros(F, dtype=torch.long), 4
        call._remember(rows(4, dtype=torch.float32), errors, 0, F)
        call._resample(model.encoder, model.decoder, None)
        assert says in caplog.text


def test_its_state_comes_back() -> None:
    call, again = Resample(every=50), Resample(every=50)
    trained(steps=3, callbacks=[call], data=planted())
    again.load_state_dict(call.state_dict())
    assert again._tokens == call._tokens > 0 and torch.equal(again._fired, call._fired)  # type: ignore[arg-type]


@pytest.mark.parametrize("given", [{"every": 0}, {"cutoff": -1.0}, {"scale": 0.0}])
def test_bad_numbers_are_refused(given: Any) -> None:
    with pytest.raises(ConfigError, match="Resample needs every, times and batches of at least 1"):
        Resample(**given)
