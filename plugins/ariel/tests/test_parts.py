"""The language models, the controls, the sampler, the metrics and the report, each on its own."""

import pytest
import torch
from ariel_toys import BOS, EOS, PAD, A, B, Table, bodies, constant, loud_gru, over, random_sentences, rows

from quire import Model
from quire.contracts import Losses, Spec, build
from quire.errors import ConfigError
from quire.roles.language.next_token import NextToken
from quire.roles.latent.contract import VectorCodes
from quire_ariel.callbacks import report
from quire_ariel.data import QuestionGrammar
from quire_ariel.decoder import VolumeDecoder
from quire_ariel.encoder import VolumeEncoder
from quire_ariel.metrics import GrammarValidity, ReconstructionExact, Uniqueness
from quire_ariel.objective import TextAutoencoding
from quire_ariel.pictures import draw, mixture, walk
from quire_ariel.precision import in_double
from quire_ariel.recurrent import GRULanguageModel, LSTMLanguageModel
from quire_ariel.sampler import UniformCube
from quire_ariel.sentence import SentenceEncoder, divergence
from quire_ariel.speaking import points_like, said_again

SPEC = {"vocab_size": 30, "length": 16, "pad": PAD, "bos": BOS, "eos": EOS}


def questions_model(dims=4, **parts):
    torch.manual_seed(0)
    data = QuestionGrammar(sentences=64, held_out=16, batch_size=16)
    cube = VolumeDecoder(GRULanguageModel(width=16, embedding=8), latent_dim=dims)
    model = Model(decoder=cube, objective=NextToken(), spec=data.spec, **parts)
    model.configure_model()
    model.refer_tokenizer(data.tokenizer)
    return model.eval(), data, next(iter(data.loader("test")))


@pytest.mark.parametrize("kind", [GRULanguageModel, LSTMLanguageModel])
@pytest.mark.parametrize("layers", [1, 2])
def test_padding_on_either_side_changes_nothing(kind, layers):
    torch.manual_seed(0)
    model = kind(width=12, embedding=6, layers=layers)
    build(model, Spec(SPEC))
    tokens, mask = random_sentences(5, longest=7)
    order = (mask).long().argsort(dim=1, stable=True)
    left, left_mask = tokens.gather(1, order), mask.gather(1, order)
    for row in range(5):
        alone = model(None, tokens[row][mask[row]][None])[0]
        assert torch.allclose(model(None, tokens, mask)[row][mask[row]], alone, atol=1e-6)
        assert torch.allclose(model(None, left, left_mask)[row][left_mask[row]], alone, atol=1e-6)


def test_behind_an_encoder_the_vector_is_where_it_starts():
    torch.manual_seed(0)
    model = LSTMLanguageModel(width=12, embedding=6)
    build(model, Spec({**SPEC, "codes": {"width": 3}}))
    tokens = rows([BOS, A, B, EOS])
    one, two = (model(VectorCodes(v), tokens) for v in torch.eye(3)[:2, None])
    assert not torch.allclose(one, two)
    with pytest.raises(ConfigError, match="needs the encoder's vector"):
        model(None, tokens)
    state = model.open(tokens[:, :2], None, VectorCodes(torch.eye(3)[:1]))
    assert torch.allclose(state.logits, one[:, 1], atol=1e-6)


def test_the_cubes_language_model_reads_no_codes_of_the_encoder():
    model, _, batch = questions_model()
    alone = model.decoder.language_model
    assert alone.bridge is None
    other, _, _ = questions_model(encoder=VolumeEncoder())
    assert other.decoder.language_model.bridge is None and len(list(other.encoder.parameters())) == 0
    codes = other.encoder(batch)
    assert codes.vector.dtype == torch.float32 and codes.z.dtype == torch.float64 and other.encoder.width == 4
    assert other.decoder(codes).rows() == bodies(batch["tokens"], batch["mask"])
    assert other.decoder(VectorCodes(codes.vector)).rows() == bodies(batch["tokens"], batch["mask"]), "float32 holds 22"


def test_float64_leaves_the_parameters_as_they_were():
    model = loud_gru()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    places = {k: v.data_ptr() for k, v in model.named_parameters()}
    with in_double(model):
        assert all(p.dtype == torch.float64 for p in model.parameters())
    with pytest.raises(IndexError), in_double(model):
        model(None, rows([BOS, 99]))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert {k: v.data_ptr() for k, v in model.named_parameters()} == places
    with torch.inference_mode(), in_double(model):
        pass
    model(None, rows([BOS, A])).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_points_have_gradients_to_the_model_in_training():
    model, _, batch = questions_model(encoder=VolumeEncoder())
    model.train()
    codes = model.encoder(batch)
    exact = model.decoder.encode(batch["tokens"], batch["mask"])
    assert torch.allclose(codes.z, exact.z, atol=1e-5)
    codes.z.sum().backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in model.decoder.parameters())


