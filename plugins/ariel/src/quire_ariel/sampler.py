"""Points of the cube and their sentences: drawn, encoded, decoded, on the way to others. Celotti et al. 2020."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from quire.contracts import Batch, Sampler
from quire.data import mix
from quire.errors import ConfigError
from quire_ariel.codes import Sentences, VolumeCodes
from quire_ariel.decoder import VolumeDecoder

MODES = ("draw", "ancestral", "encode", "decode", "walk")


class UniformCube(Sampler):
    """Sentences of uniform points, and the other ways through the cube. Celotti et al. 2020.

    ``draw``: a uniform point for each sample, and more at the end of predict, ``draws`` in all. ``ancestral``: as many
    sentences sampled token by token, the control that uniform points must equal. ``encode``: each sentence's point,
    bits and volume. ``decode``: the sentence of each row of the field ``vector``, or of the encoder's vector.
    ``walk``: what lies on the straight line from each sentence to the next one of the batch.

    Args:
        draws: Sentences in all for ``draw`` and ``ancestral``.
        mode: One of the five.
        seed: Of points; a point depends on it and on its number alone.
        steps: Points of a walk, both ends included.

    Needs:
        decoder: VolumeDecoder. Fields: tokens to encode and walk; vector to decode, unless there is an encoder.

    Returns:
        A dict a sample: ``index``, ``tokens`` (end token included), ``text`` where there is a tokenizer, ``truncated``,
        ``log2_volume`` of the box; drawn ones their point ``z``; encoded ones ``z``, ``axis_bits`` and, where points
        are exact, ``code`` as pairs of numerator and bits; a walk a list of ``steps`` under ``walk``.

    Raises:
        ConfigError: an unknown mode, a number below 1, or nothing to decode.
    """

    decoder: VolumeDecoder

    def __init__(
        self,
        draws: int = 1000,
        mode: Literal["draw", "ancestral", "encode", "decode", "walk"] = "draw",
        seed: int = 0,
        steps: int = 9,
    ) -> None:
        super().__init__()
        if mode not in MODES:
            raise ConfigError(f"UniformCube.mode is one of {', '.join(MODES)}, got {mode!r}")
        if draws < 1 or steps < 2:
            raise ConfigError(f"UniformCube needs draws >= 1 and steps >= 2, got {draws} and {steps}")
        self.draws, self.mode, self.seed, self.steps = draws, mode, seed, steps

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """Questions of the small grammar."""
        from quire_ariel.decoder import tiny_volume

        return tiny_volume()

    def reads(self, stage: str) -> tuple[str, ...]:
        """Sentences where they are encoded."""
        return ("tokens",) if self.mode in ("encode", "walk") else ()

    @torch.no_grad()
    def forward(self, model: Any, batch: Batch) -> list[dict[str, Any]]:
        """One row a sample."""
        cube: VolumeDecoder = model.decoder.role(VolumeDecoder)
        index = batch["index"].tolist() if "index" in batch else list(range(_rows(batch)))
        if self.mode in ("draw", "ancestral"):
            return self._fresh(model, cube, index)
        if self.mode == "decode":
            return _said(model, cube.decode(self._points(model, batch)), index)
        codes = cube.encode(batch["tokens"], batch.get("mask"), add_eos=True)
        assert codes is not None
        return (
            self._encoded(model, batch, codes, index)
            if self.mode == "encode"
            else self._walk(model, cube, codes, index)
        )

    def finish(self, model: Any, results: list[Any]) -> Any:
        """One row a sentence; of ``draw`` and ``ancestral`` exactly ``draws`` rows."""
        rows = [row for batch in results for row in batch]
        if self.mode not in ("draw", "ancestral"):
            return rows
        if len(rows) < self.draws:
            first = max((row["index"] for row in rows), default=-1) + 1
            more = list(range(first, first + self.draws - len(rows)))
            rows += self._fresh(model, model.decoder.role(VolumeDecoder), more)
        return rows[: self.draws]

    def points(self, numbers: Sequence[int], dims: int) -> Tensor:
        """[len(numbers),dims] float64, uniform; each depends on the seed and its own number only."""
        generator = torch.Generator()
        drawn = [
            torch.rand(dims, generator=generator.manual_seed(mix(self.seed, n)), dtype=torch.float64) for n in numbers
        ]
        return torch.stack(drawn)

    # ---- modes
    @torch.no_grad()
    def _fresh(self, model: Any, cube: VolumeDecoder, index: list[int]) -> list[dict[str, Any]]:
        if self.mode == "ancestral":
            chance = torch.Generator().manual_seed(mix(self.seed, 1 + index[0]))
            return _said(model, cube.ancestral(len(index), chance), index)
        z = self.points(index, cube.latent_dim)
        rows = _said(model, cube.decode(z), index)
        return [{**row, "z": point} for row, point in zip(rows, z.tolist())]

    def _points(self, model: Any, batch: Batch) -> Any:
        if "vector" in batch:
            return batch["vector"]
        if model.encoder is None:
            raise ConfigError("UniformCube.mode=decode needs the field vector or an encoder: use data with vectors")
        return model.encoder(batch)

    def _encoded(self, model: Any, batch: Batch, codes: VolumeCodes, index: list[int]) -> list[dict[str, Any]]:
        mask = batch["mask"] if "mask" in batch else torch.ones_like(batch["tokens"], dtype=torch.bool)
        rows = []
        for i, place in enumerate(index):
            ids = batch["tokens"][i][mask[i]].tolist()
            row = {"index": place, "tokens": ids, **_text(model, ids), "log2_volume": float(codes.log2_volume[i])}
            row |= {"z": codes.z[i].tolist(), "axis_bits": codes.axis_bits[i].tolist()}
            if codes.exact is not None:
                row["code"] = [list(pair) for pair in codes.exact[i]]
            rows.append(row)
        return rows

    def _walk(self, model: Any, cube: VolumeDecoder, codes: VolumeCodes, index: list[int]) -> list[dict[str, Any]]:
        share = torch.linspace(0, 1, self.steps, dtype=torch.float64, device=codes.z.device)[:, None]
        rows = []
        for i, place in enumerate(index):
            a, b = codes.z[i], codes.z[(i + 1) % len(index)]
            steps = _said(model, cube.decode(a + share * (b - a)), list(range(self.steps)))
            rows.append({"index": place, "walk": [{k: v for k, v in s.items() if k != "index"} for s in steps]})
        return rows


def _rows(batch: Batch) -> int:
    return next(len(v) for v in batch.values() if isinstance(v, Tensor) and v.ndim)


def _text(model: Any, ids: list[int]) -> dict[str, str]:
    tokenizer = getattr(model, "tokenizer", None)
    return {} if tokenizer is None else {"text": tokenizer.decode(ids)}


def _said(model: Any, found: Sentences, index: list[int]) -> list[dict[str, Any]]:
    volumes, cut = found.log2_volume.tolist(), found.truncated.tolist()
    return [
        {"index": i, "tokens": ids, **_text(model, ids), "truncated": t, "log2_volume": v}
        for i, ids, t, v in zip(index, found.rows(), cut, volumes)
    ]
