"""Truncated standardisation of depth."""

import pytest
import torch

from quire.errors import ConfigError
from quire_multimae.standardize import TruncatedStandardize, truncated_standardize


def test_of_0_to_99_the_kept_mean_is_49_5_and_the_unbiased_variance_540():
    found = truncated_standardize(torch.arange(100.0).reshape(1, 1, 10, 10))
    torch.testing.assert_close(found.flatten(), (torch.arange(100.0) - 49.5) / 540.0**0.5, atol=1e-5, rtol=1e-5)


def test_a_positive_affine_change_does_not_matter():
    depth = torch.rand(3, 1, 6, 7)
    a, b = truncated_standardize(depth), truncated_standardize(5 * depth + 100)
    torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)


def test_missing_pixels_and_empty_samples_are_zero():
    depth, valid = torch.rand(2, 1, 4, 4), torch.ones(2, 4, 4, dtype=torch.bool)
    valid[0, :2], valid[1] = False, False
    depth[0, 0, :2] = 1e6
    found = TruncatedStandardize()({"depth": depth, "depth_valid": valid}, torch.Generator())["depth"]
    assert not found[1].any() and not found[0, 0, :2].any()
    torch.testing.assert_close(found[:1, :, 2:], truncated_standardize(depth[:1, :, 2:]), atol=1e-5, rtol=1e-5)


def test_a_trim_of_half_is_refused():
    with pytest.raises(ConfigError, match=r"trim in \[0, 0.5\)"):
        TruncatedStandardize(0.5)
