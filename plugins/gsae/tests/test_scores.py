"""What is kept: every oracle of the selection, by hand and on noise."""

import logging
import math

import pytest
import torch
from gsae_toys import D, F, K, N, context, feed, kept, model_of, noise, unit_rows

from quire import ConfigError, DataError
from quire.contracts import Spec, build
from quire.roles.sparse.objective import SparseReconstruction
from quire.roles.sparse.selectors import BatchTopK, Matryoshka, TopK
from quire_gsae.scores import effect, scores, size
from quire_gsae.selectors import GradBatchTopK, GradTopK

Z = noise(N, F, seed=1).relu()
G = noise(N, D, seed=2)


def ready(selector, latents=F, **spec):
    build(selector, Spec({"latents": latents, "site": "blocks.1.resid", **spec}))
    return selector


def chosen(z=Z, grad=G, seen=None, **options):
    return kept(ready(GradTopK(K, **options)), z, seen or context(grad))


# ---- oracles
def test_oracle_beta_0_is_topk_bit_for_bit():
    ours, theirs = (s.select(Z, context(G)) for s in (GradTopK(K, beta=0.0), TopK(K)))
    assert torch.equal(ours.indices, theirs.indices) and torch.equal(ours.values, theirs.values)


@pytest.mark.parametrize("score", ["additive", "attribution"])
def test_oracle_a_row_without_gradient_is_topk(score):
    grad = G.clone()
    grad[3] = 0
    assert torch.equal(chosen(grad=grad, score=score)[3], kept(TopK(K), Z, context())[3])


@pytest.mark.parametrize("c", [0.01, 3.0, 1e4])
def test_oracle_scaling_the_gradient_and_beta_against_each_other_changes_nothing(c):
    assert torch.equal(chosen(grad_norm="none", beta=2.0), chosen(grad=c * G, grad_norm="none", beta=2.0 / c))


@pytest.mark.parametrize("norm", ["batch_mean", "rms"])
def test_oracle_normed_gradients_may_have_any_scale(norm):
    assert torch.equal(chosen(grad_norm=norm), chosen(grad=1000 * G, grad_norm=norm))
    assert not torch.equal(chosen(grad_norm="none"), chosen(grad=1000 * G, grad_norm="none"))


def test_oracle_the_sign_of_the_gradient_does_not_matter():
    assert torch.equal(chosen(), chosen(grad=-G))


@pytest.mark.parametrize("score", ["additive", "attribution"])
def test_oracle_only_positive_latents_are_kept_and_never_more_than_k(score):
    codes = GradTopK(K, score=score).select(Z, context(G))
    assert bool((codes.values > 0).all()) and int(codes.l0().max()) <= K
    few = Z * (torch.arange(F) < 2)
    assert int(GradTopK(K, score=score).select(few, context(G)).l0().max()) <= 2


def test_oracle_a_larger_effect_never_evicts_a_latent():
    a = effect(G, unit_rows())
    one = a.new_ones(())
    before = scores(Z, a, one, 1.0, "additive").topk(K, 1).indices
    for row in range(N):
        for latent in before[row].tolist():
            more = a.clone()
            more[row, latent] += 3.0
            assert latent in scores(Z, more, one, 1.0, "additive").topk(K, 1).indices[row].tolist()


@pytest.mark.parametrize(("beta", "share"), [(0.1, 0.93), (1.0, 0.61), (10.0, 0.43)])
def test_oracle_overlap_with_topk_falls_with_beta(beta, share):
    """F=64, k=4, D=16, N=7, normal numbers, unit rows: .93, .61, .43 (pilot, +-.15), here over several draws."""
    found = []
    for seed in range(20):
        z, grad, rows = noise(N, F, seed=seed).relu(), noise(N, D, seed=100 + seed), unit_rows(seed=200 + seed)
        seen = context(grad, rows)
        ours, plain = kept(GradTopK(K, beta=beta, grad_norm="none"), z, seen), kept(TopK(K), z, seen)
        same = [len(set(a) & set(b)) / K for a, b in zip(ours.tolist(), plain.tolist())]
        found.append(sum(same) / N)
    assert sum(found) / len(found) == pytest.approx(share, abs=0.15)


@pytest.mark.parametrize(("beta", "latent", "value"), [(1.0, 1, 1.5), (0.3, 0, 2.0)])
def test_oracle_by_hand_the_kept_value_is_the_activation(beta, latent, value):
    """z = (2, 1.5, 0), a = (0, 1, 9): s = (2, 3, 0) at beta 1, (2, 1.95, 0) at .3."""
    rows, grad = torch.diag(torch.tensor([0.0, 1.0, 9.0])), torch.ones(1, 3)
    z = torch.tensor([[2.0, 1.5, 0.0]])
    codes = GradTopK(1, beta=beta, grad_norm="none").select(z, context(grad, rows, count=1))
    assert codes.indices.tolist() == [[latent]] and codes.values.tolist() == [[value]]


