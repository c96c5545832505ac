"""RetrievalEncoder against transformers itself: same numbers, saved and read back; and what it refuses."""

from __future__ import annotations

import pytest
import torch
from dupmae_toys import SPEC, encoder, texts

import quire
from quire import ConfigError, DataError, Model
from quire.contracts import Spec, build
from quire.roles.tokens.contract import Subset
from quire_dupmae.encoder import RetrievalEncoder
from quire_dupmae.objective import SMALL, DuplexAutoencoding


def built(made=None, **spec):
    made = made or encoder(num_hidden_layers=2)
    build(made, Spec({**SPEC, **spec}))
    return made.eval()


@pytest.mark.parametrize("kind", ["bert", "roberta", "camembert"])
def test_states_and_logits_are_transformers_own(kind):
    made = built(encoder(num_hidden_layers=2, model_type=kind))
    batch = texts(3, 12, lengths=[12, 7, 3])
    module, mask = made.module, batch["mask"]
    codes = made(batch)
    # RoBERTa's own code would give pads other places; the real tokens' are said here for all kinds alike
    first = 1 if kind != "bert" else 0  # behind the padding id, which is 0 here
    place = torch.arange(12)[None] + first
    with torch.no_grad():
        states = module.base_model(batch["tokens"], mask.long(), position_ids=place).last_hidden_state
        logits = module(batch["tokens"], mask.long(), position_ids=place).logits
    assert torch.allclose(codes.values[mask], states[mask], atol=1e-5)
    assert torch.allclose(made.logits(codes)[mask], logits[mask], atol=1e-4)
    with torch.no_grad():  # and the places are those that the model gives real tokens by itself
        alone = module.base_model(batch["tokens"], mask.long()).last_hidden_state
    assert torch.allclose(codes.values[mask], alone[mask], atol=1e-5)


def test_it_is_saved_for_from_pretrained_and_read_back_with_its_head(tmp_path):
    from transformers import AutoModelForMaskedLM

    made, batch = built(), texts()
    made.save_pretrained(tmp_path)
    module, told = AutoModelForMaskedLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"]  # the head too: else it would start at random
    with torch.no_grad():
        assert torch.allclose(module.eval()(batch["tokens"]).logits, made.logits(made(batch)), atol=1e-4)
    again = built(RetrievalEncoder(str(tmp_path), dense_dim=None))
    assert torch.equal(again(batch).values, made(batch).values)


def test_a_checkpoint_rebuilds_it_when_the_folder_is_gone(tmp_path):
    made, batch = built(), texts()
    made.save_pretrained(tmp_path / "hub")
    model = Model(encoder=RetrievalEncoder(str(tmp_path / "hub"), dense_dim=8), spec=SPEC)
    model.configure_model()
    quire.export(model, tmp_path / "kept")
    (tmp_path / "hub" / "config.json").unlink()
    (tmp_path / "hub" / "model.safetensors").unlink()
    again = quire.load(tmp_path / "kept")
    model.eval()
    assert torch.equal(again.encoder.dense(again.encoder(batch)), model.encoder.dense(model.encoder(batch)))


@pytest.mark.parametrize(("pooling", "dense_dim"), [("cls", None), ("cls", 6), ("mean", 6)])
def test_the_dense_vector_is_the_projected_pool(pooling, dense_dim):
    made = built(RetrievalEncoder(SMALL, pooling=pooling, dense_dim=dense_dim))
    batch = texts(2, 10, lengths=[10, 5])
    codes = made(batch)
    state = codes.values[:, 0]
    if pooling == "mean":
        state = torch.stack([codes.values[0].mean(0), codes.values[1, :5].mean(0)])
    wanted = state if dense_dim is None else state @ made.projection.weight.T
    assert torch.allclose(made.dense(codes), wanted, atol=1e-6)


# ---- with positions hidden, for word-order objectives
def test_without_positions_order_is_not_seen_and_nothing_of_the_table_is_trained():
    made, batch = built(encoder("none", num_hidden_layers=2)), texts(2, 10)
    order = torch.randperm(10, generator=torch.Generator().manual_seed(0))
    a = made(batch).values[:, order]
    b = made({**batch, "tokens": batch["tokens"][:, order]}).values
    assert torch.allclose(a, b, atol=1e-5)
    table = made.module.base_model.embeddings.position_embeddings.weight
    assert not table.any() and not table.requires_grad


