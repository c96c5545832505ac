"""What each selector keeps, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.sparse.toys import D, F, K, N, gradients, model_of, rows
from torch import Tensor

from quire import ConfigError, Model, Spec, predictions
from quire.roles.sparse.codes import SparseCodes, packed
from quire.roles.sparse.decoder import SparseDecoder
from quire.roles.sparse.encoder import SparseEncoder
from quire.roles.sparse.jumprelu import JumpReLU
from quire.roles.sparse.objective import SparseReconstruction
from quire.roles.sparse.selector import Selection, Selector, largest, ranking
from quire.roles.sparse.selectors import BatchTopK, Matryoshka, ReLU, TopK

BATCH = {"activation": rows()}


# ---- codes
def test_a_kept_zero_is_not_active() -> None:
    codes = SparseCodes(torch.tensor([[2.0, 0.0], [0.0, 0.0]]), torch.tensor([[1, 2], [0, 3]]), 4)
    assert codes.l0().tolist() == [1, 0]
    assert codes.fired().tolist() == [0, 1, 0, 0]
    assert codes.mask.tolist() == [[True, False], [False, False]]
    assert codes.dense().tolist() == [[0, 2, 0, 0], [0, 0, 0, 0]]


def test_packing_keeps_what_is_above_zero() -> None:
    kept = torch.tensor([[0.0, 3, 0, 1], [0, 0, 0, 0], [5, 0, 0, 0]])
    codes = packed(kept)
    assert codes.values.shape == (3, 2) and torch.equal(codes.dense(), kept)


def test_codes_of_sequences_keep_their_shape() -> None:
    model = model_of().eval()
    flat, shaped = model.encoder(BATCH), model.encoder({"activation": BATCH["activation"].view(5, 10, D)})
    assert shaped.values.shape == (5, 10, K) and torch.equal(shaped.dense().view(N, F), flat.dense())
    assert torch.allclose(model.decoder(shaped).view(N, D), model.decoder(flat))
    assert torch.equal(model.encoder.encode(BATCH["activation"]).values, flat.values)


# ---- selectors
def test_topk_of_all_latents_is_relu() -> None:
    """Oracle 3."""
    everything, relu = model_of(TopK(F)).eval(), model_of(ReLU()).eval()
    assert torch.allclose(everything.encoder(BATCH).dense(), relu.encoder(BATCH).dense(), atol=1e-12)
    a, b = (gradients(m, m.objective(m, BATCH)["reconstruct"]) for m in (everything, relu))
    for name in a:
        assert torch.allclose(a[name], b[name], atol=1e-12), name


def test_topk_keeps_the_largest() -> None:
    model = model_of()
    reading = model.encoder.read(BATCH)
    assert torch.equal(reading.codes.values.sort().values, reading.z.topk(K, 1).values.sort().values)


def test_half_precision_scores_are_ranked_in_float32() -> None:
    assert largest(torch.tensor([[1.0, 3.0, 2.0]], dtype=torch.bfloat16), 1).tolist() == [[1]]


def test_autocast_does_not_tie_scores() -> None:
    model = model_of(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        reading = model.encoder.read({"activation": rows(dtype=torch.float32)})
    assert reading.z.dtype == torch.float32
    assert not torch.equal(reading.z, reading.z.bfloat16().float())


def test_batch_topk_keeps_k_per_token_on_average_and_a_threshold_later() -> None:
    model = model_of(BatchTopK(K))
    codes = model.encoder(BATCH)
    assert int(codes.l0().sum()) == K * N and codes.l0().float().std() > 0
    least = codes.values[codes.mask].min()
    assert torch.allclose(model.encoder.selector.threshold, least)
    model.encoder({"activation": 2 * BATCH["activation"]})
    again = model.encoder.selector.threshold
    assert least < again < 1.01 * least  # decay .999
    model.eval()
    kept = model.encoder(BATCH)
    alone = model.encoder({"activation": BATCH["activation"][:1]})
    assert torch.allclose(alone.dense(), kept.dense()[:1])  # a token's codes don't depend on its batch
    assert kept.values[kept.mask].min().item() > again.item()


def test_batches_with_rows_of_different_length_are_written_as_one(tmp_path: Path) -> None:
    batches = [SparseCodes(rows(3, k), torch.ones(3, k, dtype=torch.long), F).tensors() for k in (2, 5, 3)]
    (file,) = predictions.write(batches, tmp_path)
    found = load_file(file)
    assert found["values"].shape == (9, 5) and found["indices"].shape == (9, 5)
    assert torch.equal(found["values"][3:6], batches[1]["values"]) and not found["values"][:3, 2:].any()


def test_jumprelu_is_zero_at_its_threshold_and_unshrunk_above() -> None:
    selector = JumpReLU(init=0.5, bandwidth=0.2)
    selector.build(Spec(latents=3))
    theta = selector.threshold[0].item()
    pre = torch.tensor([[theta, theta + 1e-4, -1.0]])
    codes = selector.select(pre.relu(), Selection(pre, pre, {}, True, pre=pre))
    assert codes.dense().tolist() == [[0.0, pre[0, 1].item(), 0.0]] and codes.count.tolist() == [1.0]


def test_jumprelu_thresholds_get_the_rectangle_gradient() -> None:
    selector = JumpReLU(init=0.5, bandwidth=0.2)
    selector.build(Spec(latents=3))
    pre = torch.tensor([[0.45, 0.9, 0.55], [0.7, 0.41, 0.3]], requires_grad=True)
    codes = selector.select(pre.relu(), Selection(pre, pre, {}, True, pre=pre))
    upstream = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    (d_pre, d_log) = torch.autograd.grad(
        (codes.values * upstream).sum(), [pre, selector.log_threshold], retain_graph=True
    )
    assert torch.equal(d_pre, upstream * (pre > 0.5))
    near = torch.tensor([[1.0, 0, 1], [0, 1, 0]])  # within .1 of .5
    assert torch.allclose(d_log, 0.5 * -(0.5 / 0.2) * (near * upstream).sum(0))  # d theta / d log theta = theta
    (d_log,) = torch.autograd.grad(codes.count.sum(), [selector.log_threshold])
    assert torch.allclose(d_log, 0.5 * -(1 / 0.2) * near.sum(0))


def test_matryoshka_selects_in_each_prefix() -> None:
    model = model_of(Matryoshka(TopK(K), [20, 50]))
    reading = model.encoder.read(BATCH)
    assert [int(c.indices.max()) < p for c, p in zip(reading.codes.nested, (20, 50))] == [True, True]
    assert torch.equal(reading.codes.nested[0].values.sort().values, reading.z[:, :20].topk(K, 1).values.sort().values)
    losses = model.objective(model, BATCH)
    wanted = torch.stack(
        [model.objective.error(model.decoder.decode(c), BATCH["activation"]) for c in reading.codes.nested]
    )
    assert torch.allclose(losses["nested"], wanted.mean())
    assert float(gradients(model, losses["nested"])["encoder.W_enc"][50:].abs().max()) == 0


# ---- the contract, as a plugin uses it
class ByGradient(TopK):
    """Rank by z times what the decoder's row does to the loss."""

    needs_fields = ("grad",)

    def scores(self, z: Tensor, context: Selection) -> Tensor:
        return z * (1 + (context.gradient("set data.with_grad: true") @ context.rows.T).abs())


