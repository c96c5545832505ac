"""What components give back has the right form: codes, images, samples, batches, metric values."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quire.contracts import Codes, Metric
from quire.data import FIELDS, DataModule, check_batch
from quire.errors import QuireError
from quire.predictions import write
from quire.testing.learning import learned
from quire.testing.quiet import folder, quietly
from quire.testing.saving import answers, leaves, same
from quire.testing.subject import Subject
from quire.testing.trial import Ran, copied, needed, size_of
from quire.testing.verdict import Fault


def outputs(subject: Subject) -> None:
    """Shapes, dtypes and finite values of what it returns."""
    kind = subject.entry.kind
    found = subject.trained()
    ran = subject.trial.ran()
    if kind == "encoder":
        encoder_outputs(found, ran)
    elif kind == "decoder":
        _decoder_outputs(found, ran)
    elif kind == "objective":
        watch = learned(subject)
        if watch.complaints:
            raise Fault(next(iter(watch.complaints)))
    elif kind == "metric":
        _metric_outputs(subject, found, ran)
    elif kind == "data":
        with quietly():
            _data_outputs(found)


def encoder_outputs(encoder: Any, ran: Ran) -> Codes:
    """Codes with a row a sample, finite, of the sizes that the encoder tells decoders."""
    name, size = type(encoder).__name__, size_of(ran.batch)
    ran.made.model.eval()
    with torch.no_grad():
        codes = encoder(copied(ran.batch))
    if not isinstance(codes, Codes):
        raise Fault(f"{name} returns a {type(codes).__name__}: return Codes, such as VectorCodes or Tokens")
    tensors = codes.tensors()
    if not tensors:
        raise Fault(f"{name} returns {type(codes).__name__} without a tensor")
    for field, value in tensors.items():
        _finite(value, f"{name}'s {field}")
        if value.ndim and len(value) != size:
            raise Fault(f"{name}'s {field} has {len(value)} rows for a batch of {size}: keep one row a sample")
    sizes = encoder.sizes()
    try:
        json.dumps(sizes)
    except TypeError as error:
        raise Fault(f"{name}.sizes() must be plain numbers, strings and lists: {error}") from error
    width = sizes.get("width")
    whole = [codes.dense()] if hasattr(codes, "dense") else []  # codes kept as short rows of indices
    if not isinstance(width, int) or not any(v.ndim and v.shape[-1] == width for v in (*tensors.values(), *whole)):
        shapes = ", ".join(f"{k} {list(v.shape)}" for k, v in tensors.items())
        raise Fault(f"{name}.sizes() says width {width!r}, but its codes are {shapes}: decoders are built from it")
    return codes


def _finite(value: Tensor, what: str) -> None:
    if value.is_floating_point() and not bool(torch.isfinite(value).all()):
        raise Fault(f"{what} is not finite")


def _decoder_outputs(decoder: Any, ran: Ran) -> None:
    seen: list[Any] = []
    handle = decoder.register_forward_hook(lambda module, args, out: seen.append(out))
    with quietly():
        answers(ran.made.model, ran)
    handle.remove()
    for out in seen:
        found = [(k, v) for k, v in leaves(out, type(decoder).__name__) if isinstance(v, Tensor)]
        if not found:
            raise Fault(f"{type(decoder).__name__} returns a {type(out).__name__} without a tensor")
        for where, value in found:
            _finite(value, where)


def _metric_outputs(subject: Subject, metric: Any, ran: Ran) -> None:
    name = f"val/{getattr(metric, 'label', type(metric).__name__)}"
    value = ran.metrics.get(name)
    if type(metric).sampled is not Metric.sampled:  # it looks at what predict gives
        needed(lambda: subject.trial.predicted(), "predicts")
        name, value = type(metric).__name__, metric.compute()
    if value is None:
        raise Fault(f"{type(metric).__name__} logs no {name}: list it under model.metrics in tiny()")
    if value.ndim or not bool(torch.isfinite(value)):
        raise Fault(f"{name} is {value.tolist()}: compute() must give one finite number")


def _data_outputs(data: DataModule) -> None:
    name = type(data).__name__
    try:
        json.dumps(dict(data.spec))
    except TypeError as error:
        raise Fault(f"{name}.spec must hold plain numbers, strings and lists: {error}") from error
    for split, loader in (
        ("train", data.train_dataloader),
        ("val", data.val_dataloader),
        ("test", data.test_dataloader),
    ):
        batch, again = next(iter(loader())), next(iter(loader()))
        for field in batch:
            if field not in FIELDS:
                raise Fault(f"{name} gives the field {field}, which quire.data.FIELDS does not document")
            if data.fields and field not in data.fields and field != "index":
                raise Fault(f"{name} gives the field {field} but does not list it in its class attribute fields")
        missing = [f for f in data.fields if f not in batch and f != "index"]
        if missing:
            raise Fault(f"{name} lists the field {missing[0]} but its {split} batches have none")
        try:
            check_batch(batch)
        except QuireError as error:
            raise Fault(f"{name}, {split}: {error}") from error
        rows = {
            k: len(v)
            for k, v in batch.items()
            if isinstance(v, (Tensor, list)) and (not isinstance(v, Tensor) or v.ndim)
        }
        if len(set(rows.values())) != 1:
            raise Fault(f"{name}, {split}: the fields of a batch differ in length: {rows}")
        for field, value in batch.items():
            if not same(value, again[field]):
                raise Fault(f"{name}, {split}: the field {field} differs when the same epoch is read twice")


def predicts(subject: Subject) -> None:
    """``predict`` gives one result a sample, in a form that can be written to a file."""
    found = subject.trained()
    results, size = subject.trial.predicted()
    model = subject.trial.ran().made.model
    if subject.entry.kind == "sampler":
        if model.sampler is not found:
            return
        for result in results:
            rows = {len(v) for v in result.values()} if isinstance(result, dict) else {len(result)}
            if rows != {size}:
                raise Fault(f"{subject.name} gives {sorted(rows)} results for a batch of {size}: one a sample")
        results = found.finish(model, results)
    _writable(subject.name, results)


def _writable(name: str, results: Any) -> None:
    batches = results if isinstance(results, list) else [results]
    plain = [b.tensors() if isinstance(b, Codes) else b for b in batches]
    with tempfile.TemporaryDirectory(dir=folder()) as place:
        try:
            write(plain if isinstance(results, list) else plain[0], Path(place))
        except (TypeError, ValueError, RuntimeError) as error:
            raise Fault(f"what {name} predicts can't be written: {error}: return tensors or plain rows") from error
