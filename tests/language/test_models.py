from __future__ import annotations

import pytest
import torch
from tests.language.toys import SHAPES, VOCAB, language_model

from quire import ConfigError
from quire.contracts import Spec, build
from quire.roles.language.models import CausalLM, Seq2SeqDecoder
from quire.roles.language.rows import tree
from quire.roles.tokens.contract import Layout, Segment, Tokens


@pytest.mark.parametrize("shape", SHAPES)
def test_steps_equal_one_pass(shape):
    model = language_model(shape).decoder
    ids = torch.randint(4, VOCAB, (3, 17))
    with torch.no_grad():
        whole = model(None, ids)
        state = model.open(ids[:, :5])
        parts = [state.logits[:, None]]
        for start, width in ((5, 1), (6, 4), (10, 6)):
            parts.append(model.step(state, ids[:, start : start + width]))
            model.keep(state, torch.arange(width).expand(3, -1))
    torch.testing.assert_close(torch.cat(parts, 1), whole[:, 4:16], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_kept_subset_equals_a_fresh_start_on_the_same_ids(shape):
    model = language_model(shape).decoder
    prompt, draft = torch.randint(4, VOCAB, (1, 6)), torch.randint(4, VOCAB, (1, 5))
    parents = torch.tensor([[-1, 0, 0, 2, 1]])  # 0 → 2 → 3 is one path
    with torch.no_grad():
        state = model.open(prompt)
        tree_logits = model.step(state, draft, parents=parents)
        model.keep(state, torch.tensor([[0, 2, 3]]))
        after = model.step(state, torch.tensor([[9]]))
        path = torch.cat([prompt, draft[:, [0, 2, 3]], torch.tensor([[9]])], 1)
        whole = model(None, path)
    torch.testing.assert_close(tree_logits[0, [0, 2, 3]], whole[0, 6:9], atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(after[0, 0], whole[0, -1], atol=2e-5, rtol=1e-4)


def test_rows_are_selected_repeated_and_permuted():
    model = language_model().decoder
    ids = torch.randint(4, VOCAB, (3, 6))
    order = torch.tensor([2, 0, 0])
    with torch.no_grad():
        state = model.open(ids)
        plain = model.step(state, ids[:, :2])
        model.keep(state, torch.full((3, 1), -1))
        model.rows(state, order)
        again = model.step(state, ids[order, :2])
    torch.testing.assert_close(again, plain[order], atol=1e-5, rtol=0)  # with several threads sums are split by place


def test_a_cut_cache_forgets():
    model = language_model().decoder
    ids = torch.randint(4, VOCAB, (1, 8))
    with torch.no_grad():
        state = model.open(ids)
        model.cut(state, torch.tensor([5]))
        logits = model.step(state, torch.tensor([[7]]))[0, 0]
        fresh = model.open(torch.cat([ids[:, :5], torch.tensor([[7]])], 1)).logits[0]
    torch.testing.assert_close(logits, fresh, atol=2e-5, rtol=1e-4)


def test_embeddings_may_stand_for_ids():
    model = language_model().decoder
    ids = torch.randint(4, VOCAB, (2, 6))
    with torch.no_grad():
        a, b = model.open(ids), model.open(ids)
        by_id = model.step(a, ids[:, :3])
        by_embedding = model.step(b, None, embeds=model.embed(ids[:, :3]))
    assert torch.equal(by_id, by_embedding)


@pytest.mark.parametrize("shape", ["rope", "learned"])
def test_padding_changes_no_logit_and_the_future_changes_no_past(shape):
    model = language_model(shape).decoder
    ids = torch.randint(4, VOCAB, (1, 6))
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], 1)
    mask = torch.arange(9)[None] >= 3
    with torch.no_grad():
        torch.testing.assert_close(model(None, padded, mask)[:, 3:], model(None, ids), atol=2e-5, rtol=1e-4)
        changed = ids.clone()
        changed[0, 4] = (changed[0, 4] + 1) % VOCAB
        assert torch.equal(model(None, ids)[:, :4], model(None, changed)[:, :4])


