"""Block noise and glancing: what is given, what is asked, what carries loss."""

from types import SimpleNamespace

import pytest
import torch

from quire.contracts import Spec, build
from quire.errors import ConfigError, DataError
from quire_aggressive.block import BlockDrafter
from quire_aggressive.objective import BlockPrediction, noised, prefixes, revealed

SPEC = {"vocab_size": 30, "length": 16, "bos": 1, "eos": 2, "pad": 0, "mask_id": 3}
MASK = 3


def chance(seed=0):
    return torch.Generator().manual_seed(seed)


def model(block=4, **arguments):
    torch.manual_seed(0)
    decoder = BlockDrafter(block, 16, [1, 1], 2, 0.0, **arguments)
    build(decoder, Spec(SPEC))
    stream = chance()
    return SimpleNamespace(decoder=decoder, encoder=None, generator=lambda device=None: stream)


def example(seed=0, rows=6):
    draw = chance(seed)
    tokens = torch.randint(4, 30, (rows, 9), generator=draw)
    tokens[:, 0], mask = 1, torch.arange(9)[None] < torch.tensor([[9], [8], [5], [3], [2], [9]])[:rows]
    tokens[torch.arange(rows), mask.sum(1) - 1] = 2
    return {"source": torch.randint(4, 30, (rows, 7), generator=draw), "tokens": tokens.where(mask, 0), "mask": mask}


# ---- oracle 8
def test_oracle_8_a_target_of_one_token_has_no_prefix():
    assert not prefixes(torch.ones(500, dtype=torch.long), chance()).any()


def test_oracle_8_prefixes_are_even_over_0_to_len_minus_1():
    from scipy.stats import chisquare

    counts = prefixes(torch.full((7000,), 7), chance()).bincount(minlength=7)
    assert len(counts) == 7 and chisquare(counts.numpy()).pvalue > 0.001


def test_oracle_8_masks_follow_the_prefix_and_nothing_behind_the_end_is_asked():
    target = torch.tensor([[5, 6, 7, 8, 2], [9, 2, 0, 0, 0]])
    tokens, real, guess, gold = noised(target, torch.tensor([5, 2]), torch.tensor([3, 1]), 4, MASK)
    assert tokens[0].tolist() == [5, 6, 7, MASK, MASK, MASK, MASK]
    assert tokens[1, :5].tolist() == [9, MASK, MASK, MASK, MASK] and real[1].tolist() == [True] * 5 + [False] * 2
    assert guess[0].tolist() == [False] * 3 + [True, True, False, False]
    assert guess[1].tolist() == [False, True] + [False] * 5
    assert gold[guess].tolist() == [8, 2, 2]


def test_oracle_8_half_of_five_wrong_reveals_two_and_they_carry_no_loss():
    guess = torch.zeros(50, 9, dtype=torch.bool)
    guess[:, 2:7] = True
    shown = revealed(guess, torch.full((50,), int(0.5 * 5)), chance())
    assert (shown.sum(1) == 2).all() and not (shown & ~guess).any()
    assert shown[:, 2:7].float().mean(0).min() > 0.1  # every place comes up
    made, objective = model(), BlockPrediction(glancing=1.0, glancing_drop=0.0)
    losses = objective(made, example())
    assert losses.metrics["shown"] > 0.5
    logits, scored = losses.outputs["logits"], losses.outputs["guess"]
    (gradient,) = torch.autograd.grad(losses["block"], logits, allow_unused=True)
    assert not gradient[~scored].any() and gradient[scored].abs().sum(-1).gt(0).all()


def test_without_glancing_all_masked_real_places_are_scored():
    losses = BlockPrediction(glancing=0.0, glancing_drop=0.0)(model(), example())
    assert losses.metrics["shown"] == 0 and losses.outputs["guess"].any(1).all()


def test_where_everything_is_shown_the_loss_stays_finite():
    made, objective = model(block=1), BlockPrediction(glancing=1.0, glancing_drop=0.0)
    assert torch.isfinite(objective(made, example())["block"])


