"""The mixing buffer: what goes in comes out once, mixed, never above capacity, and goes on after a break."""

from __future__ import annotations

import pytest
import torch

from quire.datasets.activations.buffer import Buffer
from quire.errors import ConfigError


def chunks(sizes, start=0):
    """Chunks of rows numbered in order, with a gradient that is twice the activation."""
    for size in sizes:
        ids = torch.arange(start, start + size)
        start += size
        x = ids[:, None].float() * torch.ones(1, 3)
        yield {"activation": x, "grad": 2 * x, "token": ids}


def drained(buffer, source):
    """Every batch."""
    out = []
    while (batch := buffer.next(lambda: next(source, None))) is not None:
        out.append(batch)
    return out


SIZES = (7, 9, 30, 1, 13, 22, 22, 5, 40, 3)


@pytest.mark.parametrize("capacity", [8, 20, 50, 1000])
@pytest.mark.parametrize("keep", [0.0, 0.5, 0.9])
def test_what_goes_in_comes_out_once_but_for_a_short_tail(capacity, keep):  # oracle 7
    total, size = sum(SIZES), 8
    batches = drained(Buffer(capacity, size, keep, 0), chunks(SIZES))
    ids = torch.cat([b["token"] for b in batches])
    assert len(ids) == total // size * size
    assert len(ids.unique()) == len(ids) and set(ids.tolist()) <= set(range(total))
    for b in batches:  # x and its gradient stay one row
        assert torch.equal(b["grad"], 2 * b["activation"]) and torch.equal(b["activation"][:, 0].long(), b["token"])


def test_half_is_served_and_half_is_kept_and_the_pool_never_grows():
    buffer, source, pulled = Buffer(40, 4, 0.5, 0), chunks((10,) * 12), []

    def pull():
        chunk = next(source, None)
        pulled.append(chunk)
        return chunk

    buffer.next(pull)
    assert len(pulled) == 4 and buffer.until == 20 and len(buffer.order) == 40
    for _ in range(4):
        buffer.next(pull)
    assert len(pulled) == 4
    buffer.next(pull)  # refilled with as many rows as were served
    assert len(pulled) == 6 and len(buffer.order) == 40
    assert all(len(v) == 40 for v in buffer.pool.values())


def test_the_served_half_is_a_random_half_and_rows_of_many_chunks_mix():
    batches = drained(Buffer(1000, 50, 0.5, 0), chunks((20,) * 100))
    early = batches[0]["token"]
    assert early.max() > 700 and early.min() < 300  # from all over the first fill
    assert torch.equal(early, drained(Buffer(1000, 50, 0.5, 0), chunks((20,) * 100))[0]["token"])
    assert not torch.equal(early, drained(Buffer(1000, 50, 0.5, 1), chunks((20,) * 100))[0]["token"])
    late = torch.cat([b["token"] for b in batches[12:]])
    assert (late < 1000).any()  # some early rows stay behind for long


@pytest.mark.parametrize("served", [0, 1, 2, 3, 7, 11, 16])
def test_a_restored_buffer_goes_on_to_the_bit(served):
    whole = drained(Buffer(50, 8, 0.5, 3), chunks(SIZES))
    buffer, source, read = Buffer(50, 8, 0.5, 3), chunks(SIZES), 0

    def pull():
        nonlocal read
        read += 1
        return next(source, None)

    for _ in range(served):
        buffer.next(pull)
    plain, rows = buffer.state()
    rows = {k: v.clone() for k, v in rows.items()}
    other = Buffer(50, 8, 0.5, 99)
    other.restore(plain, rows, torch.device("cpu"))
    rest = list(chunks(SIZES))[read:]
    again = drained(other, iter(rest))
    assert len(again) == len(whole) - served
    for a, b in zip(again, whole[served:]):
        assert all(torch.equal(a[k], b[k]) for k in b)


def test_wrong_sizes_are_refused():
    with pytest.raises(ConfigError, match="data.buffer is 4 rows, less than a batch of 8"):
        Buffer(4, 8, 0.5, 0)
    with pytest.raises(ConfigError, match=r"data.keep must be in \[0, 1\), got 1"):
        Buffer(8, 8, 1.0, 0)
    buffer = Buffer(60, 8, 0.5, 0)
    source = chunks(SIZES)
    buffer.next(lambda: next(source, None))
    with pytest.raises(ConfigError, match="holds 60 rows, data.buffer is 20"):
        Buffer(20, 8, 0.5, 0).restore(*buffer.state(), torch.device("cpu"))
