"""Interventions change what they should and nothing else."""

import pytest
import torch
from attn_toys import Ids, batch_of, dictionary, feed

from quire.errors import ConfigError
from quire.roles.sparse.selectors import TopK
from quire_attn_sae.intervention import LatentIntervention


def made(kind="gpt2", left=False, selector=None, **given):
    data = feed(kind, source=Ids(left=left))
    return data, dictionary(data, LatentIntervention(**given), selector)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "quire"])
@pytest.mark.parametrize("site", ["blocks.1.z", "blocks.0.resid"])
def test_latents_left_alone_leave_the_logits(kind, site):  # oracle: 1e-5
    data = feed(kind, site=site)
    model, batch = dictionary(data, LatentIntervention()), batch_of(data)
    clean = data.subject.logits(batch)
    same = model.sampler.logits(model, batch, edit=lambda codes: codes.replace(values=codes.values.clone()))
    real = batch["mask"]
    assert torch.allclose(same[real], clean[real], atol=1e-5)


def test_taking_a_latent_out_takes_its_row_off_where_it_fires():
    data, model = made()
    batch = batch_of(data)
    codes, real = model.encoder(batch).dense(), batch["mask"]
    in_a_sample = ((codes > 0) & real[..., None]).any(1)
    i = int((in_a_sample.any(0) & ~in_a_sample.all(0)).nonzero()[0])  # fires in some samples only
    model.sampler.latents = [i]
    value, row = codes[..., i], model.decoder.W_dec[i]
    edited = model.sampler.edit(model.encoder(batch)).dense()
    assert float(edited[..., i].abs().sum()) == 0 and torch.equal(edited[..., i + 1 :], codes[..., i + 1 :])
    with data.subject.sites.replace("blocks.1.z", lambda z: z - value[..., None] * row):
        want = data.subject.run(batch)
    found = model.sampler.logits(model, batch)
    assert torch.allclose(found[real], want[real], atol=1e-4)
    said = model.sampler(model, batch)
    fires = in_a_sample[:, i]
    assert torch.equal(said["activation"] > 0, fires)
    assert float(said["kl"].min()) > -1e-6 and bool((said["kl"][fires] > 1e-9).any())
    assert said["kl"][~fires].abs().sum() < 1e-5 and said["index"].tolist() == batch["index"].tolist()


def test_pinning_holds_a_latent_and_zero_pins_are_zeros():
    data, model = made(mode="pin", latent=[3, 5], value=2.0, selector=TopK(4))
    batch = batch_of(data)
    codes = model.sampler.edit(model.encoder(batch)).dense()
    assert torch.equal(codes[..., [3, 5]], torch.full_like(codes[..., :2], 2.0))
    off, pinned = LatentIntervention("zero", 3), LatentIntervention("pin", 3, 0.0)
    for sampler in (off, pinned):
        sampler.site = "blocks.1.z"
    assert torch.equal(off.logits(model, batch), pinned.logits(model, batch))


def test_without_its_error_the_rebuild_stands_alone():
    data, model = made(latent=3, keep_error=False)
    batch = batch_of(data)

    def rebuilt(z):
        codes = model.encoder.encode(z).dense().clone()
        codes[..., 3] = 0
        return codes @ model.decoder.W_dec + model.decoder.b_dec

    with data.subject.sites.replace("blocks.1.z", rebuilt):
        want = data.subject.run(batch)
    assert torch.allclose(model.sampler.logits(model, batch)[batch["mask"]], want[batch["mask"]], atol=1e-4)


def test_padding_on_the_left_changes_nothing():
    right, left = made(latent=3), made(latent=3, left=True)
    mask = batch_of(right[0])["mask"]
    one = right[1].sampler(right[1], batch_of(right[0]))
    rows = batch_of(right[0])["tokens"]
    other = batch_of(left[0])
    other["tokens"] = torch.stack([row.roll(int((~real).sum())) for row, real in zip(rows, mask)])
    other["mask"] = mask.flip(1)
    other |= {k: v for k, v in left[0].sample({k: other[k] for k in ("tokens", "mask", "index")}).items()}
    two = left[1].sampler(left[1], other)
    for name in ("loss", "loss_clean", "kl", "activation"):
        assert torch.allclose(one[name], two[name], atol=1e-4), name


# ---- bad input
@pytest.mark.parametrize(
    ("given", "said"),
    [({"mode": "add"}, "mode must be zero or pin"), ({"mode": "pin", "value": -1.0}, "value must be at least 0")],
)
def test_bad_arguments_are_refused(given, said):
    with pytest.raises(ConfigError, match=said):
        LatentIntervention(**given)


def test_missing_latents_samples_and_subjects_are_refused():
    with pytest.raises(ConfigError, match="latent 24 is not there: the dictionary has 24"):
        made(latent=24)
    data, model = made()
    with pytest.raises(ConfigError, match=r"runs whole samples: set data.analysis: true"):
        model.sampler(model, {"activation": torch.zeros(3, 32), "tokens": torch.zeros(3)})
    batch = batch_of(data)
    model._trainer = None
    with pytest.raises(ConfigError, match="needs the subject itself"):
        model.sampler(model, batch)
