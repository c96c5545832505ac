"""The drafters on other plugins' models, and the block drafter from its checkpoint to a drafter's slot."""

import pytest
import torch
from aggressive_toys import BOS, SPEC, batch, greedy, rows, wild
from test_source import Given, slips

import quire
from quire.contracts import Spec
from quire.errors import ConfigError
from quire.model import Model
from quire.plugins import load
from quire.recipe import instantiate
from quire.roles.language.drafters import DraftUnion, PromptCopy
from quire.roles.language.loop import Speculative
from quire_aggressive.accept import Tolerance
from quire_aggressive.block import BlockDrafter
from quire_aggressive.objective import BlockPrediction

SMALL = {"width": 32, "heads": 4, "ffn": 64, "steps": 3, "dropout": 0.0}
NAMES = ("universal seq2seq", "universal causal", "routed causal")


def mixed(name):
    """An untrained model with large weights of another plugin."""
    plugin = {"universal": "quire_universal", "routed": "quire_first"}[name.partition(" ")[0]]
    pytest.importorskip(plugin)
    torch.manual_seed(0)
    encoder = None
    if name == "routed causal":
        base = {"class_path": "CausalLM", "init_args": {"width": 32, "depth": 4, "heads": 4}}
        decoder = {"class_path": "RoutedModel", "init_args": {"base": base}}
    else:
        causal = name == "universal causal"
        encoder = None if causal else {"class_path": "UniversalEncoder", "init_args": SMALL}
        decoder = {"class_path": "UniversalDecoder", "init_args": {**SMALL, "position": "rope"} if causal else SMALL}
    load().registry.import_named([part["class_path"] for part in (encoder, decoder) if part])
    model = Model(encoder=instantiate(encoder), decoder=instantiate(decoder), spec=SPEC)
    model.configure_model()
    return wild(model)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("arguments", [{"resume": False, "adapt": False}, {"multiple": "tree"}], ids=str)
def test_ids_equal_greedys_on_other_plugins_models(name, arguments):
    model, sources = mixed(name), rows((3, 7, 12))
    given = batch("bart" if "seq2seq" in name else "gpt2", sources)
    plain = greedy(model, given, 16)
    copied = [slips(t[0], i) for i, t in enumerate(plain.tokens)]
    result = Speculative(Given(copied, **arguments), max_new_tokens=16, debug=True)(model, given)
    assert result.tokens == plain.tokens
    assert result.stats.accepted > 0 and result.stats.target_forwards <= plain.stats.target_forwards


def trained(tmp_path, **spec):
    """A checkpoint folder of a block drafter that has seen one batch."""
    torch.manual_seed(0)
    model = Model(decoder=BlockDrafter(3, 16, [1, 1], 2, 0.0), objective=BlockPrediction(), spec={**SPEC, **spec})
    model.configure_model()
    tokens = torch.tensor([[BOS, 5, 6, 7, 3]])
    model.objective(model, {"source": torch.tensor([[5, 6, 7]]), "tokens": tokens})
    return str(quire.export(model, tmp_path / "drafter"))


def test_a_trained_block_drafter_is_loaded_into_a_union_and_lives_on_in_the_new_checkpoint(tmp_path):
    from aggressive_toys import toy

    drafter = quire.Pretrained(trained(tmp_path), part="decoder")
    assert isinstance(drafter, BlockDrafter) and drafter.trained and drafter.frozen
    sampler = Speculative(DraftUnion([drafter, PromptCopy()]), max_new_tokens=12)
    given = batch("bart", rows())
    assert sampler(toy("bart"), given).tokens == greedy(toy("bart"), given, 12).tokens
    again = instantiate(quire.contracts.plain(drafter))
    assert isinstance(again, BlockDrafter) and again.built


def test_a_drafter_of_another_tokenizer_is_refused(tmp_path):
    drafter = quire.Pretrained(trained(tmp_path, tokenizer="aaa"), part="decoder")
    decoder = {"class_path": "quire.roles.language.models.CausalLM", "init_args": {"width": 16, "depth": 1, "heads": 2}}
    model = Model(decoder=decoder, sampler=Speculative(drafter), spec=Spec({**SPEC, "tokenizer": "bbb"}))
    with pytest.raises(ConfigError, match="BlockDrafter was trained on the tokenizer aaa, this run has bbb"):
        model.configure_model()


def test_yaml_may_name_a_pretrained_part_in_a_drafters_slot():
    from quire.roles.language.contract import Acceptance, Drafter

    assert issubclass(quire.Pretrained, Drafter) and issubclass(quire.Pretrained, Acceptance)
    assert not issubclass(Tolerance, Drafter)