def test_the_share_shown_falls_over_the_run():
    objective = BlockPrediction(0.5, 0.2)
    trainer = SimpleNamespace(estimated_stepping_batches=100)
    at = [objective._share(SimpleNamespace(_trainer=trainer, global_step=s)) for s in (0, 50, 100)]
    assert at == pytest.approx([0.5, 0.4, 0.3])


# ---- the network
def test_a_row_alone_and_in_a_padded_batch_scores_the_same():
    made, given = model().decoder.eval(), example()
    source = torch.tensor([[5, 6, 7], [8, 9, 0]])
    mask = torch.tensor([[True] * 3, [True, True, False]])
    tokens = torch.tensor([[5, 6, MASK, MASK], [7, MASK, MASK, 0]])
    real = torch.tensor([[True] * 4, [True, True, True, False]])
    together = made(made.read(source, mask), tokens, real)
    alone = made(made.read(source[1:, :2]), tokens[1:, :3])
    torch.testing.assert_close(together[1:, :3], alone)
    flipped = made.read(source.flip(1), mask.flip(1))  # padding on the left
    torch.testing.assert_close(made(flipped, tokens, real)[0], made(made.read(source.flip(1)[:1]), tokens[:1])[0])
    assert given["tokens"].shape == (6, 9)


def test_every_place_sees_what_stands_right_of_it():
    made = model().decoder.eval()
    source = made.read(torch.tensor([[5, 6]]))
    a, b = (made(source, torch.tensor([[5, MASK, last]]))[0, 1] for last in (7, 8))
    assert not torch.allclose(a, b)


def test_tables_are_shared_only_where_asked():
    for share in (True, False):
        made = model(share_embedding=share).decoder
        assert (made.head.weight is made.token.weight) == share == (made.source_token is made.token)


def test_training_learns_to_copy_in_blocks_and_marks_the_drafter_as_trained():
    made, objective = model(), BlockPrediction(smoothing=0.0)
    optimizer = torch.optim.Adam(made.decoder.parameters(), lr=3e-3)
    given = example()
    assert not made.decoder.trained
    losses = []
    for _ in range(60):
        loss = objective(made, given)["block"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5]) and made.decoder.trained


# ---- bad input
@pytest.mark.parametrize("name", ["pad", "eos", "unk"])
def test_a_mask_id_that_is_another_special_id_is_refused_with_both_names(name):
    with pytest.raises(ConfigError, match=f"mask and {name} are both 3"):
        build(BlockDrafter(2, 16, [1, 1], 2), Spec({**SPEC, name: 3}))


def test_a_vocabulary_without_a_mask_gets_one_behind_it():
    made = BlockDrafter(2, 16, [1, 1], 2)
    build(made, Spec({**SPEC, "mask_id": None}))
    assert made.mask_id == 30
    assert made.eval()(made.read(torch.tensor([[5]])), torch.tensor([[30]])).shape == (1, 1, 30)


def test_a_left_padded_source_without_a_mask_is_refused():
    with pytest.raises(DataError, match="source 1 begins with padding"):
        model().decoder.read(torch.tensor([[5, 6], [0, 6]]))


def test_longer_texts_than_the_data_said_are_refused():
    made = model().decoder
    with pytest.raises(DataError, match="source 0 has 21 tokens; BlockDrafter was built for 20"):
        made.read(torch.full((1, 21), 5))
    with pytest.raises(DataError, match="target has 21 tokens"):
        made(made.read(torch.tensor([[5]])), torch.full((1, 21), 5))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [({"block": 0}, "block must be"), ({"width": 10, "heads": 4}, "divisible"), ({"depth": [1]}, "depth"),
     ({"dropout": 1.0}, "dropout")],
)  # fmt: skip
def test_bad_arguments_are_refused(arguments, said):
    with pytest.raises(ConfigError, match=said):
        BlockDrafter(**arguments)


@pytest.mark.parametrize("arguments", [{"glancing": 1.5}, {"glancing_drop": 0.6}, {"smoothing": 1.0}])
def test_bad_arguments_of_the_objective_are_refused(arguments):
    with pytest.raises(ConfigError, match="BlockPrediction"):
        BlockPrediction(**arguments)
