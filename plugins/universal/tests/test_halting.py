"""Oracles 2 to 6: the arithmetic of adaptive computation time."""

import pytest
import torch

from quire.contracts import Spec, build
from quire.errors import ConfigError
from quire_universal.halting import ACT, GlobalACT, Halt, RandomSteps
from quire_universal.sight import Sight


def weights(ps, **given):
    """Run the accumulators on scripted probabilities: weights, effective weights, steps, remainder."""
    rule = ACT(**{"max_steps": len(ps), **given})
    halt = Halt(rule, torch.zeros(1, 1, len(ps)), None)
    used = []
    for t, p in enumerate(ps):
        if not halt.running.any():
            break
        weight, _ = halt.weigh(torch.tensor([[p]]), t + 1 == rule.max_steps)
        halt.add(torch.eye(len(ps))[t].view(1, 1, -1), weight)  # the state of step t is the t-th unit vector
        used.append(float(weight))
    return used, halt.out[0, 0].tolist(), float(halt.steps), float(halt.remainder)


def test_oracle_2_constant_probability_of_three_tenths():
    used, out, n, r = weights([0.3] * 6)
    assert used == pytest.approx([0.3, 0.3, 0.3, 0.1], abs=1e-6) and n == 4 and r == pytest.approx(0.1, abs=1e-6)
    assert out[:4] == pytest.approx(used) and sum(out) == pytest.approx(1, abs=1e-5)


def test_oracle_2_at_the_last_step_the_remainder_is_forced():
    used, _, n, r = weights([0.05] * 6)
    assert used == pytest.approx([0.05] * 5 + [0.75], abs=1e-6) and n == 6 and r == pytest.approx(0.75, abs=1e-6)
    used, out, _, r = weights([0.05] * 6, force_remainder=False)
    assert sum(out) == pytest.approx(0.30, abs=1e-6) and r == 0


def test_oracle_3_basic_mode_is_not_a_convex_combination():
    _, out, n, _ = weights([0.6, 0.9, 0.5], mode="basic")
    assert out[:2] == pytest.approx([0.36, 0.40], abs=1e-6) and sum(out) == pytest.approx(0.76, abs=1e-6) and n == 2


def test_oracle_4_limits():
    assert weights([1.0] * 4)[1:3] == ([1.0, 0, 0, 0], 1)
    assert weights([0.0] * 4)[2] == 4
    for k in (2, 3, 5):
        assert weights([1 / k] * 8, epsilon=1e-4)[2] == k


def test_the_test_is_strict_and_a_stopped_position_never_restarts():
    rule = ACT(max_steps=9, epsilon=0.25)
    halt = Halt(rule, torch.zeros(1, 1, 1), None)
    halt.weigh(torch.tensor([[0.75]]), False)
    assert bool(halt.running)  # .75 is not above .75
    halt.weigh(torch.tensor([[1e-3]]), False)
    assert not bool(halt.running)
    weight, active = halt.weigh(torch.tensor([[0.9]]), False)
    assert float(weight) == 0 and not bool(active) and float(halt.steps) == 2


def test_bias_one_means_two_steps_at_start(encoder):
    found = encoder(halting=ACT(max_steps=6), std=None)
    torch.nn.init.zeros_(found.halting.unit.weight)
    codes = found({"tokens": torch.randint(4, 40, (2, 5))})
    assert torch.equal(codes.steps, torch.full((2, 5), 2.0))


def test_oracle_5_a_stopped_state_is_bitwise_unchanged_under_copy(encoder):
    found = encoder(halting=ACT(max_steps=6, bias=-1.0))
    batch = {"tokens": torch.randint(4, 40, (3, 9))}
    steps = found(batch).steps
    assert steps.min() < steps.max()
    states = [found.features(batch, t).values for t in range(1, 7)]
    for t in range(5):
        stopped = steps <= t + 1
        assert torch.equal(states[t][stopped], states[t + 1][stopped])
        assert not torch.equal(states[t][~stopped], states[t + 1][~stopped]) or bool(stopped.all())


