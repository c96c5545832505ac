"""The cube over other homes' language models, and other homes' parts on its points."""

import copy

import pytest
import torch
from ariel_toys import BOS, EOS, PAD, bodies, over, random_sentences

from quire.plugins import load
from quire.recipe import instantiate
from quire.roles.language.hf import HFCausal
from quire.roles.language.models import CausalLM
from quire.roles.latent.contract import VectorCodes
from quire_ariel.data import QuestionGrammar
from quire_ariel.decoder import VolumeDecoder, tiny_volume

SPEC = {"vocab_size": 30, "length": 32, "pad": PAD, "bos": BOS, "eos": EOS}
HF = {
    "gpt2": {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32},
    "llama": {
        "model_type": "llama",
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 64,
    },
}


def loud(model):
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
    return model


def model_of(name):
    if name in HF:
        ids = {"vocab_size": 30, "eos_token_id": EOS, "bos_token_id": BOS, "pad_token_id": PAD}
        return HFCausal(config={**HF[name], **ids})
    if name == "CausalLM":
        return CausalLM(width=32, depth=2, heads=4)
    if "universal" not in load().records:
        pytest.skip("plugin universal is not installed")
    shape = {"width": 32, "heads": 4, "ffn": 64, "steps": 3, "dropout": 0.0}
    if name == "universal with ACT":
        shape["halting"] = {"class_path": "quire_universal.halting.ACT", "init_args": {"max_steps": 3}}
    load().registry.import_named(["UniversalDecoder", "ACT"])
    return instantiate({"class_path": "quire_universal.decoder.UniversalDecoder", "init_args": shape})


@pytest.mark.parametrize("name", ["CausalLM", "gpt2", "llama", "universal", "universal with ACT"])
def test_any_causal_model_is_a_code(name):
    tokens, mask = random_sentences(24, longest=7)
    cube = over(model_of(name), 1, SPEC)
    loud(cube)
    said = cube.decode(cube.encode(tokens, mask))
    assert said.rows() == bodies(tokens, mask) and not said.differs.any()
    wide = copy.copy(cube)
    wide.latent_dim = 16
    assert wide.decode(wide.encode(tokens, mask).z[:5]).rows() == bodies(tokens, mask)[:5]
    assert all(p.dtype == torch.float32 for p in cube.parameters())


def trained(run, **trainer):
    from quire.testing.assembly import make, parse, trainer_of
    from quire.testing.quiet import quietly

    with quietly():
        made = make(parse(run))
        trainer_of(made, [], logger=False, max_epochs=1, limit_train_batches=3, limit_val_batches=1, **trainer).fit(
            made.model, datamodule=made.data
        )
    return made.model.eval(), made.data


@pytest.mark.skipif("universal" not in load().records, reason="plugin universal is not installed")
def test_universals_objective_finds_its_decoder_inside_the_cube():
    run = tiny_volume()
    run["model"]["decoder"]["init_args"]["language_model"] = {
        "class_path": "UniversalDecoder",
        "init_args": {"width": 16, "heads": 2, "ffn": 32, "steps": 2, "dropout": 0.0},
    }
    run["model"]["objective"] = "UniversalLM"
    run["model"]["encoder"] = "VolumeEncoder"
    model, data = trained(run)
    batch = next(iter(data.loader("test")))
    assert model.decoder(model.encoder(batch)).rows() == bodies(batch["tokens"], batch["mask"])


@pytest.mark.skipif("prototypes" not in load().records, reason="plugin prototypes is not installed")
def test_prototypes_on_points_decode_to_sentences():
    load().registry.import_named(["PrototypeLayer"])
    torch.manual_seed(0)
    data = QuestionGrammar(sentences=32, held_out=8, batch_size=8)
    from quire import Model
    from quire_ariel.encoder import VolumeEncoder
    from quire_ariel.recurrent import GRULanguageModel

    cube = VolumeDecoder(GRULanguageModel(width=16, embedding=8), latent_dim=4)
    layer = instantiate({"class_path": "quire_prototypes.modules.PrototypeLayer", "init_args": {"prototypes": 6}})
    layer.decoder = cube
    model = Model(encoder=VolumeEncoder(), spec={**data.spec, "classes": 2}, decoder=with_inner(layer, cube))
    model.configure_model()
    codes = model.encoder(next(iter(data.loader("train"))))
    assert model.decoder(codes).shape == (8, 2)
    assert len(cube.decode(VectorCodes(model.decoder.prototypes)).rows()) == 6


def with_inner(layer, cube):
    """As if YAML had named the cube inside the layer."""
    layer.init_args = {**layer.init_args, "decoder": cube}
    return layer