class FirstHalf(Selector):
    """Cut another selector's order at half of its length."""

    needs_ranking = True

    def __init__(self, order: Selector) -> None:
        super().__init__()
        self.order = ranking(order, "FirstHalf")

    def select(self, z: Tensor, context: Selection) -> SparseCodes:
        indices = largest(self.order.scores(z, context), z.shape[1] // 2)
        return SparseCodes(z.gather(1, indices), indices, z.shape[1])


def test_a_selector_may_rank_by_gradients_and_still_have_the_values_of_z() -> None:
    model = model_of(ByGradient(K), norm="layer")
    grad = rows(seed=5)
    reading = model.encoder.read({**BATCH, "grad": grad})
    std = BATCH["activation"].std(1, keepdim=True)
    scores = reading.z * (1 + ((grad * std) @ model.decoder.W_dec.T).abs())
    assert torch.equal(reading.codes.indices.sort().values, scores.topk(K, 1).indices.sort().values)
    assert torch.equal(reading.codes.values, reading.z.gather(1, reading.codes.indices))
    zero = model.encoder.read({**BATCH, "grad": 0 * grad}).codes.indices
    assert torch.equal(zero, reading.z.topk(K, 1, sorted=False).indices)


def test_a_missing_field_names_selector_and_remedy() -> None:
    with pytest.raises(ConfigError, match="ByGradient needs the batch field 'grad': set data.with_grad: true"):
        model_of(ByGradient(K)).encoder(BATCH)
    assert model_of(ByGradient(K)).encoder.selector.reads("fit") == ("grad",)


def test_an_order_can_be_cut_by_another_selector() -> None:
    model = model_of(FirstHalf(ByGradient(K)))
    assert int(model.encoder({**BATCH, "grad": rows(seed=5)}).values.shape[1]) == F // 2
    with pytest.raises(ConfigError, match="FirstHalf ranks latents; JumpReLU has no order of them"):
        FirstHalf(JumpReLU())


def test_rows_without_a_decoder_are_refused() -> None:
    encoder = SparseEncoder(F, ByGradient(K))
    model = Model(encoder, spec={"width": D})
    model.configure_model()
    with pytest.raises(ConfigError, match="ByGradient reads the decoder's rows: set model.decoder"):
        model.encoder({**BATCH, "activation": BATCH["activation"].float(), "grad": rows()})


# ---- refusals
REFUSED: list[tuple[Any, str]] = [
    (lambda: model_of(TopK(5000), latents=4096), r"k \(5000\) exceeds latents \(4096\)"),
    (lambda: model_of(BatchTopK(97)), r"k \(97\) exceeds latents \(96\)"),
    (lambda: TopK(0), "TopK.k must be at least 1, got 0"),
    (lambda: BatchTopK(-1), "BatchTopK.k must be at least 1"),
    (lambda: JumpReLU(init=0), "JumpReLU.init and bandwidth must be above 0"),
    (lambda: Matryoshka(TopK(1), [4, 4]), "rising numbers"),
    (lambda: Matryoshka(TopK(1), []), "rising numbers"),
    (lambda: model_of(Matryoshka(TopK(1), [97])), r"prefix 97 exceeds latents \(96\)"),
    (lambda: model_of(Matryoshka(TopK(9), [8])), r"k \(9\) exceeds latents \(8\)"),
    (lambda: SparseEncoder(0), "latents must be at least 1"),
    (lambda: SparseEncoder(4, norm="batch"), "SparseEncoder.norm must be none, layer, global_rms"),  # type: ignore[arg-type]
    (lambda: SparseEncoder(4, init="ones"), "SparseEncoder.init must be"),  # type: ignore[arg-type]
    (lambda: model_of(width=1, norm="layer"), "norm: layer needs a width of at least 2"),
    (lambda: model_of(norm="layer", spec={"target_width": 3}), "can't be undone on another site's target"),
    (lambda: model_of(decoder=SparseDecoder(bias=False)), "subtract_bias needs the decoder's bias"),
    (
        lambda: model_of().encoder({"activation": rows(width=D + 1)}),
        "SparseEncoder was built for width 16; batch field 'activation' has width 17",
    ),
    (lambda: model_of().encoder({"activation": rows(0)}), "the batch has no tokens"),
    (lambda: SparseReconstruction(reduction="max"), "reduction must be sum or mean"),  # type: ignore[arg-type]
    (lambda: SparseReconstruction(l1=-1), "l1 must be at least 0"),
    (lambda: SparseReconstruction(dead_after=0), "must be at least 1"),
    (lambda: model_of(objective=SparseReconstruction(l0=1.0)), "TopK has none: use JumpReLU, or l1"),
]


@pytest.mark.parametrize(("make", "says"), REFUSED, ids=[s[:40] for _, s in REFUSED])
def test_what_cannot_work_is_refused_in_a_sentence(make: Any, says: str) -> None:
    with pytest.raises(ValueError if "tokens" not in says else Exception, match=says):
        make()
