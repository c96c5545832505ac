"""Phase 1 and phase 2: gradients, penalties, what is frozen, what a checkpoint keeps."""

import hashlib

import pytest
import torch
from first_toys import DEPTH, codes, padded, prompts, routed, whole

from quire.checkpoint import export, load
from quire.datasets.algorithmic import Algorithmic
from quire.errors import ConfigError, DataError
from quire.model import Model
from quire.reproduce import arm_trainer, quiet
from quire.roles.language.models import CausalLM
from quire.roles.language.next_token import NextToken
from quire_first.lora import LowRank
from quire_first.model import RoutedModel
from quire_first.objective import RoutedLoRA, RouterTraining
from quire_first.phases import RouterPhases
from quire_first.routing import Routing

SIZES = {"train_length": 4, "test_length": 4, "samples": 256, "batch_size": 32, "causal": True}


def data(task="copy+reverse"):
    return Algorithmic(task=task, **SIZES)


def causal(depth=DEPTH):
    return CausalLM(width=32, depth=depth, heads=2)


def fitted(objective, decoder, steps=8, rate=1e-2, callbacks=(), kind=torch.optim.Adam, **trainer):
    torch.manual_seed(0)
    model = Model(decoder=decoder, objective=objective, optimizer=lambda p: kind(p, lr=rate))
    with quiet():
        arm_trainer(max_steps=steps, callbacks=list(callbacks), **trainer).fit(model, datamodule=data())
    return model


def digest(tensors):
    return hashlib.sha256(b"".join(t.detach().numpy().tobytes() for t in tensors)).hexdigest()


def batch(rows=4):
    ids, mask = padded(prompts((6, 8, 7, 9))[:rows])
    return {"tokens": ids, "mask": mask, "prompt_length": torch.tensor([3, 4, 2, 5])[:rows]}


@pytest.mark.parametrize("gate", ["ste", "soft", "gumbel"])
@pytest.mark.parametrize("pooling", ["mean", "last_token", "majority"])
def test_oracle_5_the_task_gradient_reaches_every_router(gate, pooling):
    model = routed(loud=False, gate=gate, pooling=pooling).train()
    RouterTraining().run(whole(model), batch())[0]["task"].backward()
    for parameter in (model.routers.weight, model.routers.bias):
        assert bool((parameter.grad.abs().reshape(len(parameter), -1).sum(1) > 0).all())


def test_oracle_5_the_printed_formula_would_give_the_routers_no_gradient():
    """H = H' + rho phi + (1 - rho) phi: rho cancels, which the test above would catch."""
    model = routed(loud=False).train()
    model.routers.mixed = lambda decision, given, made: (
        given + decision.gate[:, None, None] * (made - given) + (1 - decision.gate[:, None, None]) * (made - given)
    )
    RouterTraining().run(whole(model), batch())[0]["task"].backward()
    assert float(model.routers.weight.grad.abs().max()) < 1e-7


def test_oracle_5_without_a_price_no_layer_of_a_trained_model_is_given_up():
    base = fitted(NextToken(), RoutedModel(causal()), 60, 3e-3).decoder
    model = fitted(RouterTraining(alpha=0.0), base, 20, 1e-2)
    rho = torch.cat([r.rho for r in model.decoder.recent])
    assert len(model.decoder.recent) == 20 and float(rho.min()) >= 0.5


def test_oracle_5_at_a_great_price_only_protected_layers_stay():
    model = fitted(RouterTraining(alpha=100.0), RoutedModel(causal()), 40, 3e-2)
    on = model.decoder.recent[-1].on
    assert on[:, [0, -1]].all() and not on[:, 1:-1].any()


def test_oracle_6_the_price_is_the_mean_probability():
    rho = torch.tensor([[0.9, 0.2, 0.6, 0.8]] * 3)
    objective = RouterTraining(alpha=0.3)
    assert float(objective.price(rho)) == pytest.approx(0.625)
    assert objective.weights["skip"] * float(objective.price(rho)) == pytest.approx(0.1875)
    assert float(RouterTraining(penalty="target", target_skip=0.25).price(rho)) == pytest.approx(0.125)


