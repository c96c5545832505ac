"""The drafter on models that are not ours: transformers causal and encoder-decoder models made from a config."""

import random
from types import SimpleNamespace

import pytest
import torch
from aded_toys import VOCAB, prompts

from quire.contracts import Spec, build
from quire.roles.language.drafters import DraftUnion, PromptCopy
from quire.roles.language.hf import HFCausal, HFSeq2Seq
from quire.roles.language.loop import Speculative
from quire.roles.language.proof import assert_lossless
from quire_aded.drafter import TrigramTree

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
BART = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 2, "decoder_start_token_id": 2}
HEADS = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
MODELS = {
    "gpt2": (HFCausal, {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "llama": (HFCausal, {"model_type": "llama", "num_key_value_heads": 2, **SIZES}),
    "bart": (HFSeq2Seq, {"model_type": "bart", "forced_eos_token_id": None, **BART, **HEADS}),
    "t5": (HFSeq2Seq, {"model_type": "t5", **T5}),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("union", [False, True])
def test_oracle_1_ids_equal_greedy_on_transformers_models_in_a_ragged_batch(name, union):
    adapter, config = MODELS[name]
    torch.manual_seed(0)
    decoder = adapter(config={**config, "vocab_size": VOCAB, "eos_token_id": 3, "bos_token_id": 1, "pad_token_id": 0})
    build(decoder, Spec())
    with torch.no_grad():
        for parameter in decoder.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
    drafter = TrigramTree(corpus=None, nodes=12, scope="shared")
    source = random.Random(0)
    drafter.learn([[source.randrange(VOCAB) for _ in range(400)]], VOCAB, "")
    joined = DraftUnion([PromptCopy(), drafter])
    sampler = Speculative(joined if union else drafter, max_new_tokens=24, debug=True)
    fields = {}
    if adapter is HFSeq2Seq:
        fields = {"source": torch.tensor([[5, 9, 7, 3]] * 5), "source_mask": torch.ones(5, 4, dtype=torch.bool)}
    assert_lossless(SimpleNamespace(decoder=decoder.eval(), encoder=None), sampler, prompts(), **fields)
