"""How many latents a token keeps: every oracle of the rule, by hand and on noise."""

import pytest
import torch
from topafa_toys import D, F, N, context, feed, model_of, noise, unit_rows

from quire import ConfigError, DataError
from quire.contracts import Spec, build
from quire.roles.sparse.jumprelu import JumpReLU
from quire.roles.sparse.selector import Selector
from quire.roles.sparse.selectors import TopK
from quire_topafa.prefix import OFFICIAL_SENTINEL, nearest, prefixes
from quire_topafa.selector import TopAFA

Z = noise(N, F, seed=1).relu()
U = noise(N, D, seed=2)


def counts(selector, z=Z, u=U, rows=None):
    return selector.select(z, context(u, unit_rows() if rows is None else rows)).l0().tolist()


def of_norm(n, width=4):
    """[1,D] of norm n."""
    return torch.tensor([[n] + [0.0] * (width - 1)])


# ---- by hand
@pytest.mark.parametrize(
    ("n", "norm", "squared"), [(3, 1, 1), (4, 1, 1), (4.49, 1, 1), (4.51, 2, 1), (4.53, 2, 2), (5, 2, 2)]
)
def test_oracle_norms_and_their_squares_differ_between_their_midpoints(n, norm, squared):
    """Activations (4, 3, 0, 0), unit rows: norms meet at 4.5, squares at sqrt(20.5) = 4.528."""
    z = torch.tensor([[4.0, 3, 0, 0]])
    assert counts(TopAFA("norm"), z, of_norm(n), torch.eye(4)) == [norm]
    assert counts(TopAFA("squared"), z, of_norm(n), torch.eye(4)) == [squared]


def test_oracle_the_official_notebooks_example():
    """k = [2, 2, 2] at norms 54.41, 15.00, 67.80 (the official repository's notebook)."""
    acts, rows = torch.tensor([[5.0, 4, 3], [1, 1, 1], [1, 10, 2]]), torch.tensor([[1.0, 2], [3, 4], [5, 6]])
    x = acts @ rows
    assert x.norm(dim=1).tolist() == pytest.approx([54.41, 15.00, 67.80], abs=0.01)
    for compat in (None, "official"):
        assert counts(TopAFA(compat=compat), acts, x, rows) == [2, 2, 2]


def test_all_latents_are_never_kept_unless_there_is_one():
    z = torch.tensor([[1.0, 1, 1]])
    assert counts(TopAFA(), z, of_norm(100.0, 3), torch.eye(3)) == [2]
    assert counts(TopAFA(), z[:, :1], of_norm(100.0, 1), torch.eye(1)) == [1]


def test_the_official_sentinel_is_wrong_for_large_norms_and_infinity_is_not():
    z, u = torch.tensor([[9e3, 9e3, 9e3]]), of_norm(9.9e3, 3)
    assert counts(TopAFA(), z, u, torch.eye(3)) == [1]
    squares = z.square().cumsum(1)
    assert nearest(z.square(), torch.tensor([9.95e3]), "norm", OFFICIAL_SENTINEL).tolist() == [3]  # 1e4 looks nearest
    assert nearest(z.square(), torch.tensor([9.95e3]), "norm", torch.inf).tolist() == [1]
    assert torch.equal(squares, z.square().cumsum(1))  # neither writes into what it was given


def test_silent_tokens_and_inputs_of_zero_keep_one_zero():
    codes = TopAFA().select(torch.zeros(2, F), context(U[:2], unit_rows()))
    assert codes.values.shape == (2, 1) and codes.l0().tolist() == [0, 0]
    assert counts(TopAFA(), Z[:1], torch.zeros(1, D)) == [1]