def test_attention_can_stay_within_documents():
    model = language_model().decoder
    ids = torch.randint(4, VOCAB, (1, 8))
    doc = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1]])
    changed = ids.clone()
    changed[0, 1] = (changed[0, 1] + 1) % VOCAB
    with torch.no_grad():
        a, b = model(None, ids, doc=doc), model(None, changed, doc=doc)
    assert torch.equal(a[:, 4:], b[:, 4:])
    assert not torch.equal(a[:, 1:4], b[:, 1:4])


def test_the_head_is_the_embedding_when_tied():
    tied, loose = language_model().decoder, language_model("llama").decoder
    assert tied.head.weight is tied.token.weight
    assert loose.head.weight is not loose.token.weight


def test_swiglu_hidden_width_is_rounded_up_to_eight():
    assert CausalLM(width=64, mlp="swiglu").ffn == 176  # 8/3 x 64 = 170.7
    assert CausalLM(width=64).ffn == 256


def test_a_class_embedding_takes_the_first_place():
    torch.manual_seed(0)
    model = CausalLM(width=16, depth=1, heads=2, prefix_classes=10)
    build(model, Spec(vocab_size=VOCAB))
    ids = torch.randint(4, VOCAB, (2, 5))
    a = model(None, ids, label=torch.tensor([1, 2]))
    changed = ids.clone()
    changed[:, 0] += 1
    assert torch.equal(a, model(None, changed, label=torch.tensor([1, 2])))
    assert not torch.equal(a, model(None, ids, label=torch.tensor([1, 10])))  # 10 is the null class


def test_cross_attention_reads_the_source_and_leaves_its_padding_out():
    torch.manual_seed(0)
    model = Seq2SeqDecoder(width=32, depth=2, heads=4)
    build(model, Spec(vocab_size=VOCAB, codes={"width": 24}))
    model.eval()
    layout = Layout((Segment("source", (6,), 1, "source"),))

    def codes(values, mask):
        return Tokens(values, torch.arange(6).expand(len(values), -1), layout, mask)

    values, ids = torch.randn(2, 6, 24), torch.randint(4, VOCAB, (2, 5))
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[:, 4:] = False
    noisy = values.clone()
    noisy[:, 4:] += 1
    with torch.no_grad():
        a, b = model(codes(values, mask), ids), model(codes(noisy, mask), ids)
        torch.testing.assert_close(a, b)
        state = model.open(ids[:, :2], codes=codes(values, mask))
        source = state.extras["source"]
        kept = {k: v[0].data_ptr() for k, v in source.made.items()}
        stepped = model.step(state, ids[:, 2:4])
        assert {k: v[0].data_ptr() for k, v in source.made.items()} == kept  # made once, never touched
    torch.testing.assert_close(stepped, a[:, 2:4], atol=2e-5, rtol=1e-4)
    with pytest.raises(ConfigError, match="needs an encoder that gives tokens"):
        model(None, ids)


def test_a_tree_says_depths_and_ancestors():
    depths, seen = tree([[-1, 0, 0, 2]], torch.device("cpu"))
    assert depths.tolist() == [[0, 1, 1, 2]]
    assert seen[0].int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 1, 1]]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"width": 30, "heads": 4}, "width divisible by heads"),
        ({"width": 12, "heads": 4}, "even number each with rope"),
        ({"norm": "batch"}, "norm is layer or rms"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\)"),
        ({"window": 0}, "window must be at least 1"),
    ],
)
def test_impossible_sizes_are_named(arguments, said):
    with pytest.raises(ConfigError, match=said):
        CausalLM(**arguments)


def test_prompts_that_cannot_be_read_are_named():
    model = language_model("learned").decoder
    with pytest.raises(ConfigError, match="prompt 0 has 70 tokens; the model takes 64"):
        model.open(torch.ones(1, 70, dtype=torch.long))
    with pytest.raises(ConfigError, match="prompt 1 has no real tokens"):
        model.open(torch.ones(2, 3, dtype=torch.long), torch.tensor([[True] * 3, [False] * 3]))
    with pytest.raises(ConfigError, match=r"shallow by layers=1..2"):
        model.shallow(layers=3)
