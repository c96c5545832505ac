"""Log-mel frames, wav folders and generated tones."""

from __future__ import annotations

import math
import os
import wave
from pathlib import Path

import numpy as np
import pytest
import torch

from quire.contracts import Spec, build
from quire.data import check_batch
from quire.datasets.logmel import LogMel, mel_bank
from quire.datasets.speech import SpeechFolder, SpeechTones
from quire.datasets.wav import read_wav, write_wav
from quire.errors import ConfigError, DataError


def logmel(rate: int = 16000, **given: object) -> LogMel:
    made = LogMel(**given)  # type: ignore[arg-type]
    build(made, Spec(sample_rate=rate))
    return made


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return 0.1 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- log-mel
def test_empty_mel_filters_are_refused_by_number() -> None:
    with pytest.raises(ConfigError, match="1 of 80 mel bands at 8000 Hz with an FFT of 200 points are empty"):
        mel_bank(8000, 200, 80)  # role-tokens section 7: 1 [V]
    assert bool((mel_bank(8000, 256, 80).sum(0) > 0).all())  # with 256 points none [V]


def test_mel_bank_is_triangles_on_the_htk_scale() -> None:
    bank, bins = mel_bank(16000, 512, 20), torch.linspace(0, 8000, 257)
    peaks = 700 * (10 ** (torch.linspace(0, 2595 * math.log10(1 + 8000 / 700), 22)[1:-1] / 2595) - 1)
    assert float((bins[bank.argmax(0)] - peaks).abs().max()) <= 16000 / 512  # within one bin
    assert float(bank.max()) <= 1 and float(bank.min()) == 0
    inside = (bins > peaks[0]) & (bins < peaks[-1])
    assert torch.allclose(bank.sum(1)[inside], torch.ones(int(inside.sum())), atol=1e-5)  # neighbours add up to 1


def test_one_second_is_a_hundred_frames_of_the_default_bands() -> None:
    for rate, bands in ((16000, 80), (8000, 40), (22050, 80)):
        frames, mask = logmel(rate)(noise(2, rate), torch.tensor([rate, rate]))
        assert frames.shape == (2, 100, bands) and bool(mask.all())


def test_frames_agree_with_torch_stft() -> None:
    audio, made = noise(1, 16000), logmel(normalise=False)
    spectrum = torch.stft(
        audio, 512, 160, 400, torch.hann_window(400), center=True, pad_mode="reflect", return_complex=True
    )
    expected = (spectrum.abs().square().transpose(1, 2)[:, :100] @ mel_bank(16000, 512, 80) + 1e-6).log()
    frames, _ = made(audio, torch.tensor([16000]))
    assert torch.allclose(frames[:, 2:98], expected[:, 2:98], atol=1e-4)  # edges are mirrored a little differently


def test_without_overlap_a_frame_sees_its_own_samples_only() -> None:
    for rate in (8000, 16000):
        hop = rate // 100
        apart, over = logmel(rate, overlap=False, normalise=False), logmel(rate, normalise=False)
        audio = noise(1, rate)
        changed = audio.clone()
        changed[:, 10 * hop : 12 * hop] = noise(1, 2 * hop, seed=1)  # a token of two frames
        length = torch.tensor([rate])
        moved = [
            (m(audio, length)[0] != m(changed, length)[0]).any(-1)[0].nonzero()[:, 0].tolist() for m in (apart, over)
        ]
        assert moved[0] == [10, 11]
        assert set(moved[1]) > {10, 11}


