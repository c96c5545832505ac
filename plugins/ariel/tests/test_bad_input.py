"""What is refused, each in one sentence that says what was given and what to change."""

from types import SimpleNamespace

import pytest
import torch
from ariel_toys import BOS, EOS, PAD, A, B, C, Table, constant, language, loud_gru, over, random_sentences, rows

from quire import Model
from quire.contracts import Spec, build
from quire.errors import ConfigError, DataError
from quire.recipe import instantiate
from quire.roles.language.models import CausalLM
from quire.roles.language.next_token import NextToken
from quire_ariel.callbacks import LatentSampleReport
from quire_ariel.data import ClosedWords, QuestionGrammar
from quire_ariel.decoder import VolumeDecoder
from quire_ariel.encoder import VolumeEncoder
from quire_ariel.errors import CapacityError, PointError, ZeroVolumeError
from quire_ariel.metrics import GrammarValidity, ReconstructionExact
from quire_ariel.objective import TextAutoencoding
from quire_ariel.recurrent import GRULanguageModel
from quire_ariel.sampler import UniformCube
from quire_ariel.sentence import SentenceEncoder

HALF = constant(a=0.5, b=0.25, eos=0.25)


@pytest.mark.parametrize("arithmetic", ["float64", "exact"])
def test_points_outside_the_cube(arithmetic):
    cube = over(Table(HALF), 4, arithmetic=arithmetic)
    point = torch.full((2, 4), 0.5)
    point[1, 3] = 1.2
    with pytest.raises(ValueError, match=r"^coordinate 3 is 1\.2, outside \[0, 1\]; pass clip=true to clip$"):
        cube.decode(point)
    with pytest.raises(PointError, match=r"coordinate 0 is nan, outside"):
        cube.decode(torch.full((1, 4), torch.nan))
    with pytest.raises(PointError, match="coordinate 1 is -0.1, outside"):
        cube.decode(torch.tensor([[0.5, -0.1, 0.5, 0.5]]))
    with pytest.raises(PointError, match="^z has 8 coordinates, latent_dim is 4$"):
        cube.decode(torch.rand(2, 8))
    clipped = over(Table(HALF), 4, arithmetic=arithmetic, clip=True, max_length=3)
    assert len(clipped.decode(point).rows()) == 2
    with pytest.raises(PointError, match="coordinate 0 is nan"):
        clipped.decode(torch.full((1, 4), torch.nan))


def test_exact_codes_outside_the_cube():
    cube = over(Table(HALF), 2, arithmetic="exact")
    with pytest.raises(PointError, match=r"coordinate 1 is 9 / 2\^3, outside \[0, 1\]"):
        cube.decode([[(1, 3), (9, 3)]])
    with pytest.raises(PointError, match="z has 1 coordinates, latent_dim is 2"):
        cube.decode([[(1, 3)]])


def test_tokens_outside_the_vocabulary():
    cube = over(Table(HALF), 2)
    with pytest.raises(DataError, match=r"token 9 \(sentence 1, place 2\) is outside the vocabulary of 6 tokens"):
        cube.encode(rows([BOS, A, B, EOS], [BOS, A, 9, EOS]))
    with pytest.raises(DataError, match="token -3 "):
        cube.encode(rows([BOS, A, -3, EOS]))


def test_sentences_without_an_end_or_with_one_inside():
    cube = over(Table(HALF), 2)
    with pytest.raises(DataError, match="^sentence 1 has no EOS; pass add_eos=true$"):
        cube.encode(rows([BOS, A, EOS], [BOS, A, B]))
    assert cube.decode(cube.encode(rows([BOS, A, EOS], [BOS, A, B]), add_eos=True)).rows() == [[A, EOS], [A, B, EOS]]
    with pytest.raises(DataError, match="sentence 0 goes on behind its end token at place 1"):
        cube.encode(rows([BOS, A, EOS, B, EOS]))
    with pytest.raises(DataError, match="sentence 1 is empty"):
        cube.encode(rows([BOS, EOS], [BOS, PAD]), torch.tensor([[True, True], [True, False]]))
    assert cube.decode(cube.encode(rows([BOS]), add_eos=True)).rows() == [[EOS]]


def test_a_token_of_probability_0():
    cube = over(Table(language(((A, B, EOS), 1.0))), 2)
    with pytest.raises(
        ZeroVolumeError, match=r"token \[5\] has probability 0 after \[3\]; its volume is empty, set smo"
    ):
        cube.encode(rows([BOS, A, C, EOS]))
    data = QuestionGrammar(sentences=8, held_out=4)
    named = over(Table(lambda prefix: {4: 1.0}, 47), 2)
    named.refer("owner", SimpleNamespace(tokenizer=data.tokenizer))
    with pytest.raises(ZeroVolumeError, match="token 'is' has probability 0 after 'it'; its volume is empty"):
        named.encode(rows([1, 4, data.tokenizer.ids["is"], 2]))


@pytest.mark.parametrize("dims", [1, 4])
def test_a_sentence_beyond_capacity_is_refused_with_the_remedy(dims):
    long = torch.full((1, 62), A)
    long[0, 0], long[0, -1] = BOS, EOS
    cube = over(Table(constant(a=0.05, b=0.9, eos=0.05)), dims)
    with pytest.raises(CapacityError) as error:
        cube.encode(long)
    said = str(error.value)
    needed, least = float(said.split(" needs ")[1].split()[0]), int(said.split(">= ")[1].split()[0])
    assert needed > 52 and "float64 holds 52" in said and said.endswith("or arithmetic=exact")
    wider = over(Table(constant(a=0.05, b=0.9, eos=0.05)), least)
    assert wider.decode(wider.encode(long)).rows() == [long[0, 1:].tolist()]
    exact = over(Table(constant(a=0.05, b=0.9, eos=0.05)), dims, arithmetic="exact")
    assert exact.decode(exact.encode(long)).rows() == [long[0, 1:].tolist()]


