"""What is proved of volume codes, each with its number. Oracles 1 to 10 of the plugin's specification."""

import itertools
import math

import pytest
import torch
from ariel_toys import (
    BOS,
    EOS,
    PAD,
    A,
    B,
    C,
    Table,
    bodies,
    constant,
    language,
    loud_gru,
    over,
    random_sentences,
    rows,
)
from scipy.stats import chisquare

from quire_ariel.grammar import KINDS, Grammar
from quire_ariel.tables import CHUNK, frequencies

HALF = constant(a=0.5, b=0.25, eos=0.25)
THREE = language(((A, EOS), 0.5), ((B, EOS), 0.3), ((A, B, EOS), 0.2))


def test_a_sentence_worked_by_hand():
    # a is the first half of axis 0; b the third quarter of axis 1; the end the last quarter of axis 0's half. EOS is 2
    # here, so it comes first: a starts at .25
    codes = over(Table(HALF), 2).encode(rows([BOS, A, B, EOS]))
    assert codes.low.tolist() == [[0.25, 0.75]] and codes.high.tolist() == [[0.375, 1.0]]
    assert codes.z.tolist() == [[0.3125, 0.875]] and codes.log2_volume.tolist() == [-5.0]


def test_the_specifications_sentence():
    # with the order a, b, EOS: axis 0 [.375, .5), axis 1 [.5, .75), z (.4375, .625), volume .03125
    last = 5
    model = Table(lambda prefix: {A: 0.5, B: 0.25, last: 0.25})
    model._caps = type(model._caps)(6, eos_ids=(last,), pad_id=PAD, start_id=BOS)
    codes = over(model, 2).encode(rows([BOS, A, B, last]))
    assert codes.low.tolist() == [[0.375, 0.5]] and codes.high.tolist() == [[0.5, 0.75]]
    assert codes.z.tolist() == [[0.4375, 0.625]] and 2 ** codes.log2_volume.item() == 0.03125


@pytest.mark.parametrize("dims", [1, 3, 16])
def test_every_sentence_of_a_grammar_comes_back_exactly(dims):
    grammar = Grammar({k: v[:n] for (k, v), n in zip(KINDS.items(), (2, 1, 4, 3, 2, 2))})
    ids = {w: i + 3 for i, w in enumerate(grammar.words)}
    found = [[BOS, *(ids[w] for w in words), EOS] for words in grammar.every()]
    assert len(found) == grammar.size() >= 10_000
    chosen = found if dims == 3 else found[::7]
    cube = over(loud_gru(grammar.vocab_size), dims, arithmetic="exact")
    width = max(map(len, chosen))
    tokens = torch.tensor([r + [PAD] * (width - len(r)) for r in chosen])
    mask = torch.tensor([[True] * len(r) + [False] * (width - len(r)) for r in chosen])
    said = cube.decode(cube.encode(tokens, mask))
    assert said.rows() == bodies(tokens, mask) and not said.differs.any() and not said.truncated.any()


@pytest.mark.parametrize("dims", [1, 2, 4, 16])
@pytest.mark.parametrize("scale", [0.2, 0.6])
def test_float64_gives_sentences_back_wherever_it_accepts_them(dims, scale):
    tokens, mask = random_sentences(200, longest=12)
    cube = over(loud_gru(scale=scale), dims)
    bits = over(loud_gru(scale=scale), dims, arithmetic="exact").encode(tokens, mask).axis_bits.amax(1)
    fits = bits < 52
    assert fits[bits < 48].all() and int(fits.sum()) > 10
    said = cube.decode(cube.encode(tokens[fits], mask[fits]))
    assert said.rows() == bodies(tokens[fits], mask[fits])


