"""Reading, writing and resampling recordings."""

import errno
import os

import numpy as np
import pytest
import scipy.signal
import soundfile
import torch

from speechbrain_taskarith.data import (
    encode_audio,
    read_audio,
    resample_wave,
    to_pcm16,
    write_audio,
)


def tone(frequency, rate, seconds=0.5, level=0.5):
    time = torch.arange(round(seconds * rate)) / rate
    return level * torch.sin(2 * torch.pi * frequency * time)


@pytest.mark.parametrize("suffix", ["wav", "flac"])
def test_the_16_bit_grid_survives_a_file(tmp_path, suffix):
    wave = to_pcm16(torch.randn(5000) * 0.4)
    path = tmp_path / f"a.{suffix}"
    write_audio(path, wave, 16000)
    assert torch.equal(read_audio(path, 16000), wave)
    found, rate = soundfile.read(path, dtype="int16")
    assert rate == 16000
    assert np.array_equal(found, (wave * 32768).numpy().astype(np.int16))
    assert os.listdir(tmp_path) == [path.name]


def test_the_grid_clips_at_full_scale():
    wave = to_pcm16(torch.tensor([1.0, 1.5, -1.0, -1.5, 1e-9]))
    assert wave.tolist() == [32767 / 32768, 32767 / 32768, -1.0, -1.0, 0.0]


def test_channels_are_averaged(tmp_path):
    stereo = np.stack([np.full(100, 0.5), np.full(100, -0.25)], axis=1)
    soundfile.write(tmp_path / "a.wav", stereo, 16000)
    wave = read_audio(tmp_path / "a.wav", 16000)
    assert torch.allclose(wave, torch.full((100,), 0.125), atol=1e-4)


@pytest.mark.parametrize(("old", "new"), [(22050, 16000), (8000, 16000)])
def test_resampling_keeps_what_both_rates_can_hold(old, new):
    # The oracle is the tone itself at the other rate.
    for frequency in (200, 1000, 3000):
        found = resample_wave(tone(frequency, old), old, new)
        expected = tone(frequency, new)
        inner = slice(300, 7000)
        assert (found[inner] - expected[inner]).abs().max() < 2e-3


def test_resampling_removes_what_the_lower_rate_cannot_hold():
    found = resample_wave(tone(9500, 22050), 22050, 16000)
    assert found[300:7000].abs().max() < 1e-3


def test_resampling_agrees_with_scipy():
    generator = torch.Generator().manual_seed(0)
    wave = resample_wave(torch.randn(4000, generator=generator), 8000, 22050)
    found = resample_wave(wave, 22050, 16000)
    expected = scipy.signal.resample_poly(wave.double().numpy(), 320, 441)
    inner = slice(200, -200)
    error = found.numpy()[inner] - expected[: len(found)][inner]
    # The input has nothing above 4 kHz, where the two filters differ.
    assert np.sqrt((error**2).mean()) < 2e-3 * expected.std()


def test_same_rate_is_the_same_tensor():
    wave = torch.randn(10)
    assert resample_wave(wave, 16000, 16000) is wave


def test_a_rate_may_be_a_float():
    wave = torch.randn(10)
    assert encode_audio(wave, 8e3, "wav") == encode_audio(wave, 8000, "wav")


@pytest.mark.parametrize(
    "dtype, tolerance",
    [(torch.float64, 1e-6), (torch.float16, 2e-3), (torch.bfloat16, 2e-2)],
)
def test_any_precision_resamples(dtype, tolerance):
    wave = tone(440, 8000).to(dtype)
    found = resample_wave(wave, 8000, 16000)
    assert found.dtype == dtype
    expected = resample_wave(wave.float(), 8000, 16000)
    torch.testing.assert_close(found.float(), expected, atol=tolerance, rtol=0)
    empty = resample_wave(torch.zeros(2, 0, dtype=dtype), 8000, 16000)
    assert empty.shape == (2, 0) and empty.dtype == dtype
    assert resample_wave(wave[None][:0], 8000, 16000).shape == (
        0,
        2 * len(wave),
    )
    with pytest.raises(ValueError, match="wave / 32768"):
        resample_wave(wave.short(), 8000, 16000)


def test_wrong_rate_names_the_file_and_both_rates(tmp_path):
    write_audio(tmp_path / "a.wav", torch.zeros(80), 8000)
    with pytest.raises(ValueError) as caught:
        read_audio(tmp_path / "a.wav", 16000)
    for part in ("a.wav", "8000 Hz", "16000 Hz", "resample=True"):
        assert part in str(caught.value)
    assert len(read_audio(tmp_path / "a.wav", 16000, resample=True)) == 160


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.wav: no such"):
        read_audio(tmp_path / "nowhere.wav", 16000)
    with pytest.raises(FileNotFoundError):
        read_audio(tmp_path, 16000)


@pytest.mark.parametrize("content", [b"", b"not audio at all", b"RIFF\0\0"])
def test_no_audio(tmp_path, content):
    (tmp_path / "a.wav").write_bytes(content)
    with pytest.raises(ValueError, match="a.wav: unreadable as audio"):
        read_audio(tmp_path / "a.wav", 16000)


def test_truncated_flac(tmp_path):
    write_audio(tmp_path / "a.flac", torch.randn(16000) * 0.1, 16000)
    content = (tmp_path / "a.flac").read_bytes()
    (tmp_path / "a.flac").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="a.flac"):
        read_audio(tmp_path / "a.flac", 16000)


def test_no_samples(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.zeros(0), 16000)
    with pytest.raises(ValueError, match="a.wav: the recording has no samples"):
        read_audio(tmp_path / "a.wav", 16000)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite(tmp_path, value):
    samples = np.zeros(100, dtype=np.float32)
    samples[50] = value
    soundfile.write(tmp_path / "a.wav", samples, 16000, subtype="FLOAT")
    with pytest.raises(ValueError, match="a.wav.*NaN or infinite"):
        read_audio(tmp_path / "a.wav", 16000)
    with pytest.raises(ValueError, match="b.wav.*NaN or infinite"):
        write_audio(tmp_path / "b.wav", torch.from_numpy(samples), 16000)
    assert not (tmp_path / "b.wav").exists()


@pytest.mark.parametrize(
    ("name", "wave", "rate"),
    [
        ("a.mp3", torch.zeros(10), 16000),
        ("a", torch.zeros(10), 16000),
        ("a.wav", torch.zeros(0), 16000),
        ("a.wav", torch.zeros(1, 10), 16000),
        # Once clipped, all of them.
        ("a.wav", torch.full((10,), 900, dtype=torch.int16), 16000),
        ("a.wav", torch.zeros(10), 0),
        ("a.wav", torch.zeros(10), 16000.5),
    ],
)
def test_nothing_is_written_for_bad_input(tmp_path, name, wave, rate):
    with pytest.raises(ValueError, match=name):
        write_audio(tmp_path / name, wave, rate)
    assert os.listdir(tmp_path) == []


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    write_audio(tmp_path / "a.wav", torch.zeros(10), 16000)
    before = (tmp_path / "a.wav").read_bytes()

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="a.wav"):
        write_audio(tmp_path / "a.wav", torch.ones(10), 16000)
    assert (tmp_path / "a.wav").read_bytes() == before
    assert os.listdir(tmp_path) == ["a.wav"]
