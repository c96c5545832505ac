"""Bad input is refused in a sentence."""

import pytest
import torch
from first_toys import DEPTH, VOCAB, base, padded, prompts, routed

from quire.contracts import Spec, build
from quire.errors import ConfigError
from quire.model import Model
from quire.roles.language.contract import Caps, StepModel
from quire.roles.language.hf import HFCausal
from quire.roles.language.models import CausalLM
from quire_first.gates import refuse_shared
from quire_first.metrics import LayersUsed
from quire_first.model import RoutedModel

SPEC = Spec({"vocab_size": VOCAB, "length": 64, "eos": 3, "bos": 1})


class GPTX(StepModel):
    """A step model that shows no layers."""

    def caps(self):
        return Caps(VOCAB)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"threshold": 0.0}, r"threshold must be in \(0, 1\), got 0.0"),
        ({"threshold": 1.0}, r"threshold must be in \(0, 1\)"),
        ({"init": 1.0}, r"init must be in \(0, 1\)"),
        ({"pooling": "max"}, "pooling is mean, last_token, majority; got 'max'"),
        ({"gate": "hard"}, "gate is ste, soft, gumbel"),
        ({"prefill": "half"}, "prefill is skip, full"),
        ({"batch": "all"}, "batch is union, group, vote"),
    ],
)
def test_arguments_out_of_range(arguments, said):
    with pytest.raises(ConfigError, match=said):
        RoutedModel(base("causal"), **arguments)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"force": [9]}, "force names layer 9; CausalLM has 0 to 3"),
        ({"protected": [-5]}, "protected names layer -5"),
        ({"force": [0]}, "force skips layer 0, which is protected"),
        ({"protected": [0, 1, 2, 3]}, "all 4 layers are protected"),
    ],
)
def test_layers_that_are_unknown_or_protected(arguments, said):
    with pytest.raises(ConfigError, match=said):
        build(RoutedModel(base("causal"), **arguments), SPEC)


def test_a_base_without_layers():
    with pytest.raises(ConfigError, match=r"RoutedModel: GPTX exposes no layers; implement iter_layers\(\)"):
        Model(decoder=RoutedModel(GPTX()))
    with pytest.raises(ConfigError, match="implement iter_layers"):
        build(RoutedModel(GPTX()), SPEC)


def test_a_base_that_cannot_be_stepped():
    from quire.contracts import Decoder

    with pytest.raises(ConfigError, match="which can't be stepped"):
        RoutedModel(Decoder())


def test_a_prompt_of_padding_only():
    model = routed()
    ids, mask = padded(prompts((4, 6)))
    mask[1] = False
    with pytest.raises(ConfigError, match="prompt 1 has no real tokens"):
        model.open(ids, mask)


def test_an_encoder_decoder_without_codes():
    with pytest.raises(ConfigError, match="read its source; no codes are given"):
        routed("seq2seq").open(*padded(prompts((2, 3))))


def test_layers_that_share_keys_and_values_are_refused_with_both_named():
    def layer(shared):
        made = torch.nn.Module()
        made.attention = torch.nn.Module()
        made.attention.is_kv_shared_layer, made.attention.layer_type = shared, "full_attention"
        return made

    with pytest.raises(ConfigError, match="layer 2 uses the keys and values of layer 1"):
        refuse_shared([layer(False), layer(False), layer(True)])


def test_real_shared_layers_are_refused():
    config = {"model_type": "gemma3n_text", "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
    config |= {"num_key_value_heads": 1, "head_dim": 16, "intermediate_size": 32, "num_kv_shared_layers": 2}
    config |= {"layer_types": ["full_attention"] * 4, "vocab_size": VOCAB, "vocab_size_per_layer_input": VOCAB}
    config |= {"hidden_size_per_layer_input": 8, "laurel_rank": 4, "activation_sparsity_pattern": [0.0] * 4}
    try:
        model = HFCausal(config=config)
        build(model, SPEC)
    except Exception as error:
        pytest.skip(f"this transformers makes no such model: {str(error)[:60]}")
    with pytest.raises(ConfigError, match="layer 2 uses the keys and values of layer 1"):
        build(RoutedModel(model), SPEC)


def test_recurrent_and_hybrid_models_are_refused_by_name():
    config = {"model_type": "mamba", "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "vocab_size": VOCAB}
    with pytest.raises(ConfigError, match="needs a croppable cache; mamba"):
        build(RoutedModel(HFCausal(config=config, attn_implementation="eager")), SPEC)


def test_a_sliding_cache_is_refused():
    with pytest.raises(ConfigError, match="set base.cache to full"):
        RoutedModel(base("mistral", cache="sliding"))


def test_a_new_turn_keeps_the_first_decision_and_warns():
    model = routed(protected=[], seed=3)
    rows = prompts((5, 8))
    with torch.no_grad():
        state = model.open(*padded(rows))
        on = state.extras["routing"].on.clone()
        with pytest.warns(UserWarning, match="earlier turn, whose routing stays"):
            model.read(state, torch.tensor(prompts((3, 3), seed=9)))
    assert torch.equal(state.extras["routing"].on, on) and state.lengths.tolist() == [8, 11]


def test_an_unknown_report():
    with pytest.raises(ConfigError, match="report is layers, skip_rate, entropy, diversity"):
        LayersUsed("depth")


def test_a_routed_model_that_skips_itself_is_no_verifier_of_a_routed_draft():
    with pytest.raises(ConfigError, match=r"set force: \[\]"):
        routed().shallow(routed=True)
    with pytest.raises(ConfigError, match="shallow by layers"):
        routed().shallow(depth=2)
    assert isinstance(routed().shallow(layers=2), CausalLM) and DEPTH == 4
