from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from tests.core.toys import Ascend, Duel, Guess, Line, Picky, Rebuild, Toy, Wide

import quire
from quire import ConfigError, DataError, Fields, Losses, Model, Objective, Sum
from quire.schedule import Constant, WarmupCosine


def trainer(tmp_path, **kwargs):
    options = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return pl.Trainer(
        default_root_dir=tmp_path, **{**options, "enable_model_summary": False, "max_epochs": 1, **kwargs}
    )


def fitted(tmp_path, model, data=None, **kwargs):
    run = trainer(tmp_path, **kwargs)
    run.fit(model, datamodule=data or Toy())
    return run


def test_terms_are_summed_with_their_weights(tmp_path):
    model = Model(encoder=Line(), objective=Guess(weight=3.0))
    run = fitted(tmp_path, model, log_every_n_steps=1, max_steps=1)
    seen = run.callback_metrics
    assert seen["train/loss"] == pytest.approx(3.0 * seen["train/guess"].item(), rel=1e-6)
    assert 0 <= seen["train/accuracy"] <= 1


def test_a_loss_that_no_trained_part_moves_is_refused(tmp_path):
    class Still(Objective):
        """A loss of frozen codes beside a layer that could learn."""

        def build(self, spec):
            super().build(spec)
            self.spare = torch.nn.Linear(2, 2)

        def forward(self, model, batch):
            return Losses({"size": model.encoder(batch).detach().square().mean()})

    with pytest.raises(ConfigError, match="Still: all that its loss depends on is frozen"):
        fitted(tmp_path, Model(encoder=Line(), objective=Still()), max_steps=1)


