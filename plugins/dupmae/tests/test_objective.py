"""The pretraining method: what the decoder may see, what the loss counts, how gradients flow."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from dupmae_toys import SPEC, encoder, model, texts
from torch.nn import functional as F

from quire import ConfigError, DataError, Model, Sum
from quire.roles.tokens.text import TextEncoder
from quire_dupmae.decoder import DuplexDecoder, rebuild
from quire_dupmae.objective import BagOfWords, DuplexAutoencoding


def test_other_content_reaches_a_row_only_through_visible_keys_and_never_the_own_one():
    made = model().eval()
    batch, vector = texts(1, 10), torch.randn(1, 32)
    visible = made.decoder.visible(
        batch["word_ids"], ~batch["special"], batch["mask"], torch.Generator().manual_seed(0)
    )

    def logits(tokens):
        original = made.encoder.embed({"tokens": tokens, "mask": batch["mask"]})
        return made.encoder.logits(rebuild(made.decoder, made.encoder, vector, original, visible))[0]

    before = logits(batch["tokens"])
    for j in range(1, 10):
        other = batch["tokens"].clone()
        other[0, j] = 5 + (other[0, j] + 1) % 40
        moved = (logits(other) - before).abs().amax(1) > 1e-6
        assert torch.equal(moved, visible[0, :, j])
    assert not visible[0].diagonal().any()  # so logits at i never depend on token i


@pytest.mark.parametrize("query", ["duplex", "retro"])
def test_the_query_is_the_vector_at_each_place(query):
    made = model(decoder=DuplexDecoder(query=query, dropout=0.0)).eval()
    batch, vector = texts(2, 6), torch.randn(2, 32)
    found = made.decoder.queries(made.encoder, vector, made.encoder.embed(batch))
    own = made.encoder.module.base_model.embeddings
    place = own.position_embeddings.weight[:6]
    summed = vector[:, None] + place
    if query == "duplex":
        summed = own.LayerNorm(summed + own.token_type_embeddings.weight[0])
    assert torch.allclose(found, summed, atol=1e-6)


def test_slot_0_holds_the_vector_without_position_or_norm(monkeypatch):
    made = model().eval()
    batch, vector, seen = texts(1, 6), torch.randn(1, 32), {}

    def look(queries, contents, visible):
        seen["keys"] = contents
        return queries

    monkeypatch.setattr(made.decoder.blocks[0], "forward", look)
    original = made.encoder.embed(batch)
    rebuild(made.decoder, made.encoder, vector, original, torch.ones(1, 6, 6, dtype=torch.bool))
    assert torch.equal(seen["keys"][:, 0], vector)
    assert torch.equal(seen["keys"][:, 1:], original.values[:, 1:])


def test_the_decoder_s_loss_counts_every_ordinary_token_of_the_original_and_no_other():
    made = model().eval()
    batch = texts(2, 12, lengths=[12, 7])
    made._rekey("val", 0, 0)
    losses = made.objective(made, batch)
    made._rekey("val", 0, 0)
    codes, _, ordinary = made.objective.see(made, batch)
    assert int(ordinary.sum()) == 10 + 5
    visible = made.decoder.visible(batch["word_ids"], ordinary, batch["mask"], made.generator("cpu"))
    states = rebuild(made.decoder, made.encoder, codes.values[:, 0], made.encoder.embed(batch), visible)
    labels = batch["tokens"].masked_fill(batch["special"], -100)
    expected = F.cross_entropy(made.encoder.logits(states).flatten(0, 1), labels.flatten())
    assert losses["decoder"].item() == pytest.approx(expected.item(), abs=1e-6)


def test_the_mlm_s_loss_counts_hidden_tokens_only_and_the_encoder_sees_the_masked_text():
    made = model().eval()
    batch = texts(2, 12)
    made._rekey("val", 0, 0)
    found = made.objective(made, batch)["mlm"]
    made._rekey("val", 0, 0)
    codes, hidden, _ = made.objective.see(made, batch)
    labels = batch["tokens"].masked_fill(~hidden, -100)
    expected = F.cross_entropy(made.encoder.logits(codes).flatten(0, 1), labels.flatten())
    assert found.item() == pytest.approx(expected.item(), abs=1e-6)
    assert hidden.sum(1).tolist() == [4, 4]  # round(.3 * 12)
    assert not torch.equal(codes.values, made.encoder(batch).values)


def test_the_bag_reads_the_masked_text_s_logits_behind_the_first_token():
    made = model().eval()
    batch = texts(2, 12, lengths=[12, 7])
    codes, _, _ = made.objective.see(made, batch)
    found = made.objective.bag(made, codes, 1024)
    logits = made.encoder.logits(codes)
    expected = torch.stack([logits[0, 1:].amax(0), logits[1, 1:7].amax(0)])
    assert torch.allclose(found, expected, atol=1e-5)
    changed = codes.with_values(codes.values.index_fill(1, torch.tensor([0]), 9.0))
    assert torch.equal(made.objective.bag(made, changed, 1024), found)  # the first row takes no part


def test_without_the_bag_it_is_retromae_s_loss():
    batch, duplex = texts(), model(DuplexAutoencoding(pictures=0)).eval()
    retro = copy.deepcopy(duplex)
    retro.objective.weights = {**retro.objective.weights, "bow": 0.0}
    for made in (duplex, retro):
        made._rekey("val", 0, 0)
    with_bag, without = duplex.objective(duplex, batch), retro.objective(retro, batch)
    assert set(with_bag) == {"mlm", "decoder", "bow"} and set(without) == {"mlm", "decoder"}
    assert torch.equal(with_bag["mlm"], without["mlm"]) and torch.equal(with_bag["decoder"], without["decoder"])
    assert float(duplex._total(with_bag)) == pytest.approx(
        float(without["mlm"] + without["decoder"] + 0.1 * with_bag["bow"])
    )


def test_the_decoder_s_gradient_reaches_the_trunk_only_through_the_first_token(monkeypatch):
    made = model().eval()
    own = made.encoder.module
    for part in (own.base_model.embeddings, own.cls):
        part.requires_grad_(False)
    batch, kept = texts(1, 8), {}

    def see(model, batch):
        codes = model.encoder(batch)
        kept["values"] = codes.values.detach().requires_grad_()
        return codes.with_values(kept["values"]), batch["mask"], ~batch["special"]

    monkeypatch.setattr(made.objective, "see", see)
    made.objective(made, batch)["decoder"].backward()
    reached = kept["values"].grad[0].abs().sum(1) > 0
    assert reached.tolist() == [True] + [False] * 7


def test_embedding_and_head_are_the_encoder_s_own_and_tied():
    made = model()
    own = made.encoder.module
    assert own.cls.predictions.decoder.weight.data_ptr() == own.base_model.embeddings.word_embeddings.weight.data_ptr()
    assert not [n for n, p in made.decoder.named_parameters() if 50 in p.shape]  # no table or head of its own


def test_longer_padding_changes_no_term():
    made = model().eval()
    short = texts(2, 9, lengths=[9, 6])
    pads = {"tokens": 0, "mask": False, "special": True, "word_ids": -1}
    longer = {k: F.pad(v, (0, 4), value=pads[k]) for k, v in short.items()}
    made.objective.see = lambda model, batch: (  # the same hidden tokens for both
        model.encoder(batch),
        batch["word_ids"].remainder(2) == 0,
        ~batch["special"],
    )
    made.decoder.visible = lambda word_ids, ordinary, mask, generator: (  # and the same rows
        mask[:, None] & ~torch.eye(mask.shape[1], dtype=torch.bool)
    )
    a, b = made.objective(made, short), made.objective(made, longer)
    for name in ("mlm", "decoder", "bow"):
        assert a[name].item() == pytest.approx(b[name].item(), abs=1e-5)


def test_weight_zero_leaves_the_decoder_out():
    made = model(DuplexAutoencoding(decoder_weight=0.0, bow_weight=0.0, pictures=0))
    losses = made.objective(made, texts())
    assert set(losses) == {"mlm"}
    losses["mlm"].backward()
    assert all(p.grad is None for p in made.decoder.parameters())


# ---- small texts
def test_a_passage_of_one_word_trains_also_when_the_word_is_longer_than_the_budget():
    made = model()
    one = texts(2, 6, lengths=[3, 6])
    one["word_ids"][1] = torch.tensor([-1, 0, 0, 0, 0, -1])  # four pieces, round(.3 * 6) = 2: nothing is hidden
    losses = made.objective(made, one)
    assert all(math.isfinite(float(v)) for v in losses.values())
    only = {k: v[1:] for k, v in one.items()}
    losses = made.objective(made, only)
    assert losses["mlm"].item() == 0.0
    sum(losses.values()).backward()
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in made.parameters())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda b: b["tokens"].__setitem__((1, 0), 9), "text 1 of the batch does not begin with the start token"),
        (lambda b: b["mask"].__setitem__((2, slice(1, None)), False), "text 2 of the batch has no token but the start"),
    ],
)
def test_a_text_without_its_start_or_of_nothing_else_is_refused(change, said):
    made, batch = model(), texts()
    change(batch)
    with pytest.raises(DataError, match=said):
        made.objective(made, batch)


# ---- other parts
def test_the_bag_alone_is_a_second_loss_for_a_text_encoder_of_the_core():
    text = TextEncoder(width=16, depth=1, heads=2)
    made = Model(
        encoder=text,
        decoder=DuplexDecoder(dropout=0.0),
        objective=Sum([DuplexAutoencoding(bow_weight=0.0, pictures=0), BagOfWords(weight=0.5)]),
        spec=SPEC,
    )
    made.configure_model()
    losses = made.objective(made, texts())
    assert set(losses) == {"mlm", "decoder", "bow"}
    sum(losses.values()).backward()
    assert [n for n, p in made.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"encoder": TextEncoder(16, 16, 16, 1, 2, lm_head=False)}, "DuplexAutoencoding needs 'lm_head'; TextEncoder"),
        ({"decoder": None}, "DuplexAutoencoding needs a DuplexDecoder; model.decoder is not set"),
    ],
)
def test_parts_that_do_not_serve_are_refused(parts, said):
    given = {"encoder": encoder(), "decoder": DuplexDecoder(), "objective": DuplexAutoencoding(), **parts}
    with pytest.raises(ConfigError, match=said):
        Model(**given)


@pytest.mark.parametrize(("missing", "word"), [("mask_id", "mask"), ("bos", "CLS")])
def test_a_tokenizer_without_mask_or_start_token_is_refused(missing, word):
    made = Model(
        encoder=encoder(), decoder=DuplexDecoder(), objective=DuplexAutoencoding(), spec={**SPEC, missing: None}
    )
    with pytest.raises(ConfigError, match=f"needs a {word} token; the data's tokenizer made-up has none"):
        made.configure_model()


def test_an_encoder_without_positions_can_not_be_asked_by_place():
    made = Model(encoder=encoder("none"), decoder=DuplexDecoder(), objective=DuplexAutoencoding(), spec=SPEC)
    made.configure_model()
    with pytest.raises(ConfigError, match="asks by place, but encoder RetrievalEncoder has no positions"):
        made.objective(made, texts())


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: DuplexAutoencoding(masking=1.0), r"mask_ratio must be in \(0,1\), got 1.0"),
        (lambda: DuplexDecoder(mask_ratio=1.0), r"mask_ratio must be in \(0,1\), got 1.0"),
        (lambda: DuplexAutoencoding(bow_weight=-1), "bow_weight must be at least 0"),
        (lambda: DuplexAutoencoding(bow_target="words"), "the bag's target is frequency or set, got 'words'"),
        (lambda: DuplexDecoder(query="both"), "query must be duplex or retro, got 'both'"),
        (lambda: DuplexDecoder(pool=0), "DuplexDecoder.pool must be at least 1, got 0"),
        (lambda: BagOfWords(chunk=0), "BagOfWords.chunk must be at least 1, got 0"),
    ],
)
def test_bad_arguments_are_one_sentence(make, said):
    with pytest.raises(ConfigError, match=said):
        make()


def test_it_rebuilds_patches_from_a_class_token_too():
    from quire.roles.tokens.vit import ViTEncoder

    vit = ViTEncoder(patch=4, width=16, depth=1, heads=2, class_token=True)
    made = Model(encoder=vit, decoder=DuplexDecoder(dropout=0.0), spec={"image_size": [8, 8], "channels": 1})
    made.configure_model()
    image = torch.rand(2, 1, 8, 8, requires_grad=True)
    codes, original = vit({"image": image}), vit.embed({"image": image})
    cells = torch.arange(4).expand(2, -1)
    rows = made.decoder.visible(
        cells, torch.ones(2, 4, dtype=torch.bool), torch.ones(2, 4, dtype=torch.bool), torch.Generator()
    )
    visible = F.pad(rows, (1, 0), value=True)  # the class token's vector, then the patches
    queries = made.decoder.queries(vit, codes.prefix[:, 0], original)
    out = made.decoder(codes.prefix[:, 0].detach(), original.values, queries.detach(), visible)
    assert out.shape == (2, 4, 16)
    for cell in range(4):
        (gradient,) = torch.autograd.grad(out[0, cell].square().sum(), original.values, retain_graph=True)
        assert torch.equal(gradient[0].abs().sum(1) > 0, rows[0, cell])
