"""DirichletMask: exact counts, the Dirichlet's moments, repair, forced counts, bad input."""

from __future__ import annotations

import pytest
import torch

from quire.errors import ConfigError
from quire.roles.tokens.contract import Layout, Segment
from quire_multimae.masking import DirichletMask


def layout(*cells: int) -> Layout:
    return Layout.of(*(Segment(f"m{i}", (n, 1), (1, 1), f"m{i}") for i, n in enumerate(cells)))


def counts(subset, where: Layout):
    kept = subset.kept()
    return torch.stack([kept[:, s.start : s.stop].sum(1) for s in where.segments], 1)


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("alpha", [1e-3, 0.1, 1.0, 1000.0, 1e6])
@pytest.mark.parametrize("visible", [1, 24, 98, 400, 588])
def test_every_row_keeps_exactly_k_for_any_alpha_also_above_one_modality(alpha, visible):
    where = layout(196, 196, 196)
    subset = DirichletMask(visible, alpha=alpha).draw(where, 64, None, gen())
    assert subset.keep.shape == (64, visible)
    assert (counts(subset, where).sum(1) == visible).all()
    cells = torch.arange(588).expand(64, -1)
    assert torch.equal(subset.unshuffle(subset.shuffle(cells)), cells)


def test_moments_are_the_dirichlet_s_oracle_32_67_and_23_10():
    where = layout(196, 196, 196)
    found = counts(DirichletMask(98).draw(where, 10_000, None, gen()), where).float()
    error = 23.10 / 100  # of a mean over 10k draws
    assert (found.mean(0) - 98 / 3).abs().max() < 3 * error + 0.1  # 0.1: rounding and repair
    assert (found.std(0) - 23.10).abs().max() < 0.6
    none = (found == 0).float().mean(0)  # 1.02 % before repair, 1.08 % measured
    assert (none - 0.0105).abs().max() < 0.005


def test_moments_of_two_modalities_oracle_20_and_11_547():
    where = layout(100, 100)
    found = counts(DirichletMask(40).draw(where, 10_000, None, gen(1)), where).float()
    assert abs(float(found[:, 0].mean()) - 20) < 3 * 0.11547
    assert abs(float(found[:, 0].std()) - 11.547) < 0.3


def test_large_alpha_is_even_and_small_alpha_nearly_one_hot():
    where = layout(196, 196, 196)
    even = counts(DirichletMask(98, alpha=1e6).draw(where, 200, None, gen()), where)
    assert (even - 98 / 3).abs().max() <= 1
    single = counts(DirichletMask(98, alpha=1e-3).draw(where, 500, None, gen()), where)
    assert ((single == 98).any(1)).float().mean() > 0.97


def test_alpha_by_modality_and_forced_counts():
    where = layout(50, 50, 50)
    lean = counts(DirichletMask(30, alpha={"m0": 50.0, "m1": 0.1, "m2": 0.1}).draw(where, 300, None, gen()), where)
    assert lean[:, 0].float().mean() > 28
    forced = counts(DirichletMask(30, forced={"m1": 7}).draw(where, 300, None, gen()), where)
    assert (forced[:, 1] == 7).all() and (forced.sum(1) == 30).all()
    hidden = counts(DirichletMask(30, forced={"m0": 0}).draw(where, 300, None, gen()), where)
    assert (hidden[:, 0] == 0).all()


def test_uniform_subsets_leave_modalities_out_evenly():
    where = layout(100, 100, 100)
    found = counts(DirichletMask(40, subset_uniform=True).draw(where, 7000, None, gen()), where)
    singles = (found == 40).float().mean(0)  # 1 of the 7 subsets is this modality alone
    assert (singles - 1 / 7).abs().max() < 0.04


def test_one_modality_is_a_plain_random_mask_and_ratio_gives_a_sixth():
    subset = DirichletMask().draw(layout(196), 3, None, gen())
    assert subset.keep.shape == (3, 33)
    assert DirichletMask().draw(layout(196, 196, 196), 2, None, gen()).keep.shape == (2, 98)


def test_padding_is_never_kept():
    where = layout(10, 20)
    mask = torch.ones(5, 30, dtype=torch.bool)
    mask[:, 15:] = False
    subset = DirichletMask(12).draw(where, 5, mask, gen())
    assert mask.gather(1, subset.keep).all() and subset.keep.shape == (5, 12)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: DirichletMask(alpha=0.0), "alpha must be > 0, got 0.0"),
        (lambda: DirichletMask(alpha={"m0": -1.0}), "alpha must be > 0, got -1.0"),
        (lambda: DirichletMask(ratio=0), "ratio must be in"),
        (lambda: DirichletMask(visible=0), "visible must be at least 1"),
        (lambda: DirichletMask(700).draw(layout(196, 196, 196), 2, None, gen()), "visible=700 exceeds the 588 tokens"),
        (lambda: DirichletMask(9, forced={"x": 1}).draw(layout(9, 9), 2, None, gen()), "DirichletMask names 'x'"),
        (lambda: DirichletMask(9, forced={"m0": 10}).draw(layout(9, 9), 2, None, gen()), "forced keeps 10"),
        (lambda: DirichletMask(12, forced={"m0": 0}).draw(layout(9, 9), 2, None, gen()), "can't make visible=12"),
    ],
)
def test_bad_input(make, said):
    with pytest.raises(ConfigError, match=said.replace("(", r"\(")):
        make()