@pytest.mark.parametrize("kind", ["learned", "sincos"])
def test_attached_positions_are_seen_saved_and_reloaded(kind, tmp_path):
    model = Model(encoder=encoder("none"), objective=None, spec=SPEC)
    model.configure_model()
    model.encoder.attach_positions(kind, "normal")
    table = model.encoder.module.base_model.embeddings.position_embeddings.weight
    assert table.requires_grad == (kind == "learned") and table.any()
    quire.export(model, tmp_path)
    again, batch = quire.load(tmp_path), texts()
    assert again.encoder.positions == kind
    assert torch.equal(again.encoder(batch).values, model.eval().encoder(batch).values)
    with pytest.raises(ConfigError, match=f"has {kind} positions already"):
        model.encoder.attach_positions("sincos" if kind == "learned" else "learned")


def test_a_word_order_objective_runs_on_it():
    pytest.importorskip("quire_mp3", reason="needs the plugin mp3")
    from quire.recipe import component_class

    prediction = component_class("PositionPrediction")
    model = Model(encoder=encoder("none"), objective=prediction(masking=0.5, pictures=0), spec=SPEC)
    model.configure_model()
    batch = texts(3, 16, lengths=[16, 16, 12])
    losses = model.objective(model, batch)
    losses["position"].backward()
    guesses = losses.outputs["position"]
    assert guesses.logits.shape == (3, 16, 16)
    assert torch.equal(guesses.real, ~batch["special"])  # start, end and padding aren't asked for
    reached = {n for n, p in model.encoder.named_parameters() if p.grad is not None}
    assert "module.bert.embeddings.word_embeddings.weight" in reached
    assert "module.bert.embeddings.position_embeddings.weight" not in reached
    with pytest.raises(ConfigError, match="encoder RetrievalEncoder adds positions"):
        Model(encoder=encoder(), objective=prediction(pictures=0), spec=SPEC)


def test_frozen_keys_come_from_the_embedded_tokens_in_every_layer():
    made, batch = built(), texts(2, 8)
    tokens = made.embed(batch)
    chosen = Subset.ordered(torch.rand(2, 8).argsort(1), 4)
    updated = made.encode(tokens, context=chosen).values
    frozen = made.encode(tokens, context=chosen, context_update=False).values
    assert not torch.allclose(updated, frozen, atol=1e-4)
    alone = built(encoder())
    tokens = alone.embed(batch)
    assert torch.equal(
        alone.encode(tokens, context=chosen).values, alone.encode(tokens, context=chosen, context_update=False).values
    )  # of one layer both are the same


# ---- bad input
@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"model_type": "t5"}, "T5 isn't a bidirectional encoder with an MLM head"),
        ({"model_type": "gpt2"}, "GPT2 isn't a bidirectional encoder with an MLM head"),
        ({"model_type": "bertt"}, "model_type 'bertt', which transformers does not know; did you mean bert"),
        ({"hidden_sise": 32}, "has hidden_sise, which bert does not know; did you mean hidden_size"),
    ],
)
def test_other_models_and_misspelt_keys_are_refused_by_name(config, said):
    with pytest.raises(ConfigError, match=said):
        Model(encoder=RetrievalEncoder(config), spec=SPEC)


def test_a_masked_language_model_of_another_shape_is_refused():
    config = {"model_type": "distilbert", "dim": 32, "n_layers": 1, "n_heads": 2, "hidden_dim": 64}
    with pytest.raises(ConfigError, match="DistilBertForMaskedLM is not BERT-shaped"):
        built(RetrievalEncoder(config))


def test_texts_and_vocabularies_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match="max_length 1024 exceeds the encoder's 512 positions"):
        built(encoder(max_position_embeddings=512), length=1024)
    with pytest.raises(ConfigError, match="tokenizer has 31000 ids but the encoder has 30522 rows"):
        built(encoder(vocab_size=30522), vocab_size=31000)
    made = built()
    with pytest.raises(DataError, match="token id 50 but the encoder has 50 rows"):
        made({"tokens": torch.tensor([[2, 50, 3]])})
    with pytest.raises(DataError, match="tokens has 17 places but the encoder has 16 positions"):
        made({"tokens": torch.full((1, 17), 5)})


def test_nothing_at_a_path_is_said_with_the_path(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="RetrievalEncoder: nothing to load at .*empty"):
        RetrievalEncoder(str(tmp_path / "empty"))


@pytest.mark.parametrize("given", [{"pooling": "max"}, {"dense_dim": 0}, {"positions": "rope"}])
def test_bad_arguments_are_one_sentence(given):
    with pytest.raises(ConfigError, match=f"{next(iter(given))}.* must be"):
        RetrievalEncoder(SMALL, **given)


def test_an_encoder_without_a_head_is_told_from_the_objective():
    assert DuplexAutoencoding.requires["encoder"] <= RetrievalEncoder.capabilities
