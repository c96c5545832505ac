"""BlockDrafter in the loop: same ids as greedy, passes by arithmetic, source codes cached, refusals."""

import math

import pytest
import torch
from aggressive_toys import BOS, EOS, SPEC, VOCAB, batch, greedy, rows, said, toy, wild

from quire.contracts import Spec, build
from quire.errors import ConfigError
from quire.roles.language.drafters import DraftUnion, PromptCopy, Scripted
from quire.roles.language.loop import Speculative
from quire_aggressive.accept import Tolerance
from quire_aggressive.block import BlockDrafter

ALL = ("own seq2seq", "bart", "t5", "own causal", "gpt2", "llama")


def drafter(block=5, trained=True, seed=0, **spec):
    torch.manual_seed(seed)
    made = BlockDrafter(block, 32, [1, 1], 4, 0.0)
    build(made, Spec({**SPEC, **spec}))
    made.trained.fill_(trained)
    return wild(made)


@pytest.mark.parametrize("name", ALL)
def test_oracle_1_ids_equal_greedys_and_passes_are_no_more(name):
    model, given = toy(name), batch(name, rows())
    plain = greedy(model, given, 20)
    for rule in (None, Tolerance(1, 0.0)):
        result = Speculative(drafter(), rule, max_new_tokens=20, debug=True)(model, given)
        assert result.tokens == plain.tokens and result.finish == plain.finish
        assert result.stats.target_forwards <= plain.stats.target_forwards


def test_it_stands_in_a_union_with_prompt_copy():
    model, given = toy("own seq2seq"), batch("own seq2seq", rows())
    result = Speculative(DraftUnion([drafter(), PromptCopy(1)]), max_new_tokens=20, debug=True)(model, given)
    assert result.tokens == greedy(model, given, 20).tokens
    assert result.stats.drafter_forwards > 1


@pytest.mark.parametrize("block", [1, 3, 8])
def test_oracle_4_a_gold_drafter_takes_a_pass_for_each_block_and_its_bonus(block):
    script = [*range(10, 33), EOS]
    result = Speculative(Scripted(script, block), max_new_tokens=60)(said([script]), {"tokens": torch.tensor([[BOS]])})
    assert result.tokens[0][0] == script
    assert result.stats.target_forwards == math.ceil((len(script) - 1) / (block + 1))  # the prefill gives the first


def test_oracle_4_a_constant_wrong_drafter_takes_as_many_passes_as_greedy():
    script = [*range(10, 33), EOS]
    wrong = Scripted([7] * 60, 5)
    result = Speculative(wrong, max_new_tokens=60)(said([script]), {"tokens": torch.tensor([[BOS]])})
    assert result.tokens[0][0] == script and result.stats.target_forwards == len(script) - 1


def test_oracle_6_a_batch_equals_its_rows_one_by_one_with_the_same_drafts():
    model, sources = toy("own seq2seq"), rows()
    loose = {"acceptance": Tolerance(VOCAB, 4.0), "max_new_tokens": 20}
    together = Speculative(drafter(), **loose)(model, batch("own seq2seq", sources)).tokens
    for i, source in enumerate(sources):
        alone = Speculative(drafter(), **loose)(model, batch("own seq2seq", [source])).tokens
        assert alone[0] == together[i]


def test_what_is_tolerated_takes_the_drafters_own_tokens():
    model, given = toy("own seq2seq"), batch("own seq2seq", rows((9,)))
    made = drafter(block=4)
    result = Speculative(made, Tolerance(VOCAB, math.inf), max_new_tokens=11, debug=True)(model, given)
    made.begin(model.decoder, [[BOS]], [given["source"][0].tolist()])
    assert result.tokens[0][0][:4] == made.propose(0, [BOS], 64).tokens[:4] or EOS in result.tokens[0][0][:5]
    assert result.stats.target_forwards <= 2 + (EOS in result.tokens[0][0])


def test_the_source_is_encoded_once_a_batch_and_its_keys_are_kept():
    made, model = drafter(), toy("own seq2seq")
    calls = []
    made.encoder_blocks[0].register_forward_hook(lambda *_: calls.append(1))
    crossed = []
    cross = made.decoder_blocks[0].cross
    cross.key_value.register_forward_hook(lambda *_: crossed.append(1))
    result = Speculative(made, max_new_tokens=20)(model, batch("own seq2seq", rows()))
    assert len(calls) == len(crossed) == 1 and result.stats.drafter_forwards > 20


def test_drafts_end_with_the_end_token_and_within_the_positions():
    made = drafter(block=5, length=4)  # nine places
    made.begin(said([[]]).decoder, [[BOS]], [[5, 6]])
    assert len(made.propose(0, [BOS, *[5] * 6], 64).tokens) <= 3
    assert made.propose(0, [BOS, *[5] * 9], 64) is None
    made.head.weight.data[EOS] = 100 * made.decoder_norm.weight
    made.decoder_norm.bias.data.fill_(1.0)
    assert made.propose(0, [BOS, 5], 64).tokens == [EOS]


def test_a_row_without_a_source_decodes_plainly():
    made = drafter()
    made.begin(said([[]]).decoder, [[BOS], [BOS]], [[], [5]])
    assert made.propose(0, [BOS, 5], 64) is None and made.propose(1, [BOS, 5], 64) is not None


def test_an_untrained_one_is_refused():
    with pytest.raises(ConfigError, match="untrained: load it with Pretrained.path, part=decoder."):
        Speculative(drafter(trained=False))(toy("bart"), batch("bart", rows()))


def test_another_vocabulary_and_no_source_are_refused():
    with pytest.raises(ConfigError, match="BlockDrafter has 60 tokens, the model 50"):
        Speculative(drafter(vocab_size=60))(toy("bart"), batch("bart", rows()))
    with pytest.raises(ConfigError, match="neither"):
        Speculative(drafter())(toy("gpt2"), {"tokens": torch.tensor([[5, 6]])})
