"""Whole-word masks: how many, which, and what each row of the decoder sees."""

from __future__ import annotations

import pytest
import torch
from dupmae_toys import texts

from quire import ConfigError
from quire_dupmae.masking import WholeWordMask, budget, row_masks, whole_word_masks


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    ("length", "hidden", "of"),  # from the spec: the budget counts specials, candidates don't
    [(4, 2, 2), (8, 4, 6), (12, 6, 10), (32, 16, 30), (64, 32, 62), (150, 75, 148), (512, 256, 510)],
)
def test_half_of_the_length_is_hidden_of_two_tokens_less(length, hidden, of):
    batch = texts(1, length)
    assert int((~batch["special"]).sum()) == of
    masks = whole_word_masks(batch["word_ids"], ~batch["special"], budget(torch.tensor([length]), 0.5), 4, generator())
    assert masks.sum(2).unique().tolist() == [hidden]
    assert not masks[..., [0, -1]].any()


def test_the_budget_rounds_half_to_even_as_python_does_and_is_at_least_one():
    lengths = torch.arange(1, 600)
    assert budget(lengths, 0.3).tolist() == [max(1, round(0.3 * n)) for n in range(1, 600)]
    assert budget(torch.tensor([5, 7]), 0.5).tolist() == [2, 4]  # 2.5 and 3.5


def test_pieces_of_a_word_are_hidden_together_and_a_word_too_long_is_skipped():
    word_ids = torch.tensor([[-1, 0, 0, 0, 1, 2, 2, 3, -1]])
    candidates = word_ids >= 0
    masks = whole_word_masks(word_ids, candidates, torch.tensor([2]), 400, generator())[0]
    assert (masks.sum(1) <= 2).all()
    assert not masks[:, 1:4].any()  # three pieces never fit into two
    assert torch.equal(masks[:, 5], masks[:, 6])
    assert masks[:, 5].any() and masks[:, 4].any() and masks[:, 7].any()
    assert (masks.sum(1) == 2).all()  # one of the two single words alone is never the end: the other fits too


def test_a_word_number_that_comes_again_elsewhere_is_another_word():
    word_ids = torch.tensor([[-1, 0, -1, 0, -1]])
    masks = whole_word_masks(word_ids, word_ids >= 0, torch.tensor([1]), 50, generator())[0]
    assert masks.sum(1).tolist() == [1] * 50


def test_rows_see_the_start_and_end_never_themselves_never_padding_and_differ():
    batch = texts(4, 20, lengths=[20, 9, 3, 2])
    seen = row_masks(batch["word_ids"], ~batch["special"], batch["mask"], 0.5, 256, generator())
    assert not seen.diagonal(dim1=1, dim2=2).any()
    assert seen[:, 1:, 0].all()
    assert not seen[~batch["mask"][:, None].expand_as(seen)].any()
    for row, length in enumerate([20, 9, 3, 2]):
        others = torch.arange(20) != length - 1
        assert seen[row, others, length - 1].all()  # the end, but in its own row
    assert seen.any(2).all()  # no row is empty: of [CLS][SEP] row 0 sees SEP and row 1 CLS
    assert seen[3, 0].nonzero().tolist() == [[1]] and seen[3, 1].nonzero().tolist() == [[0]]
    assert len({tuple(r) for r in seen[0].long().tolist()}) > 15
    ordinary = (~batch["special"])[0]
    least = 20 - 2 - round(0.5 * 20) - 1
    assert int((seen[0] & ordinary)[1:-1].sum(1).min()) >= least


def test_a_row_of_34_tokens_sees_14_and_a_half_ordinary_ones():
    batch = texts(200, 34)
    seen = row_masks(batch["word_ids"], ~batch["special"], batch["mask"], 0.5, 256, generator())
    ordinary = ~batch["special"]
    count = (seen & ordinary[:, None])[:, 1:-1].sum(2).float().mean().item()
    assert count == pytest.approx(15 - 15 / 32, abs=0.03)  # 17 of 32 hidden, the own one forced; from the spec


def test_every_row_takes_one_of_the_pool():
    batch = texts(1, 40)
    seen = row_masks(batch["word_ids"], ~batch["special"], batch["mask"], 0.5, 1, generator())[0]
    own = torch.eye(40, dtype=torch.bool)
    assert len({tuple(r) for r in (seen | own)[:, 1:-1].long().tolist()}) <= 40
    hidden = [tuple((~(s | o))[1:-1].long().tolist()) for s, o in zip(seen, own)]
    assert max(sum(h) for h in hidden) == 20  # one mask for all rows, less the own token
    whole = torch.tensor([h for h in hidden if sum(h) == 20])
    assert len(whole.unique(dim=0)) == 1


def test_the_same_generator_gives_the_same_masks_and_another_others():
    batch = texts(2, 30)
    given = (batch["word_ids"], ~batch["special"], batch["mask"], 0.5, 256)
    assert torch.equal(row_masks(*given, generator(1)), row_masks(*given, generator(1)))
    assert not torch.equal(row_masks(*given, generator(1)), row_masks(*given, generator(2)))


def test_eight_of_ten_hidden_tokens_become_the_mask_one_another_one_stays():
    batch = texts(400, 50)
    part = WholeWordMask(0.3)
    hidden = part.draw(batch["word_ids"], ~batch["special"], batch["mask"], generator())
    assert hidden.sum(1).unique().tolist() == [15]
    seen = part.corrupt(batch["tokens"], hidden, 4, 50, generator(3))
    assert torch.equal(seen[~hidden], batch["tokens"][~hidden])
    masked, same = (seen == 4)[hidden].float().mean(), (seen == batch["tokens"])[hidden].float().mean()
    assert masked.item() == pytest.approx(0.8 + 0.1 / 50, abs=0.02)
    assert same.item() == pytest.approx(0.1 + 0.1 / 50, abs=0.02)


@pytest.mark.parametrize("ratio", [0.0, 1.0, -0.1])
def test_a_ratio_outside_the_open_interval_is_refused(ratio):
    with pytest.raises(ConfigError, match=rf"mask_ratio must be in \(0,1\), got {ratio}"):
        WholeWordMask(ratio)


def test_shares_that_do_not_sum_to_one_are_refused():
    with pytest.raises(ConfigError, match="three shares that sum to 1"):
        WholeWordMask(0.3, (0.8, 0.1, 0.2))