@pytest.mark.parametrize("gate", ["ste", "soft", "gumbel"])
def test_oracle_8_phase_1_leaves_the_backbone_and_phase_2_the_routers(gate):
    torch.manual_seed(0)
    first = RoutedModel(causal(), gate=gate)
    probe = Model(decoder=first, objective=RouterTraining(), spec=data().spec)
    probe.configure_model()
    before, routers = digest(first.base.parameters()), digest(first.routers.parameters())
    fitted(RouterTraining(alpha=1.0), first)
    assert digest(first.base.parameters()) == before
    trained = digest(first.routers.parameters())
    assert trained != routers
    model = fitted(RoutedLoRA(rank=2), first)
    assert digest(first.routers.parameters()) == trained
    own = [p for n, p in first.base.named_parameters() if not n.endswith(("down_rank", "up_rank"))]
    assert digest(own) == before
    moved = [m for m in first.base.modules() if isinstance(m, LowRank)]
    assert len(moved) == DEPTH * 3 and all(bool(m.up_rank.any()) for m in moved)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n, _ in model.named_parameters() if n.endswith(("down_rank", "up_rank"))
    }


def test_oracle_8_a_checkpoint_of_phase_2_rebuilds_adapters_and_logits(tmp_path):
    first = fitted(RouterTraining(alpha=1.0), RoutedModel(causal())).decoder
    model = fitted(RoutedLoRA(rank=2, modules=["q", "mlp"]), first)
    again = load(export(model, tmp_path / "second"))
    ids, mask = padded(prompts((6, 5)))
    ids = ids.clamp(max=19)
    with torch.no_grad():
        model.eval()
        want = model.decoder.routed(None, ids, mask, torch.tensor([3, 3]))
        got = again.decoder.routed(None, ids, mask, torch.tensor([3, 3]))
    assert torch.equal(want[0], got[0]) and torch.equal(want[1].rho, got[1].rho)
    assert again.decoder.lora == {"rank": 2, "alpha": 16.0, "modules": ["q", "mlp"], "dropout": 0.0}


@pytest.mark.parametrize("name", ["causal", "seq2seq", "universal", "llama", "gpt2", "bart", "t5"])
def test_oracle_1_adapters_that_are_0_change_nothing_and_learnt_ones_are_one_product(name):
    model = routed(name, loud=False)
    ids, mask = padded(prompts((6, 5)))
    own = codes(name, 2)
    with torch.no_grad():
        want = model(own, ids, mask)
        model.adapt(rank=2, alpha=4.0, modules=["q", "k", "v", "o", "mlp"], dropout=0.0)
        model.eval()
        assert torch.equal(model(own, ids, mask), want)
        for part in model.base.modules():
            if isinstance(part, LowRank):
                part.up_rank.normal_(std=0.1)
        merged = model(own, ids, mask)
    apart = model(own, ids, mask).detach()  # with gradients: two products
    assert not torch.allclose(merged, want, atol=1e-3) and torch.allclose(merged, apart, atol=1e-4)


def test_an_adapter_equals_pefts(tmp_path):
    peft = pytest.importorskip("peft", reason="pip install 'quire-first[peft]'")
    torch.manual_seed(0)
    plain = torch.nn.Sequential(torch.nn.Linear(8, 6))
    theirs = peft.inject_adapter_in_model(
        peft.LoraConfig(r=2, lora_alpha=5, target_modules=["0"], init_lora_weights=False), plain
    )
    layer = theirs[0]
    ours = LowRank(layer.base_layer, 2, 5.0, 0.0)
    ours.down_rank.data, ours.up_rank.data = layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data
    x = torch.randn(3, 8)
    assert torch.allclose(ours(x), theirs(x), atol=1e-6)


def test_adapters_reach_what_is_named():
    def names(kind, modules):
        model = routed(kind, loud=False)
        model.adapt(rank=2, alpha=4.0, modules=modules, dropout=0.0)
        layer = model.stack.layers[-1]
        return sorted(n for n, m in layer.named_modules() if isinstance(m, LowRank))

    assert names("causal", ["q", "o"]) == ["attention.out", "attention.query"]
    assert names("causal", ["mlp"]) == ["mlp.down", "mlp.up"]
    assert names("gpt2", ["o"]) == ["attn.c_proj"]
    assert names("gpt2", ["mlp"]) == ["mlp.c_fc", "mlp.c_proj"]
    assert names("llama", ["gate_proj"]) == ["mlp.gate_proj"]
    assert names("bart", ["q"]) == ["encoder_attn.q_proj", "self_attn.q_proj"]
    with pytest.raises(ConfigError, match="modules names 'z'; the layers' projections are"):
        names("causal", ["z"])


