"""Whole numbers: no rounding, short codes, and the same code as an independent entropy coder's length."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from ariel_toys import BOS, bodies, loud_gru, over, random_sentences, rows

from quire_ariel import exact


def tables(count, size=20, bits=24, seed=0):
    source = np.random.default_rng(seed)
    made = np.zeros((count, size + 1), dtype=np.int64)
    for row in made:
        share = source.dirichlet(np.full(size, 0.3))
        f = 1 + np.floor(share * ((1 << bits) - size)).astype(np.int64)
        f[int(f.argmax())] += (1 << bits) - f.sum()
        row[1:] = f.cumsum()
    return made, source


@pytest.mark.parametrize("dims", [1, 4, 16])
def test_long_sentences_come_back_and_lie_in_their_box(dims):
    made, source = tables(300)
    said = [int(source.integers(0, made.shape[1] - 1)) for _ in made]
    parts = [(int(c[s]), int(c[s + 1] - c[s])) for c, s in zip(made, said)]
    codes = exact.encode(parts, dims, 24)
    point = exact.Point(codes, 24)
    assert [point.choose(c) for c in made] == said
    low, width = [Fraction(0)] * dims, [Fraction(1)] * dims
    for t, (start, count) in enumerate(parts):
        k = t % dims
        low[k] += width[k] * Fraction(start, 1 << 24)
        width[k] *= Fraction(count, 1 << 24)
    for (numerator, bits), a, w in zip(codes, low, width):
        assert a <= Fraction(numerator, 1 << bits) < a + w
        assert bits <= math.log2(w.denominator) - math.log2(w.numerator) + 1, "no axis holds a bit more than it must"


@pytest.mark.parametrize("length", [20, 200])
def test_a_code_is_as_long_as_an_independent_range_coders(length):
    constriction = pytest.importorskip("constriction")
    made, source = tables(length, seed=length)
    chances = np.diff(made, axis=1) / 2**24
    said = np.array([source.choice(chances.shape[1], p=p) for p in chances], dtype=np.int32)
    coder = constriction.stream.queue.RangeEncoder()
    model = constriction.stream.model.Categorical(perfect=False)
    coder.encode(said, model, chances.astype(np.float64))
    ideal = -np.log2(chances[np.arange(length), said]).sum()
    parts = [(int(c[s]), int(c[s + 1] - c[s])) for c, s in zip(made, said)]
    ours = exact.encode(parts, 1, 24)[0][1]
    assert ideal <= ours + 1 and ours <= ideal + 2
    assert abs(32 * len(coder.get_compressed()) - ours) <= 32 + 2


def test_exact_codes_hold_what_float64_refuses():
    tokens, mask = random_sentences(40, longest=30, vocab=30)
    cube = over(loud_gru(), 1, arithmetic="exact")
    codes = cube.encode(tokens, mask)
    assert float(codes.axis_bits.max()) > 100
    assert cube.decode(codes).rows() == bodies(tokens, mask)
    assert cube.decode(codes.exact).rows() == bodies(tokens, mask), "pairs of numerator and bits are enough"


def test_exact_and_float64_agree_where_both_can():
    tokens, mask = random_sentences(60, longest=6)
    a = over(loud_gru(), 4).encode(tokens, mask)
    b = over(loud_gru(), 4, arithmetic="exact")
    assert b.decode(a.z).rows() == bodies(tokens, mask)
    assert torch.allclose(a.axis_bits, b.encode(tokens, mask).axis_bits, atol=1e-4)


def test_a_float_is_the_fraction_that_it_is():
    for value in (0.0, 0.1, 0.4375, 1.0, 5e-324):
        numerator, bits = exact.of_float(value)
        assert Fraction(numerator, 1 << bits) == Fraction(value) and exact.to_float((numerator, bits)) == value


def test_probabilities_are_held_for_a_sentence_of_many_tokens():
    cube = over(loud_gru(), 2, arithmetic="exact", max_length=400)
    source = torch.Generator().manual_seed(2)
    long = [BOS, *torch.randint(3, 30, (300,), generator=source).tolist(), 2]
    assert cube.decode(cube.encode(rows(long))).rows() == [long[1:]]