def test_oracle_large_beta_is_attribution():
    far = chosen(beta=1e6, grad_norm="none")
    assert torch.equal(far, chosen(score="attribution", grad_norm="none"))


def test_scores_are_ranked_in_float32_under_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        a = effect(G.bfloat16(), unit_rows())
    assert a.dtype == torch.float32 and not torch.equal(a, a.bfloat16().float())


# ---- the norm
def test_first_and_special_tokens_do_not_rule_the_mean():
    a = torch.ones(4, F)
    a[0], a[2] = 1e6, 1e6
    counting = torch.tensor([False, True, False, True])
    assert float(size(a, "batch_mean", counting)) == 1.0 and float(size(a, "rms", counting)) == 1.0
    assert float(size(a, "batch_mean")) > 1e5


def test_outliers_at_position_0_change_nothing_when_masked():
    position, special = torch.arange(N) % 3, torch.arange(N) == 1
    loud = G.clone()
    loud[(position == 0) | special] *= 1e4
    rest = (position != 0) & ~special
    fields = {"position": position, "special": special}
    quiet, masked = (chosen(seen=context(g, **fields)) for g in (G, loud))
    assert torch.equal(quiet[rest], masked[rest])
    unmasked = chosen(seen=context(loud, **fields), norm_mask=False)
    assert torch.equal(unmasked[rest], kept(TopK(K), Z, context())[rest])


def test_a_batch_of_one_token_uses_that_token_even_where_it_is_masked():
    seen = context(G[:1], count=1, position=torch.zeros(1, dtype=torch.long))
    assert torch.equal(chosen(Z[:1], seen=seen), chosen(Z[:1], seen=context(G[:1], count=1)))


def test_no_gradient_anywhere_is_topk_and_warns_once(caplog):
    selector = ready(GradTopK(K))
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert torch.equal(kept(selector, Z, context(0 * G)), kept(TopK(K), Z, context()))
    assert caplog.text.count("all gradients are 0") == 1


# ---- in a dictionary
def test_evaluation_is_plain_unless_asked_for():
    batch = {"activation": noise(N, D, seed=5), "grad": 50 * G}
    model, plain = model_of(GradTopK(K)).eval(), model_of(TopK(K)).eval()
    assert torch.equal(model.encoder(batch).indices, plain.encoder(batch).indices)
    assert torch.equal(model.encoder({"activation": batch["activation"]}).values, plain.encoder(batch).values)
    by_gradient = model_of(GradTopK(K, select_at_eval="grad")).eval().encoder(batch)
    assert not torch.equal(by_gradient.indices.sort(1).values, plain.encoder(batch).indices.sort(1).values)


def test_no_gradient_passes_through_scores_or_g():
    model = model_of(GradTopK(K))
    grad = G.clone().requires_grad_(True)
    losses = model.objective(model, {"activation": noise(N, D, seed=5), "grad": grad})
    losses["reconstruct"].backward()
    assert grad.grad is None and model.encoder.W_enc.grad is not None


def test_auxk_ranks_dead_latents_by_activation_alone():
    batch = {"activation": noise(N, D, seed=5), "grad": G}
    found = []
    for beta in (0.0, 100.0):
        model = model_of(GradTopK(K, beta=beta), objective=SparseReconstruction(dead_after=1, aux_latents=3))
        model.decoder.tokens_since_fired.fill_(5)
        reading, encoder, decoder = model.encoder.read(batch), model.encoder, model.decoder
        rest = noise(N, D, seed=8)  # the same residual for both
        found.append(model.objective.revive(encoder, decoder, reading, rest, torch.zeros_like(rest)))
    assert torch.allclose(*found)


def test_a_normalised_activation_scales_its_gradient():
    model = model_of(GradTopK(K, grad_norm="none"), norm="layer")
    x = noise(N, D, seed=5)
    reading = model.encoder.read({"activation": x, "grad": G})
    a = ((G * x.std(1, keepdim=True)) @ model.decoder.W_dec.T).abs()
    wanted = (reading.z * (1 + a)).topk(K, 1).indices.sort(1).values
    assert torch.equal(reading.codes.indices.sort(1).values, wanted)


def test_all_latents_silent_gives_the_bias():
    model = model_of(GradTopK(K))
    with torch.no_grad():
        model.encoder.b_enc.fill_(-1e3)
    codes = model.encoder({"activation": noise(N, D), "grad": G})
    made = model.decoder(codes)
    assert int(codes.l0().sum()) == 0 and torch.allclose(made, model.decoder.b_dec.expand(N, D))


