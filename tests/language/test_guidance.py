from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tests.language import hf_toys
from tests.language.toys import VOCAB, batch, language_model, prompts

from quire import ConfigError, Model
from quire.contracts import Spec, build
from quire.roles.language.guidance import ClassCodes
from quire.roles.language.loop import Greedy, Sample
from quire.roles.language.models import CausalLM, Seq2SeqDecoder
from quire.roles.language.next_token import NextToken

CLASSES = 4


def class_model(**arguments):
    """A model with four classes and a null class, weights large."""
    torch.manual_seed(0)
    decoder = CausalLM(width=32, depth=2, heads=4, prefix_classes=CLASSES, **arguments)
    build(decoder, Spec(vocab_size=VOCAB, length=64, bos=1))
    with torch.no_grad():
        for parameter in decoder.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
    return SimpleNamespace(decoder=decoder.eval(), encoder=None)


def labelled(rows, labels, side="right"):
    return {**batch(rows, side), "label": torch.tensor(labels)}


def guided(model, prompt, label, cfg, count, interval=(0, 10**9)):
    """Guided greedy continuation by whole passes, no cache."""
    new = []
    with torch.no_grad():
        for number in range(count):
            ids = torch.tensor([prompt + new])
            c = model.decoder(None, ids, label=torch.tensor([label]))[0, -1]
            u = model.decoder(None, ids, label=torch.tensor([CLASSES]))[0, -1]
            inside = interval[0] <= number < interval[1]
            new.append(int((u + cfg * (c - u) if inside else c).argmax()))
    return new


def likeliest(**arguments):
    return Sample(top_k=1, max_new_tokens=8, **arguments)


def ids(result):
    return [row[0] for row in result.tokens]


@pytest.mark.parametrize("cfg", [0.0, 0.5, 2.0, 4.0])
def test_guided_logits_are_u_plus_cfg_times_c_minus_u(cfg):
    model, rows, labels = class_model(), prompts((1, 4, 6)), [0, 2, 3]
    want = [guided(model, p, y, cfg, 8) for p, y in zip(rows, labels)]
    for side in ("left", "right"):
        assert ids(likeliest(cfg=cfg)(model, labelled(rows, labels, side))) == want
    assert want != [guided(model, p, y, 1.0, 8) for p, y in zip(rows, labels)]


@pytest.mark.parametrize("interval", [[0, 3], [2, 5], [5, 8], [7, 100], [8, 9]])
def test_an_interval_guides_these_tokens_only_and_costs_passes_only_there(interval):
    model, rows, labels = class_model(), prompts((3, 5)), [1, 2]
    result = likeliest(cfg=3.0, cfg_interval=interval)(model, labelled(rows, labels))
    assert ids(result) == [guided(model, p, y, 3.0, 8, interval) for p, y in zip(rows, labels)]
    both = len([n for n in range(1, 8) if interval[0] <= n < interval[1]])  # token 0 comes from the prompt
    assert result.stats.target_forwards == 7 + both


def test_a_scale_of_one_runs_one_pass_and_equals_the_conditional_model():
    model, rows, labels = class_model(), prompts((3, 5)), [1, 2]
    one, two = (Sample(cfg=c, max_new_tokens=8, seed=3)(model, labelled(rows, labels)) for c in (1.0, 2.0))
    assert (one.stats.target_forwards, two.stats.target_forwards) == (7, 14)
    assert two.stats.target_positions == 2 * one.stats.target_positions
    assert ids(one) == ids(Sample(max_new_tokens=8, seed=3)(model, labelled(rows, labels)))
    assert ids(Greedy(8)(model, labelled(rows, labels))) == [guided(model, p, y, 1.0, 8) for p, y in zip(rows, labels)]


def test_rows_end_alone_under_guidance():
    model = class_model()
    rows, labels = prompts((2, 3, 4, 5)), [0, 1, 2, 3]
    end = guided(model, rows[1], 1, 2.0, 8)[3]
    model.decoder._caps = replace(model.decoder.caps(), eos_ids=(end,))
    result = likeliest(cfg=2.0)(model, labelled(rows, labels))
    for prompt, label, new in zip(rows, labels, ids(result)):
        assert new == guided(model, prompt, label, 2.0, len(new))
    assert result.finish[1] == ["eos"]


@pytest.mark.parametrize("shape", ["gpt2", "llama", "own"])
def test_a_prompt_of_its_own_can_stand_for_no_condition(shape):
    model = language_model(eos=None) if shape == "own" else hf_toys.toy(shape, eos=None)
    rows, blank = prompts((3, 6)), [9, 5]

    def logits(given):
        if shape == "own":
            return model.decoder(None, torch.tensor([given]))[0, -1]
        return model.decoder.open(torch.tensor([given])).logits[0]

    want = []
    with torch.no_grad():
        for prompt in rows:
            new = []
            for _ in range(8):
                c, u = logits(prompt + new), logits(blank + new)
                new.append(int((u + 2 * (c - u)).argmax()))
            want.append(new)
    assert ids(likeliest(cfg=2.0, unconditional=blank)(model, batch(rows))) == want


