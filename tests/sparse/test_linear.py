"""Oracles 1 and 2 of role-sparse: the sparse path has the gradients of the dense one, AuxK included."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.sparse.toys import D, F, K, dense_codes, gradients, model_of, rows
from torch import Tensor

from quire.roles.sparse.objective import SparseReconstruction
from quire.roles.sparse.selectors import BatchTopK, TopK

LIMITS = {torch.float64: 1e-10, torch.float32: 1e-6}


def duplicated(dtype: Any) -> Tensor:
    return rows(10, dtype=dtype).repeat(5, 1)


CASES = {
    "rows": lambda t: rows(dtype=t),
    "duplicated rows": duplicated,
    "one row": lambda t: rows(1, dtype=t),
    "rows of which few latents are active": lambda t: rows(dtype=t) * 1e-3,
}


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("aux", [False, True], ids=["plain", "auxk"])
def test_sparse_path_has_the_gradients_of_the_dense_one(case: str, dtype: Any, aux: bool) -> None:
    objective = SparseReconstruction(auxk=1 / 32 if aux else 0.0, dead_after=5, aux_latents=6)
    model = model_of(objective=objective, dtype=dtype)
    with torch.no_grad():
        model.encoder.b_enc[: F // 2] -= 3  # zero values among the kept
    x = CASES[case](dtype).requires_grad_()
    model.decoder.tokens_since_fired[::2] = 5
    dead = model.decoder.dead(5)
    losses = objective(model, {"activation": x})
    codes = losses.outputs["codes"]
    assert codes.indices is not None and codes.values.shape == (len(x), K)
    found = gradients(model, sum(objective.weights.get(k, 1.0) * v for k, v in losses.items()), x)

    decoder = model.decoder
    made = dense_codes(model, x, codes.indices) @ decoder.W_dec + decoder.b_dec
    loss = (made - x).square().sum(1).mean()
    if aux:
        z = torch.relu((x - decoder.b_dec) @ model.encoder.W_enc.T + model.encoder.b_enc) * dead
        again = dense_codes(model, x, z.topk(6, 1).indices) * dead @ decoder.W_dec
        rest = (x - made).detach()
        variance = (rest - rest.mean(0)).square().sum(1).mean()
        loss = loss + (1 / 32 * (rest - again).square().sum(1).mean() / variance if variance else 0)
    wanted = gradients(model, loss, x)
    assert set(found) == {"encoder.W_enc", "encoder.b_enc", "encoder.b_dec", "decoder.W_dec", "0"}
    for name in wanted:
        scale = wanted[name].abs().max().clamp(min=1e-3)
        assert float((found[name] - wanted[name]).abs().max() / scale) <= LIMITS[dtype], name


def test_auxk_reaches_the_encoder_rows_of_dead_latents_only() -> None:
    objective = SparseReconstruction(dead_after=5)
    model = model_of(objective=objective)
    model.decoder.tokens_since_fired[::2] = 5
    dead = model.decoder.dead(5)
    aux = objective(model, {"activation": rows()})["auxk"]
    gradient = gradients(model, aux)["encoder.W_enc"].abs().sum(1)
    assert float(gradient[~dead].max()) == 0
    assert float((gradient[dead] > 0).double().mean()) > 0.5


def test_no_latent_dead_means_no_auxk_term() -> None:
    model = model_of()
    assert "auxk" not in model.objective(model, {"activation": rows()})


def test_the_sparse_path_keeps_no_tensor_of_tokens_by_kept_by_width() -> None:
    """Peak of what autograd saves: [N,K] and [N,D] tensors, never [N,K,D] or [N,F]."""
    model = model_of(objective=SparseReconstruction(auxk=0.0), dtype=torch.float32)
    sizes: list[int] = []

    def pack(t: Tensor) -> Tensor:
        sizes.append(t.numel())
        return t

    x = rows(500, dtype=torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model.objective(model, {"activation": x})
    assert max(sizes) <= max(500 * D, F * D) < 500 * K * D


def test_many_kept_latents_take_the_dense_path_with_the_same_result() -> None:
    sparse, dense = model_of(TopK(F // 8)), model_of(TopK(F // 8 + 1))
    assert sparse.encoder.read({"activation": rows()}).plan is not None
    assert dense.encoder.read({"activation": rows()}).plan is None
    dense.encoder.selector.k = F // 8
    for model in (sparse, dense):
        model.losses = model.objective(model, {"activation": rows()})
    a, b = (gradients(m, m.losses["reconstruct"]) for m in (sparse, dense))
    for name in a:
        assert torch.allclose(a[name], b[name], atol=1e-12), name


def test_a_batch_wide_selection_has_dense_gradients_too() -> None:
    model = model_of(BatchTopK(K), objective=SparseReconstruction(auxk=0.0))
    x = rows()
    losses = model.objective(model, {"activation": x})
    codes = losses.outputs["codes"]
    mask = torch.zeros(len(x), F, dtype=torch.bool).scatter(1, codes.indices, codes.mask)
    z = torch.relu((x - model.encoder.b_dec) @ model.encoder.W_enc.T + model.encoder.b_enc) * mask
    loss = (z @ model.decoder.W_dec + model.decoder.b_dec - x).square().sum(1).mean()
    a, b = gradients(model, losses["reconstruct"]), gradients(model, loss)
    for name in a:
        assert torch.allclose(a[name], b[name], atol=1e-10), name


def test_objectives_of_a_sum_read_a_batch_once() -> None:
    from quire.sum import Sum

    model = model_of(objective=Sum([SparseReconstruction(l1=0.1), SparseReconstruction()]))
    calls: list[int] = []
    select = model.encoder.selector.select
    model.encoder.selector.select = lambda *a: calls.append(1) or select(*a)
    batch = {"activation": rows()}
    for _ in range(2):
        model.zero_grad()
        sum(model.objective(model, batch).values()).backward()
    assert len(calls) == 2
