"""Direct feature attribution splits a pre-activation exactly."""

import json

import pytest
import torch
from attn_toys import Ids, batch_of, dictionary, feed
from lightning.pytorch import Trainer
from torch import nn

from quire.checkpoint import export
from quire.errors import ConfigError
from quire.roles.sites.subject import Subject
from quire.roles.sparse.selectors import TopK
from quire_attn_sae.attribution import DirectFeatureAttribution
from quire_attn_sae.dfa import Firings, entries, linear, repeated, strongest

ALL = [("gpt2", {}), ("llama", {}), ("quire", {}), ("neox", {}), ("gpt2", {"norm": "layer"})]
ALL += [("gpt2", {"norm": "global_rms"}), ("gpt2", {"subtract_bias": False}), ("gpt2", {"encoder_bias": False})]


def everywhere(batch, latents):
    """Every real token and latent as firings."""
    rows, places = batch["mask"].nonzero(as_tuple=True)
    each = torch.arange(latents).repeat(len(rows))
    return Firings(rows.repeat_interleave(latents), places.repeat_interleave(latents), each)


@pytest.mark.parametrize(("kind", "given"), ALL)
def test_terms_and_constant_sum_to_the_pre_activation(kind, given):  # oracle: 4e-6 in fp32
    data = feed(kind)
    model, batch = dictionary(data, **given), batch_of(data)
    if given.get("norm") == "global_rms":
        model.encoder.fit_norm(batch)
    at = everywhere(batch, 24)
    line = linear(model.encoder, batch["activation"], at)
    terms = entries(batch["pattern"], batch["value"], line.directions, at)
    x = model.encoder.normalised(batch)[0]
    bias = model.encoder.b_dec
    pre = model.encoder.project(x if bias is None else x - bias).view(*batch["mask"].shape, -1)
    want = pre[at.rows, at.places, at.latents]
    assert torch.allclose(terms.sum((1, 2)) + line.constant, want, atol=1e-5 if given else 4e-6)
    future = torch.arange(terms.shape[2]) > at.places[:, None]
    assert float(terms.masked_fill(~future[:, None], 0).abs().max()) == 0  # oracle: DFA[t, s > t] = 0


def test_sums_over_heads_and_over_sources_agree():  # oracle
    data = feed()
    batch = batch_of(data)
    model = dictionary(data, DirectFeatureAttribution(3, "both"))
    rows = model.sampler(model, batch)
    assert [r["index"] for r in rows] == batch["index"].tolist()
    assert all(len(r["latents"]) == 3 for r in rows)
    for row in rows:
        for said in row["latents"]:
            both = torch.tensor(said["both"])
            assert torch.allclose(both.sum(1), torch.tensor(said["by_head"]))
            assert torch.allclose(both.sum(0), torch.tensor(said["by_source"]))
            assert both.sum() + said["constant"] == pytest.approx(said["pre"], abs=1e-5)
            assert said["activation"] == pytest.approx(said["pre"], abs=1e-5)  # ReLU, above 0
            assert said["source"] == int(both.sum(0).argmax()) <= said["position"]
    assert json.loads(json.dumps(rows)) == rows
    for by in ("head", "source"):
        model = dictionary(data, DirectFeatureAttribution([5, 2], by))
        again = model.sampler(model, batch)
        assert [s["latent"] for s in again[0]["latents"]] == [5, 2]
        assert f"by_{by}" in again[0]["latents"][0] and "both" not in again[0]["latents"][0]


