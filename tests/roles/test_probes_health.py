"""Health: geometry oracles, the second view, and the monitor in a run."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import yaml
from lightning.pytorch.loggers import CSVLogger
from tests.core.toys import Guess, Line, Toy

from quire import ConfigError, Encoder, Losses, Model, Objective, Sum
from quire.plugins import load
from quire.roles.latent import VectorCodes
from quire.roles.probes.geometry import Moments, agreement, alignment, effective_rank, uniformity
from quire.roles.probes.health import Health, _dead
from quire.roles.probes.perturb import perturb


def whitened(count, width):
    """Features whose covariance is the identity exactly."""
    x = torch.randn(count, width, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    x = x - x.mean(0)
    return torch.linalg.qr(x)[0] * math.sqrt(count)


@pytest.mark.parametrize("width", [1, 3, 16])
def test_effective_rank_of_an_identity_covariance_is_its_size(width):
    # oracle of role-tokens 6: effective rank of an identity covariance of size d = d
    assert effective_rank(whitened(200, width)) == pytest.approx(width, rel=1e-6)


def test_effective_rank_of_features_on_a_line_is_1_and_of_a_point_0():
    # oracle of role-tokens 6: of rank 1 = 1
    line = torch.randn(50, 1) @ torch.randn(1, 12) + 5
    assert effective_rank(line) == pytest.approx(1, abs=1e-3)
    assert effective_rank(torch.ones(50, 12)) == 0.0


def test_effective_rank_of_few_samples_in_many_dimensions_is_that_of_the_transpose():
    few = torch.randn(5, 40, dtype=torch.double)
    padded = torch.cat([few, few.mean(0).expand(60, -1)])  # more samples at the mean add no direction
    assert effective_rank(few) == pytest.approx(effective_rank(padded), rel=1e-6)


def test_effective_rank_of_two_unequal_directions_is_exp_of_their_entropy():
    # singular values 3 and 1: shares 3/4 and 1/4, entropy 0.562335, exp 1.754765
    x = whitened(100, 2) * torch.tensor([3.0, 1.0])
    assert effective_rank(x) == pytest.approx(1.754765, rel=1e-5)


def test_alignment_is_0_for_equal_views_and_4_for_opposite_ones():
    x = torch.randn(10, 4)
    assert alignment(x, 3 * x) == pytest.approx(0, abs=1e-6)
    assert alignment(x, -x) == pytest.approx(4, rel=1e-5)


def test_uniformity_is_0_for_a_point_and_minus_4_for_orthogonal_pairs():
    assert uniformity(torch.ones(5, 3)) == pytest.approx(0, abs=1e-6)
    assert uniformity(torch.eye(4)) == pytest.approx(-4, rel=1e-6)  # d² = 2 for every pair


def test_neighbours_agree_wholly_for_the_same_view_and_by_chance_for_an_unrelated_one():
    x = torch.randn(400, 8, generator=torch.Generator().manual_seed(0))
    assert agreement(x, x) == 1.0
    assert agreement(x, torch.randn(400, 8, generator=torch.Generator().manual_seed(1))) < 0.03


def test_moments_of_pieces_are_those_of_the_whole():
    x = torch.randn(30, 4, dtype=torch.double) * 3 + 100
    both = Moments.of(x[:11]) + Moments.of(x[11:])
    assert torch.allclose(both.std, x.std(0, unbiased=False), rtol=1e-9)
    assert Moments.of(x.reshape(5, 6, 4)).count == 30


def test_dead_dimensions_are_those_that_never_change():
    x = torch.randn(100, 4)
    x[:, 0], x[:, 1] = 0.0, 5.0
    assert _dead(Moments.of(x)) == 0.5
    assert _dead(Moments.of(torch.zeros(10, 4))) == 1.0


def test_a_view_has_a_little_noise_and_stays_in_range():
    image = torch.rand(4, 1, 16, 16)
    batch = {"image": image, "label": torch.arange(4)}
    view = perturb(batch, 0.1, torch.Generator().manual_seed(0))
    gap = (view["image"] - image).std()
    assert 0.05 * image.std() < gap < 0.15 * image.std()
    assert view["image"].min() >= 0 and view["image"].max() <= 1
    assert view["label"] is batch["label"] and batch["image"] is image
    again = perturb(batch, 0.1, torch.Generator().manual_seed(0))
    assert torch.equal(view["image"], again["image"])


def test_a_view_of_words_replaces_a_share_of_real_words_by_others_of_the_batch():
    ids = torch.randint(10, 1000, (50, 40))
    ids[:, 0] = 1
    mask, special = torch.ones_like(ids, dtype=torch.bool), torch.zeros_like(ids, dtype=torch.bool)
    mask[:, 30:], special[:, 0] = False, True
    view = perturb({"tokens": ids, "mask": mask, "special": special}, 0.2, torch.Generator().manual_seed(0))["tokens"]
    changed = view != ids
    assert not changed[:, 30:].any() and not changed[:, 0].any()
    assert changed[:, 1:30].double().mean() == pytest.approx(0.2, abs=0.03)
    assert set(view.unique().tolist()) <= set(ids.unique().tolist())


def test_modalities_beside_or_without_an_image_are_changed_too():
    batch = {"depth": torch.randn(4, 1, 8, 8) * 7, "edges": torch.rand(4, 1, 8, 8), "semantic": torch.zeros(4, 8, 8)}
    view = perturb(batch, 0.1, torch.Generator().manual_seed(0))
    assert 0.3 < (view["depth"] - batch["depth"]).std() < 1.1 and not torch.equal(view["edges"], batch["edges"])
    assert view["edges"].min() >= 0 and view["semantic"] is batch["semantic"]


def test_a_batch_without_inputs_that_can_change_has_no_view():
    assert perturb({"label": torch.arange(3)}, 0.1, torch.Generator()) is None


# ---- in a run
class Named(Guess):
    """Guess with a target that Health watches and a chance level."""

    chance = {"accuracy": 0.5}

    def health_targets(self, model, batch):
        assert not torch.is_grad_enabled() and not model.training
        return {"goal": batch["vector"].unsqueeze(1) * 0.01}


class Flat(Encoder):
    """Collapsed: every sample has nearly the same code."""

    fields = ("vector",)

    def build(self, spec):
        self.linear = torch.nn.Linear(8, 4)

    def forward(self, batch):
        return VectorCodes(1 + 1e-3 * self.linear(batch["vector"]))

    def sizes(self):
        return {"width": 4}


class GuessVector(Guess):
    def forward(self, model, batch):
        logits = self.head(model.encoder(batch).vector)
        return Losses({"guess": torch.nn.functional.cross_entropy(logits, batch["label"])})


def run(tmp_path, health, encoder=None, objective=None, **kwargs):
    pl.seed_everything(0)
    model = Model(encoder=encoder or Line(), objective=objective or Guess())
    options = {"accelerator": "cpu", "enable_checkpointing": False, "enable_progress_bar": False, "max_epochs": 2}
    options |= {"logger": CSVLogger(tmp_path, name="h"), "enable_model_summary": False, "log_every_n_steps": 2}
    made = pl.Trainer(default_root_dir=tmp_path, callbacks=[health], **{**options, **kwargs})
    made.fit(model, datamodule=Toy(batch_size=32))
    return model, made


def test_every_number_is_logged_each_epoch_and_drawn_at_the_end(tmp_path, capsys):
    health = Health()
    _, made = run(tmp_path, health, objective=Named())
    names = {k.removeprefix("val/health/") for k in made.callback_metrics if k.startswith("val/health/")}
    assert names == {
        "effective_rank", "std", "std_pooled", "std_goal", "alignment", "uniformity", "neighbours", "dead",
        "gradient_norm", "accuracy_over_chance",
    }  # fmt: skip
    assert [row["epoch"] for row in health.rows] == [0, 1]
    folder = tmp_path / "h" / "version_0"
    assert (folder / "health.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((folder / "health.json").read_text()) == health.rows
    assert "health: " in capsys.readouterr().out


def test_a_pretext_metric_is_divided_by_its_chance_level(tmp_path):
    _, made = run(tmp_path, Health(), objective=Named())
    seen = made.callback_metrics
    assert seen["val/health/accuracy_over_chance"].item() == pytest.approx(seen["val/accuracy"].item() / 0.5)


def test_members_of_a_sum_are_asked_too(tmp_path):
    _, made = run(tmp_path, Health(), objective=Sum([Guess(term="a"), Named(term="b")]))
    assert {"val/health/std_goal", "val/health/accuracy_over_chance"} <= set(made.callback_metrics)


def test_the_target_spread_is_that_of_the_target(tmp_path):
    _, made = run(tmp_path, Health(), objective=Named())
    expected = 0.01 * Toy().dataset("val").tensors["vector"].std(0, unbiased=False).mean()
    assert made.callback_metrics["val/health/std_goal"].item() == pytest.approx(expected.item(), rel=1e-4)


def test_gradient_norm_is_the_mean_of_the_steps_seen(tmp_path):
    norms = []

    class Spy(pl.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            if trainer.global_step % 2 == 0:
                grads = [p.grad for p in pl_module.parameters() if p.grad is not None]
                norms.append(math.sqrt(sum(g.square().sum().item() for g in grads)))

    health = Health()
    pl.seed_everything(0)
    made = pl.Trainer(
        default_root_dir=tmp_path, accelerator="cpu", max_epochs=1, logger=False, log_every_n_steps=2,
        callbacks=[health, Spy()], enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    made.fit(Model(encoder=Line(), objective=Guess()), datamodule=Toy(batch_size=32))
    assert health.rows[-1]["gradient_norm"] == pytest.approx(sum(norms) / len(norms), rel=1e-5)


def test_a_collapsed_encoder_is_warned_of_once_by_name_and_floor(tmp_path):
    health = Health()
    with pytest.warns(
        UserWarning, match=r"standard deviation of the codes is \S+ at epoch 0, under the floor 0.1"
    ) as w:
        run(tmp_path, health, Flat(), GuessVector(), max_epochs=3)
    assert sum("under the floor" in str(item.message) for item in w) == 1
    assert health.rows[-1]["std"] < 0.01


def test_a_healthy_run_is_not_warned_of(tmp_path):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*under the floor.*")
        run(tmp_path, Health())


def test_no_labels_are_needed(tmp_path):
    class Shrink(Objective):
        def forward(self, model, batch):
            return Losses({"shrink": model.encoder(batch).square().mean()})

    class Bare(Toy):
        fields = ("vector",)

        def split(self, name):
            data = super().split(name)
            del data.tensors["label"]
            return data

    health = Health()
    made = pl.Trainer(
        default_root_dir=tmp_path, accelerator="cpu", max_epochs=1, logger=False, callbacks=[health],
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    made.fit(Model(encoder=Line(), objective=Shrink()), datamodule=Bare(batch_size=32))
    assert health.rows


@pytest.mark.parametrize("bad", [{"floor": -1.0}, {"noise": -0.1}, {"max_samples": 2}])
def test_values_out_of_range_are_refused(bad):
    with pytest.raises(ConfigError, match="Health needs floor and noise of at least 0 and max_samples of at least 3"):
        Health(**bad)


# ---- in the shipped configs
PRETRAINING = ("PositionPrediction", "MaskedReconstruction", "ContextAutoencoding", "MaskedMultiTask")


def unwatched(configs):
    """Configs that pretrain an encoder without labels and don't list Health."""
    found = []
    for name, path in configs.items():
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        objective = json.dumps((content.get("model") or {}).get("objective"))
        listed = json.dumps((content.get("trainer") or {}).get("callbacks"))
        if any(f'"{o}"' in objective for o in PRETRAINING) and '"Health"' not in listed:
            found.append(name)
    return found


def test_every_shipped_config_that_pretrains_is_watched(tmp_path):
    own = {p.stem: p for p in (Path(__file__).parents[2] / "configs").rglob("*.yaml")}
    shipped = {**load().configs(), **own}
    assert "quickstart" in shipped and unwatched(shipped) == []
    bare = tmp_path / "bare.yaml"
    bare.write_text("model: {objective: {class_path: Sum, init_args: {objectives: [PositionPrediction]}}}")
    assert unwatched({"bare": bare}) == ["bare"]