# ---- properties
def full_sort(z, u, rows, domain="norm"):
    """The rule with a whole argsort in fp64."""
    sizes = z.double() * rows.double().norm(dim=1)
    sums = sizes.sort(1, descending=True).values.square().cumsum(1)
    sums[:, -1] = torch.inf
    n = u.double().norm(dim=1)[:, None]
    gaps = (sums.sqrt() - n).abs() if domain == "norm" else (sums - n.square()).abs()
    return gaps, gaps.argmin(1) + 1


@pytest.mark.parametrize("domain", ["norm", "squared"])
@pytest.mark.parametrize("first", [1, 4, 16, F])
def test_oracle_a_growing_part_of_the_order_gives_the_full_sorts_answer(domain, first):
    z = noise(200, F, seed=3, dtype=torch.float64).relu()
    u = noise(200, D, seed=4, dtype=torch.float64) * torch.linspace(0.1, 3, 200)[:, None]
    gaps, wanted = full_sort(z, u, unit_rows(), domain)
    indices, found = prefixes(z, z.square(), u.norm(dim=1), domain, first=first)
    assert torch.equal(found, wanted)
    assert bool((gaps.gather(1, found[:, None] - 1) <= gaps[:, :-1] + 1e-6).all())  # no other count is nearer
    for row in range(200):  # and it is a prefix of the order
        k = int(found[row])
        assert set(indices[row, :k].tolist()) == set(z[row].topk(k).indices.tolist()) or int(k) > int(
            (z[row] > 0).sum()
        )


@pytest.mark.parametrize("most", [1, 3, 20])
def test_oracle_k_max_is_the_full_answer_cut(most):
    whole = prefixes(Z, Z.square(), U.norm(dim=1))[1]
    for first in (2, 256):
        indices, cut = prefixes(Z, Z.square(), U.norm(dim=1), most=most, first=first)
        assert torch.equal(cut, whole.clamp(max=most)) and indices.shape[1] <= most


def test_oracle_permuting_latents_permutes_what_is_kept():
    mixed = torch.randperm(F, generator=torch.Generator().manual_seed(5))
    plain = TopAFA().select(Z, context(U, unit_rows())).dense()
    other = TopAFA().select(Z[:, mixed], context(U, unit_rows()[mixed])).dense()
    assert torch.equal(plain[:, mixed], other)


@pytest.mark.parametrize("c", [0.1, 7.0])
def test_oracle_scaling_inputs_and_bias_keeps_k(c):
    model = model_of(TopAFA(), encoder_bias=False).eval()
    x = noise(40, D, seed=6)
    before = model.encoder({"activation": x}).l0()
    with torch.no_grad():
        model.encoder.b_dec.mul_(c)
    assert torch.equal(model.encoder({"activation": c * x}).l0(), before) and int(before.min()) < int(before.max())


def test_oracle_scaling_rows_against_encoders_keeps_k_where_rows_count():
    a = torch.linspace(0.3, 4, F)[torch.randperm(F, generator=torch.Generator().manual_seed(0))]
    scaled = counts(TopAFA(), Z / a, U, unit_rows() * a[:, None])
    assert scaled == counts(TopAFA(), Z, U)
    assert counts(TopAFA(scale_by_decoder=False), Z / a, U, unit_rows() * a[:, None]) != scaled


def test_oracle_after_a_layer_norm_every_token_has_one_norm():
    """|x~| = sqrt(D-1) = 27.6948 +- 3e-4 at D = 768."""
    model = model_of(TopAFA(), width=768, norm="layer", subtract_bias=False, decoder=None)
    x = model.encoder.normalised({"activation": 5 * noise(50, 768) + 2})[0]
    assert x.norm(dim=1).min() > 27.6948 - 3e-4 and x.norm(dim=1).max() < 27.6948 + 3e-4