@pytest.mark.parametrize("dims", [1, 2, 5])
def test_boxes_of_different_sentences_are_apart(dims):
    tokens, mask = random_sentences(120, longest=6)
    kept = {tuple(b): i for i, b in enumerate(bodies(tokens, mask))}
    chosen = torch.tensor(sorted(kept.values()))
    cube = over(loud_gru(), dims, arithmetic="exact")
    low, high = cube.box(tokens[chosen], mask[chosen])
    for i, j in itertools.combinations(range(len(chosen)), 2):
        assert bool(((high[i] <= low[j]) | (high[j] <= low[i])).any())
    assert float((2 ** cube.log2_volume(tokens[chosen], mask[chosen])).sum()) <= 1 + 1e-9


def test_the_volumes_of_a_whole_language_are_one():
    cube = over(Table(THREE), 2)
    volumes = [cube.log2_volume(rows([BOS, *s])) for s in ([A, EOS], [B, EOS], [A, B, EOS])]
    assert float((2 ** torch.cat(volumes)).sum()) == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("dims", [1, 3, 7])
def test_the_volume_is_the_sum_of_log_probabilities_and_of_log_sides(dims):
    tokens, mask = random_sentences(50, longest=7)
    model = loud_gru()
    cube = over(model, dims)
    codes = cube.encode(tokens, mask)
    sides = (codes.high - codes.low).log2().sum(1)
    with torch.no_grad(), cube.doubled():
        logits = model(None, tokens[:, :-1]).float()
    shares = frequencies(logits.flatten(0, 1), cube.banned, 24).view(*logits.shape).double() / 2**24
    own = shares.gather(2, tokens[:, 1:, None])[..., 0].log2().masked_fill(~mask[:, 1:], 0).sum(1)
    assert torch.allclose(cube.log2_volume(tokens, mask), own, rtol=0, atol=1e-9)
    low, high = cube.box(tokens, mask)
    rounding = 1e-9 + (4 * 2 ** (codes.axis_bits - 52)).sum(1)  # a side is a difference of numbers near 1
    assert (((high - low).log2().sum(1) - own).abs() < rounding).all()
    assert ((sides - codes.log2_volume).abs() < rounding).all() and (rounding < 1e-8).any()


