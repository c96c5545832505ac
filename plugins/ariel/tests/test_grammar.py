"""The grammar: what it counts, and that its recogniser accepts its sentences and no others."""

import random

import pytest
import torch

from quire_ariel.data import QuestionGrammar
from quire_ariel.grammar import KINDS, LONGEST, Grammar, questions
from quire_ariel.measures import fidelity, interval, marks, variety, words_of


def test_the_sizes_are_those_counted_by_hand():
    grammar = questions()
    assert grammar.vocab_size == 47 and LONGEST == 14
    assert grammar.phrases() == 2 * 16 * (1 + 8 + 2 * 8) == 800
    assert grammar.size() == 800 + 6 * 800 + 5 * 800**2 + 6 * 800**2
    assert len(grammar.productions) == 4 + 3 + 39


def test_the_recogniser_accepts_exactly_the_language():
    small = Grammar({k: v[:1] for k, v in KINDS.items()})
    language = {tuple(s) for s in small.every()}
    assert len(language) == small.size() == 3 + 3 + 9 + 9
    for sentence in language:
        assert small.valid(sentence)
        for place in range(len(sentence)):  # everything one word away: changed, dropped, doubled
            for word in (*small.words, "ARTICLE", "zebra"):
                changed = (*sentence[:place], word, *sentence[place + 1 :])
                assert small.valid(changed) == (changed in language)
            for other in (sentence[:place] + sentence[place + 1 :], sentence[: place + 1] + sentence[place:]):
                assert small.valid(other) == (other in language)


def test_productions_of_a_sentence():
    found = questions().used(["does", "the", "very", "old", "cat", "have", "a", "dog", "near", "it", "?"])
    assert found == {
        "does NP have NP PREP it ?",
        "NP = ARTICLE DEGREE ADJECTIVE NOUN",
        "NP = ARTICLE NOUN",
        *("ARTICLE = the", "ARTICLE = a", "DEGREE = very", "ADJECTIVE = old"),
        *("NOUN = cat", "NOUN = dog", "PREP = near"),
    }
    assert questions().used(["is", "it"]) == set()


def test_all_productions_are_used_by_some_sentence():
    chance, grammar = random.Random(0), questions()
    used = set().union(*(grammar.used(grammar.draw(chance)) for _ in range(600)))
    assert used == set(grammar.productions)


@pytest.mark.parametrize("vocabulary", [47, 48, 100, 803])
def test_a_larger_vocabulary_has_as_many_tokens(vocabulary):
    grammar = questions(vocabulary)
    assert grammar.vocab_size == vocabulary and grammar.valid(grammar.draw(random.Random(1)))


def test_held_out_sentences_are_all_different_and_never_trained_on():
    data = QuestionGrammar(sentences=2000, held_out=300)
    train, held = ({tuple(s) for s in data.drawn()[n]} for n in ("train", "val"))
    test = {tuple(s) for s in data.drawn()["test"]}
    assert len(held) == len(test) == 300 and not held & test and not (held | test) & train
    again = QuestionGrammar(sentences=2000, held_out=300)
    assert torch.equal(data.split("train").tensors["tokens"], again.split("train").tensors["tokens"])
    assert QuestionGrammar(sentences=50, seed=1).drawn() != QuestionGrammar(sentences=50).drawn()
    batch = data.split("test").tensors
    for tokens, mask, words in zip(batch["tokens"], batch["mask"], data.drawn()["test"]):
        ids = tokens[mask].tolist()
        assert (ids[0], ids[-1]) == (1, 2) and data.tokenizer.decode(ids).split() == words
        assert data.tokenizer.encode(" ".join(words)) == ids[1:-1]


def test_measures_counted_by_hand():
    grammar = questions()
    good, other = tuple(["is", "it", "a", "cat", "?"]), tuple(["is", "it", "the", "dog", "?"])
    drawn = [good, good, other, ("is", "it")]
    found = variety(drawn, grammar, {good})
    assert found["valid"] == 0.75 and found["unique"] == 0.75 and found["valid unique"] == 0.5 and found["novel"] == 0.5
    assert found["vocabulary"] == 7 / 44 and found["grammar"] == 6 / 46
    assert marks(drawn, grammar) == {"valid": [1, 1, 1, 0], "valid unique": [1, 0, 1, 0]}
    low, high = interval(marks(drawn * 100, grammar)["valid"])
    assert low < 0.75 < high and high - low == pytest.approx(2 * 1.96 * (0.75 * 0.25 / 400) ** 0.5, rel=0.2)
    assert fidelity([[3, 4, 2], [3, 2]], [[3, 4, 2], [3, 5, 2]]) == {"exact": 0.5, "tokens": 4 / 6}


def test_what_was_cut_is_no_sentence():
    words = questions().words
    ids = [words.index(w) + 3 for w in ["is", "it", "a", "cat", "?"]]
    whole, cut, odd = words_of([[*ids, 2], ids, [ids[0], 1, *ids[1:], 2]], words, 3, {2})
    assert questions().valid(whole) and not questions().valid(cut) and not questions().valid(odd)
