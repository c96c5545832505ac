"""Head attribution, and the site that it rests on."""

import pytest
import torch
from attn_toys import Ids, dictionary, feed
from lightning.pytorch import Trainer
from torch.nn.functional import normalize

from quire.contracts import Spec
from quire.errors import ConfigError
from quire.roles.sparse.card import measure
from quire_attn_sae.attribution import DirectFeatureAttribution
from quire_attn_sae.heads import HeadAttribution, head_shares, head_sizes

QUIET = {"logger": False, "enable_progress_bar": False, "accelerator": "cpu", "enable_model_summary": False}


def test_shares_sum_to_one_and_follow_the_heads():  # oracles
    rows = normalize(torch.randn(9, 12, generator=torch.Generator().manual_seed(0)), dim=1)
    shares = head_shares(rows, 3)
    assert torch.allclose(shares.sum(1), torch.ones(9))
    assert torch.allclose(rows.unflatten(1, (3, 4)).norm(dim=2).square().sum(1), torch.ones(9))
    assert torch.allclose(head_shares(rows, 3, "squared"), rows.unflatten(1, (3, 4)).square().sum(2), atol=1e-6)
    order = [2, 0, 1]
    moved = rows.unflatten(1, (3, 4))[:, order].flatten(1)
    assert torch.allclose(head_shares(moved, 3), shares[:, order])
    alone = torch.zeros(1, 12)
    alone[0, 4:8] = 0.5
    assert head_shares(alone, 3).tolist() == [[0, 1, 0]]
    assert head_shares(torch.zeros(1, 12), 3).tolist() == [[0, 0, 0]]


@pytest.mark.parametrize("kind", ["gpt2", "llama", "quire"])
def test_z_times_the_output_projection_is_the_attentions_output(kind):  # oracle: 1e-5
    data = feed(kind, source=Ids(ragged=False))
    batch = data.source.dataset("test").__getitems__([0, 1])
    found = data.subject.sites.read(batch, ["blocks.1.z", "blocks.1.attn_out"]).values
    projection = data.subject.sites.place("blocks.1.z").module
    assert torch.allclose(projection(found["blocks.1.z"]), found["blocks.1.attn_out"], atol=1e-5)
    assert data.spec["heads"] == 4 and data.spec["head_width"] == 8 and data.spec["width"] == 32


def test_it_is_logged_written_by_latent_and_on_the_card():
    data = feed()
    model = dictionary(data, DirectFeatureAttribution(), metrics=[HeadAttribution(by_latent=True)])
    metric = model.metrics[0]
    said = Trainer(limit_val_batches=1, **QUIET).validate(model, datamodule=data, verbose=False)[0]
    share = head_shares(model.decoder.W_dec, 4).amax(1).mean()
    assert said["val/HeadAttribution"] == pytest.approx(float(share))
    Trainer(limit_predict_batches=1, **QUIET).predict(model, datamodule=data)
    assert torch.allclose(metric.compute(), head_shares(model.decoder.W_dec, 4))
    card = measure(model.encoder, model.decoder, data, tokens=40, splice=False, extra=[metric])
    assert card.numbers["head_share"] == pytest.approx(float(share))
    assert sum(card.numbers[f"head_{h}"] for h in range(4)) == 24


def test_a_splice_of_the_identity_costs_nothing_and_zeros_recover_nothing():  # oracles
    data = feed(source=Ids(ragged=False))
    model = dictionary(data)

    def same(batch):
        return batch["activation"]

    card = measure(same, lambda c: c.values if hasattr(c, "values") else c, data, tokens=40)
    assert card.numbers["delta_ce"] == 0 and card.numbers["recovered_zero"] == 1
    nothing = measure(model.encoder, lambda c: torch.zeros(*c.values.shape[:-1], 32), data, tokens=40)
    assert nothing.numbers["recovered_zero"] == pytest.approx(0, abs=1e-6)
    assert {"fvu", "delta_ce", "recovered_mean"} <= set(nothing.numbers)  # never one without the other


# ---- bad input
def test_other_sites_and_wrong_widths_are_refused():
    with pytest.raises(ConfigError, match=r"HeadAttribution needs a z site; trained at blocks.0.resid"):
        dictionary(feed(site="blocks.0.resid"), metrics=[HeadAttribution()])
    with pytest.raises(ConfigError, match=r"needs a z site; trained at blocks.7.heads"):
        head_sizes({"site": "blocks.7.heads", "heads": 4, "head_width": 8, "width": 32}, "HeadAttribution")
    spec = Spec(site="blocks.1.z", width=768, heads=10, head_width=64)
    with pytest.raises(ConfigError, match=r"site blocks.1.z gives width 768, but heads 10 x head_width 64 = 640"):
        HeadAttribution().build(spec)
    with pytest.raises(ConfigError, match="norm must be l1_of_l2 or squared"):
        HeadAttribution("l2")