@pytest.mark.parametrize("dims", [1, 2, 16])
def test_uniform_points_have_the_models_own_law(dims):
    cube = over(Table(THREE), dims)
    count, expected = 20_000, {(A, EOS): 0.5, (B, EOS): 0.3, (A, B, EOS): 0.2}
    points = torch.rand(count, dims, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = list(map(tuple, cube.decode(points).rows()))
    seen = [found.count(s) for s in expected]
    assert sum(seen) == count
    assert chisquare(seen, [count * p for p in expected.values()]).pvalue > 0.001
    control = list(map(tuple, cube.ancestral(count, torch.Generator().manual_seed(1)).rows()))
    assert chisquare([control.count(s) for s in expected], [count * p for p in expected.values()]).pvalue > 0.001


@pytest.mark.parametrize("dims", [1, 3])
def test_every_point_of_a_box_says_its_sentence_and_the_border_the_neighbours(dims):
    tokens, mask = random_sentences(6, longest=4)
    cube = over(loud_gru(scale=0.3), dims)
    low, high = cube.box(tokens, mask)
    source = torch.Generator().manual_seed(0)
    for i, sentence in enumerate(bodies(tokens, mask)):
        inside = low[i] + (high[i] - low[i]) * torch.rand(100, dims, dtype=torch.float64, generator=source)
        edges = torch.stack([low[i], torch.nextafter(high[i], torch.zeros(dims, dtype=torch.float64))])
        assert all(row == sentence for row in cube.decode(torch.cat([inside, edges])).rows())
        for axis in range(dims):
            if high[i, axis] < 1:
                beyond = ((low[i] + high[i]) / 2).clone()
                beyond[axis] = high[i, axis]
                assert cube.decode(beyond[None]).rows() != [sentence]


def test_a_beginning_holds_its_continuations():
    cube = over(loud_gru(), 3)
    sentence = [BOS, A, B, C, A, 9, 12, EOS]
    boxes = [cube.box(rows(sentence[:n])) for n in range(2, len(sentence) + 1)]
    for (low, high), (inner_low, inner_high) in itertools.pairwise(boxes):
        assert bool((low <= inner_low).all() & (inner_high <= high).all())


def test_one_axis_is_arithmetic_coding():
    shares = {EOS: 0.25, A: 0.5, B: 0.25}
    low, width = 0.0, 1.0
    for token in (B, A, A, EOS):
        low += width * sum(p for t, p in sorted(shares.items()) if t < token)
        width *= shares[token]
    found = over(Table(HALF), 1).encode(rows([BOS, B, A, A, EOS]))
    assert found.low.item() == low and found.high.item() == low + width


def test_another_order_of_ids_moves_boxes_and_keeps_volumes():
    other = constant(a=0.25, b=0.5, eos=0.25)
    one, two = over(Table(HALF), 2), over(Table(other), 2)
    a, b = one.encode(rows([BOS, A, A, B, EOS])), two.encode(rows([BOS, B, B, A, EOS]))
    assert a.log2_volume.equal(b.log2_volume) and not a.low.equal(b.low)


@pytest.mark.parametrize("shares", [{"a": 0.5, "eos": 0.5}, {"a": 1 / 3, "b": 1 / 3, "eos": 1 / 3}])
def test_the_upper_end_belongs_to_the_last_token_that_can_be(shares):
    for arithmetic in ("float64", "exact"):
        cube = over(Table(constant(**shares)), 2, max_length=5, clip=True, arithmetic=arithmetic)
        said = cube.decode(torch.tensor([[1.0, 1.0], [1.5, 3.0], [1 - 2e-16, 1 - 2e-16]], dtype=torch.float64))
        last = B if "b" in shares else A
        assert said.rows() == [[last] * 5] * 3 and said.truncated.all()


def test_batches_do_not_matter():
    tokens, mask = random_sentences(8, longest=9)
    cube = over(loud_gru(), 1)
    together = cube.encode(tokens, mask)
    for i, sentence in enumerate(bodies(tokens, mask)):
        assert cube.decode(together.z[i : i + 1]).rows() == [sentence]
        alone = cube.encode(tokens[i : i + 1], mask[i : i + 1])
        assert cube.decode(alone.z.expand(8, -1)).rows() == [sentence] * 8


def test_tables_made_in_parts_are_those_of_each_row_alone():
    logits = 6 * torch.randn(
        50, CHUNK // 20, generator=torch.Generator().manual_seed(1)
    )  # 20 rows a part, 10 left over
    banned = torch.tensor([0, 1])
    alone = torch.cat([frequencies(row[None], banned, 24) for row in logits])
    assert torch.equal(frequencies(logits, banned, 24), alone)


def test_tables_sum_to_the_total_and_keep_the_largest_remainders():
    source = torch.Generator().manual_seed(0)
    logits = 6 * torch.randn(300, 40, generator=source)
    banned = torch.tensor([0, 1])
    f = frequencies(logits, banned, 24)
    p = torch.softmax(logits.double().index_fill(1, banned, -math.inf), 1)
    assert (f.sum(1) == 1 << 24).all() and (f[:, 2:] >= 1).all() and (f[:, :2] == 0).all()
    first = (p[:, 2:] * 2**24 < 1).any(1, keepdim=True)
    share = p[:, 2:] * (2**24 - 38 * first) + first.double()
    assert ((f[:, 2:] - share).abs() < 1).all(), "no token is off by a whole count"
    assert (f[:, 2:] - share).sum(1).abs().max() < 1e-6
    given = f[:, 2:] - share.floor()  # who got one more: those with the largest remainders
    rest = share - share.floor()
    for up, left in zip(given.bool(), rest):
        assert not up.any() or up.all() or left[up].min() >= left[~up].max() - 1e-9
    equal = frequencies(torch.zeros(1, 5), torch.tensor([], dtype=torch.long), 8)
    assert equal.tolist() == [[52, 51, 51, 51, 51]], "of equal remainders the lower id gets it"