def test_the_gradient_of_a_point_is_that_of_its_sides():
    # one token on one axis: z = c + p/2, so dz/dlogits is that of the softmax
    cube = over(loud_gru(vocab=8), 2)
    tokens = rows([BOS, 5, EOS])
    codes = cube.encode(tokens, differentiable=True)
    first = cube.language_model(None, tokens[:, :1])[0, 0].double()
    first = first.index_fill(0, cube.banned, -torch.inf)
    p = torch.softmax(first, 0)
    wanted = p[:5].sum() + p[5] / 2
    a = torch.autograd.grad(codes.z[0, 0], cube.language_model.head.bias)[0]
    b = torch.autograd.grad(wanted, cube.language_model.head.bias)[0]
    assert torch.allclose(a, b, atol=1e-6)


def test_a_straight_through_choice_has_a_gradient_to_the_point():
    plain = over(loud_gru(vocab=8), 2, max_length=6)
    cube = over(loud_gru(vocab=8), 2, max_length=6, straight_through=True)
    z = torch.rand(5, 2, dtype=torch.float64, requires_grad=True)
    said = cube.decode(z)
    assert said.rows() == plain.decode(z.detach()).rows() and said.one_hot.shape[:2] == said.tokens.shape
    hot = said.one_hot.argmax(-1)[said.mask]
    assert torch.equal(hot, said.tokens[said.mask]) and torch.allclose(said.one_hot.sum(-1), said.mask.double())
    (said.one_hot * torch.randn(8, dtype=torch.float64)).sum().backward()
    assert torch.isfinite(z.grad).all() and bool((z.grad != 0).all())
    assert plain.decode(z.detach()).one_hot is None


def test_unfolding_says_the_same_where_there_is_room():
    tokens, mask = random_sentences(40, longest=5)
    cube, other = over(loud_gru(scale=0.2), 4), over(loud_gru(scale=0.2), 4, unfold=True)
    z = cube.encode(tokens, mask).z
    assert other.decode(z).rows() == cube.decode(z).rows() == bodies(tokens, mask)


def test_drawn_points_depend_on_seed_and_number_alone():
    model, _, batch = questions_model(sampler=UniformCube(draws=40, seed=3))
    together = model.sampler(model, batch)
    assert [r["index"] for r in together] == batch["index"].tolist()
    alone = model.sampler(model, {k: v[5:6] for k, v in batch.items()})
    assert alone[0]["tokens"] == together[5]["tokens"] and alone[0]["z"] == together[5]["z"]
    rest = model.sampler.finish(model, [together])
    assert len(rest) == 40 and len({tuple(r["z"]) for r in rest}) == 40 and rest[5] == together[5]
    assert len(UniformCube(draws=3).finish(model, [together])) == 3
    assert UniformCube(seed=4)(model, batch)[0]["z"] != together[0]["z"]
    assert together[0]["text"] == model.tokenizer.decode(together[0]["tokens"])


def test_modes_of_the_sampler():
    model, _, batch = questions_model(encoder=VolumeEncoder())
    meant = bodies(batch["tokens"], batch["mask"])
    encoded = UniformCube(mode="encode")(model, batch)
    assert [r["tokens"][1:] for r in encoded] == meant
    again = model.decoder.decode(torch.tensor([r["z"] for r in encoded], dtype=torch.float64))
    assert again.rows() == meant
    assert [r["tokens"] for r in UniformCube(mode="decode")(model, batch)] == meant
    given = {"vector": torch.tensor([r["z"] for r in encoded])}
    assert [r["tokens"] for r in UniformCube(mode="decode")(model, given)] == meant
    walks = UniformCube(mode="walk", steps=4)(model, batch)
    assert [len(r["walk"]) for r in walks] == [4] * 16
    assert [(r["walk"][0]["tokens"], r["walk"][-1]["tokens"]) for r in walks] == [*zip(meant, [*meant[1:], meant[0]])]
    control = UniformCube(mode="ancestral", draws=20)
    assert len(control.finish(model, [control(model, batch)])) == 20
    bare, _, _ = questions_model()
    with pytest.raises(ConfigError, match="mode=decode needs the field vector or an encoder"):
        UniformCube(mode="decode")(bare, {"tokens": batch["tokens"]})