def test_grouped_queries_give_what_values_repeated_by_hand_give():  # oracle: H_q = 4, H_kv = 2
    data = feed("llama")
    batch = batch_of(data)
    assert batch["value"].shape[2] == 2 and batch["pattern"].shape[1] == 4
    by_hand = torch.stack([batch["value"][:, :, h // 2] for h in range(4)], 2)
    assert torch.equal(repeated(batch["value"], 4), by_hand)
    z = torch.einsum("bhts,bshd->bthd", batch["pattern"], by_hand).flatten(2)
    assert torch.allclose(z[batch["mask"]], batch["activation"][batch["mask"]], atol=1e-5)
    model = dictionary(data)
    at = everywhere(batch, 24)
    line = linear(model.encoder, batch["activation"], at)
    one = entries(batch["pattern"], batch["value"], line.directions, at)
    assert torch.equal(one, entries(batch["pattern"], by_hand, line.directions, at))


@pytest.mark.parametrize("kind", ["gpt2", "llama", "quire", "neox"])
@pytest.mark.parametrize("left", [False, True])
def test_recursive_parts_sum_to_the_entry(kind, left):  # oracle: 1e-4
    data = feed(kind, source=Ids(left=left))
    batch = batch_of(data)
    model = dictionary(data, DirectFeatureAttribution(3, "source", recursive=True))
    for row in model.sampler(model, batch):
        for said in row["latents"]:
            parts = said["recursive"]
            assert sum(parts.values()) == pytest.approx(said["by_source"][said["source"]], abs=1e-4)
            assert {"embed", "blocks.0.attn_out", "blocks.0.mlp_out", "bias"} == set(parts)
    first = feed(kind, site="blocks.0.z")
    model = dictionary(first, DirectFeatureAttribution(1, recursive=True))
    found = model.sampler(model, batch_of(first))[0]["latents"][0]["recursive"]
    assert set(found) == {"embed", "bias"}


def test_recursion_goes_on_into_a_residual_dictionary(tmp_path):
    data = feed()
    below = feed(site="blocks.1.resid_pre", analysis=False)
    export(dictionary(below, selector=TopK(4)), tmp_path / "below")
    model = dictionary(data, DirectFeatureAttribution(2, recursive=str(tmp_path / "below")))
    for row in model.sampler(model, batch_of(data)):
        for said in row["latents"]:
            parts = said["recursive"]
            assert sum(parts.values()) == pytest.approx(said["by_source"][said["source"]], abs=1e-4)
            assert {"b_dec", "error", "latents", "bias"} <= set(parts) and any(k.startswith("latent ") for k in parts)


def test_each_sample_is_looked_at_where_the_latent_peaks():
    codes = torch.tensor([[[0.0, 2.0], [3.0, 0.0], [9.0, 9.0]], [[0.0, 0.0], [0.0, 1.0], [0.0, 0.5]]])
    mask = torch.tensor([[True, True, False], [True, True, True]])
    at = strongest(codes, mask, 2)  # padding does not count, latents that never fire are left out
    assert (at.rows.tolist(), at.places.tolist(), at.latents.tolist()) == ([0, 0, 1], [1, 0, 1], [0, 1, 1])
    at = strongest(codes, mask, [1])
    assert (at.rows.tolist(), at.places.tolist()) == ([0, 1], [0, 1])


def test_it_predicts_under_a_trainer_with_a_batch_of_one():
    data = feed(batch_size=1)
    model = dictionary(data, DirectFeatureAttribution(2))
    quiet = {"logger": False, "enable_progress_bar": False, "accelerator": "cpu", "enable_model_summary": False}
    found = Trainer(limit_predict_batches=2, **quiet).predict(model, datamodule=data)
    assert [len(rows) for rows in found] == [1, 1]


def test_bf16_rows_reach_an_fp32_dictionary():  # bad input: a bf16 buffer is cast
    data = feed(analysis=False, dtype="bfloat16", batch_size=1, buffer=8)
    batch = next(iter(data.train_dataloader()))
    assert batch["activation"].dtype == torch.float32
    assert dictionary(data)(batch).values.dtype == torch.float32


# ---- bad input
def test_without_patterns_it_says_what_to_set():
    data = feed(analysis=False)
    model = dictionary(data, DirectFeatureAttribution())
    with pytest.raises(ConfigError, match=r"needs 'pattern' and 'value': set data.analysis: true \(eager attention\)"):
        model.sampler(model, batch_of(data))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"by": "token"}, "by must be head, source, both"),
        ({"latents": 0}, "at least 1"),
        ({"latents": []}, "name latents"),
    ],
)
def test_bad_arguments_are_refused(given, said):
    with pytest.raises(ConfigError, match=said):
        DirectFeatureAttribution(**given)


def test_a_latent_that_is_not_there_and_another_site_are_refused():
    data = feed()
    model = dictionary(data, DirectFeatureAttribution([24]))
    with pytest.raises(ConfigError, match="latent 24 is not there: the dictionary has 24"):
        model.sampler(model, batch_of(data))
    with pytest.raises(ConfigError, match=r"DirectFeatureAttribution needs a z site; trained at blocks.0.resid"):
        dictionary(feed(site="blocks.0.resid"), DirectFeatureAttribution())


def test_a_block_whose_values_are_made_otherwise_is_refused():
    data = feed()
    data.subject.sites.anatomy.blocks[1].ln_1.weight.requires_grad_(False).add_(1)  # not what made the batch's values
    batch = batch_of(data)
    data.subject.sites.anatomy.blocks[1].ln_1.weight.add_(1)
    model = dictionary(data, DirectFeatureAttribution(2, recursive=True))
    with pytest.raises(ConfigError, match="values of block 1 of subject gpt2 are not W_V times its first norm"):
        model.sampler(model, batch)


def test_attention_without_a_separable_projection_names_what_was_tried():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.fused = nn.Linear(8, 8)

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = Attention()

    root = nn.Module()
    root.blocks = nn.ModuleList([Block(), Block()])
    with pytest.raises(ConfigError, match=r"blocks.1.attn has no output projection .*looked for o_proj, out_proj"):
        Subject(root, "odd").sites.place("blocks.1.z")