def test_a_step_equals_the_whole_pass_with_a_class():
    decoder = class_model().decoder
    tokens, label = torch.randint(4, VOCAB, (3, 9)), torch.tensor([0, 3, CLASSES])
    with torch.no_grad():
        whole = decoder(None, tokens, label=label)
        state = decoder.open(tokens[:, :5], codes=ClassCodes(label))
        torch.testing.assert_close(state.logits, whole[:, 4], atol=2e-5, rtol=1e-4)
        stepped = decoder.step(state, tokens[:, 5:])
        torch.testing.assert_close(stepped, whole[:, 5:], atol=2e-5, rtol=1e-4)
        null = decoder(None, tokens, label=torch.full((3,), CLASSES))
        assert torch.equal(decoder(None, tokens), null)  # nothing said is the null class
        torch.testing.assert_close(decoder.open(tokens).logits, null[:, -1], atol=2e-5, rtol=1e-4)


def test_the_number_of_classes_can_come_from_the_data():
    decoder = CausalLM(width=16, depth=1, heads=2, prefix_classes=True)
    build(decoder, Spec(vocab_size=VOCAB, classes=7))
    assert (decoder.prefix_classes, len(decoder.classes.weight)) == (7, 8)
    with pytest.raises(ConfigError, match=r"prefix_classes=7|classes"):
        build(CausalLM(width=16, depth=1, heads=2, prefix_classes=5), Spec(vocab_size=VOCAB, classes=7))


def test_dropped_classes_are_the_null_class():
    decoder = class_model().decoder
    objective = NextToken(class_dropout=0.5).train()
    model = SimpleNamespace(decoder=decoder, generator=lambda device: torch.Generator().manual_seed(0))
    label = torch.arange(CLASSES).repeat(250)
    found = objective._classes(decoder, label, model)
    gone = found == CLASSES
    assert 0.45 < gone.float().mean() < 0.55
    assert torch.equal(found[~gone], label[~gone])
    assert torch.equal(objective.eval()._classes(decoder, label, model), label)


def test_z_loss_is_the_mean_squared_log_partition_and_documents_keep_apart():
    model = language_model()
    tokens = torch.randint(4, VOCAB, (2, 9))
    batch_ = {"tokens": tokens, "doc": torch.tensor([[0] * 4 + [1] * 5] * 2)}
    losses = NextToken(z_loss=0.1, doc_mask=True)(model, batch_)
    logits = model.decoder(None, tokens[:, :-1], doc=batch_["doc"][:, :-1])
    assert float(losses["z"].detach()) == pytest.approx(float(logits.detach().logsumexp(-1).square().mean()), rel=1e-5)
    assert NextToken(z_loss=0.1).weights == {"z": 0.1}
    assert NextToken(doc_mask=True).reads("fit") == ("tokens", "doc")


@pytest.mark.parametrize(
    ("run", "said"),
    [
        (lambda: Sample(cfg=-1.0), "Sample.cfg must be a number of at least 0, got -1"),
        (lambda: Sample(cfg=float("nan")), "Sample.cfg must be a number of at least 0"),
        (lambda: Sample(cfg=2.0, cfg_interval=[3, 3]), r"cfg_interval is \[first, last\).*got \[3, 3\]"),
        (lambda: Sample(cfg=2.0, unconditional=[]), "unconditional must hold at least one id"),
        (
            lambda: Sample(cfg=2.0)(language_model(), batch(prompts((3,)))),
            "Sample.cfg needs a model with a null class: .*prefix_classes.*or give Sample.unconditional",
        ),
        (
            lambda: Sample(cfg=2.0, unconditional=[VOCAB])(language_model(), batch(prompts((3,)))),
            "Sample.unconditional holds id 50; the model has 50",
        ),
        (
            lambda: Greedy(2)(class_model(), labelled(prompts((3,)), [5])),
            "label 5 .* classes 0..3, and 4 for none",
        ),
        (lambda: Seq2SeqDecoder(prefix_classes=3), "Seq2SeqDecoder takes no prefix_classes"),
        (
            lambda: Model(decoder=CausalLM(width=16, depth=1, heads=2), objective=NextToken(class_dropout=0.1)),
            "NextToken.class_dropout needs a decoder with prefix_classes",
        ),
    ],
)
def test_what_guidance_lacks_is_named(run, said):
    with pytest.raises(ConfigError, match=said):
        run()