def test_an_exact_cube_writes_codes_as_whole_numbers():
    model, _, batch = questions_model()
    model.decoder.arithmetic = "exact"
    encoded = UniformCube(mode="encode")(model, batch)
    codes = [[tuple(pair) for pair in row["code"]] for row in encoded]
    assert model.decoder.decode(codes).rows() == bodies(batch["tokens"], batch["mask"])


def test_metrics_read_points_and_held_out_sentences():
    model, _, batch = questions_model(metrics=[Uniqueness(), ReconstructionExact("questions")])
    unique, exact = model.metrics
    losses = Losses({})
    for metric in model.metrics:
        metric.observe(model, batch, losses)
    drawn = losses.outputs["drawn"]
    assert len(drawn) == 16 and float(unique.compute()) == len(set(map(tuple, drawn))) / 16
    assert float(exact.compute()) == 1 and exact.table() == {"exact": 1, "tokens": 1, "valid": 1}
    judged = GrammarValidity("questions")
    judged.sampled(model, batch, [{"tokens": b} for b in bodies(batch["tokens"], batch["mask"])])
    assert float(judged.compute()) == 1 and judged.table()["valid unique"] == 1
    judged.sampled(model, batch, [{"tokens": [5, 6, EOS]}] * 16)
    assert float(judged.compute()) == 0.5
    nobody = GrammarValidity()
    nobody.sampled(model, batch, [{"tokens": [5, EOS]}])
    with pytest.raises(ConfigError, match="GrammarValidity needs a grammar: set grammar: questions"):
        nobody.compute()


def test_a_vae_is_measured_by_hand():
    mean, logvar = torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.zeros(2, 2)
    assert float(divergence(mean, logvar)) == 0.5
    assert float(divergence(mean, logvar, free_bits=1.0)) == pytest.approx(2 * 0.6931472)
    assert float(divergence(torch.zeros(1, 1), torch.full((1, 1), 2.0))) == pytest.approx(0.5 * (2.71828183**2 - 3))


def test_an_autoencoder_learns_to_say_a_few_sentences_again():
    torch.manual_seed(0)
    data = QuestionGrammar(sentences=8, held_out=4, batch_size=8)
    model = Model(
        encoder=SentenceEncoder(8, width=64),
        decoder=GRULanguageModel(width=64),
        objective=TextAutoencoding(),
        spec=data.spec,
    )
    model.configure_model()
    batch = next(iter(data.loader("train")))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(400):
        optimizer.zero_grad()
        model.objective(model, batch)["reconstruct"].backward()
        optimizer.step()
    model.eval()
    meant = bodies(batch["tokens"], batch["mask"])
    assert sum(a == b for a, b in zip(said_again(model, batch, 16), meant)) >= 7
    codes = model.encoder(batch).vector.detach()
    drawn = points_like(codes, 500, torch.Generator().manual_seed(0)).vector
    assert (drawn >= codes.amin(0)).all() and (drawn <= codes.amax(0)).all()
    assert float((drawn.amax(0) - drawn.amin(0)).min() / (codes.amax(0) - codes.amin(0)).min()) > 0.9


def test_the_report_and_the_picture(tmp_path):
    model, data, batch = questions_model()
    said = report(model, data, 50)
    assert "50 uniform points of 4 axes" in said and "valid unique" in said and "bootstrap interval" in said
    corners = model.decoder.encode(batch["tokens"][:4], batch["mask"][:4]).z
    square = mixture(corners, 5)
    assert torch.equal(square[[0, 4, 20, 24]], corners) and bool(((square >= 0) & (square <= 1)).all())
    read = model.tokenizer.decode
    steps = walk(model.decoder, corners[0], corners[1], read, lambda row: None)
    assert (steps.texts[0], steps.texts[-1]) == tuple(map(read, bodies(batch["tokens"][:2], batch["mask"][:2])))
    assert draw(tmp_path / "cube.png", model.decoder, corners, read, steps, "title", side=12) > 1
    assert (tmp_path / "cube.png").stat().st_size > 10_000


def test_one_pass_encodes_and_rows_leave_when_they_end():
    model = Table(constant(a=0.5, b=0.25, eos=0.25))
    over(model, 16).encode(rows([BOS, A, B, EOS], [BOS, A, A, EOS]))
    assert model.passes == 1
    seen = []
    step = model.step
    model.step = lambda state, ids, **kw: (seen.append(len(ids)), step(state, ids, **kw))[1]
    cube = over(model, 2, max_length=8)
    lengths = [len(r) for r in cube.decode(torch.rand(64, 2, generator=torch.Generator().manual_seed(0))).rows()]
    again = [sum(n > t for n in lengths) for t in range(1, max(lengths))]
    assert all(a <= b for a, b in zip(seen, again)), "no step is taken for a row that has ended"