def test_batch_topk_takes_the_highest_scores_of_the_batch_and_a_threshold_later():
    selector = ready(GradBatchTopK(K, grad_norm="none"))
    codes = selector.select(Z, context(G))
    s = Z * (1 + effect(G, unit_rows()))
    assert torch.equal(codes.dense() > 0, (s >= s.flatten().topk(K * N).values.min()) & (Z > 0))
    assert float(selector.threshold) == float(codes.values[codes.mask].min())
    later = selector.select(Z, context(training=False))  # no gradient needed
    assert torch.equal(later.dense(), Z * (selector.threshold < Z))
    selector.select_at_eval = "grad"
    assert torch.equal(selector.select(Z, context(G, training=False)).dense(), codes.dense())
    zero = ready(GradBatchTopK(K, beta=0.0)).select(Z, context(G)).dense()
    assert torch.equal(zero, ready(BatchTopK(K)).select(Z, context(G)).dense())


def test_matryoshka_ranks_each_prefix_by_gradient():
    model = model_of(Matryoshka(GradTopK(K, grad_norm="none"), [20]))
    reading = model.encoder.read({"activation": noise(N, D, seed=5), "grad": G})
    s = reading.z * (1 + effect(G, model.decoder.W_dec))
    (short,) = reading.codes.nested
    assert torch.equal(short.indices.sort(1).values, s[:, :20].topk(K, 1).indices.sort(1).values)


# ---- refusals
def test_what_cannot_work_is_refused_in_a_sentence():
    refused = [
        (lambda: model_of(GradTopK(5000), latents=4096), r"k \(5000\) exceeds latents \(4096\)"),
        (lambda: GradTopK(0), "GradTopK.k must be at least 1, got 0"),
        (lambda: GradTopK(2, beta=-1.0), "beta must be at least 0, got -1"),
        (lambda: GradTopK(2, grad_norm="max"), "grad_norm must be batch_mean or rms or none"),
        (lambda: GradTopK(2, score="sum"), "score must be additive or attribution"),
        (lambda: GradBatchTopK(2, select_at_eval="both"), "select_at_eval must be plain or grad"),
        (lambda: ready(GradTopK(2), target_width=3), "a transcoder's rows are at another site"),
    ]
    for make, says in refused:
        with pytest.raises(ConfigError, match=says):
            make()


def test_a_missing_gradient_names_the_remedy_that_helps():
    with pytest.raises(ConfigError, match=r"GradTopK needs gradients: the batch has no 'grad' field; set data.with_gr"):
        chosen(seen=context())
    with pytest.raises(ConfigError, match="select_at_eval: plain helps in evaluation only"):
        chosen(seen=context())
    with pytest.raises(ConfigError, match="set data.with_grad: true or select_at_eval: plain$"):
        chosen(seen=context(training=False), select_at_eval="grad")


@pytest.mark.parametrize(("value", "what"), [(math.nan, "NaN"), (math.inf, "an infinite value")])
def test_a_broken_gradient_is_told_with_its_row_and_site(value, what):
    grad = noise(20, D)
    grad[12, 3] = value
    with pytest.raises(DataError, match=rf"field 'grad' has {what} at row 12 \(site blocks.1.resid\)"):
        chosen(noise(20, F).relu(), seen=context(grad, count=20))


def test_data_without_gradients_is_refused_before_training():
    from quire.datasets.planted import PlantedFeatures
    from quire.matching import check_fields

    model = model_of(GradTopK(K))
    with pytest.raises(ConfigError, match="GradTopK reads the field grad; PlantedFeatures offers activation"):
        check_fields(model, PlantedFeatures.fields, "PlantedFeatures", "fit")
    check_fields(model, ("activation",), "a plain feed", "test")
    assert feed().fields.count("grad") == 1


def test_the_mean_is_that_of_all_processes(monkeypatch):
    """Two halves see the mean of the whole, so what is kept does not depend on the number of processes."""
    whole, position = effect(G, unit_rows()), torch.arange(N) % 3
    parts, sums = [(whole[:3], position[:3] != 0), (whole[3:], position[3:] != 0)], []
    monkeypatch.setattr("quire_gsae.scores.sum_over_ranks", lambda v: sums.append(v) or v)
    for part in parts:
        size(part[0], "batch_mean", part[1], over_ranks=True)
    monkeypatch.setattr("quire_gsae.scores.sum_over_ranks", lambda v: sums[0] + sums[1])
    for part in parts:
        assert torch.allclose(
            size(part[0], "batch_mean", part[1], over_ranks=True), size(whole, "batch_mean", position != 0)
        )
