"""The simulated recording, against measurements of what it claims."""

import pickle

import numpy as np
import pytest
import scipy.signal
import torch
from common.simulate import (
    RecordingSimulator,
    add_noise,
    coloured_noise,
    convolve,
    equalize,
    room_impulse_response,
    set_level,
    telephone,
)
from hypothesis import given, settings
from hypothesis import strategies as st


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def noise(length=16000, seed=0):
    return 0.1 * torch.randn(length, generator=generator(seed))


def power(wave):
    return float(wave.double().square().mean())


@pytest.mark.parametrize("rt60", [0.2, 0.5, 1.0])
def test_the_tail_decays_as_asked(rt60):
    tail = room_impulse_response(rt60, 0.0, 16000, generator())[1:].double()
    # Schroeder's backward integration; slope between -5 and -25 dB.
    energy = torch.flip(torch.cumsum(torch.flip(tail**2, [0]), 0), [0])
    level = 10 * torch.log10(energy / energy[0]).numpy()
    inside = np.flatnonzero((level < -5) & (level > -25))
    slope = np.polyfit(inside / 16000, level[inside], 1)[0]
    assert -60 / slope == pytest.approx(rt60, rel=0.1)


@pytest.mark.parametrize("drr", [-6.0, 0.0, 10.0])
def test_direct_to_reverberant_ratio(drr):
    response = room_impulse_response(0.4, drr, 16000, generator())
    assert response[0] == 1.0
    ratio = 1.0 / float(response[1:].double().square().sum())
    assert 10 * np.log10(ratio) == pytest.approx(drr, abs=1e-3)


def test_no_room_changes_nothing():
    response = room_impulse_response(0.0, 3.0, 16000, generator())
    assert response.tolist() == [1.0]
    wave = noise(999)
    assert torch.allclose(convolve(wave, response), wave, atol=1e-6)
    with pytest.raises(ValueError, match="rt60=-1"):
        room_impulse_response(-1, 3.0, 16000, generator())


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 300), st.integers(1, 300), st.integers(0, 99))
def test_convolution_is_the_naive_sum(length, taps, seed):
    wave, response = noise(length, seed), noise(taps, seed + 100)
    expected = np.convolve(wave.double().numpy(), response.double().numpy())
    found = convolve(wave, response).numpy()
    assert found.shape == (length,)
    assert np.allclose(found, expected[:length], atol=1e-5)


@pytest.mark.parametrize("exponent", [0.0, 1.0, 2.0])
def test_colour_of_the_noise(exponent):
    wave = coloured_noise(160000, exponent, generator()).double().numpy()
    assert abs(wave.mean()) < 1e-3 and wave.var() == pytest.approx(1, rel=1e-3)
    frequency, density = scipy.signal.welch(wave, 16000, nperseg=2048)
    band = (frequency > 100) & (frequency < 6000)
    slope = np.polyfit(np.log(frequency[band]), np.log(density[band]), 1)[0]
    assert slope == pytest.approx(-exponent, abs=0.1)


@pytest.mark.parametrize("length", [1, 2, 3, 17])
def test_short_noise_is_finite(length):
    assert torch.isfinite(coloured_noise(length, 1.0, generator())).all()


@pytest.mark.parametrize("snr", [-5.0, 0.0, 20.0])
def test_signal_to_noise_ratio(snr):
    wave, other = noise(seed=1), coloured_noise(16000, 1.0, generator(2))
    added = add_noise(wave, other, snr).double() - wave.double()
    assert 10 * np.log10(power(wave) / power(added)) == pytest.approx(
        snr, abs=1e-3
    )


def test_silence_gets_no_noise():
    silence = torch.zeros(100)
    assert add_noise(silence, noise(100), 10.0).abs().max() == 0.0
    assert set_level(silence, -20.0).abs().max() == 0.0


@pytest.mark.parametrize(
    ("frequency", "gain"),
    # Points at 62.5, 707 (7 octaves halved) and 8000 Hz; -6 dB to +6 dB.
    [(70, -6.0), (707.1, 0.0), (7800, 6.0), (2378.4, 3.0)],
)
def test_response_of_the_microphone(frequency, gain):
    time = torch.arange(16000) / 16000
    wave = 0.1 * torch.sin(2 * torch.pi * frequency * time)
    heard = equalize(wave, 16000, [-6.0, 0.0, 6.0])
    found = 10 * np.log10(power(heard[4000:12000]) / power(wave[4000:12000]))
    assert found == pytest.approx(gain, abs=0.4)


