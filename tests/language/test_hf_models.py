"""Adapters to transformers as components: training, checkpoints, sizes from the data, and wrong ones refused."""

from __future__ import annotations

import copy
import shutil
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers")

from tests.language.hf_toys import (
    CONFIGS,
    EOS,
    SEQ2SEQ,
    VOCAB,
    WHOLE,
    adapter,
    batch,
    new_tokens,
    prompts,
    reference,
    toy,
    whole,
)

from quire.checkpoint import export, load
from quire.contracts import Spec, build
from quire.errors import ConfigError
from quire.model import Model
from quire.roles.language.contract import Draft, Drafter
from quire.roles.language.drafters import PromptCopy
from quire.roles.language.hf import Encoded, HFCausal, HFSeq2Seq
from quire.roles.language.loop import Greedy, Speculative
from quire.roles.language.next_token import NextToken, Seq2SeqTokens
from quire.roles.tokens.text import TextEncoder


@pytest.mark.parametrize("name", WHOLE)
def test_training_logits_do_not_see_padding(name):
    model = toy(name).decoder
    rows = prompts((5, 9, 2))
    codes = model.encode(batch(name, prompts((4, 4, 4)))) if name in SEQ2SEQ else None
    for side in ("left", "right"):
        given = batch("llama", rows, side)
        with torch.no_grad():
            logits = model(codes, given["tokens"], given["mask"])
        assert logits.shape == (3, 9, VOCAB)
        for i, row in enumerate(rows):
            own = None if codes is None else Encoded(codes.values[i : i + 1])
            torch.testing.assert_close(logits[i][given["mask"][i]], whole(model, own, row), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_attention_stays_within_a_document(name):
    model = toy(name).decoder
    tokens, doc = torch.tensor([[5, 6, 7, 8, 9, 10]]), torch.tensor([[0, 0, 0, 1, 1, 1]])
    changed = torch.tensor([[11, 12, 13, 8, 9, 10]])
    with torch.no_grad():
        a, b = model(None, tokens, doc=doc), model(None, changed, doc=doc)
        alone = model(None, tokens[:, :3])
    assert torch.equal(a[:, 3:], b[:, 3:])
    torch.testing.assert_close(a[:, :3], alone, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "bart"])
def test_objectives_reach_every_parameter(name):
    decoder = adapter(name).train()
    model = SimpleNamespace(decoder=decoder, encoder=None)
    tokens = torch.tensor(prompts((6, 6), seed=3))
    given = {**batch(name, prompts((5, 8))), "tokens": tokens} if name == "bart" else {"tokens": tokens}
    objective = Seq2SeqTokens() if name == "bart" else NextToken()
    sum(objective(model, given).values()).backward()
    unreached = [n for n, p in decoder.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()]
    assert unreached == []


def test_another_encoder_may_read_the_source():
    config = {**CONFIGS["bart"], "eos_token_id": EOS}
    encoder, decoder = TextEncoder(width=24, depth=1, heads=2, lm_head=False), HFSeq2Seq(config=config)
    spec = Spec({"vocab_size": VOCAB, "length": 16, "bos": 1, "eos": EOS, "pad": 0})
    model = Model(encoder, decoder, Seq2SeqTokens(), Greedy(max_new_tokens=4), spec=dict(spec))
    model.configure_model()
    given = {**batch("bart", prompts((5, 8))), "tokens": torch.tensor(prompts((6, 6), seed=3))}
    sum(model.objective(model, given).values()).backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None for p in trained)
    assert not any(p.requires_grad for p in decoder.module.get_encoder().layers.parameters())
    assert len(new_tokens(model.eval().sampler(model, given))) == 2


# ---- where a model comes from
def test_a_folder_of_weights_decodes_and_a_checkpoint_needs_it_no_more(tmp_path):
    source = toy("llama").decoder.module
    source.save_pretrained(tmp_path / "hf")
    model = Model(decoder=HFCausal(str(tmp_path / "hf")), sampler=Greedy(max_new_tokens=32), spec={"vocab_size": VOCAB})
    model.configure_model()
    assert new_tokens(model.eval().sampler(model, batch("llama", prompts()))) == reference("llama")
    export(model, tmp_path / "quire")
    shutil.rmtree(tmp_path / "hf")
    again = load(tmp_path / "quire")
    assert again.decoder.caps() == model.decoder.caps()
    assert new_tokens(again.sampler(again, batch("llama", prompts()))) == reference("llama")


def test_a_wrapped_module_is_recorded_by_its_config(tmp_path):
    model = Model(decoder=HFCausal.of(toy("gpt2").decoder.module), sampler=Greedy(max_new_tokens=32))
    model.configure_model()
    export(model, tmp_path)
    again = load(tmp_path)
    assert new_tokens(again.sampler(again, batch("gpt2", prompts()))) == reference("gpt2")


def test_a_fresh_config_takes_sizes_and_ids_from_the_data():
    spec = Spec({"vocab_size": 77, "length": 32, "pad": 0, "bos": 5, "eos": 6})
    causal = HFCausal(config=CONFIGS["gpt2"])
    seq2seq = HFSeq2Seq(config={k: v for k, v in CONFIGS["bart"].items() if k != "decoder_start_token_id"})
    for model in (causal, seq2seq):
        build(model, spec)
        caps = model.eval().caps()
        assert (caps.vocab_size, caps.eos_ids, caps.pad_id, caps.start_id) == (77, (6,), 0, 5)


