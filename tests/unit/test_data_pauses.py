"""Cutting at pauses: places by brute force, and what always holds."""

import pytest
import torch

from speechbrain_taskarith.data import cut_at_pauses

RATE = 1000  # 20 samples are a frame


def speech(seconds, pauses=(), seed=0):
    """Return noise; a pause is half a second of next to nothing."""
    g = torch.Generator().manual_seed(seed)
    wave = 0.1 * torch.randn(round(seconds * RATE), generator=g)
    for start in pauses:
        wave[round(start * RATE) : round((start + 0.5) * RATE)] *= 0.01
    return wave


def quietest(wave, first, last):
    """The middle of the quietest frame, by a loop; the last of equals."""
    best, place = float("inf"), None
    whole = len(wave) // 20
    for frame in range(-(-first // 20), last // 20):
        around = range(max(0, frame - 5), min(whole, frame + 6))
        powers = [
            wave[20 * n : 20 * n + 20].double().square().mean() for n in around
        ]
        power = float(sum(powers) / len(powers))
        if power <= best * (1 + 1e-12):
            best, place = power, 20 * frame + 10
    return place


def test_every_cut_is_in_a_pause():
    pauses = (3.1, 6.0, 9.5, 14.2)
    parts = cut_at_pauses(speech(18, pauses), RATE, longest=5.0)
    cuts = [end / RATE for _, end in parts[:-1]]
    assert len(cuts) == 4
    for cut, start in zip(cuts, pauses):
        assert start < cut < start + 0.5


@pytest.mark.parametrize("seed", range(6))
def test_each_cut_is_the_quietest_place_there_is(seed):
    wave = speech(3 + 1.7 * seed + 0.013, seed=seed)
    longest = (1.0, 1.5, 2.21)[seed % 3]
    parts = cut_at_pauses(wave, RATE, longest)
    size = int(longest * RATE)
    assert parts[0][0] == 0 and parts[-1][1] == len(wave)
    for (start, end), (following, _) in zip(parts, parts[1:]):
        assert end == following
        left = len(wave) - start
        last = start + min(size, left - size // 4)
        assert end == quietest(wave, start + size // 2, last)
    lengths = [end - start for start, end in parts]
    assert max(lengths) <= size and min(lengths) >= size // 4
    assert len(parts) > 1


def test_silence_and_what_is_short_enough():
    assert cut_at_pauses(speech(2), RATE, 2.0) == [(0, 2000)]
    assert cut_at_pauses(speech(2)[:0], RATE, 2.0) == [(0, 0)]
    parts = cut_at_pauses(torch.zeros(5000), RATE, 2.0)
    assert [end for _, end in parts] == [1990, 3970, 5000]


@pytest.mark.parametrize("longest", [0.5, float("inf"), float("nan")])
def test_bad_lengths(longest):
    with pytest.raises(ValueError, match="longest .*: expected seconds"):
        cut_at_pauses(speech(3), RATE, longest)
    with pytest.raises(ValueError, match=r"expected \[samples\]"):
        cut_at_pauses(speech(3)[None], RATE, 2.0)