def test_the_backbone_trains_first_then_freezes_and_the_routers_learn():
    seen = []

    class Look(RouterPhases):
        def on_train_batch_end(self, trainer, module, *rest):
            super().on_train_batch_end(trainer, module, *rest)
            decoder = module.decoder
            seen.append(
                (digest(decoder.base.parameters()), digest(decoder.routers.parameters()), dict(weights(module)))
            )

    def weights(module):
        return module.objective.weights

    fitted(
        RouterTraining(alpha=2.0),
        RoutedModel(causal()),
        8,
        callbacks=[Look(backbone=0.5, warmup=0.5)],
        log_every_n_steps=1,
    )
    bases, routers, alphas = zip(*seen)
    assert len(set(bases[:4])) == 4 and len(set(bases[3:])) == 1
    assert len(set(routers[:4])) == 1 and len(set(routers[4:])) == 4
    assert [round(a["skip"], 2) for a in alphas[4:]] == [0.0, 1.0, 2.0, 2.0]


def test_the_temperature_falls_to_its_end():
    model = fitted(
        RouterTraining(), RoutedModel(causal(), gate="gumbel"), 4, callbacks=[RouterPhases(temperature=[1.0, 0.5])]
    )
    assert model.decoder.routers.temperature == pytest.approx(0.5**0.75)  # at the last of four steps


def test_plain_next_token_training_runs_every_layer_and_needs_no_prompt():
    model = fitted(NextToken(), RoutedModel(causal()), 2)
    assert model.decoder.routers.weight.grad is None


# ---- bad input
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"alpha": -1}, "weights of at least 0"),
        ({"penalty": "max"}, "mean or target"),
        ({"penalty": "target"}, "go together"),
        ({"target_skip": 0.2}, "go together"),
        ({"penalty": "target", "target_skip": 1.0}, r"in \[0, 1\)"),
    ],
)
def test_bad_weights_are_refused(arguments, said):
    with pytest.raises(ConfigError, match=said):
        RouterTraining(**arguments)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [({"rank": 0}, "rank >= 1"), ({"lora_alpha": 0}, "lora_alpha > 0"), ({"dropout": 1.0}, r"dropout in \[0, 1\)")],
)
def test_bad_adapters_are_refused(arguments, said):
    with pytest.raises(ConfigError, match=said):
        RoutedLoRA(**arguments)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [({"backbone": 1.0}, "backbone in"), ({"warmup": 2}, "warmup in"), ({"temperature": [1.0]}, "two numbers above 0")],
)
def test_bad_phases_are_refused(arguments, said):
    with pytest.raises(ConfigError, match=said):
        RouterPhases(**arguments)


def test_a_target_that_protected_layers_rule_out_is_refused():
    model = Model(
        decoder=RoutedModel(causal(8)), objective=RouterTraining(penalty="target", target_skip=0.95), spec=data().spec
    )
    with pytest.raises(ConfigError, match=r"target_skip 0.95 needs <= 1 active layer but 2 are protected"):
        model.configure_model()


def test_phase_2_behind_untrained_routers_is_refused():
    with pytest.raises(ConfigError, match="routers are untrained"):
        fitted(RoutedLoRA(), RoutedModel(causal()), 1)
    fitted(RoutedLoRA(rank=1), RoutedModel(causal(), force=[1]), 1)  # nobody asks them


def test_router_training_under_force_is_refused():
    with pytest.raises(ConfigError, match="set RoutedModel.force to null"):
        fitted(RouterTraining(), RoutedModel(causal(), force=[1]), 1)


def test_a_prompt_that_is_empty_or_longer_than_its_row_is_refused():
    model = routed()
    ids, mask = padded(prompts((4, 6)))
    with pytest.raises(DataError, match="prompt_length of row 1 is 0"):
        model.routed(None, ids, mask, torch.tensor([2, 0]))
    with pytest.raises(DataError, match="prompt_length of row 0 is 5, but its mask has 4 real tokens"):
        model.routed(None, ids, mask, torch.tensor([5, 2]))
    with pytest.raises(ConfigError, match="needs prompt_length"):
        model.routed(None, ids, mask)


def test_the_data_must_say_where_prompts_end():
    from quire.datasets.text import TextTokens

    model = Model(decoder=RoutedModel(causal()), objective=RouterTraining())
    with quiet(), pytest.raises(ConfigError, match="RouterTraining reads the field prompt_length"):
        arm_trainer(max_steps=1).fit(model, datamodule=TextTokens(source="stdlib:docs", length=16, train_samples=8))


def test_phases_without_their_objective_are_refused():
    with pytest.raises(ConfigError, match="RouterPhases needs model.objective with RouterTraining"):
        fitted(NextToken(), RoutedModel(causal()), 1, callbacks=[RouterPhases()])


def test_routing_says_its_skip_rate():
    on = torch.tensor([[True, False, True, True]])
    assert float(Routing(on.float(), on).skip_rate) == 0.25
