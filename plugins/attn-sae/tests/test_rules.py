"""A latent judged by a rule: counts by hand, whole samples and rows alike."""

import pytest
import torch
from attn_toys import Ids, dictionary, feed
from lightning.pytorch import Trainer

from quire.errors import ConfigError
from quire.roles.sparse.card import measure
from quire_attn_sae.rules import ProxyRule, induction, normalised

QUIET = {"logger": False, "enable_progress_bar": False, "accelerator": "cpu", "enable_model_summary": False}


class Words:
    """Eight tokens that differ in case and spaces."""

    vocab_size = 6
    words = ("The", " the", "cat", "Cat ", "\ufffd", " ")

    def decode(self, ids):
        return self.words[ids[0]]


def test_induction_is_a_pair_seen_before():
    #                                a  b  c  a  b  a  c
    found = induction(torch.tensor([0, 1, 2, 0, 1, 0, 2]))
    assert found.tolist() == [False, False, False, True, False, False, False]  # the last token has nothing behind it
    alike = normalised(Words())
    assert alike[0] == alike[1] and alike[2] == alike[3] and len(set(alike.tolist())) == 4
    assert induction(torch.tensor([0, 2, 4, 1, 3]), alike).tolist() == [False, False, False, True, False]
    assert normalised(None) is None


def third(ids, tokenizer):
    """Every third token."""
    return torch.arange(len(ids)) % 3 == 0


def reference(data, model, rule):
    """Specificity and sensitivity of every latent, from whole samples."""
    fired = hits = held = 0
    for batch in data.val_dataloader():
        codes = model.encoder(batch).dense()
        for ids, real, values in zip(batch["tokens"], batch["mask"], codes):
            holds, fires = rule(ids[real]), values[real] > 0
            fired, hits, held = fired + fires.sum(0), hits + (fires & holds[:, None]).sum(0), held + holds.sum()
    return hits / fired.clamp(min=1), hits / held


@pytest.mark.parametrize("analysis", [True, False])
@pytest.mark.parametrize("rule", ["induction", "test_rules.third"])
def test_counts_are_those_of_whole_samples(analysis, rule):
    data = feed(analysis=analysis, source=Ids(samples=12, length=16), batch_size=5)
    model = dictionary(data, metrics=[ProxyRule(rule)])
    said = Trainer(**QUIET).validate(model, datamodule=data, verbose=False)[0]["val/ProxyRule"]
    plain = (lambda ids: third(ids, None)) if "third" in rule else induction
    specific, sensitive = reference(feed(source=Ids(samples=12, length=16), batch_size=5), model, plain)
    both = 2 * specific * sensitive / (specific + sensitive).clamp(min=1e-12)
    assert said == pytest.approx(float(both.max()), abs=1e-6) and said > 0
    card = measure(model.encoder, model.decoder, data, tokens=10_000, splice=False, extra=[model.metrics[0]])
    best = int(both.argmax())
    assert card.numbers["rule_latent"] == best
    assert card.numbers["rule_specificity@0"] == pytest.approx(float(specific[best]), abs=1e-6)
    assert card.numbers["rule_sensitivity@0"] == pytest.approx(float(sensitive[best]), abs=1e-6)


def observed(data, model):
    metric = model.metrics[0]
    for batch in data.val_dataloader():
        metric.observe(model, batch, model.objective(model, batch))
    return metric


def test_higher_thresholds_are_less_sensitive():
    data = feed(source=Ids(samples=12, length=16))
    metric = observed(data, dictionary(data, metrics=[ProxyRule(latent=2, thresholds=[0.0, 0.5])]))
    assert metric.chosen() == 2 and float(metric.sensitivity()[1].sum()) > 0
    assert bool((metric.sensitivity()[1] <= metric.sensitivity()[0]).all())


def test_the_card_counts_apart():
    data = feed(source=Ids(samples=12, length=16))
    model = dictionary(data, metrics=[ProxyRule()])
    metric = observed(data, model)
    before = metric.fired.clone(), metric.held.clone()
    measure(model.encoder, model.decoder, data, tokens=30, splice=False, extra=[metric])
    assert torch.equal(metric.fired, before[0]) and torch.equal(metric.held, before[1]) and float(before[1]) > 0


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"rule": "often"}, "must be induction or the path of a function"),
        ({"rule": "nowhere.rule"}, "can't be imported: No module named 'nowhere'"),
        ({"rule": "math.pi"}, "path of a function"),
        ({"thresholds": []}, "at least 0, one or more"),
        ({"thresholds": [-1.0]}, "at least 0"),
    ],
)
def test_bad_arguments_are_refused(given, said):
    with pytest.raises(ConfigError, match=said):
        ProxyRule(**given)


def test_a_latent_that_is_not_there_is_refused():
    with pytest.raises(ConfigError, match="latent 24 is not there: the dictionary has 24"):
        dictionary(feed(), metrics=[ProxyRule(latent=24)])