def test_run_goes_on_transforming_what_stopped(encoder):
    found = encoder(halting=ACT(max_steps=6, bias=-1.0, halted="run"))
    batch = {"tokens": torch.randint(4, 40, (3, 9))}
    steps = found(batch).steps
    stopped = steps == steps.min()
    t = int(steps.min())
    assert int(steps.max()) > t
    assert not torch.equal(found.features(batch, t).values[stopped], found.features(batch, t + 1).values[stopped])


@pytest.mark.parametrize("rule", [ACT, GlobalACT, RandomSteps])
@pytest.mark.parametrize("halted", ["copy", "run"])
def test_oracle_5_padding_and_the_batch_change_nothing(encoder, rule, halted):
    found = encoder(halting=rule(max_steps=5, bias=-1.0, halted=halted))
    tokens = torch.randint(4, 40, (4, 7))
    mask = torch.arange(7) < torch.tensor([[7], [4], [6], [5]])
    codes = found({"tokens": tokens, "mask": mask})
    noisy = found({"tokens": torch.where(mask, tokens, 5), "mask": mask})
    order = torch.tensor([2, 0, 3, 1])
    moved = found({"tokens": tokens[order], "mask": mask[order]})
    for name in ("values", "ponder", "steps"):
        want = getattr(codes, name)
        assert torch.allclose(want[mask], getattr(noisy, name)[mask], atol=1e-6)
        assert torch.allclose(want[order][mask[order]], getattr(moved, name)[mask[order]], atol=1e-6)
        for i, row in enumerate(mask):
            alone = found({"tokens": tokens[i : i + 1, : int(row.sum())]})
            assert torch.allclose(want[i, : int(row.sum())], getattr(alone, name)[0], atol=1e-5)
    assert (codes.steps[~mask] == 0).all()


def test_oracle_6_gradcheck_in_double(encoder):
    found = encoder(halting=ACT(max_steps=3, bias=-0.5), width=4, ffn=6).double()
    tokens = found.embed({"tokens": torch.tensor([[5, 6, 7]])})
    x = tokens.values.detach().requires_grad_(True)

    def f(values):
        codes = found.encode(tokens.with_values(values))
        return codes.values, codes.ponder

    assert torch.autograd.gradcheck(f, (x,), eps=1e-6, atol=1e-5)


def test_oracle_6_the_ponder_gradient_raises_the_bias(encoder):
    found = encoder(halting=ACT(max_steps=6, bias=-1.0))
    found({"tokens": torch.randint(4, 40, (2, 6))}).ponder.mean().backward()
    assert float(found.halting.unit.bias.grad) < 0  # descent raises it: fewer steps


def test_global_act_stops_a_whole_row_at_once(encoder):
    found = encoder(halting=GlobalACT(max_steps=6, bias=-1.0))
    steps = found({"tokens": torch.randint(4, 40, (4, 6))}).steps
    assert torch.equal(steps, steps[:, :1].expand_as(steps))


def test_random_steps_are_drawn_in_training_from_the_generator_and_fixed_otherwise():
    rule = RandomSteps(bias=0.0)
    build(rule, Spec())
    sight, x = Sight(torch.arange(500)[None]), torch.zeros(2, 500, 4)
    rule.train()
    a, b = (rule.probability(x, sight, 1, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(a, b)
    rule.eval()
    c = rule.probability(x, sight, 1)
    assert torch.equal(c, rule.probability(x, sight, 1)) and 0.4 < float(c.mean()) < 0.6 and float(c.std()) > 0.2


@pytest.mark.parametrize("rule", [ACT, GlobalACT, RandomSteps])
def test_bad_arguments_are_refused(rule):
    with pytest.raises(ConfigError, match="max_steps must be at least 1"):
        rule(max_steps=0)
    for epsilon in (0.0, 1.0):
        with pytest.raises(ConfigError, match="epsilon must be in"):
            rule(epsilon=epsilon)
    with pytest.raises(ConfigError, match="accumulated or basic"):
        rule(mode="mean")
    with pytest.raises(ConfigError, match="copy or run"):
        rule(halted="stop")
