"""The bottleneck in training and evaluation: what moves, what doesn't, and what is refused (spec, sections 7 and 8)."""

import math

import pytest
import torch
from torch import nn
from torch.nn.functional import one_hot

from quire.contracts import Spec, build
from quire.errors import ConfigError, DataError
from quire.roles.latent import LatentCodes, VectorCodes, VectorEncoder
from quire.roles.latent.mlp import MlpVectorEncoder
from quire.roles.latent.plain import FlatPixels, Pooled
from quire.roles.sparse.encoder import SparseEncoder
from quire.roles.sparse.selectors import TopK
from quire.roles.tokens.contract import Layout, Segment, Tokens
from quire.roles.tokens.vit import ViTEncoder
from quire_dkvb.decoders import ConcatProbe
from quire_dkvb.encoder import KeyValueBottleneck, rows_of


class Normed(VectorEncoder):
    """Pixels through a BatchNorm: an encoder that moves unless it is held still."""

    fields = ("image",)

    def build(self, spec):
        self.width = 64
        self.norm = nn.BatchNorm1d(64)

    def forward(self, batch):
        return VectorCodes(self.norm(batch["image"].flatten(1)))


def loss_of(model, batch):
    return model.objective(model, batch)["classify"]


def step(model, batch, lr=0.3):
    model.zero_grad()
    loss_of(model, batch).backward()
    values = model.encoder.values
    with torch.no_grad():
        values -= lr * values.grad


# ---- what moves
def test_values_that_were_not_fetched_have_no_gradient_and_stay_bit_identical(make, some):
    """Oracle 1."""
    model, batch = make(), some(8)
    before = model.encoder.values.detach().clone()
    indices = model.encoder(batch).indices
    step(model, batch)
    grad = model.encoder.values.grad
    fetched = torch.zeros(6, 16, dtype=torch.bool)
    for c in range(6):
        fetched[c, indices[:, 0, c, 0]] = True
    assert 0 < fetched.sum() < 96, "some must be left"
    assert (grad[~fetched] == 0).all() and (grad[fetched].abs().sum(1) > 0).all()
    assert torch.equal(model.encoder.values[~fetched], before[~fetched])
    assert (grad.abs().sum(-1) > 0).sum() <= 8 * 1 * 6


def test_the_gradient_is_the_papers_formula(make, batch):
    """Oracle 2: dL/dV[c,j] = 1/(B·C) · sum over b with i_c(b) = j of softmax(logits_b) − y_b."""
    model = make({"value_init": "normal"})
    codes = model.encoder(batch)
    rest = model.decoder(codes).softmax(1) - one_hot(batch["label"], 10)
    loss_of(model, batch).backward()
    wanted = torch.zeros_like(model.encoder.values)
    for c in range(6):
        wanted[c].index_add_(0, codes.indices[:, 0, c, 0], rest / (64 * 6))
    torch.testing.assert_close(model.encoder.values.grad, wanted, atol=1e-7, rtol=1e-5)


def test_values_start_at_zero_and_the_loss_at_ln_k(make, batch):
    """Oracle 2: ln 10 = 2.302585; a lone sample's first gradient at its class is (.1 − 1)/C."""
    model = make()
    assert (model.decoder(model.encoder(batch)) == 0).all()
    assert loss_of(model, batch).item() == pytest.approx(2.302585, abs=1e-6)
    one = {k: v[:1] for k, v in batch.items()}
    model.zero_grad()
    loss_of(model, one).backward()
    grad = model.encoder.values.grad.sum(1)[:, int(one["label"])]
    torch.testing.assert_close(grad, torch.full((6,), (0.1 - 1) / 6))


def test_keys_heads_and_encoder_stand_still_in_training(make, digits, trainer):
    """Oracle 3: BatchNorm statistics too."""
    model = make(encoder=Normed())
    model.encoder.encoder.norm.running_mean.fill_(0.1)
    kept = {k: v.clone() for k, v in model.state_dict().items()}
    trainer(2).fit(model, datamodule=digits())
    moved = {k for k, v in model.state_dict().items() if not torch.equal(v, kept[k])}
    assert moved == {"encoder.values", "encoder.usage", "encoder.tokens"}
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["encoder.values"]


