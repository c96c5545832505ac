"""The drafter inside the core's loop: same ids, learning, scopes and refusals."""

import random
import warnings

import pytest
from aded_toys import EOS, VOCAB, Memoryless, language_model, prompts

from quire.errors import ConfigError, DataError
from quire.roles.language.drafters import DraftUnion, PromptCopy
from quire.roles.language.loop import Greedy, Speculative
from quire.roles.language.proof import assert_lossless, batch_of
from quire_aded.drafter import TrigramTree

ROWS = prompts()


def drafter(documents=None, **arguments):
    made = TrigramTree(corpus=None, **arguments)
    if documents is not None:
        made.learn(documents, VOCAB)
    return made


def truth(model, rows=ROWS, count=30):
    return [t[0] for t in Greedy(count)(model, batch_of(rows, model.decoder, {})).tokens]


def corpora(model):
    source = random.Random(5)
    greedy = [p + t for p, t in zip(ROWS, truth(model))]
    return {
        "empty": None,
        "random": [[source.randrange(VOCAB) for _ in range(3000)]],
        "right": greedy,
        "EOS everywhere": [[t for pair in zip(row, [EOS] * len(row)) for t in pair] for row in greedy] + greedy,
        "wrong": [[(t + 1) % VOCAB for t in row] for row in greedy],
    }


@pytest.mark.parametrize("name", ["empty", "random", "right", "EOS everywhere", "wrong"])
@pytest.mark.parametrize("nodes", [1, 64])
def test_oracle_1_ids_equal_greedy_for_any_weights(name, nodes):
    model = language_model()
    sampler = Speculative(drafter(corpora(model)[name], nodes=nodes), max_new_tokens=30, debug=True)
    assert_lossless(model, sampler, ROWS)
    assert_lossless(model, sampler, ROWS, batch=1)


@pytest.mark.parametrize("arguments", [{"nodes": "auto"}, {"width": 1}, {"update": "ema"}, {"extend": 0}, {"depth": 6}])
def test_ids_equal_greedy_for_any_setting(arguments):
    model = language_model()
    assert_lossless(model, Speculative(drafter(corpora(model)["right"], **arguments), max_new_tokens=24), ROWS)


def test_oracle_2_never_more_forwards_than_greedy_and_the_counts_add_up():
    model = language_model()
    given = batch_of(ROWS, model.decoder, {})
    plain = Greedy(30)(model, given).stats
    for documents in corpora(model).values():
        stats = Speculative(drafter(documents), max_new_tokens=30)(model, given).stats
        assert stats.target_forwards <= plain.target_forwards
        assert stats.accepted + stats.steps + stats.rows - stats.opened - stats.cut == stats.new_tokens


def test_the_right_trigrams_save_forwards_and_learning_saves_more():
    model = language_model()
    given = batch_of(ROWS[:1], model.decoder, {})
    plain = Greedy(30)(model, given).stats.target_forwards
    warm = Speculative(drafter(corpora(model)["right"][:1]), max_new_tokens=30)(model, given).stats
    assert warm.target_forwards < 0.6 * plain
    shared = Speculative(drafter(scope="shared"), max_new_tokens=30)
    first, second = (shared(model, given).stats.target_forwards for _ in range(2))
    assert second < 0.6 * first


def test_oracle_9_shared_weights_persist_and_those_of_a_run_are_reset():
    model = language_model()
    given = batch_of(ROWS[:1], model.decoder, {})
    run = Speculative(drafter(scope="run"), max_new_tokens=30)
    counts = [run(model, given).stats.target_forwards for _ in range(2)]
    assert counts[0] == counts[1]
    shared = Speculative(drafter(scope="shared"), max_new_tokens=30)
    shared(model, given)
    held = len(shared.drafter.store)
    shared(model, given)
    assert held > 0 and len(shared.drafter.store) == held


