"""Log-mel frames: what a recording looks like to a frame encoder."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from quire.contracts import Part, Spec
from quire.errors import ConfigError


def mel_bank(sample_rate: int, fft: int, bands: int) -> Tensor:
    """Triangles on the HTK mel scale, 2595 log10(1 + f/700), from 0 Hz to half the rate: [fft // 2 + 1, bands].

    Raises:
        ConfigError: filters so narrow that no bin falls into them; says how many.
    """
    top = 2595 * math.log10(1 + sample_rate / 2 / 700)
    edges = 700 * (10 ** (torch.linspace(0, top, bands + 2, dtype=torch.double) / 2595) - 1)
    bins = torch.linspace(0, sample_rate / 2, fft // 2 + 1, dtype=torch.double)
    rising = (bins[:, None] - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - bins[:, None]) / (edges[2:] - edges[1:-1])
    bank = torch.minimum(rising, falling).clamp_min(0)
    empty = int((bank.sum(0) == 0).sum())
    if empty:
        raise ConfigError(
            f"{empty} of {bands} mel bands at {sample_rate} Hz with an FFT of {fft} points are empty: "
            "lower LogMel.bands or raise LogMel.fft"
        )
    return bank.float()


class LogMel(Part):
    """Audio → log-mel frames with a mask of the real ones.

    Frame t of T = samples // hop is centred on sample t * hop, with the edges mirrored (the frame after the last
    hop is dropped). Neighbouring frames then share samples, which tells a model that orders them who is next to
    whom; with ``overlap: false`` frame t sees exactly the samples t * hop to (t + 1) * hop, so no window reaches
    over a token border, however many frames a token stacks.

    Args:
        sample_rate: In Hz; null takes the data's.
        window: Window in milliseconds (Hann); with ``overlap: false`` the window is the hop.
        hop: Step from frame to frame in milliseconds.
        bands: Mel bands; null is 80, or 40 up to 8 kHz.
        fft: Points of the Fourier transform; null is the next power of two from ``window``, with or without overlap.
        overlap: Whether windows reach over frame borders.
        normalise: Whether each utterance gets mean 0 and variance 1 per band, over its real frames.

    Returns:
        frames [B,T,F] (0 where padded) and mask [B,T], True = real.

    Raises:
        ConfigError: empty mel bands (their number is named), an ``fft`` below the window, a ``sample_rate`` that
            is not the data's, or a window or hop of less than one sample.
    """

    bank: Tensor
    taper: Tensor

    def __init__(
        self,
        sample_rate: int | None = None,
        window: float = 25.0,
        hop: float = 10.0,
        bands: int | None = None,
        fft: int | None = None,
        overlap: bool = True,
        normalise: bool = True,
    ) -> None:
        super().__init__()
        if bands is not None and bands < 1:
            raise ConfigError(f"LogMel.bands must be at least 1, got {bands}")
        self.sample_rate, self.window_ms, self.hop_ms, self.bands = sample_rate, window, hop, bands
        self.fft, self.overlap, self.normalise = fft, overlap, normalise

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """Frames of generated tones."""
        from quire.datasets.speech import SpeechTones

        run = SpeechTones.tiny()
        run["data"]["init_args"]["features"] = {"class_path": "LogMel", "init_args": {"bands": 16}}
        return run

    def build(self, spec: Spec) -> None:
        """Make the window and the bank for ``spec["sample_rate"]``."""
        rate = spec.agree("sample_rate", self.sample_rate, self)
        self.hop = round(rate * self.hop_ms / 1000)
        nominal = round(rate * self.window_ms / 1000)
        self.window = nominal if self.overlap else self.hop
        if min(self.hop, self.window) < 1:
            raise ConfigError(
                f"LogMel.window and hop must be at least a sample, got {self.window_ms}, {self.hop_ms} ms"
            )
        self.points = self.fft or 2 ** math.ceil(math.log2(max(nominal, self.window)))
        if self.points < self.window:
            raise ConfigError(f"LogMel.fft={self.points} is below the window of {self.window} samples: raise it")
        self.width = self.bands or (80 if rate > 8000 else 40)  # [I] 40 at 8 kHz
        self.register_buffer("bank", mel_bank(rate, self.points, self.width), persistent=False)
        self.register_buffer("taper", torch.hann_window(self.window), persistent=False)

    def count(self, samples: int) -> int:
        """Frames of a recording of that many samples."""
        return samples // self.hop

    def forward(self, audio: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """audio [B,S] and the real samples of each [B] → frames [B,T,F], mask [B,T]."""
        total = self.count(audio.shape[1])
        before = self.window // 2 if self.overlap else 0
        after = max(0, (total - 1) * self.hop + self.window - before - audio.shape[1])
        if before or after:
            audio = pad(audio[:, None], (before, after), mode="reflect")[:, 0]
        windows = audio.unfold(1, self.window, self.hop)[:, :total] * self.taper  # [B,T,window]
        power = torch.fft.rfft(windows, self.points).abs().square()
        frames = (power @ self.bank + 1e-6).log()  # the floor keeps digital silence finite
        mask = torch.arange(total, device=audio.device) < (lengths // self.hop)[:, None]
        if self.normalise:
            frames = _standardised(frames, mask)
        return frames * mask[..., None], mask


def _standardised(frames: Tensor, mask: Tensor) -> Tensor:
    real = mask[..., None].to(frames.dtype)
    count = real.sum(1, keepdim=True).clamp_min(1)
    mean = (frames * real).sum(1, keepdim=True) / count
    variance = ((frames - mean).square() * real).sum(1, keepdim=True) / count
    return (frames - mean) / variance.sqrt().clamp_min(1e-3)
