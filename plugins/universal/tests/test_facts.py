"""The generator: an answer follows from the story, and from no fewer facts than said."""

import pytest
import torch

from quire.errors import ConfigError
from quire_universal.facts import ID, WORDS, Facts, tell


def solve(story, question):
    """Answer by reading the story line by line."""
    at, carried = {}, {}
    for line in story:
        who, verb, *_, what, _ = line.split()
        if verb == "goes":
            at.setdefault(who, []).append(what)
        else:
            carried[what] = (who, len(at.get(who, [])))
    words = question.split()
    if words[:2] == ["where", "is"] and words[2] != "the":
        return at[words[2]][-1]
    who, since = carried[words[3]]
    trips = at[who][since:]
    return trips[-1] if words[1] == "is" else trips[trips.index(words[-2]) - 1]


@pytest.mark.parametrize("needed", [1, 2, 3])
def test_the_answer_follows_from_the_story(needed):
    chance = torch.Generator().manual_seed(0)
    for _ in range(200):
        story, question, answer = tell(needed, 6, chance)
        assert len(story) == 6 and solve(story, question) == answer


def test_rows_fit_and_read_back():
    data = Facts(samples=256, batch_size=32)
    batch = data.dataset("train").tensors
    assert int(batch["source"].max()) < len(WORDS) and set(batch["label"].tolist()) == {0, 1, 2}
    for row, mask, label in zip(batch["source"], batch["source_mask"], batch["label"]):
        words = [WORDS[i] for i in row[mask].tolist()]
        assert words[-1] == "?" and (ID["before"] in row[mask]) == (int(label) == 2)
    assert batch["source"].shape[1] == data.sizes()["length"]


def test_splits_differ_and_are_the_same_again():
    a, b = Facts(samples=64), Facts(samples=64)
    assert torch.equal(a.split("train").tensors["source"], b.split("train").tensors["source"])
    assert not torch.equal(a.split("val").tensors["source"], a.split("test").tensors["source"])


def test_bad_arguments_are_refused():
    for supporting in ([], [4], [0, 1]):
        with pytest.raises(ConfigError, match="some of 1, 2, 3"):
            Facts(supporting=supporting)
    with pytest.raises(ConfigError, match="at least 4 facts"):
        Facts(facts=3)
    with pytest.raises(ConfigError, match="1 sample"):
        Facts(samples=0)
