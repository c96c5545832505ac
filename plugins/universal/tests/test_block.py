"""Oracles 1 and 8: the recurrence is a weight-tied stack, and signals match the closed form."""

import math

import pytest
import torch
from torch import nn

from quire.contracts import Spec, build
from quire.errors import ConfigError, DataError
from quire_universal.decoder import UniversalDecoder
from quire_universal.encoder import UniversalEncoder
from quire_universal.signals import coordinates


def torch_layer(block, pre):
    """torch's own layer with the block's weights."""
    layer = nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True, norm_first=pre)
    a = block.attention
    with torch.no_grad():
        layer.self_attn.in_proj_weight.copy_(torch.cat([a.query.weight, a.key_value.weight]))
        layer.self_attn.in_proj_bias.copy_(torch.cat([a.query.bias, a.key_value.bias]))
        for ours, theirs in (
            (a.out, layer.self_attn.out_proj),
            (block.norm_self, layer.norm1),
            (block.norm_transition, layer.norm2),
            (block.transition.up, layer.linear1),
            (block.transition.down, layer.linear2),
        ):
            theirs.weight.copy_(ours.weight)
            theirs.bias.copy_(ours.bias)
    return layer.train()


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("steps", [1, 5])
def test_oracle_1_equals_a_tied_stack_of_torch_layers_gradients_too(encoder, norm, steps):
    found = encoder(norm=norm, steps=steps, step_signal="sinusoid")
    layer = torch_layer(found.core.blocks[0], norm == "pre")
    tokens = torch.randint(4, 40, (3, 7))
    x = found.embed({"tokens": tokens}).values.detach()
    for t in range(1, steps + 1):
        x = layer(x + coordinates(torch.arange(7), t, 16))
    want, got = found.core.norm(x), found({"tokens": tokens}).values
    assert torch.allclose(want, got, atol=1e-5)
    noise = torch.randn_like(want)
    (want * noise).sum().backward()
    (got * noise).sum().backward()
    ours = found.core.blocks[0].transition.up.weight.grad
    assert torch.allclose(layer.linear1.weight.grad, ours, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("cls", [UniversalEncoder, UniversalDecoder])
def test_oracle_1_parameters_do_not_depend_on_steps(cls):
    def count(steps, **given):
        part = cls(width=16, heads=2, ffn=32, steps=steps, **given)
        build(part, Spec({"vocab_size": 40, "length": 8}))
        return sum(p.numel() for p in part.parameters())

    assert count(2, step_signal="sinusoid") == count(9, step_signal="sinusoid")
    assert count(9) - count(2) == 7 * 16
    assert count(4, shared=False, step_signal="sinusoid") > 2 * count(4, step_signal="sinusoid")


def test_oracle_8_signals_match_the_closed_form():
    assert coordinates(torch.tensor(0), 0, 8).tolist() == [0, 2] * 4
    for i, t in ((3, 1), (17, 6)):
        got = coordinates(torch.tensor(i), t, 8)
        for j in range(4):
            rate = 10000 ** (-2 * j / 8)
            assert float(got[2 * j]) == pytest.approx(math.sin(i * rate) + math.sin(t * rate), abs=1e-5)
            assert float(got[2 * j + 1]) == pytest.approx(math.cos(i * rate) + math.cos(t * rate), abs=1e-5)
    halves = coordinates(torch.tensor(5), 2, 8, "halves")
    assert torch.allclose(halves, torch.cat([coordinates(torch.tensor(5), 2, 8)[i::2] for i in (0, 1)]))


def test_oracle_8_random_offset_is_zero_in_evaluation(encoder):
    a, b = encoder(position="random_offset"), encoder(position="coordinate")
    batch = {"tokens": torch.randint(4, 40, (4, 6))}
    assert torch.equal(a(batch).values, b(batch).values)
    a.train()
    assert not torch.allclose(a(batch).values, b(batch).values, atol=1e-3)


def test_offsets_come_from_the_models_generator(encoder):
    found = encoder(position="random_offset").train()
    source = torch.Generator()
    found.refer("_source_of_chance", lambda device: source.manual_seed(4))
    batch = {"tokens": torch.randint(4, 40, (4, 6))}
    assert torch.equal(found(batch).values, found(batch).values)


def test_signals_are_added_at_every_step(encoder):
    """Without them in later steps, a state that starts equal everywhere would stay equal."""
    found = encoder(steps=3)
    given = []
    found.core.blocks[0].register_forward_pre_hook(lambda module, args: given.append(args[0]))
    states = []
    tokens = found.embed({"tokens": torch.randint(4, 40, (1, 6))})
    found._run(tokens, None, None, True, 3, states)
    before = [tokens.values, *states]
    for t in range(3):
        signal = given[t] - before[t]
        assert not torch.allclose(signal[:, 0], signal[:, 1], atol=1e-3)


@pytest.mark.parametrize("cls", [UniversalEncoder, UniversalDecoder])
def test_bad_sizes_are_refused(cls):
    with pytest.raises(ConfigError, match="not divisible by heads"):
        cls(width=10, heads=4)
    with pytest.raises(ConfigError, match="even width"):
        cls(width=9, heads=3)
    with pytest.raises(ConfigError, match="even width"):
        cls(width=9, heads=3, position="none", step_signal="sinusoid")
    with pytest.raises(ConfigError, match="heads of even width"):
        cls(width=6, heads=2, position="rope")
    with pytest.raises(ConfigError, match="steps and ffn"):
        cls(steps=0)
    for bad in ({"norm": "mid"}, {"transition": "gru"}, {"position": "here"}, {"step_signal": "x"}, {"layout": "x"}):
        with pytest.raises(ConfigError, match="got"):
            cls(**bad)
    with pytest.raises(ConfigError, match="dropout"):
        cls(dropout=1.0)
    with pytest.raises(ConfigError, match="max_offset"):
        cls(max_offset=-1)


def test_bad_sources_are_named(encoder):
    found = encoder()
    mask = torch.tensor([[True, True], [False, False]])
    with pytest.raises(DataError, match="row 1 of tokens is padding alone"):
        found({"tokens": torch.full((2, 2), 5), "mask": mask})
    with pytest.raises(ConfigError, match="source is empty"):
        found({"source": torch.zeros(2, 0, dtype=torch.long)})
    with pytest.raises(DataError, match="id 40"):
        found({"tokens": torch.tensor([[40]])})


def test_sinusoid_steps_may_exceed_training_and_learned_ones_may_not(encoder):
    learned = encoder(steps=8)
    batch = {"tokens": torch.randint(4, 40, (1, 3))}
    with pytest.raises(ConfigError, match="step 9 > table 8: use step_signal sinusoid or train with more steps"):
        learned._run(learned.embed(batch), None, None, True, 9, None)
    free = encoder(steps=8, step_signal="sinusoid")
    free._run(free.embed(batch), None, None, True, 9, None)


def test_learned_positions_end_where_the_table_does(encoder):
    found = encoder(position="learned", spec={"length": 4})
    with pytest.raises(ConfigError, match="position 4 is beyond the learned table of 4"):
        found({"tokens": torch.randint(4, 40, (1, 5))})


def test_patches_of_images_are_tokens_too(encoder):
    found = encoder(patch=4, spec={"image_size": [8, 12], "channels": 3})
    codes = found({"image": torch.rand(2, 3, 8, 12)})
    assert codes.values.shape == (2, 6, 16) and codes.layout.grid == (2, 3) and found.fields == ("image",)
    alone = found.encode(found.embed({"image": torch.rand(2, 3, 8, 12)}), keep=torch.tensor([[0, 3], [5, 1]]))
    assert alone.values.shape == (2, 2, 16)


def test_a_position_free_encoder_takes_positions_later(encoder):
    found = encoder(position="none")
    batch, turned = {"tokens": torch.tensor([[5, 6, 7]])}, {"tokens": torch.tensor([[7, 6, 5]])}
    assert torch.allclose(found(batch).values, found(turned).values.flip(1), atol=1e-5)
    found.attach_positions("learned", "normal")
    assert found.init_args["position"] == "learned"
    assert not torch.allclose(found(batch).values, found(turned).values.flip(1), atol=1e-3)