def test_each_utterance_is_normalised_over_its_real_frames() -> None:
    made, audio = logmel(8000), noise(3, 8000)
    lengths = torch.tensor([8000, 4000, 90])
    for i, n in enumerate(lengths):
        audio[i, n:] = 0
    frames, mask = made(audio, lengths)
    assert mask.sum(1).tolist() == [100, 50, 1]
    assert bool((frames[~mask] == 0).all()) and bool(torch.isfinite(frames).all())
    real = frames[1, :50]
    assert torch.allclose(real.mean(0), torch.zeros(40), atol=1e-4)
    assert torch.allclose(real.var(0, unbiased=False), torch.ones(40), atol=1e-3)
    alone, _ = made(audio[1:2, :4800], torch.tensor([4000]))
    assert torch.allclose(alone[0, :49], frames[1, :49], atol=1e-4)  # longer padding changes no real frame


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"sample_rate": 8000}, "LogMel has sample_rate=8000, the data has sample_rate=16000"),
        ({"fft": 128}, "LogMel.fft=128 is below the window of 400 samples"),
        ({"hop": 0.01}, "must be at least a sample"),
        ({"bands": 0}, "LogMel.bands must be at least 1, got 0"),
    ],
)
def test_impossible_features_are_refused(given: dict, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        logmel(16000, **given)


# ---- wav
@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_wav_of_every_width_is_read(tmp_path: Path, width: int) -> None:
    top = 2 ** (8 * width - 1)
    values = np.array([0, top // 2, -top // 2, top - 1, -top], np.int64)
    raw = (
        (values + 128).astype(np.uint8).tobytes()
        if width == 1
        else b"".join(int(v).to_bytes(width, "little", signed=True) for v in values)
    )
    with wave.open(str(tmp_path / "x.wav"), "wb") as opened:
        opened.setparams((1, width, 8000, 0, "NONE", ""))
        opened.writeframes(raw)
    sound, rate = read_wav(tmp_path / "x.wav")
    assert rate == 8000
    assert torch.allclose(sound, torch.tensor([0, 0.5, -0.5, (top - 1) / top, -1.0]), atol=1e-7)


def recordings(root: Path, rate: int = 8000, seconds: float = 0.2) -> Path:
    for part, takes in (("train", 4), ("test", 2)):
        for kind in ("no", "yes"):
            for who in ("ann", "bob", "cy"):
                for take in range(takes):
                    file = root / part / kind / f"{kind}_{who}_{take}.wav"
                    file.parent.mkdir(parents=True, exist_ok=True)
                    write_wav(file, noise(int(rate * seconds), seed=take), rate)
    return root


def test_a_folder_gives_audio_frames_mask_and_label(tmp_path: Path) -> None:
    data = SpeechFolder(str(recordings(tmp_path)), seconds=0.3, batch_size=6, val_samples=6)
    batch = next(iter(data.loader("train", shuffle=True)))
    check_batch(batch)
    assert batch["audio"].shape == (6, 2400) and batch["frames"].shape == (6, 30, 40)
    assert batch["mask"].sum(1).tolist() == [20] * 6 and batch["audio"][:, 1600:].abs().max() == 0
    assert data.spec == {"frames": 30, "bands": 40, "classes": 2, "sample_rate": 8000}
    assert [len(data.dataset(n)) for n in ("train", "val", "test")] == [18, 6, 12]
    assert data.dataset("val").tensors["label"].bincount().tolist() == [3, 3]


def test_long_recordings_are_cut_and_counted(tmp_path: Path) -> None:
    data = SpeechFolder(str(recordings(tmp_path)), seconds=0.15)
    data.dataset("train")
    assert data.cut["train"] == 24 and data.dataset("train").tensors["audio"].shape[1] == 1200


def test_held_out_speakers_are_in_no_other_split(tmp_path: Path) -> None:
    data = SpeechFolder(str(recordings(tmp_path)), test_speakers=["bob"])
    split = {part: {f.name.split("_")[1] for f in files} for part, files in data._files.items()}
    assert split == {"train": {"ann", "cy"}, "test": {"bob"}}
    assert [len(data.dataset(n)) for n in ("train", "test")] == [24, 12]
    for wrong in (["eve"], ["ann", "bob", "cy"], []):
        with pytest.raises(ConfigError, match="data.test_speakers must be some, not all, of ann, bob, cy"):
            SpeechFolder(str(tmp_path), test_speakers=wrong).dataset("train")
    with pytest.raises(ConfigError, match="finds no speaker in"):
        SpeechFolder(str(tmp_path), test_speakers=["bob"], speaker="^(x)").dataset("train")


def test_another_rate_is_an_error_until_resampling_is_asked_for(tmp_path: Path) -> None:
    root = recordings(tmp_path)
    odd = root / "train" / "yes" / "yes_zoe_0.wav"
    tone = torch.sin(2 * torch.pi * 440 * torch.arange(3200) / 16000)
    write_wav(odd, 0.5 * tone, 16000)
    with pytest.raises(DataError, match=r"yes_zoe_0.wav has 16000 Hz, 8000 Hz is expected: set data.target_rate"):
        SpeechFolder(str(root)).dataset("train")
    data = SpeechFolder(str(root), target_rate=8000)
    sound = data.dataset("train").tensors["audio"][-1, :1600]
    expected = 0.5 * torch.sin(2 * torch.pi * 440 * torch.arange(1600) / 8000)
    assert float((sound - expected)[100:-100].abs().max()) < 0.01
    assert data.spec["sample_rate"] == 8000


def test_stereo_empty_and_broken_files_are_named(tmp_path: Path) -> None:
    root = recordings(tmp_path)
    file = root / "train" / "yes" / "yes_zoe_0.wav"

    def refused(said: str, error: type[Exception] = DataError) -> None:
        with pytest.raises(error, match=said):
            SpeechFolder(str(root)).dataset("train")

    with wave.open(str(file), "wb") as opened:
        opened.setparams((2, 2, 8000, 0, "NONE", ""))
        opened.writeframes(b"\0" * 400)
    refused("yes_zoe_0.wav has 2 channels, 1 is expected")
    write_wav(file, torch.zeros(0), 8000)
    refused("yes_zoe_0.wav is empty")
    write_wav(file, torch.zeros(50), 8000)
    refused("yes_zoe_0.wav has 50 samples; at least one frame of 80 is needed")
    write_wav(file, torch.zeros(800), 8000)
    file.write_bytes(file.read_bytes()[:-100])
    refused("yes_zoe_0.wav is truncated: 750 of 800 samples")
    file.write_bytes(b"RIFFnothing")
    refused("yes_zoe_0.wav can't be read as PCM wav")


def test_missing_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no folder .*train; recordings lie in train/CLASS/\*.wav"):
        SpeechFolder(str(tmp_path)).dataset("train")
    (tmp_path / "train" / "a").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"train holds no CLASS/\*.wav"):
        SpeechFolder(str(tmp_path)).dataset("train")


# ---- tones
def test_tones_are_the_same_every_time_and_differ_between_splits() -> None:
    given = {"sample_rate": 8000, "seconds": 0.2, "length": 48}
    a, b = (SpeechTones(**given, seed=s).dataset("train").tensors for s in (0, 1))
    assert all(torch.equal(a[k], b[k]) for k in a)
    data = SpeechTones(**given)
    val, test = (data.dataset(n).tensors for n in ("val", "test"))
    assert len(val["audio"]) == len(test["audio"]) == 12 and not torch.equal(val["audio"], test["audio"])
    check_batch(next(iter(data.loader("val"))))
    assert data.spec == {"frames": 20, "bands": 40, "classes": 6, "sample_rate": 8000}
    assert float(a["audio"].abs().max()) <= 1 and a["label"].bincount().tolist() == [8] * 6
    assert bool((a["mask"].sum(1) < 20).any())  # clips of several lengths


def test_the_default_tones_make_fifty_tokens_of_two_frames() -> None:
    data = SpeechTones(length=24)
    assert data.spec == {"frames": 100, "bands": 80, "classes": 6, "sample_rate": 16000}  # mp3 section 5: N=50


def test_tones_follow_their_contour() -> None:
    data = SpeechTones(length=24, features=LogMel(normalise=False))
    frames = data.dataset("train").tensors
    power = frames["frames"].exp()
    centre = (power * torch.arange(80)).sum(-1) / power.sum(-1)  # in bands
    for kind, sign in (("rising", 1), ("falling", -1)):
        rows = frames["label"] == data.classes.index(kind)
        assert bool((sign * (centre[rows, 60] - centre[rows, 5]) > 0).all())


def test_speech_arguments_are_checked() -> None:
    with pytest.raises(ConfigError, match="data.length must be at least 24"):
        SpeechTones(length=4)
    with pytest.raises(ConfigError, match="data.seconds is 0.001, less than one window"):
        SpeechTones(seconds=0.001).dataset("train")


def test_real_spoken_digits() -> None:
    root = Path(os.environ.get("QUIRE_DATA", ""), "") / "fsdd"
    if not root.is_dir():
        pytest.skip("QUIRE_DATA holds no fsdd")
    data = SpeechFolder("$QUIRE_DATA/fsdd")
    assert (len(data.dataset("train")), len(data.dataset("test"))) == (1200, 300)
    assert data.cut["train"] + data.cut["test"] == 10  # role-tokens section 7 [V]
    assert data.spec == {"frames": 100, "bands": 40, "classes": 10, "sample_rate": 8000}
    check_batch(next(iter(data.loader("test"))))
