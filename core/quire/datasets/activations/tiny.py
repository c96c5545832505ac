"""The subject ``tiny``: a byte language model trained on Python's own library, once per cache folder."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from quire.errors import ConfigError

log = logging.getLogger(__name__)

STEPS = {"tiny": 1500, "tiny-30s": 300}
"""Training steps of each; about two minutes and half a minute on two cores."""

RECIPE: dict[str, Any] = {
    "config": {"model_type": "gpt2", "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 64},
    "length": 64,
    "rows": 32,
    "rate": 2e-3,
    "seed": 0,
}


def cache_folder() -> Path:
    """Where what is built once is kept: ``$QUIRE_CACHE``, by default ``~/.cache/quire``."""
    from quire.data import expand

    return expand(os.environ.get("QUIRE_CACHE") or "~/.cache/quire")


def tiny_subject(name: str, steps: int | None = None) -> Path:
    """The folder of a trained tiny subject, an exported Quire model; trained on first use.

    Args:
        name: ``tiny`` or ``tiny-30s``.
        steps: Another number of training steps, for tests.

    Returns:
        A folder for ``quire.load``, named by everything that it depends on.

    Raises:
        ConfigError: an unknown name.
    """
    if name not in STEPS:
        raise ConfigError(f"there is no subject {name!r}; the embedded ones are {', '.join(STEPS)}")
    count = STEPS[name] if steps is None else steps
    data = _text()
    said = [RECIPE, count, data.tokenizer.fingerprint, _fingerprint(data)]
    return trained_once(name, said, count, lambda folder: _train(data, count, folder))


def trained_once(name: str, said: list[Any], steps: int, train: Callable[[Path], None]) -> Path:
    """A subject's folder in the cache, filled on first use; several processes may ask at once.

    Args:
        name: Start of the folder's name.
        said: Everything that the subject depends on, as plain data; its digest ends the folder's name.
        steps: For the log.
        train: Writes an exported model into the folder that it is given.
    """
    digest = hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:8]
    target = cache_folder() / "subjects" / f"{name}-{digest}"
    if not (target / "config.json").is_file():
        log.warning("training the subject %s once (%d steps); it is kept in %s", name, steps, target)
        target.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
        try:
            train(part)
            if not target.exists():  # another process may have been faster; both are as good
                os.replace(part, target)
        except OSError:
            if not (target / "config.json").is_file():
                raise
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return target


def _text() -> Any:
    from quire.datasets.text import TextTokens

    return TextTokens(source="stdlib", length=RECIPE["length"], batch_size=RECIPE["rows"])


def _fingerprint(data: Any) -> str:
    digest = hashlib.sha256()
    for text in data.documents()["train"]:
        digest.update(text.encode())
    return digest.hexdigest()[:12]


def _train(data: Any, steps: int, folder: Path) -> None:
    """A plain loop, since it may run inside another run's set-up; the global random state is left as it was."""
    from quire.checkpoint import export
    from quire.model import Model
    from quire.roles.language.hf import HFCausal
    from quire.roles.language.next_token import NextToken

    rows = data.dataset("train").tensors["tokens"]
    with torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.enable_grad():
        torch.manual_seed(RECIPE["seed"])
        decoder = HFCausal(config={**RECIPE["config"], "embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0})
        model = Model(decoder=decoder, objective=NextToken(), spec=data.spec)
        model.configure_model()
        model.refer_tokenizer(data.tokenizer)
        model.train()
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(RECIPE["seed"]))
        moving = torch.optim.AdamW(decoder.parameters(), lr=RECIPE["rate"], weight_decay=0.01, betas=(0.9, 0.99))
        for step in range(steps):
            start = step * RECIPE["rows"] % max(1, len(rows) - RECIPE["rows"])
            batch = {"tokens": rows[order[start : start + RECIPE["rows"]]]}
            warm, left = min(1.0, (step + 1) / 50), 0.5 * (1 + math.cos(math.pi * step / steps))
            for group in moving.param_groups:
                group["lr"] = RECIPE["rate"] * warm * max(left, 0.05)
            loss = model.objective(model, batch)["next"]
            moving.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
            moving.step()
        export(model.eval(), folder)