def test_same_drafts_every_time():
    model, given = language_model(), None
    made = []
    for _ in range(2):
        given = batch_of(ROWS, model.decoder, {})
        made.append(Speculative(drafter(corpora(model)["random"]), max_new_tokens=20)(model, given).stats)
    assert made[0] == made[1]


def test_joins_prompt_copy_in_a_union():
    model = language_model()
    assert_lossless(model, Speculative(DraftUnion([drafter(corpora(model)["right"]), PromptCopy()])), ROWS)


def test_a_short_prompt_takes_a_plain_step():
    made = drafter([[1, 2, 3]])
    made.begin(language_model().decoder, [[7]], None)
    assert made.propose(0, [7], 64) is None


def test_a_step_without_a_proposal_is_learnt_too():
    made = drafter()
    made.begin(language_model().decoder, [[1, 2, 3]], None)
    made.observe(0, [1, 2, 3], [4], [])
    assert made.store.row(1, 2)[0] == [3]


def test_a_model_without_tree_mask_gets_chains_and_is_told_why_once():
    made = TrigramTree(corpus=None)
    made.learn([[0, 1, 2, 0, 1, 2, 1]], 3)
    lacks = {"tree_mask": "HFCausal with flash_attention_2 takes no 4-D mask: use attn_implementation=sdpa"}
    model = Memoryless([0.3, 0.5, 0.2], tree_mask=False, lacks=lacks)
    with pytest.warns(UserWarning, match="chains, not trees.*sdpa"):
        made.begin(model, [[0, 1]], None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made.begin(model, [[0, 1]], None)
    draft = made.propose(0, [0, 1], 64)
    assert draft.parents == list(range(-1, len(draft.tokens) - 1))


def test_near_the_position_limit_trees_get_shallower():
    model = language_model(rope=False)  # 64 learned positions
    rows = prompts((60, 61, 62, 63))
    sampler = Speculative(drafter([r + r for r in rows]), max_new_tokens=64, debug=True)
    assert_lossless(model, sampler, rows)


def test_a_store_of_another_vocabulary_is_refused():
    made = TrigramTree(corpus=None)
    made.learn([[1, 2, 3]], 32000, "ab12")
    with pytest.raises(ConfigError, match=r"trigram store was built for vocab 32000 \(ab12\), model has 50"):
        made.begin(language_model().decoder, [[1, 2]], None)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"nodes": 0}, "nodes is 1 to 64 or auto"),
        ({"nodes": 65}, "nodes is 1 to 64"),
        ({"nodes": "many"}, "or auto"),
        ({"depth": 1}, "depth must be at least 2"),
        ({"cap": 0}, "cap and c2 above 0"),
        ({"delta": -0.1}, "delta must be at least 0"),
        ({"window": 2}, "window must be at least 3"),
        ({"update": "ema", "delta": 2}, "rate of at most 1"),
        ({"update": "sum"}, "additive or ema"),
        ({"scope": "ever"}, "run or shared"),
        ({"width": 2}, "width is 1"),
    ],
)
def test_bad_arguments_are_refused_in_a_sentence(arguments, said):
    with pytest.raises(ConfigError, match=said):
        TrigramTree(**arguments)


def test_a_corpus_that_is_missing_empty_or_pickled_is_named(tmp_path):
    decoder = language_model().decoder
    with pytest.raises(ConfigError, match="nowhere.txt"):
        TrigramTree(corpus=str(tmp_path / "nowhere.txt")).begin(decoder, [[1]], None)
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(DataError, match=r"empty.txt is empty"):
        TrigramTree(corpus=str(tmp_path / "empty.txt")).begin(decoder, [[1]], None)
    (tmp_path / "m.pkl").write_bytes(b"\x80\x04N.")
    with pytest.raises(DataError, match="a pickle never is"):
        TrigramTree(corpus=str(tmp_path / "m.pkl")).begin(decoder, [[1]], None)
    with pytest.raises(ConfigError, match="no data module"):
        TrigramTree().begin(decoder, [[1]], None)
