"""Source rows in, activation rows out: one forward pass of the subject a chunk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from quire.contracts import Batch
from quire.datasets.activations.rows import Rows
from quire.errors import ConfigError, DataError
from quire.roles.sites.reading import Reading
from quire.roles.sites.subject import Subject


class Forwards:
    """Chunks of activation rows from a subject.

    Args:
        subject: The frozen model.
        rows: The source's rows.
        sites: Sites that are read in one forward pass; their widths stand side by side in ``activation``.
        target: Another site, for transcoders: ``target`` of each row.
        with_grad: Also ``grad``, of the subject's summed loss.
        drop_special: Leave special tokens out.
        dtype: What rows are kept in.
    """

    def __init__(
        self,
        subject: Subject,
        rows: Rows,
        sites: Sequence[str],
        target: str | None,
        with_grad: bool,
        drop_special: bool,
        dtype: torch.dtype,
    ) -> None:
        self.subject, self.rows, self.sites, self.target = subject, rows, list(sites), target
        self.with_grad, self.drop_special, self.dtype = with_grad, drop_special, dtype
        self.per_token = max(subject.sites.place(s).heads if is_heads(subject, s) else 1 for s in self.sites)
        if self.per_token > 1 and (len(self.sites) > 1 or target):
            raise ConfigError("a heads site has one row a head: read it alone, without other sites or a target_site")

    def plan(self, epoch: int, shuffle: bool, rank: int = 0, world: int = 1) -> list[Any]:
        """One entry a forward pass."""
        return self.rows.plan(epoch, shuffle, rank, world)

    def fed(self, plan: list[Any]) -> int:
        """Rows that a plan gives."""
        return self.rows.fed(plan) * self.per_token

    def read(self, indices: list[int]) -> dict[str, Tensor]:
        """The rows of one forward pass, on the subject's device.

        Raises:
            DataError: an activation or gradient that is not finite, with site, row and position.
        """
        batch = moved(self.rows.batch(indices), self.subject.device)
        wanted = [*self.sites, *([self.target] if self.target else [])]
        found = self.subject.sites.read(batch, wanted, grad=self.with_grad)
        first = found.values[self.sites[0]]
        about = described(self.subject, batch, first)
        keep = about["mask"] & ~about["special"] if self.drop_special else about["mask"]
        self._check(found, keep, batch["index"])
        chosen = None if bool(keep.all()) else keep.flatten().nonzero().squeeze(1)

        def rows(x: Tensor) -> Tensor:
            flat = x.flatten(0, 1)
            return flat if chosen is None else flat[chosen]

        made = {"activation": self._joined(found.values, rows)}
        if self.with_grad:
            made["grad"] = self._joined(found.grads, rows)
        if self.target:
            made["target"] = rows(found.values[self.target]).to(self.dtype)
        for name in ("token", "position", "special", "instance", "label"):
            if name in about:
                made[name] = rows(about[name])
        if self.per_token > 1:
            heads = self.per_token
            made = {
                k: v.flatten(0, 1) if k in ("activation", "grad") else v.repeat_interleave(heads, 0)
                for k, v in made.items()
            }
            made["head"] = torch.arange(heads, device=first.device).repeat(len(made["activation"]) // heads)
        return made

    def _joined(self, values: dict[str, Tensor], rows: Any) -> Tensor:
        parts = [rows(values[s]).to(self.dtype) for s in self.sites]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    def _check(self, found: Reading, keep: Tensor, index: Tensor) -> None:
        for what, values in (("activations", found.values), ("gradients", found.grads)):
            for site, x in values.items():
                if bool(torch.isfinite(x.sum(dtype=torch.float32))):
                    continue
                bad = (~torch.isfinite(x).flatten(2).all(-1) & keep).nonzero()
                if len(bad):
                    row, place = bad[0].tolist()
                    raise DataError(
                        f"{what} of site {site} of subject {self.subject.name} are not finite: source row"
                        f" {int(index[row])} (number {row} of its batch), position {place}"
                    )


def described(subject: Subject, batch: Batch, like: Tensor) -> Batch:
    """Per token, [B,T]: mask, special, position, instance, and token and label where there are.

    Args:
        subject: The subject.
        batch: What it read.
        like: [B,T,…] what was read.
    """
    size, length = like.shape[:2]
    device = like.device
    tokens, mask = batch.get("tokens"), batch.get("mask")
    position = torch.arange(length, device=device).expand(size, length)
    if mask is None or mask.shape != (size, length):
        mask = torch.ones(size, length, dtype=torch.bool, device=device)
    else:
        position = (mask.long().cumsum(1) - 1).clamp(min=0)
    special = batch.get("special")
    if special is None or special.shape != mask.shape:
        special = torch.zeros_like(mask)
        special[:, : getattr(subject.part, "prefix_tokens", 0)] = True
    out = {"mask": mask, "special": special, "position": position}
    out["instance"] = batch["index"].to(device)[:, None].expand(size, length)
    if tokens is not None and tokens.shape == mask.shape:
        out["token"] = tokens
    label = batch.get("label")
    if isinstance(label, Tensor) and label.shape == (size,):
        out["label"] = label[:, None].expand(size, length)
    return out


def moved(batch: Batch, device: torch.device) -> Batch:
    """The batch on a device."""
    return {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}


def is_heads(subject: Subject, site: str) -> bool:
    """Whether a site gives one row a head."""
    return subject.sites.place(site).side == "heads"


def rows_of(batch: Batch) -> Iterator[tuple[str, Tensor]]:
    """Fields of an analysis batch, one row a real token: what a per-row encoder reads."""
    mask = batch["mask"]
    for name, values in batch.items():
        if isinstance(values, Tensor) and values.shape[:2] == mask.shape:
            yield name, values[mask]
    yield "instance", batch["index"][:, None].expand(mask.shape)[mask]
