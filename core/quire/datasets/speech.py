"""Speech data modules: recordings, their log-mel frames, and which frames are real."""

from __future__ import annotations

import functools
import re
import tempfile
from collections.abc import Callable, Sequence
from math import gcd
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from quire.contracts import Spec, build
from quire.data import SPLITS, Fields, expand, mix
from quire.datasets.logmel import LogMel
from quire.datasets.splits import TrainTest
from quire.datasets.wav import read_wav, write_wav
from quire.errors import ConfigError, DataError


class Speech(TrainTest):
    """What speech sets share. Subclass it and write ``rate``, ``classes`` and ``recordings``.

    Args:
        seconds: Length of every sample in seconds; shorter ones are padded with zeros, longer ones cut.
        features: How audio becomes frames; null is ``LogMel()`` with its defaults.
        **kwargs: Arguments of ``TrainTest`` (``val_samples``) and ``DataModule``.

    Raises:
        ConfigError: ``seconds`` shorter than one window.
    """

    fields = ("audio", "frames", "mask", "label", "index")
    rate: int
    """Samples a second."""
    classes: Sequence[str]
    """Names of the classes, in the order of their labels."""

    def __init__(self, seconds: float = 1.0, features: LogMel | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.seconds, self.features = seconds, features or LogMel()

    def recordings(self, part: str) -> tuple[Tensor, Tensor, Tensor]:
        """audio [N,S] in [-1,1], the real samples of each [N], label [N]."""
        raise NotImplementedError

    @property
    def samples(self) -> int:
        """S: samples of a recording."""
        return round(self.seconds * self.rate)

    @functools.cached_property
    def logmel(self) -> LogMel:
        """``features``, built for this sample rate."""
        build(self.features, Spec(sample_rate=self.rate))
        if self.samples < max(self.features.hop, self.features.window):
            raise ConfigError(f"data.seconds is {self.seconds:g}, less than one window of LogMel: raise it")
        return self.features

    def load(self, part: str) -> Fields:
        """One part, in memory, frames included."""
        audio, lengths, label = self.recordings(part)
        pieces = [self.logmel(a, n) for a, n in zip(audio.split(256), lengths.split(256))]
        frames, mask = (torch.cat(p) for p in zip(*pieces))
        return Fields(audio=audio, frames=frames, mask=mask, label=label)

    def sizes(self) -> dict[str, Any]:
        """frames (T), bands (F), classes, sample_rate in Hz."""
        logmel = self.logmel
        frames = logmel.count(self.samples)
        return {"frames": frames, "bands": logmel.width, "classes": len(self.classes), "sample_rate": self.rate}


class SpeechFolder(Speech):
    """Recordings in ``ROOT/train/CLASS/*.wav`` and ``ROOT/test/CLASS/*.wav``; mono PCM of one sample rate.

    Fields: audio [B,S] float in [-1,1], frames [B,T,F], mask [B,T] (True = real frame), label [B].

    Args:
        root: The folder; ``$QUIRE_DATA`` and ``~`` are expanded.
        seconds: Length of every sample in seconds; shorter ones are padded, longer ones cut and counted in the log.
        target_rate: Rate in Hz to resample every recording to; null wants one rate and keeps it.
        features: How audio becomes frames; null is ``LogMel()`` with its defaults.
        test_speakers: Names of speakers who make up the test split, out of both folders, so that no speaker is in
            both; null keeps the folders' split.
        speaker: Regular expression whose first group is the speaker in a file's name.
        **kwargs: Arguments of ``TrainTest`` (``val_samples``) and ``DataModule``.

    Raises:
        ConfigError: no such folder, no wav in it, or a speaker whom no file name tells (the known ones are listed).
        DataError: a file that is broken, empty, not mono or of another rate: names it, with found and expected.
    """

    def __init__(
        self,
        root: str,
        seconds: float = 1.0,
        target_rate: int | None = None,
        features: LogMel | None = None,
        test_speakers: list[str] | None = None,
        speaker: str = r"^[^_]+_([^_]+)_",
        **kwargs: Any,
    ) -> None:
        super().__init__(seconds, features, **kwargs)
        self.root, self.target_rate = expand(root), target_rate
        self.test_speakers, self.speaker = test_speakers, speaker
        self.cut: dict[str, int] = {}

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """A few generated tones, written to a temporary folder."""
        folder, tones = Path(tempfile.mkdtemp()), SpeechTones(sample_rate=8000, seconds=0.3, length=36)
        for part in ("train", "test"):
            audio, lengths, label = tones.recordings(part)
            for i, (sound, length, kind) in enumerate(zip(audio, lengths, label)):
                file = folder / part / tones.classes[int(kind)] / f"{i}.wav"
                file.parent.mkdir(parents=True, exist_ok=True)
                write_wav(file, sound[: int(length)], tones.rate)
        given = {"root": str(folder), "seconds": 0.3, "batch_size": 12}
        return {"model": _TINY, "data": {"class_path": "SpeechFolder", "init_args": given}}

    @functools.cached_property
    def _files(self) -> dict[str, list[Path]]:
        found: dict[str, list[Path]] = {}
        for part in ("train", "test"):
            folder = self.root / part
            if not folder.is_dir():
                raise ConfigError(f"data.root: there is no folder {folder}; recordings lie in {part}/CLASS/*.wav")
            found[part] = sorted(folder.glob("*/*.wav"))
            if not found[part]:
                raise ConfigError(f"data.root: {folder} holds no CLASS/*.wav")
        return found if self.test_speakers is None else self._by_speaker(found["train"] + found["test"])

    def _by_speaker(self, files: list[Path]) -> dict[str, list[Path]]:
        speakers = {}
        for file in files:
            match = re.search(self.speaker, file.name)
            if match is None:
                raise ConfigError(f"data.speaker: {self.speaker!r} finds no speaker in {file}")
            speakers[file] = match[1]
        held, known = set(self.test_speakers or []), set(speakers.values())
        if not held or held - known or held == known:
            raise ConfigError(
                f"data.test_speakers must be some, not all, of {', '.join(sorted(known))}, got {sorted(held)}"
            )
        return {part: [f for f in files if (speakers[f] in held) == (part == "test")] for part in ("train", "test")}

    @functools.cached_property
    def classes(self) -> list[str]:  # type: ignore[override]
        """Names of the class folders, in order."""
        return sorted({file.parent.name for files in self._files.values() for file in files})

    @functools.cached_property
    def rate(self) -> int:  # type: ignore[override]
        """``target_rate``, or that of the first file."""
        return self.target_rate or read_wav(self._files["train"][0])[1]

    def recordings(self, part: str) -> tuple[Tensor, Tensor, Tensor]:
        """As ``Speech``; counts and logs what is longer than ``seconds``."""
        files = self._files[part]
        audio, lengths = torch.zeros(len(files), self.samples), torch.zeros(len(files), dtype=torch.long)
        self.cut[part] = 0
        for i, file in enumerate(files):
            sound = self._sound(file)
            self.cut[part] += len(sound) > self.samples
            sound = sound[: self.samples]
            if self.logmel.count(len(sound)) < 1:
                raise DataError(f"{file} has {len(sound)} samples; at least one frame of {self.logmel.hop} is needed")
            audio[i, : len(sound)], lengths[i] = sound, len(sound)
        if self.cut[part]:
            rank_zero_info(f"{self.cut[part]} of {len(files)} {part} recordings are cut at {self.seconds:g} s")
        return audio, lengths, torch.tensor([self.classes.index(f.parent.name) for f in files])

    def _sound(self, file: Path) -> Tensor:
        sound, rate = read_wav(file)
        if rate == self.rate:
            return sound
        if self.target_rate is None:
            raise DataError(f"{file} has {rate} Hz, {self.rate} Hz is expected: set data.target_rate to resample")
        from scipy.signal import resample_poly

        shared = gcd(rate, self.rate)
        changed = resample_poly(sound.numpy(), self.rate // shared, rate // shared)
        return torch.from_numpy(changed.astype(np.float32)).clamp(-1, 1)


_CONTOURS: dict[str, Callable[[Tensor], Tensor]] = {
    "rising": lambda u: u,
    "falling": lambda u: 1 - u,
    "arched": lambda u: 4 * u * (1 - u),
    "dipped": lambda u: 1 - 4 * u * (1 - u),
    "stepping": lambda u: (4 * u).floor() / 3,
    "waving": lambda u: torch.sin(6 * torch.pi * u) / 2 + 0.5,
}


def _contour(label: Tensor, place: Tensor) -> Tensor:
    """Octaves above the base pitch, [N,S]; ``place`` is 0..1 over the clip."""
    octaves = torch.empty_like(place)
    for kind, curve in enumerate(_CONTOURS.values()):
        octaves[label == kind] = 1.5 * curve(place[label == kind])
    return octaves


class SpeechTones(Speech):
    """Synthetic: generated chirps, one pitch contour a class, in every install. No speech is in it.

    A class is the course of the pitch over the clip: rising, falling, arched, dipped, stepping, waving. Base
    pitch, length, loudness, harmonics and noise differ from clip to clip; clip i of a split is always the same.

    Fields: audio [B,S] float in [-1,1], frames [B,T,F], mask [B,T] (True = real frame), label [B].

    Args:
        seconds: Length of every sample in seconds; the clips fill 70 to 100 % of it.
        sample_rate: In Hz.
        length: Training clips; validation and test have a quarter as many each.
        features: How audio becomes frames; null is ``LogMel()`` with its defaults.
        **kwargs: Arguments of ``DataModule``.

    Raises:
        ConfigError: ``length`` below 24, or a rate too low for the pitch.
    """

    classes = tuple(_CONTOURS)

    def __init__(
        self,
        seconds: float = 1.0,
        sample_rate: int = 16000,
        length: int = 1024,
        features: LogMel | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(seconds, features, **kwargs)
        if length < 24 or sample_rate < 8000:
            raise ConfigError(
                f"data.length must be at least 24 and data.sample_rate 8000, got {length} and {sample_rate}"
            )
        self.rate, self.length = sample_rate, length

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """Classify short clips."""
        given: dict[str, Any] = {"sample_rate": 8000, "seconds": 0.32, "length": 48, "batch_size": 12}
        return {"model": _TINY, "data": {"class_path": "SpeechTones", "init_args": given}}

    def split(self, name: str) -> Fields:
        """A set of its own for each split."""
        return super().split(name) if self.val_samples else self.part(name)  # type: ignore[return-value]

    def recordings(self, part: str) -> tuple[Tensor, Tensor, Tensor]:
        """Generated from (split, clip) alone."""
        count = self.length if part == "train" else self.length // 4
        generator = torch.Generator().manual_seed(mix(SPLITS.index(part)))

        def uniform(low: float, high: float) -> Tensor:
            return low + (high - low) * torch.rand(count, 1, generator=generator)

        label = torch.arange(count) % len(self.classes)
        lengths = (uniform(0.7, 1.0)[:, 0] * self.samples).long()
        time = torch.arange(self.samples)
        place = time / lengths[:, None]
        pitch = uniform(200, 400) * 2 ** _contour(label, place)  # Hz
        turns = (pitch.double().cumsum(1) / self.rate % 1).float() + uniform(0, 1)
        tone = sum(uniform(0.5, 1.0) / k * torch.sin(2 * torch.pi * k * turns) for k in (1, 2, 3))
        loudness = uniform(0.1, 0.3) * (1 + 0.3 * torch.sin(2 * torch.pi * (place * 3 + uniform(0, 1))))
        sound = loudness * tone + 0.005 * torch.randn(count, self.samples, generator=generator)
        return (sound * (time < lengths[:, None])).clamp(-1, 1), lengths, label


_TINY = {
    "encoder": {"class_path": "FrameEncoder", "init_args": {"width": 16, "depth": 1, "heads": 2}},
    "objective": "Classify",
}