def test_the_decoders_bias_is_taken_off_the_target_even_where_the_encoder_leaves_it():
    model = model_of(TopAFA(), subtract_bias=False).double()
    x = noise(30, D, seed=6, dtype=torch.float64)
    with torch.no_grad():
        model.decoder.b_dec.copy_(noise(D, seed=7))
    reading = model.encoder.read({"activation": x})
    wanted = full_sort(reading.z, x - model.decoder.b_dec.detach(), model.decoder.W_dec.detach())[1]
    assert torch.equal(reading.codes.l0(), torch.minimum(wanted, (reading.z > 0).sum(1)))


# ---- in a dictionary
def test_kept_values_have_a_gradient_and_the_others_none():
    model = model_of(TopAFA())
    reading = model.encoder.read({"activation": noise(30, D, seed=6)})
    reading.z.retain_grad()
    reading.codes.values.sum().backward()
    assert torch.equal(reading.z.grad != 0, reading.codes.dense() > 0)
    assert int(reading.codes.l0().min()) < int(reading.codes.l0().max())


def test_one_token_alone_keeps_what_it_keeps_in_a_batch():
    model = model_of(TopAFA()).eval()
    x = noise(30, D, seed=6)
    together, alone = (model.encoder({"activation": part}).dense() for part in (x, x[4:5]))
    assert torch.allclose(together[4:5], alone, atol=1e-6)


def test_another_selectors_order_is_cut():
    reverse = type("Reverse", (Selector,), {"ranks": True, "scores": lambda self, z, seen: (z > 0) / (z + 0.1)})()
    found = TopAFA(order=reverse).select(Z, context(U, unit_rows()))
    wanted = prefixes((Z > 0) / (Z + 0.1), Z.square(), U.norm(dim=1))[1]
    assert torch.equal(found.l0(), torch.minimum(wanted, (Z > 0).sum(1))) and found.l0().tolist() != counts(TopAFA())
    assert counts(TopAFA(order=TopK(3))) == counts(TopAFA())


def test_sums_run_in_float32_at_least():
    z = noise(N, F, seed=1).relu().bfloat16()
    codes = TopAFA().select(z, context(U.bfloat16(), unit_rows().bfloat16()))
    assert codes.values.dtype == torch.bfloat16
    wanted = full_sort(z.float(), U.bfloat16().float(), unit_rows().bfloat16().float())[1]
    assert (codes.l0() - wanted.clamp(max=F)).abs().max() <= 1


# ---- refusals
def test_what_cannot_work_is_refused_in_a_sentence():
    rows = unit_rows().clone()
    rows[17] = 0
    refused = [
        (lambda: TopAFA(domain="l1"), ConfigError, "domain must be norm or squared"),
        (lambda: TopAFA(k_max=0), ConfigError, "k_max must be at least 1, got 0"),
        (lambda: model_of(TopAFA(k_max=65)), ConfigError, r"k_max \(65\) exceeds latents \(64\)"),
        (lambda: TopAFA(compat="v1"), ConfigError, "compat must be official or null"),
        (lambda: TopAFA(order=JumpReLU()), ConfigError, "TopAFA ranks latents; JumpReLU has no order of them"),
        (lambda: counts(TopAFA(), rows=rows), DataError, "decoder row 17 has zero norm"),
        (lambda: model_of(TopAFA(), width=1, norm="layer"), ConfigError, "norm: layer needs a width of at least 2"),
        (lambda: TopAFA().select(Z, context(U)), ConfigError, "TopAFA reads the decoder's rows"),
    ]
    for make, kind, says in refused:
        with pytest.raises(kind, match=says):
            make()


class NeedsGrad(TopK):
    """Stands for an order that reads gradients."""

    def scores(self, z, seen):
        return z * seen.need("grad", "set data.with_grad: true").norm(dim=1, keepdim=True)


def test_an_order_without_its_field_says_its_own_sentence():
    selector = TopAFA(order=NeedsGrad(2))
    build(selector, Spec({"latents": F}))
    with pytest.raises(ConfigError, match="needs the batch field 'grad': set data.with_grad: true"):
        counts(selector)
    assert "grad" not in feed().fields