def test_a_sentence_longer_than_is_decoded():
    cube = over(Table(HALF), 16, max_length=3)
    with pytest.raises(CapacityError, match="sentence 0 has 4 tokens, the cube decodes 3: raise max_length"):
        cube.encode(rows([BOS, A, A, A, EOS]))
    short = CausalLM(width=8, depth=1, heads=2, rope=False)
    placed = over(short, 2, {"vocab_size": 6, "length": 5, "pad": PAD, "bos": BOS, "eos": EOS})
    with pytest.raises(CapacityError, match="sentence 0 has 7 tokens, the language model takes 5: shorten it"):
        placed.encode(rows([BOS, A, A, A, A, A, A, EOS]))


def test_a_sentence_without_an_end_says_so():
    cube = over(Table(constant(a=0.999, eos=0.001)), 2, max_length=6)
    said = cube.decode(torch.full((1, 2), 0.7))
    assert said.rows() == [[A] * 6] and said.truncated.tolist() == [True]


def test_another_models_code_is_told():
    tokens, mask = random_sentences(20, longest=6)
    codes = over(loud_gru(seed=0), 4).encode(tokens, mask)
    with pytest.warns(UserWarning, match=r"sentence \d+ has another probability than it was encoded with"):
        assert over(loud_gru(seed=1), 4).decode(codes).differs.any()


ARGUMENTS = {
    "axes": ({"latent_dim": 0}, "latent_dim >= 1"),
    "length": ({"max_length": 0}, "max_length >= 1"),
    "bits": ({"frequency_bits": 40}, "frequency_bits must be in 8..30, got 40"),
    "arithmetic": ({"arithmetic": "float32"}, "float64 or exact, got 'float32'"),
    "unfold": ({"arithmetic": "exact", "unfold": True}, "need arithmetic: float64"),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments_of_the_cube(name):
    given, said = ARGUMENTS[name]
    with pytest.raises(ConfigError, match=said):
        VolumeDecoder(Table(HALF), **given)


def test_language_models_that_do_not_fit():
    with pytest.raises(ConfigError, match="frequency_bits=8 has no room for 300 tokens: raise it"):
        over(Table(HALF, 300), 2, frequency_bits=8)
    model = GRULanguageModel()
    with pytest.raises(ConfigError, match="needs a start token; GRULanguageModel has none"):
        build(VolumeDecoder(model), Spec({"vocab_size": 6, "eos": EOS}))
    with pytest.raises(ConfigError, match="needs an end token; GRULanguageModel has none"):
        build(VolumeDecoder(GRULanguageModel()), Spec({"vocab_size": 6, "bos": BOS}))
    reading = instantiate(
        {"class_path": "quire.roles.language.models.Seq2SeqDecoder", "init_args": {"width": 8, "heads": 2}}
    )
    with pytest.raises(ConfigError, match="reads no source; Seq2SeqDecoder attends to one"):
        Model(decoder=VolumeDecoder(reading))
    nothing = Table(lambda prefix: {}, 6)
    with pytest.raises(DataError, match="logits are not finite"):
        over(nothing, 2).decode(torch.rand(1, 2))


def test_an_encoder_without_a_cube_is_told_the_role():
    with pytest.raises(ConfigError, match="VolumeEncoder needs a VolumeDecoder; model.decoder is GRULanguageModel"):
        Model(encoder=VolumeEncoder(), decoder=GRULanguageModel())
    with pytest.raises(ConfigError, match="VolumeEncoder needs a VolumeDecoder; model.decoder is not set"):
        Model(encoder=VolumeEncoder())


def test_the_other_parts():
    with pytest.raises(ConfigError, match="UniformCube.mode is one of draw, ancestral"):
        UniformCube(mode="sample")
    with pytest.raises(ConfigError, match="draws >= 1 and steps >= 2"):
        UniformCube(draws=0)
    with pytest.raises(ConfigError, match="GRULanguageModel.dropout must be in"):
        GRULanguageModel(dropout=1.0)
    with pytest.raises(ConfigError, match="kl_weight >= 0"):
        TextAutoencoding(kl_weight=-1)
    with pytest.raises(ConfigError, match="kl_weight needs a SentenceEncoder with variational=true"):
        Model(encoder=SentenceEncoder(), decoder=GRULanguageModel(), objective=TextAutoencoding(kl_weight=0.1))
    with pytest.raises(ConfigError, match="questions or questions:SIZE, got 'english'"):
        GrammarValidity("english")
    with pytest.raises(ConfigError, match="at least 47, got 40"):
        QuestionGrammar(vocabulary=40)
    with pytest.raises(ConfigError, match="hold out fewer"):
        QuestionGrammar(held_out=3_000_000)
    with pytest.raises(ConfigError, match="the word 'zebra' is not among the 44 words"):
        ClosedWords().encode("is it a zebra ?")
    with pytest.raises(ConfigError, match="LatentSampleReport needs every >= 1"):
        LatentSampleReport(every=0)
    with pytest.raises(ConfigError, match="ReconstructionExact needs a VolumeDecoder, or an encoder"):
        Model(decoder=GRULanguageModel(), objective=NextToken(), metrics=[ReconstructionExact()])