def test_nothing_is_left_above_4_khz():
    wave = noise(32000)
    heard = telephone(wave, 16000, companding=False).double().numpy()
    frequency, density = scipy.signal.welch(heard, 16000, nperseg=1024)
    high, low = density[frequency > 4300].max(), density[frequency < 3500]
    assert high < 1e-6 * low.mean()
    _, before = scipy.signal.welch(wave.double().numpy(), 16000, nperseg=1024)
    inside = (frequency > 100) & (frequency < 3500)
    assert np.allclose(density[inside], before[inside], rtol=0.01)


def test_companding_is_the_mu_law():
    # At 8 kHz nothing but quantisation is left; G.711's formula in float64.
    wave = torch.linspace(-1, 1, 4001)
    x = wave.double().numpy()
    compressed = np.sign(x) * np.log1p(255 * np.abs(x)) / np.log(256)
    level = np.floor((compressed + 1) / 2 * 255 + 0.5)
    y = level / 255 * 2 - 1
    expected = np.sign(y) * (256 ** np.abs(y) - 1) / 255
    found = telephone(wave, 8000).numpy()
    # A sample on the border of two levels may fall to either side.
    wrong = np.abs(found - expected) > 1e-5
    assert wrong.mean() < 1e-3
    assert len(np.unique(found)) <= 256


@pytest.mark.parametrize("length", [1, 2, 7, 1601, 16000])
@pytest.mark.parametrize("rate", [8000, 16000, 22050])
def test_the_codec_keeps_the_length(length, rate):
    assert telephone(noise(length), rate).shape == (length,)


def test_level_without_clipping():
    wave = noise()
    assert 10 * np.log10(power(set_level(wave, -30.0))) == pytest.approx(-30)
    loud = set_level(wave, 0.0)
    assert loud.abs().max() == pytest.approx(0.999, abs=1e-4)
    assert torch.allclose(loud / wave, loud[0] / wave[0], rtol=1e-4)


def test_keyed_by_name_and_not_by_order():
    simulate = RecordingSimulator(seed=5)
    names = [("a", "s1"), ("b", "s1"), ("a", "s2")]
    one = {n: simulate(noise(), *n) for n in names}
    copy = pickle.loads(pickle.dumps(simulate))
    torch.manual_seed(99)
    for n in reversed(names):
        assert torch.equal(copy(noise(), *n), one[n])
    assert not torch.equal(one["a", "s1"], one["b", "s1"])
    assert not torch.equal(one["a", "s1"], one["a", "s2"])
    other = RecordingSimulator(seed=6)(noise(), "a", "s1")
    assert not torch.equal(one["a", "s1"], other)


def test_a_session_keeps_its_place():
    simulate = RecordingSimulator()
    first, again = simulate.session("s1"), simulate.session("s1")
    assert torch.equal(first["room"], again["room"])
    assert torch.equal(first["microphone"], again["microphone"])
    assert first["snr"] == again["snr"]
    assert simulate.session("s2")["snr"] != first["snr"]
    # Two utterances of a session differ by their noise alone.
    quiet = RecordingSimulator(snr=(200.0, 200.0), codec="none")
    assert torch.allclose(
        quiet(noise(), "a", "s"), quiet(noise(), "b", "s"), atol=1e-5
    )


def test_sessions_stay_within_the_limits():
    simulate = RecordingSimulator()
    for number in range(50):
        place = simulate.session(str(number))
        for key in ("rt60", "drr", "snr", "colour", "level"):
            least, most = getattr(simulate, key)
            assert least <= place[key] <= most


def test_does_not_touch_global_random_numbers():
    state = torch.get_rng_state()
    RecordingSimulator()(noise(), "a")
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("codec", ["none", "band8k", "mulaw8k"])
@pytest.mark.parametrize("length", [1, 2, 300, 8000])
def test_any_length_and_codec(codec, length):
    heard = RecordingSimulator(codec=codec)(noise(length), "a")
    assert heard.shape == (length,) and torch.isfinite(heard).all()
    assert heard.abs().max() <= 1.0


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"codec": "mp3"}, "codec='mp3': expected one of none"),
        ({"snr": (20.0, 10.0)}, "snr=.*expected least, greatest"),
        ({"level": (1.0,)}, "level=.*expected least, greatest"),
        ({"rt60": (-0.1, 0.3)}, "rt60=.*0 or more"),
    ],
)
def test_bad_settings(settings_, message):
    with pytest.raises(ValueError, match=message):
        RecordingSimulator(**settings_)


def test_from_yaml():
    from hyperpyyaml import load_hyperpyyaml

    loaded = load_hyperpyyaml(
        "s: !new:common.simulate.RecordingSimulator\n"
        "    rt60: [0.1, 0.2]\n    codec: band8k\n"
    )
    assert loaded["s"] == RecordingSimulator(rt60=(0.1, 0.2), codec="band8k")
