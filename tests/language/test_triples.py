"""Every drafter with every lossless acceptance rule on every step model installed, and under adversarial drafts."""

from __future__ import annotations

import functools

import pytest
import torch

from quire.contracts import build, plain
from quire.errors import ConfigError
from quire.plugins import load
from quire.recipe import instantiate
from quire.roles.language.accept import Exact, SampleOnce
from quire.roles.language.contract import Draft, Drafter
from quire.roles.language.loop import Speculative
from quire.testing.language import prove
from quire.testing.quiet import quietly
from quire.testing.subject import Subject
from quire.testing.talk import adversary, talk
from quire.testing.verdict import Skip

REGISTRY = load().registry
MODELS = [e.name for e in REGISTRY if e.kind == "decoder" and "StepModel" in e.role]
DRAFTERS = [e.name for e in REGISTRY if e.kind == "part" and "drafter" in e.role]
RULES = [e.name for e in REGISTRY if e.kind == "part" and "acceptance" in e.role]
LENGTHS = tuple(range(1, 41))
COUNT = 6


@functools.cache
def conversation(name):
    """A step model on the kit's bench, or why it has none."""
    try:
        return talk(Subject(REGISTRY.entries[name]))
    except Skip as reason:
        return str(reason)


@functools.cache
def part(name):
    """A drafter or rule as its own tiny run has it, unbuilt."""
    subject = Subject(REGISTRY.entries[name])
    with quietly():
        return plain(subject.trial.made().find(subject.cls))


def on(model, name):
    """A fresh one, built and bound for a model."""
    made = instantiate(part(name))
    build(made, model.spec)
    made.bind(model)
    return made


def ready(name):
    it = conversation(name)
    if isinstance(it, str):
        pytest.skip(it)
    return it


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("drafter", DRAFTERS)
def test_no_drafter_changes_an_id(model, drafter):
    it = ready(model)
    made = on(it.model, drafter)
    try:
        prove(it, made, it.prompts(LENGTHS), COUNT)
    except ConfigError as refused:  # a pair that can't be is refused, not decoded wrongly
        pytest.skip(str(refused))


class Dummy(Drafter):
    """A tree of one node: whatever came last, again."""

    def propose(self, row, context, budget):
        return Draft(context[-1:], [-1])


@pytest.mark.parametrize("model", MODELS)
def test_adversarial_trees_trees_with_an_end_and_dummies_change_no_id(model):
    it = ready(model)
    prompts = it.prompts(LENGTHS)
    for drafter in (adversary(it, prompts, COUNT, 0), adversary(it, prompts, COUNT, 1), Dummy()):
        prove(it, drafter, prompts, COUNT)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("rule", RULES)
def test_a_lossless_rule_gives_the_same_stream_with_drafts_as_without(model, rule):
    it, made = ready(model), instantiate(part(rule))
    if not made.lossless:
        pytest.skip(f"{rule} declares lossless=False")
    if not isinstance(made, (Exact, SampleOnce)):
        pytest.skip(f"{rule} need not draw as plain decoding does; its law is the kit's acceptance_law")
    prompts = it.prompts((5, 9, 2, 7))
    given = {**it.given(prompts), "index": torch.arange(4)}
    drafter = adversary(it, prompts, COUNT)
    plain_, drafted = (Speculative(d, made, max_new_tokens=COUNT, seed=3)(it.model, given) for d in (None, drafter))
    assert drafted.tokens == plain_.tokens