def test_classes_without_a_common_key_can_not_touch_each_other(make, some):
    """Oracle 5: bit-identical logits."""
    model, batch = make({"keys": 64, "codebooks": 4}), some(64)
    with torch.no_grad():
        bottleneck = model.encoder
        heads = bottleneck.project(bottleneck.read(batch)[0].flatten(0, 1))
        bottleneck.initialised(heads.transpose(0, 1))
    model.eval()
    model.encoder.unused = "keep"
    indices, label = model.encoder(batch).indices[:, 0, :, 0], batch["label"]
    a, b = (indices[label == k] for k in (0, 1))
    assert not (a[:, None] == b[None]).any(), "each sample is its own key: classes share none"
    other = {k: v[label == 1] for k, v in batch.items()}
    before = model.decoder(model.encoder(other))
    model.train()
    for _ in range(3):
        step(model, {k: v[label == 0] for k, v in batch.items()})
    model.eval()
    assert torch.equal(model.decoder(model.encoder(other)), before)


def test_one_key_predicts_the_distribution_of_labels(make, some):
    """Oracle 7: C = M = 1; on balanced data the accuracy is 1/K."""
    model, batch = make({"codebooks": 1, "keys": 1}), some(200)
    for _ in range(400):
        step(model, batch, lr=1.0)
    share = torch.bincount(batch["label"], minlength=10) / 200
    torch.testing.assert_close(model.decoder(model.encoder(batch))[0].softmax(0), share, atol=1e-3, rtol=0)
    balanced = torch.cat([(batch["label"] == k).nonzero()[:10, 0] for k in range(10)])
    hit = model.decoder(model.encoder({k: v[balanced] for k, v in batch.items()})).argmax(1) == batch["label"][balanced]
    assert hit.float().mean() == pytest.approx(0.1)


def test_a_checkpoint_restores_counters_and_what_is_frozen(make, some, tmp_path):
    """Oracle 8."""
    import quire

    model = make(encoder=MlpVectorEncoder())
    model.encoder.remember(64)
    for _ in range(2):
        step(model, some(64))
    path = quire.export(model, tmp_path / "x")
    loaded = quire.load(path)
    assert loaded.encoder.usage.sum() == 2 * 64 * 6, "what the cache handed out is counted before saving"
    assert bool(loaded.encoder.ready) and torch.equal(loaded.encoder.keys, model.encoder.keys)
    loaded.train()
    assert not loaded.encoder.encoder.training
    assert not any(p.requires_grad for p in loaded.encoder.encoder.parameters())


# ---- cache
def test_cached_and_uncached_training_are_the_same(make, digits, trainer):
    """Oracle 9: losses and values to 1e-6, counters exactly; the cache skips the encoder."""
    ran = {}
    for cache in (True, False):
        model, calls = make({"cache": cache}), []
        model.encoder.encoder.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        trainer(4).fit(model, datamodule=digits())
        model.encoder.settle()
        ran[cache] = (model.encoder.values.detach(), model.encoder.usage, len(calls))
    torch.testing.assert_close(ran[True][0], ran[False][0], atol=1e-6, rtol=0)
    assert torch.equal(ran[True][1], ran[False][1])
    assert (ran[True][2], ran[False][2]) == (4, 16), "one pass of 4 batches, then none; 4 epochs of 4"


def test_cached_indices_take_two_bytes(make, some):
    model = make()
    model.encoder.remember(64)
    model.encoder(some(64))
    assert model.encoder.lookups.held.dtype == torch.int16
    assert model.encoder.lookups.held.shape == (64, 1, 6, 1)


def test_augmented_data_switch_the_cache_off_and_say_so(make, digits, trainer, caplog):
    from quire.datasets.crops import RandomFlip

    model = make()
    with caplog.at_level("INFO", logger="quire_dkvb.watching"):
        trainer().fit(model, datamodule=digits(transforms=[RandomFlip()]))
    assert "lookups are not cached: data.transforms may change the training images" in caplog.text
    assert model.encoder.lookups is None


# ---- evaluation
def test_results_do_not_depend_on_the_evaluation_batch(make, some):
    """Oracle 9: the paper's code gives unused keys the batch's largest distance, ours infinity."""
    model = make({"keys": 40})
    step(model, some(16))
    model.eval()
    batch = some(100, 200)
    whole = model.encoder(batch).indices
    for size in (1, 7, 64):
        pieces = [model.encoder({k: v[i : i + size] for k, v in batch.items()}).indices for i in range(0, 100, size)]
        assert torch.equal(torch.cat(pieces), whole)


