"""Objectives, metrics, the monitor and the model's refusals."""

import json

import pytest
import torch
from lightning.pytorch import Trainer

from quire.contracts import Losses, Spec
from quire.datasets.algorithmic import Algorithmic
from quire.errors import ConfigError
from quire.model import Model
from quire.recipe import instantiate
from quire.roles.language.contract import Generated
from quire.roles.language.loop import Greedy
from quire.roles.language.next_token import Seq2SeqTokens
from quire.roles.language.stats import Stats
from quire_universal.decoder import UniversalDecoder
from quire_universal.encoder import UniversalEncoder
from quire_universal.halting import ACT, Ponder
from quire_universal.metrics import CharAccuracy, PonderTime, SequenceAccuracy
from quire_universal.monitor import PonderMonitor
from quire_universal.objective import UniversalLM, UniversalSeq2Seq

SPEC = {"vocab_size": 20, "length": 12, "bos": 1, "eos": 2, "pad": 0}
SMALL = {"width": 16, "heads": 2, "ffn": 32, "steps": 3, "dropout": 0.0}


def model(halting=None, objective=None, spec=SPEC, **parts):
    torch.manual_seed(0)
    make = (lambda: ACT(max_steps=4, bias=-0.5)) if halting else (lambda: None)
    made = Model(
        encoder=UniversalEncoder(**SMALL, halting=make()),
        decoder=UniversalDecoder(**SMALL, halting=make()),
        objective=objective or UniversalSeq2Seq(),
        spec=spec,
        **parts,
    )
    if spec:
        made.configure_model()
    return made


def batch():
    source, tokens = torch.randint(5, 15, (3, 6)), torch.randint(5, 15, (3, 5))
    tokens[:, 0] = 1
    return {
        "source": source,
        "source_mask": torch.arange(6) < torch.tensor([[6], [3], [4]]),
        "tokens": tokens,
        "mask": torch.arange(5) < torch.tensor([[5], [4], [3]]),
    }


def test_the_ponder_term_is_the_mean_over_real_positions_of_each_side():
    made = model(halting=True).eval()
    given = batch()
    losses = made.objective(made, given)
    codes = made.encoder(given)
    real = given["source_mask"]
    assert float(losses["ponder_encoder"]) == pytest.approx(float(codes.ponder[real].mean()), abs=1e-5)
    assert set(losses) == {"seq2seq", "ponder_encoder", "ponder_decoder"}
    assert made.objective.weights == {"ponder_encoder": 0.01, "ponder_decoder": 0.01}
    noisy = {**given, "source": given["source"].masked_fill(~real, 7)}
    assert float(made.objective(made, noisy)["ponder_encoder"]) == pytest.approx(float(losses["ponder_encoder"]))


def test_steps_have_no_gradient_and_the_cost_is_steps_plus_remainder():
    made = model(halting=True)
    codes = made.encoder(batch())
    assert not codes.steps.requires_grad and codes.ponder.requires_grad
    remainder = (codes.ponder - codes.steps)[batch()["source_mask"]]
    assert (remainder >= 0).all() and (remainder <= 1.0001).all()


def test_without_halting_there_is_no_ponder_term():
    made = model()
    assert set(made.objective(made, batch())) == {"seq2seq"}


def test_a_language_model_scores_behind_its_prompt():
    made = Model(decoder=UniversalDecoder(**SMALL, halting=ACT(max_steps=3)), objective=UniversalLM(), spec=SPEC)
    made.configure_model()
    given = batch()
    rows = {"tokens": given["tokens"], "mask": given["mask"], "prompt_length": torch.tensor([2, 2, 2])}
    losses = made.objective(made, rows)
    assert set(losses) == {"next", "ponder_decoder"} and int(losses.outputs["counts"].sum()) == 3 + 2 + 1


