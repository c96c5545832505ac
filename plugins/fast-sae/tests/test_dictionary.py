"""What the paper's dictionaries are: thresholds, the start of the bias, the learning rate. The parts are core's."""

from __future__ import annotations

import math

import pytest
import torch

from quire.contracts import Spec, build
from quire.errors import ConfigError
from quire.roles.sparse.jumprelu import JumpReLU
from quire.roles.sparse.median import geometric_median
from quire.roles.sparse.selector import Selection
from quire_fast_sae.schedule import HoldThenCosine


def test_the_paper_s_learning_rate():  # oracle: 7e-5, held, then to 7e-6
    schedule = HoldThenCosine(16_000, 64_000, 0.1)
    rates = [7e-5 * schedule.factor(step, 320_000) for step in (16_000, 100_000, 256_000, 320_000)]
    assert all(math.isclose(a, b) for a, b in zip(rates, (7e-5, 7e-5, 7e-5, 7e-6)))
    assert schedule.factor(0, 320_000) < 1e-3 and schedule.factor(288_000, 320_000) == pytest.approx(0.55)
    shares = HoldThenCosine(0.05, 0.2, 0.1)
    assert [shares.factor(s, 100) for s in (5, 80, 100)] == pytest.approx([1.0, 1.0, 0.1])
    assert HoldThenCosine().factor(10**9, math.inf) == 1.0
    with pytest.raises(ConfigError, match="give shares below 1"):
        schedule.factor(20_000, 50_000)
    with pytest.raises(ConfigError, match=r"floor in \[0, 1\]"):
        HoldThenCosine(floor=2)


def test_jumprelu_codes_are_0_or_above_their_threshold():  # oracle
    selector = JumpReLU(init=0.5)
    build(selector, Spec({"latents": 4}))
    theta = selector.threshold.detach()
    pre = torch.tensor([[-1.0, 0.2, float(theta[2]), 0.7]])
    empty = torch.zeros(1, 2)
    context = Selection(x=empty, u=empty, pre=pre, batch={}, training=False, decoder_rows=None, scale=None, model=None)
    codes = selector.select(pre.relu(), context).dense()
    assert codes.tolist() == [[0.0, 0.0, 0.0, pytest.approx(0.7)]] and (theta > 0).all()


def test_the_geometric_median():  # oracle
    square = torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, -1]])
    assert torch.allclose(geometric_median(square + 3), torch.tensor([3.0, 3.0]), atol=1e-4)
    assert float(geometric_median(torch.tensor([[0.0], [0.0], [10.0]])).abs()) < 1e-2