def test_unused_keys_are_excluded_or_kept(make, some):
    model = make({"keys": 40})
    step(model, some(16))
    model.eval()
    used, batch = model.encoder.usage > 0, some(100, 200)
    found = model.encoder(batch).indices[:, 0, :, 0]
    assert all(bool(used[c, found[:, c]].all()) for c in range(6))
    model.encoder.unused = "keep"
    kept = model.encoder(batch).indices[:, 0, :, 0]
    assert not all(bool(used[c, kept[:, c]].all()) for c in range(6)), "else there was nothing to exclude"


def test_padding_neither_votes_nor_counts(make):
    layout = Layout.of(Segment("words", (5,), (1,), "image"))

    class Words(FlatPixels):
        def forward(self, batch):
            values = batch["image"].flatten(1).unflatten(1, (1, 64)).expand(-1, 5, -1) * torch.arange(1.0, 6)[:, None]
            index = torch.arange(5).expand(len(values), 5)
            return Tokens(values, index, layout, batch["mask"])

    model = make(encoder=Words(), ready=False)
    model.encoder.initialised(model.encoder.keys.clone())
    with torch.no_grad():
        model.encoder.values.normal_()
    mask = torch.tensor([[True, True, False, False, False], [True] * 5])
    batch = {"image": torch.rand(2, 1, 8, 8), "mask": mask}
    codes = model.encoder(batch)
    assert model.encoder.usage.sum() == (2 + 5) * 6
    torch.testing.assert_close(model.decoder(codes)[0], codes.values[0, :2].mean((0, 1)))
    torch.testing.assert_close(codes.vector[0], codes.values[0, :2].mean(0).flatten())


def test_top_k_sums_the_values(make, batch):
    model = make({"top_k": 3, "value_init": "normal"})
    codes = model.encoder(batch)
    by_hand = torch.stack([model.encoder.values[c][codes.indices[:, 0, c]].sum(1) for c in range(6)], 1)
    torch.testing.assert_close(codes.values[:, 0], by_hand)
    torch.testing.assert_close(model.decoder(codes), by_hand.mean(1))


# ---- any frozen encoder
def test_vectors_tokens_latents_and_sparse_codes_are_rows():
    x = torch.rand(2, 3, 4)
    assert rows_of(VectorCodes(x[:, 0]), {}, None)[0].shape == (2, 1, 4)
    assert rows_of(LatentCodes(x, (3,)), {}, None)[0] is x
    sparse = SparseEncoder(12, TopK(2), init="zeros")
    build(sparse, Spec(width=4))
    rows, mask = rows_of(sparse({"activation": x}), {"mask": torch.ones(2, 3, dtype=torch.bool)}, None)
    assert rows.shape == (2, 3, 12) and mask is None and ((rows > 0).sum(-1) <= 2).all()
    assert rows_of(sparse({"activation": x[0]}), {}, None)[0].shape == (3, 1, 12)


@pytest.mark.parametrize("pooled", [True, False])
def test_a_token_encoder_serves_pooled_or_token_by_token(make, batch, pooled):
    vit = ViTEncoder(2, 16, 1, 2)
    model = make(encoder=Pooled(vit) if pooled else vit)
    codes = model.encoder(batch)
    assert codes.indices.shape == (64, 1 if pooled else 16, 6, 1)
    loss_of(model, batch).backward()
    assert model.encoder.values.grad.abs().sum() > 0


def test_who_studies_the_features_gets_a_gradient_and_training_does_not_change(make, batch):
    model = make({"value_init": "normal"}).eval()
    model.encoder.unused = "keep"
    plain = model.decoder(model.encoder(batch))
    seen = []
    hook = model.encoder.input.register_forward_hook(
        lambda m, a, out: seen.append(out.detach().requires_grad_()) or seen[-1]
    )
    studied = model.decoder(model.encoder(batch))
    hook.remove()
    torch.testing.assert_close(studied, plain, atol=1e-5, rtol=1e-5)
    (grad,) = torch.autograd.grad(studied.square().sum(), seen[0])
    assert grad.shape == (64, 1, 64) and grad.abs().sum() > 0