def test_pairs_that_can_not_work_are_refused():
    with pytest.raises(
        ConfigError, match="Seq2SeqTokens reads a source for UniversalDecoder, but model.encoder is null"
    ):
        Model(decoder=UniversalDecoder(**SMALL), objective=Seq2SeqTokens())
    with pytest.raises(ConfigError, match="UniversalSeq2Seq reads a source for UniversalDecoder"):
        Model(decoder=UniversalDecoder(**SMALL), objective=UniversalSeq2Seq())
    for cls in (UniversalSeq2Seq, UniversalLM):
        with pytest.raises(ConfigError, match="ponder must be at least 0"):
            cls(ponder=-0.1)
        with pytest.raises(ConfigError, match="smoothing must be in"):
            cls(smoothing=1.0)


def generated(rows):
    return Generated(
        list(range(len(rows))),
        [[r] for r in rows],
        [],
        [["eos"]] * len(rows),
        Stats(layers_used=9.0, target_forwards=4),
    )


def test_accuracies_count_characters_and_whole_answers():
    given = {"source": torch.zeros(3, 1), "tokens": torch.tensor([[1, 5, 6, 7, 2], [1, 5, 6, 2, 0], [1, 8, 2, 0, 0]])}
    given["mask"] = torch.tensor([[True] * 5, [True] * 4 + [False], [True] * 3 + [False] * 2])
    said = generated([[5, 9, 7, 2], [5, 6, 2], [8, 8]])
    chars, whole, time = CharAccuracy(), SequenceAccuracy(), PonderTime()
    for metric in (chars, whole, time):
        metric.build(Spec(SPEC))
        metric.sampled(None, given, said)
    assert float(chars.compute()) == pytest.approx((2 + 2 + 1) / (3 + 2 + 2))
    assert float(whole.compute()) == pytest.approx(1 / 3) and float(time.compute()) == pytest.approx(9 / 4)
    with pytest.raises(ConfigError, match="sampler of tokens"):
        chars.sampled(None, given, {"image": 1})
    with pytest.raises(ConfigError, match="sampler of tokens"):
        time.sampled(None, given, None)


def test_metrics_share_one_run_of_the_sampler():
    made = model(sampler=Greedy(max_new_tokens=4), metrics=[CharAccuracy(), SequenceAccuracy()])
    calls = []
    made.sampler.register_forward_hook(lambda *a: calls.append(1))
    losses = Losses({})
    for metric in made.metrics:
        metric.observe(made, batch(), losses)
    assert len(calls) == 1


def test_monitor_tells_steps_by_task_length_and_token(tmp_path):
    data = Algorithmic("reverse", 3, 3, 64, batch_size=16)
    made = model(halting=True, spec=dict(data.spec))
    monitor = PonderMonitor(path=str(tmp_path / "p.json"))
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        callbacks=[monitor],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=str(tmp_path),
    )
    trainer.fit(made, datamodule=data)
    table = json.loads((tmp_path / "p.json").read_text())
    assert set(table) == {"encoder", "decoder"} and set(table["encoder"]) == {"task", "length", "token"}
    assert set(table["encoder"]["length"]) == {"1", "2", "3"}
    codes = made.eval().encoder(next(iter(data.val_dataloader())))
    every = table["encoder"]["length"].values()
    mean = sum(v["steps"] * v["positions"] for v in every) / sum(v["positions"] for v in every)
    assert mean == pytest.approx(float(Ponder(codes.ponder, codes.steps, codes.mask).mean(codes.steps)), abs=1e-5)
    for bad in ({"batches": 0}, {"by": ["colour"]}):
        with pytest.raises(ConfigError, match="PonderMonitor"):
            PonderMonitor(**bad)
    with pytest.raises(ConfigError, match="needs a halting part, such as ACT"):
        PonderMonitor().setup(None, model(), "fit")


def test_everything_rebuilds_from_plain_values():
    from quire.contracts import plain

    made = UniversalDecoder(**SMALL, halting=ACT(max_steps=4, mode="basic"))
    again = instantiate(plain(made))
    assert again.halting.mode == "basic" and again.steps == 4


def test_compiling_runs_all_steps_masked_with_the_same_result(monkeypatch):
    made = model(halting=True).eval()
    given = batch()
    want = made.encoder(given)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    got = made.encoder(given)
    assert torch.allclose(want.values, got.values, atol=1e-6) and torch.equal(want.steps, got.steps)