def test_logged_training_terms_are_means_since_the_last_log(tmp_path):
    losses = []

    class Spy(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            losses.append(outputs["loss"].item())

    run = fitted(
        tmp_path, Model(encoder=Line(), objective=Guess()), log_every_n_steps=4, callbacks=[Spy()], max_steps=4
    )
    assert run.callback_metrics["train/loss"].item() == pytest.approx(sum(losses) / 4, rel=1e-5)


def test_sum_of_two_objectives_trains_both_heads_and_names_every_term(tmp_path):
    both = Sum([Guess(term="a"), Guess(term="a", weight=0.5)], weights=[1.0, 2.0])
    model = Model(encoder=Line(), objective=both, schedule=Constant())
    model.spec = quire.Spec(Toy().spec)
    model.configure_model()
    before = [o.head.weight.clone() for o in both.members]
    run = fitted(tmp_path, model, log_every_n_steps=1, max_steps=2)
    assert {"train/a", "train/Guess.a"} <= set(run.callback_metrics)
    assert both.weights == {"a": 1.0, "Guess.a": 1.0}
    assert all(not torch.equal(b, o.head.weight) for b, o in zip(before, both.members))


def test_sum_has_a_role_only_if_exactly_one_member_has_it():
    assert isinstance(Sum([Guess(), Duel()]).role(Duel), Duel)
    assert Sum([Guess(), Guess()]).role(Guess) is None


def test_sum_refuses_two_objectives_with_players_and_a_wrong_number_of_weights():
    with pytest.raises(ConfigError, match="several players"):
        Sum([Duel(), Duel()])
    with pytest.raises(ConfigError, match="2 objectives and 1 weights"):
        Sum([Guess(), Guess()], weights=[1.0])


def test_each_player_moves_only_its_own_parameters_and_the_first_alone_counts_steps(tmp_path):
    model = Model(encoder=Line(), decoder=Rebuild(), objective=Duel(), schedule=Constant())
    steps = []

    class Spy(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            steps.append(trainer.global_step)

    run = fitted(tmp_path, model, max_epochs=-1, max_steps=3, callbacks=[Spy()], log_every_n_steps=1)
    assert steps == [1, 2, 3]
    assert {"train/rebuild", "train/fool", "train/critic"} <= set(run.callback_metrics)
    critic, maker = run.optimizers[1], run.optimizers[0]
    ids = [{id(p) for g in o.param_groups for p in g["params"]} for o in (maker, critic)]
    assert not ids[0] & ids[1]
    assert ids[1] == {id(p) for p in model.objective.judge.parameters()}


def test_sum_lets_a_plain_objective_join_the_first_player(tmp_path):
    model = Model(encoder=Line(), decoder=Rebuild(), objective=Sum([Duel(), Guess()]), schedule=Constant())
    model.spec = quire.Spec(Toy().spec)
    model.configure_model()
    before = model.objective.members[1].head.weight.clone()
    run = fitted(tmp_path, model, max_steps=2, log_every_n_steps=1)
    assert "train/guess" in run.callback_metrics
    assert not torch.equal(before, model.objective.members[1].head.weight)


def test_norms_and_biases_have_no_weight_decay(tmp_path):
    model = Model(encoder=Line(), objective=Guess())
    run = fitted(tmp_path, model, max_steps=1)
    decay = {id(p): g["weight_decay"] for g in run.optimizers[0].param_groups for p in g["params"]}
    assert {n: decay[id(p)] for n, p in model.named_parameters() if p.ndim > 1 and decay[id(p)] == 0} == {}
    assert all(decay[id(p)] == 0 for p in model.parameters() if p.ndim <= 1)


def test_another_optimizer_takes_its_own_defaults(tmp_path):
    run = fitted(tmp_path, Model(encoder=Line(), objective=Guess(), optimizer=torch.optim.Adam), max_steps=1)
    assert [g["weight_decay"] for g in run.optimizers[0].param_groups] == [0, 0]
    assert type(run.optimizers[0]) is torch.optim.Adam


def test_warmup_rises_linearly_then_falls_as_a_cosine_to_the_floor():
    curve = WarmupCosine(warmup=10, floor=0.1)
    rise = [curve.factor(s, 110) for s in range(10)]
    assert rise == pytest.approx([(s + 1) / 11 for s in range(10)])
    assert curve.factor(10, 110) == pytest.approx(1.0)
    assert curve.factor(60, 110) == pytest.approx(0.55)  # half way of the cosine: (1 + 0.1) / 2
    assert curve.factor(110, 110) == pytest.approx(0.1)
    assert curve.factor(500, float("inf")) == 1.0
    with pytest.raises(ConfigError, match="warmup"):
        WarmupCosine(warmup=-1)


def test_a_part_without_the_role_is_refused_before_anything_is_built():
    with pytest.raises(ConfigError, match=r"Picky needs a Wide; model.encoder is Line \(tests\)"):
        Model(encoder=Line(), objective=Picky())
    with pytest.raises(ConfigError, match="Guess needs a Encoder; model.encoder is not set"):
        Model(objective=Guess())
    Model(encoder=Wide(), objective=Picky())


def test_a_missing_capability_is_named():
    class Narrow(Wide):
        capabilities = frozenset()

        def lacks(self, capability):
            return "is too narrow"

    with pytest.raises(ConfigError, match="Picky needs 'wide'; Narrow is too narrow"):
        Model(encoder=Narrow(), objective=Picky())


def test_a_field_that_the_data_does_not_offer_is_named(tmp_path):
    class Bare(Toy):
        fields = ("vector",)

    with pytest.raises(ConfigError, match="Guess reads the field label; Bare offers vector"):
        fitted(tmp_path, Model(encoder=Line(), objective=Guess()), Bare())


def test_a_size_the_data_does_not_say_is_named(tmp_path):
    class Silent(Toy):
        def sizes(self):
            return {"width": 8}

    with pytest.raises(ConfigError, match="Guess needs 'classes' from the data's spec, which says width=8"):
        fitted(tmp_path, Model(encoder=Line(), objective=Guess()), Silent())


@pytest.mark.parametrize(
    ("stage", "said"), [("fit", "fit needs model.objective"), ("predict", "predict needs model.sampler")]
)
def test_a_stage_without_what_it_needs_is_refused(tmp_path, stage, said):
    model = Model(encoder=Line()) if stage == "fit" else Model(decoder=None)
    with pytest.raises(ConfigError, match=said):
        getattr(trainer(tmp_path), stage)(model, datamodule=Toy())


def test_nan_in_a_later_batch_is_traced_to_field_and_sample(tmp_path):
    class Bad(Toy):
        def split(self, name):
            data = super().split(name)
            data.tensors["vector"][17, 3] = float("nan")
            return data

    with pytest.raises(DataError, match=r"vector of sample \d+ \(index 17\) is not finite"):
        fitted(tmp_path, Model(encoder=Line(), objective=Guess()), Bad(batch_size=16), num_sanity_val_steps=0)


def test_a_diverging_loss_names_the_term(tmp_path):
    model = Model(encoder=Line(), objective=Guess(weight=float("inf")))
    with pytest.raises(DataError, match="not finite at step 0: lower the learning rate"):
        fitted(tmp_path, model, num_sanity_val_steps=0)


def test_probing_between_steps_never_changes_training(tmp_path):
    class Noisy(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            torch.rand(1 + batch_idx)

    weights = []
    for callbacks in ([], [Noisy()]):
        pl.seed_everything(3)
        model = Model(encoder=Line(), objective=Guess())
        fitted(tmp_path, model, callbacks=callbacks, max_epochs=2)
        weights.append(model.encoder.linear.weight.detach().clone())
    assert torch.equal(*weights)


def test_another_seed_gives_another_run(tmp_path):
    weights = []
    for seed in (1, 2):
        pl.seed_everything(seed)
        model = Model(encoder=Line(), objective=Guess())
        fitted(tmp_path, model)
        weights.append(model.encoder.linear.weight.detach().clone())
    assert not torch.equal(*weights)


def test_validation_draws_are_the_same_in_every_epoch():
    model = Model(encoder=Line(), objective=Guess())
    model._rekey("val", 0, 3)
    first = torch.rand(2, generator=model.generator("cpu"))
    model._rekey("train", 5, 3)
    other = torch.rand(2, generator=model.generator("cpu"))
    model._rekey("val", 0, 3)
    assert torch.equal(first, torch.rand(2, generator=model.generator("cpu")))
    assert not torch.equal(first, other)


def test_a_sampler_that_differentiates_works_in_predict(tmp_path):
    rows = trainer(tmp_path).predict(Model(encoder=Line(), sampler=Ascend()), datamodule=Toy(batch_size=32))
    assert [len(r) for r in rows] == [32, 18]
    assert all(row["slope"] > 0 for batch in rows for row in batch)


def test_predict_without_a_sampler_gives_codes(tmp_path):
    codes = trainer(tmp_path).predict(Model(encoder=Line()), datamodule=Toy(batch_size=50))
    assert codes[0].shape == (50, 4)


def test_ema_through_lightnings_own_weight_averaging(tmp_path):
    pl.seed_everything(0)
    plain = Model(encoder=Line(), objective=Guess())
    fitted(tmp_path, plain, max_epochs=2)
    pl.seed_everything(0)
    averaged = Model(encoder=Line(), objective=Guess())
    fitted(tmp_path, averaged, max_epochs=2, callbacks=[EMAWeightAveraging(decay=0.5)])
    gap = (plain.encoder.linear.weight - averaged.encoder.linear.weight).abs().max()
    assert 0 < gap < 0.1


def test_two_parts_of_one_size_must_agree():
    spec = quire.Spec(image_size=28)
    assert spec.agree("image_size", None, Line()) == 28
    with pytest.raises(ConfigError, match="Line has image_size=32, the data has image_size=28"):
        spec.agree("image_size", 32, Line())


def test_fields_of_one_split_must_be_equally_long():
    with pytest.raises(DataError, match="differ in length"):
        Fields(vector=torch.zeros(3, 2), label=torch.zeros(2))


def test_each_player_may_have_its_own_optimizer_and_schedule(tmp_path):
    makers = {"maker": torch.optim.Adam, "critic": torch.optim.SGD}
    model = Model(
        encoder=Line(),
        decoder=Rebuild(),
        objective=Duel(),
        optimizer={k: (lambda groups, cls=cls: cls(groups, lr=0.01)) for k, cls in makers.items()},
        schedule={"maker": Constant(), "critic": WarmupCosine(warmup=10)},
    )
    run = fitted(tmp_path, model, max_steps=1)
    assert [type(o) for o in run.optimizers] == [torch.optim.Adam, torch.optim.SGD]
    with pytest.raises(ConfigError, match=r"names the player judge.*the objective has maker, critic"):
        fitted(
            tmp_path, Model(encoder=Line(), decoder=Rebuild(), objective=Duel(), optimizer={"judge": torch.optim.SGD})
        )


@pytest.mark.parametrize("pieces", [1, 2])
def test_the_last_gradients_are_gone_before_the_next_forward_and_accumulated_ones_stay(tmp_path, pieces):
    held, stepped = [], []

    class Spy(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            held.append(any(p.grad is not None for p in pl_module.parameters()))

        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            stepped.append(all(p.grad is not None for p in pl_module.parameters()))

    model = Model(encoder=Line(), objective=Guess())
    fitted(tmp_path, model, callbacks=[Spy()], accumulate_grad_batches=pieces, limit_train_batches=4)
    assert held == [bool(i % pieces) for i in range(4)]
    assert stepped == [True] * (4 // pieces)


def test_callbacks_see_the_outputs_of_a_training_step(tmp_path):
    seen = []

    class Spy(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            seen.append(outputs["outputs"]["logits"].shape)

    fitted(tmp_path, Model(encoder=Line(), objective=Guess()), callbacks=[Spy()], max_steps=1)
    assert seen == [(64, 2)]


def test_the_subject_belongs_to_the_data_and_never_to_the_checkpoint(tmp_path):
    class Studied(Toy):
        subject = torch.nn.Linear(2, 2)

    model = Model(encoder=Line(), objective=Guess())
    assert model.subject is None
    fitted(tmp_path, model, Studied(), max_steps=1)
    assert model.subject is Studied.subject
    assert not any("subject" in name for name in model.state_dict())


def test_predict_does_not_ask_for_the_objectives_fields(tmp_path):
    class Bare(Toy):
        fields = ("vector",)

    trainer(tmp_path).predict(Model(encoder=Line(), objective=Guess()), datamodule=Bare())


def test_predict_takes_a_checkpoint_trained_with_another_objective_and_no_sampler(tmp_path):
    run = fitted(tmp_path, Model(encoder=Line(), objective=Guess()), max_steps=1)
    run.save_checkpoint(tmp_path / "a.ckpt")
    for model in (Model(encoder=Line(), sampler=Ascend()), Model(encoder=Line())):
        trainer(tmp_path).predict(model, datamodule=Toy(), ckpt_path=tmp_path / "a.ckpt", weights_only=True)


def test_a_metric_of_samples_is_written_beside_the_predictions(tmp_path):
    import json

    from tests.core.toys import Steepness

    from quire.predictions import WritePredictions

    model = Model(encoder=Line(), sampler=Ascend(), metrics=[Steepness()])
    trainer(tmp_path, callbacks=[WritePredictions()]).predict(model, datamodule=Toy())
    (file,) = tmp_path.rglob("metrics.json")
    assert json.loads(file.read_text())["Steepness"] > 0