def test_a_frozen_probe_leaves_all_learning_to_the_values(make, batch):
    model = make({"value_width": 5}, decoder=ConcatProbe(hidden=8))
    before = {k: v.clone() for k, v in model.decoder.state_dict().items()}
    first = loss_of(model, batch).item()
    for _ in range(20):
        step(model, batch, lr=5.0)
    assert loss_of(model, batch).item() < first - 0.05
    assert all(torch.equal(v, before[k]) for k, v in model.decoder.state_dict().items())
    assert all(
        p.requires_grad for p in make({"value_width": 5}, decoder=ConcatProbe(frozen=False)).decoder.parameters()
    )


# ---- bad input
@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"top_k": 17}, "top_k is 17, but a codebook has 16 keys"),
        ({"codebooks": 0}, "codebooks must be at least 1, got 0"),
        ({"value_width": 0}, "value_width must be at least 1, got 0"),
        ({"heads": "cut"}, "heads must be random or chunk or learned, got 'cut'"),
        ({"heads": "chunk"}, "chunk cuts 64 features into codebooks x key_width = 6 x 4 = 24"),
        ({"value_width": 7}, "value_width is 7, the data has 10 classes"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_with_both_numbers(make, given, said):
    with pytest.raises(ConfigError, match=said):
        make(given, ready=False)


def test_keys_must_be_initialised_before_training(make, batch):
    with pytest.raises(
        ConfigError, match="^keys were never initialised: add the KeyInit callback or load a checkpoint$"
    ):
        make(ready=False).encoder(batch)


def test_evaluation_of_what_was_never_trained_is_refused(make, batch):
    with pytest.raises(ConfigError, match="no key was ever used in training"):
        make().eval().encoder(batch)


def test_another_number_of_tokens_than_in_training_is_refused(make, batch):
    model = make(encoder=ViTEncoder(2, 16, 1, 2))
    model.encoder(batch)
    model.encoder.encoder = Pooled(model.encoder.encoder)
    model.encoder.encoder.width = 16
    with pytest.raises(ConfigError, match="trained on 16 tokens a sample, this batch has 1"):
        model.eval().encoder(batch)


def test_a_label_outside_the_classes_is_refused(make, batch):
    with pytest.raises(DataError, match="is 10; there are 10 classes"):
        loss_of(make(), {**batch, "label": batch["label"] + 1})


def test_fewer_keys_than_classes_warn(make):
    with pytest.warns(UserWarning, match="8 keys a codebook for 10 classes: classes must share keys"):
        make({"keys": 8}, ready=False)


@pytest.mark.parametrize(
    ("optimizer", "said"),
    [
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), "the optimizer has momentum 0.9"),
        (lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.1), "the optimizer has weight_decay 0.1"),
        (lambda p: torch.optim.Adam(p, lr=0.1), "the optimizer is Adam"),
    ],
)
def test_an_optimizer_that_moves_other_values_warns(make, digits, trainer, optimizer, said):
    model = make()
    model.optimizer = optimizer
    with pytest.warns(UserWarning, match=f"{said}: values outside the batch will move: use SGD without momentum"):
        trainer(1, limit_train_batches=1).fit(model, datamodule=digits())


def test_what_adam_would_move_is_what_the_warning_says(make, some):
    """The warning's reason: after a batch of other classes Adam still moves what an earlier batch fetched."""
    model = make()
    adam = torch.optim.Adam([model.encoder.values], lr=0.1)
    for batch in (some(8), some(8, 500)):
        before, indices = model.encoder.values.detach().clone(), model.encoder(batch).indices
        adam.zero_grad()
        loss_of(model, batch).backward()
        adam.step()
    fetched = torch.zeros(6, 16, dtype=torch.bool)
    for c in range(6):
        fetched[c, indices[:, 0, c, 0]] = True
    assert (model.encoder.values.detach() != before)[~fetched].any()
    assert math.isfinite(float(model.encoder.values.sum()))


def test_codes_of_another_kind_are_refused():
    from dataclasses import dataclass

    from quire.contracts import Codes

    @dataclass
    class Odd(Codes):
        letters: str = "x"

    with pytest.raises(ConfigError, match="needs vectors, tokens, latents or sparse codes; FlatPixels gives Odd"):
        rows_of(Odd(), {}, FlatPixels())


def test_the_parts_are_refused_elsewhere():
    from quire.model import Model
    from quire_dkvb.decoders import CodebookVote

    with pytest.raises(ConfigError, match="CodebookVote needs a KeyValueBottleneck; model.encoder is FlatPixels"):
        Model(encoder=FlatPixels(), decoder=CodebookVote())
    assert KeyValueBottleneck(FlatPixels()).built is False