# ---- bad input
@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: HFCausal(), "HFCausal needs name (a folder or hub name) or config"),
        (lambda: HFCausal("x", {"model_type": "llama"}), "HFCausal needs name (a folder or hub name) or config"),
        (lambda: HFCausal("/no/such/folder"), "nothing to load at /no/such/folder"),
        (lambda: HFCausal(config={}, dtype="int8"), "HFCausal.dtype is float32, bfloat16 or float16, got 'int8'"),
        (lambda: HFCausal(config={}, cache="static"), "decoding needs a croppable cache; use full or sliding"),
        (lambda: Model(decoder=HFCausal(config={})), "HFCausal.config has no model_type: name one, like llama"),
        (lambda: Model(decoder=HFCausal(config={"model_type": "lama"})), "did you mean llama?"),
        (
            lambda: Model(decoder=HFCausal(config={"model_type": "llama", "hiden_size": 8})),
            "HFCausal.config has hiden_size, which llama does not know; did you mean hidden_size?",
        ),
        (lambda: Model(decoder=HFCausal(config={"model_type": "t5"})), "HFCausal does not take t5: use HFSeq2Seq"),
        (lambda: Model(decoder=HFSeq2Seq(config={"model_type": "gpt2"})), "HFSeq2Seq does not take gpt2: use HFCausal"),
        (lambda: Model(decoder=HFCausal(config={"model_type": "vit"})), "no such language model of type vit"),
        (
            lambda: build(HFCausal(config=CONFIGS["bloom"]), Spec(vocab_size=9)),
            "HFCausal.attn_implementation=sdpa: BloomForCausalLM has none of that kind, try eager",
        ),
        (
            lambda: build(
                HFCausal(
                    config={"model_type": "mamba", "hidden_size": 8, "num_hidden_layers": 1},
                    attn_implementation="eager",
                ),
                Spec(vocab_size=9),
            ),
            "HFCausal needs a croppable cache; mamba has LinearAttentionLayer layers",
        ),
        (
            lambda: build(HFCausal(config={**CONFIGS["gpt2"], "vocab_size": 60}), Spec(vocab_size=90)),
            "HFCausal has 60 tokens, the data's tokenizer has 90",
        ),
        (
            lambda: build(HFCausal(config=CONFIGS["gpt2"]), Spec(vocab_size=90, length=128)),
            "HFCausal takes 64 positions, the data has length=128: shorten it",
        ),
    ],
)
def test_a_wrong_model_is_refused_in_a_sentence(make, said):
    with pytest.raises(ConfigError) as error:
        make()
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_wrong_batches_are_refused_in_a_sentence():
    long = {"tokens": torch.full((1, 64), 5)}
    with pytest.raises(ConfigError, match="prompt 0 has 64 tokens; the model takes 64"):
        Greedy()(toy("gpt2"), long)
    with pytest.raises(ConfigError, match="prompt 1 has no real tokens"):
        toy("gpt2").decoder.open(torch.ones(2, 3, dtype=torch.long), torch.tensor([[True] * 3, [False] * 3]))
    with pytest.raises(ConfigError, match="HFSeq2Seq needs a source: the batch has no field source"):
        Greedy()(toy("bart"), batch("llama", prompts()))
    with pytest.raises(ConfigError, match="source 0 has 70 tokens; the model takes 64"):
        Greedy()(toy("bart"), {"source": torch.full((1, 70), 5)})
    with pytest.raises(ConfigError, match="source 1 has no real tokens"):
        toy("t5").decoder.encode({"source": torch.ones(2, 3), "source_mask": torch.tensor([[True] * 3, [False] * 3])})
    with pytest.raises(ConfigError, match="prompts of different lengths: bloom takes no positions"):
        toy("bloom").decoder.open(*batch("llama", prompts()).values())


def test_a_tree_on_a_model_without_masks_is_refused_in_a_sentence():
    class Fork(Drafter):
        def propose(self, row, context, budget):
            return Draft([4, 5], [-1, -1])

    with pytest.raises(ConfigError, match="Speculative with Fork needs tree_mask; bloom takes no positions of our own"):
        Speculative(Fork())(toy("bloom"), batch("bloom", prompts()))
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register("maskless", sdpa_attention_forward)  # stands for flash_attention_2
    AttentionMaskInterface.register("maskless", sdpa_mask)
    module = copy.deepcopy(toy("llama").decoder.module)
    module.set_attn_implementation("maskless")
    model = SimpleNamespace(decoder=HFCausal.of(module), encoder=None)
    why = "HFCausal with maskless takes no 4-D mask: use attn_implementation=sdpa or a chain drafter"
    with pytest.raises(ConfigError, match=f"^Speculative with Fork needs tree_mask; {why}$"):
        Speculative(Fork())(model, batch("llama", prompts()))
    chains = Speculative(PromptCopy(), max_new_tokens=32)(model, batch("llama", prompts()))
    assert new_tokens(chains) == reference("llama") and chains.stats.rows_looped == 5
