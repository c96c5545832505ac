"""Paired files: root/split/modality/class/file, the layout of Bachmann et al. 2022."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import Dataset

from quire.contracts import Batch
from quire.data import expand
from quire.datasets.images import Size
from quire.datasets.pixels import pair
from quire.datasets.splits import TrainTest
from quire.errors import ConfigError, DataError
from quire_multimae.adapters import tiny_run
from quire_multimae.files import fit, kind_of, read, write


class PairedFolders(TrainTest):
    """Files of several modalities that belong together: ``root/split/modality/class/file``. Bachmann et al. 2022.

    Splits are ``train`` and ``val`` (or ``test``). A sample is one name under every modality's folder; the suffix may
    differ. Class folders are optional; they make the label. Ids and depth with holes are resized by the nearest.

    Fields: one a modality, float [B,C,H,W] or int64 [B,h,w]; ``depth_valid`` [B,H,W] under ``missing: mask``; label.

    Args:
        root: The folder; ``$QUIRE_DATA`` and ``~`` are expanded.
        modalities: Name → ``rgb``, ``grey``, ``depth`` (npy, npz, float TIFF; 16-bit PNG is divided by 2^16) or
            ``classes:N``.
        suffixes: Name → suffix of its files; the others take any.
        size: Height and width in pixels (scaled to cover, middle taken); null takes files as they are.
        stride_levels: Name → pixels per cell of a class map; files may have either size.
        missing: Depth that isn't finite is an error, or masked: filled with the sample's median and told in
            ``depth_valid``.
        unpaired: Names that some modality lacks are an error, or skipped and counted in a warning.
        corrupt: A file that can't be read is an error when its sample comes up, or its sample is left out: then all
            files are read once at the start, and those left out are counted and named in a warning.
        **kwargs: Arguments of ``TrainTest`` (``val_samples``) and ``DataModule``.

    Raises:
        ConfigError: no such folder, an unknown kind, nothing in common.
        DataError: an unpaired, unreadable or wrong file (named), or sizes that don't agree.
    """

    fields = ("image", "depth", "semantic", "depth_valid", "label", "index")

    def __init__(
        self,
        root: str,
        modalities: dict[str, str] = {"image": "rgb", "depth": "depth"},  # noqa: B006
        suffixes: dict[str, str] | None = None,
        size: Size = None,
        stride_levels: dict[str, int] | None = None,
        missing: Literal["error", "mask"] = "error",
        unpaired: Literal["error", "skip"] = "error",
        corrupt: Literal["error", "skip"] = "error",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if missing not in ("error", "mask") or not {unpaired, corrupt} <= {"error", "skip"}:
            raise ConfigError(
                "data.missing is error or mask, data.unpaired and data.corrupt error or skip, got "
                f"{missing}, {unpaired} and {corrupt}"
            )
        self.root, self.size = expand(root), pair(size, "data.size")
        self.kinds = {name: kind_of(name, said) for name, said in modalities.items()}
        self.suffixes, self.strides = dict(suffixes or {}), dict(stride_levels or {})
        for name in (*self.suffixes, *self.strides):
            if name not in self.kinds:
                raise ConfigError(f"data names the modality {name!r}; there are {', '.join(self.kinds)}")
        self.missing, self.unpaired, self.corrupt = missing, unpaired, corrupt
        self._classes: list[str] | None = None
        valid = [f"{n}_valid" for n, (kind, _) in self.kinds.items() if kind == "depth" and missing == "mask"]
        label = ["label"] if self._class_names() else []
        self.fields = (*self.kinds, *valid, *label, "index")  # type: ignore[misc, assignment]

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """MultiMAE on files of generated scenes, written to a temporary folder."""
        from quire_multimae.shapes import scenes

        root = Path(tempfile.mkdtemp())
        for split, count in (("train", 32), ("val", 16)):
            made = scenes(count, (16, 16), 3, 1, len(split))
            for i in range(count):
                name = f"{int(made['label'][i])}/{i:03}.png"
                write(root / split / "image" / name, made["image"][i])
                write(root / split / "depth" / name, made["depth"][i] / 12)
        patch = {"patch": 8}
        run = tiny_run({"image": ("PatchAdapter", patch), "depth": ("PatchAdapter", patch)})
        given = {"root": str(root), "batch_size": 16}
        return {**run, "data": {"class_path": "PairedFolders", "init_args": given}}

    def _folder(self, part: str) -> Path:
        names = ("train",) if part == "train" else ("val", "test")
        found = [self.root / n for n in names if (self.root / n).is_dir()]
        if not found:
            raise ConfigError(
                f"data.root: {self.root} has no folder {' or '.join(names)} (root/split/modality/class/file)"
            )
        return found[0]

    def _class_names(self) -> list[str]:
        folder = self.root / "train" / next(iter(self.kinds))
        return sorted(f.name for f in folder.iterdir() if f.is_dir()) if folder.is_dir() else []

    def _names(self, part: str) -> dict[str, dict[str, Path]]:
        """Name without suffix → modality → file."""
        found: dict[str, dict[str, Path]] = {}
        for modality in self.kinds:
            folder = self._folder(part) / modality
            if not folder.is_dir():
                raise ConfigError(f"data.root: there is no folder {folder}")
            for file in sorted(f for f in folder.rglob("*") if f.is_file() and not f.name.startswith(".")):
                if file.suffix == self.suffixes.get(modality, file.suffix):
                    found.setdefault(str(file.relative_to(folder).with_suffix("")), {})[modality] = file
        whole = {name: files for name, files in found.items() if len(files) == len(self.kinds)}
        if len(whole) < len(found):
            name = next(n for n in found if n not in whole)
            lacks = next(m for m in self.kinds if m not in found[name])
            said = f"{len(found) - len(whole)} of {len(found)} {part} samples lack a modality, {name} {lacks} for one"
            if self.unpaired == "error":
                raise DataError(f"{said}: add the files, or set data.unpaired: skip")
            rank_zero_warn(f"{said}; they are left out")
        if self.corrupt == "skip":
            whole = self._readable(whole, part)
        if not whole:
            raise ConfigError(f"data.root: no name under {self._folder(part)} is in all of {', '.join(self.kinds)}")
        return dict(sorted(whole.items()))

    def _readable(self, names: dict[str, dict[str, Path]], part: str) -> dict[str, dict[str, Path]]:
        bad: dict[str, str] = {}
        for name, files in names.items():
            for modality, (kind, _) in self.kinds.items():
                try:
                    read(files[modality], kind)
                except DataError:
                    bad.setdefault(name, str(files[modality]))
        if bad:
            more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
            named = ", ".join(list(bad.values())[:5])
            rank_zero_warn(f"{len(bad)} of {len(names)} {part} samples can't be read and are left out: {named}{more}")
        return {name: files for name, files in names.items() if name not in bad}

    def load(self, part: str) -> Pairs:
        """One part, read sample by sample."""
        names = self._names(part)
        classes = self._class_names()
        labels = None
        if classes:
            unknown = sorted({n.split("/")[0] for n in names} - set(classes))
            if unknown:
                raise DataError(f"the {part} folder has the class {unknown[0]!r}, which the training folder lacks")
            labels = torch.tensor([classes.index(n.split("/")[0]) for n in names])
        return Pairs(list(names.values()), labels, self)

    def collate(self, samples: list[Batch]) -> Batch:
        """Stacked. Raises ``DataError`` when samples differ in size."""
        for name in self.kinds:
            sizes = sorted({tuple(s[name].shape[-2:]) for s in samples})
            if len(sizes) > 1:
                raise DataError(f"{name} files differ in size, {sizes[0]} and {sizes[1]}: set data.size")
        return super().collate(samples)

    def sizes(self) -> dict[str, Any]:
        """image_size, channels, classes of the label, and what each modality is."""
        sample: Batch = self.dataset("train")[0]
        modalities: dict[str, Any] = {}
        for name, (kind, classes) in self.kinds.items():
            size = list(sample[name].shape[-2:])
            about = {"classes": classes} if kind == "classes" else {"channels": len(sample[name])}
            modalities[name] = {**about, "size": size}
        first, *_ = self.kinds
        stride = self.strides.get(first, 1)
        made: dict[str, Any] = {"image_size": [s * stride for s in modalities[first]["size"]], "modalities": modalities}
        if "channels" in modalities.get("image", {}):
            made["channels"] = modalities["image"]["channels"]
        names = self._class_names()
        return {**made, "classes": len(names)} if names else made


class Pairs(Dataset):
    """Samples of several files each.

    Args:
        files: File by modality of every sample.
        labels: One class each, or None.
        of: The data module, for kinds and sizes.
    """

    def __init__(self, files: list[dict[str, Path]], labels: Tensor | None, of: PairedFolders) -> None:
        self.files, self.labels, self.of = files, labels, of

    def __len__(self) -> int:
        return len(self.files)

    def take(self, indices: Tensor) -> Pairs:
        """The samples at ``indices``."""
        labels = None if self.labels is None else self.labels[indices]
        return Pairs([self.files[i] for i in indices.tolist()], labels, self.of)

    def __getitem__(self, i: int) -> Batch:
        of, files = self.of, self.files[i]
        raw = {name: read(files[name], kind) for name, (kind, _) in of.kinds.items()}
        self._agree(raw, files)
        sample: Batch = {}
        for name, value in raw.items():
            stride = of.strides.get(name, 1)
            first = next(iter(raw))
            height, width = of.size or [s * of.strides.get(first, 1) for s in raw[first].shape[-2:]]
            size = (height // stride, width // stride)
            kind, classes = of.kinds[name]
            if kind == "depth":
                value = self._measured(name, value, files[name], size, sample)
            elif kind == "classes":
                value = fit(value, size, whole=False)
                if int(value.max()) >= classes and int(value.max()) != 255:
                    raise DataError(f"{files[name]}: {name} has id {int(value.max())} but classes={classes}")
            else:
                value = fit(value, size, whole=True).clamp(0, 1)
            sample[name] = value
        return sample if self.labels is None else {**sample, "label": self.labels[i]}

    def _measured(self, name: str, value: Tensor, file: Path, size: tuple[int, int], sample: Batch) -> Tensor:
        valid = torch.isfinite(value[0])
        if self.of.missing == "error":
            if not bool(valid.all()):
                count = int((~valid).sum())
                raise DataError(f"{file} has {count} values that aren't finite: set data.missing: mask")
            return fit(value, size, whole=True)
        value, valid = fit(value, size, whole=bool(valid.all())), fit(valid.long(), size, whole=False).bool()
        sample[f"{name}_valid"] = valid
        middle = value[0][valid].median() if bool(valid.any()) else value.new_zeros(())
        return torch.where(valid, value, middle)

    def _agree(self, raw: dict[str, Tensor], files: dict[str, Path]) -> None:
        first, *others = raw
        height, width = (s * (self.of.strides.get(first, 1)) for s in raw[first].shape[-2:])
        for name in others:
            h, w = raw[name].shape[-2:]
            stride = self.of.strides.get(name, 1)
            if (h, w) not in ((height, width), (height // stride, width // stride)):
                raise DataError(
                    f"{files[name]}: {name} is {h}x{w} but {first} is {height}x{width}; expected the same size "
                    f"at stride_level {stride}"
                )
