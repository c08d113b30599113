"""Strings of words: who says what, which takes, and how they sound."""

import collections
import itertools
import pickle
import random

import pytest
import torch
from common.digits import (
    AudioCache,
    DigitStringLoader,
    make_digit_strings,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from speechbrain_taskarith.data import (
    Recording,
    read_manifest,
    to_pcm16,
    write_audio,
    write_manifest,
)

WORDS = ("ONE", "TWO", "THREE", "FOUR")


def recordings(speakers=("theo", "lucas"), words=WORDS, takes=5, split="train"):
    return [
        Recording(
            f"{w}_{s}_{i}", 0.4, f"/x/{w}_{s}_{i}.wav", s, w, s[:2], split
        )
        for s, w, i in itertools.product(speakers, words, range(takes))
    ]


@settings(deadline=None, max_examples=40)
@given(
    count=st.integers(1, 60),
    least=st.integers(1, 4),
    more=st.integers(0, 4),
    seed=st.integers(0, 10**9),
    grouped=st.booleans(),
)
def test_what_every_plan_holds(count, least, more, seed, grouped):
    takes = recordings()
    by_path = {take.wav: take for take in takes}
    groups = {"low": ["ONE", "TWO"], "high": ["THREE", "FOUR"]}
    items = make_digit_strings(
        takes,
        count,
        n_words=(least, least + more),
        gap=(0.05, 0.2),
        edge=(0.1, 0.3),
        groups=groups if grouped else None,
        seed=seed,
    )
    assert len(items) == count
    for item in items.values():
        chosen = [by_path[path] for path in item["wavs"]]
        assert least <= len(chosen) <= least + more
        assert {take.spk_id for take in chosen} == {item["spk_id"]}
        assert {take.accent for take in chosen} == {item["accent"]}
        assert item["split"] == "train"
        assert item["wrd"].split() == [take.wrd for take in chosen]
        gaps = item["gaps"]
        assert len(gaps) == len(chosen) + 1
        assert all(0.05 <= gap <= 0.2 for gap in gaps[1:-1])
        assert all(0.1 <= gap <= 0.3 for gap in (gaps[0], gaps[-1]))
        assert item["duration"] == pytest.approx(
            0.4 * len(chosen) + sum(gaps), abs=1e-3
        )
        if grouped:
            assert set(item["wrd"].split()) <= set(groups[item["group"]])


def test_depends_on_the_seed_and_not_on_the_order():
    takes = recordings()
    shuffled = random.Random(3).sample(takes, len(takes))
    assert make_digit_strings(takes, 20) == make_digit_strings(shuffled, 20)
    assert make_digit_strings(takes, 20) != make_digit_strings(
        takes, 20, seed=1
    )


def test_a_longer_plan_begins_like_a_shorter_one():
    takes = recordings()
    short, long = (make_digit_strings(takes, n) for n in (10, 30))
    assert all(long[key] == item for key, item in short.items())


def test_speakers_groups_words_and_takes_are_balanced():
    takes = recordings(speakers=("a", "b", "c"))
    groups = {"low": ["ONE", "TWO"], "high": ["THREE", "FOUR"]}
    items = make_digit_strings(takes, 600, groups=groups).values()
    turns = collections.Counter((i["spk_id"], i["group"]) for i in items)
    assert set(turns.values()) == {100}
    words = collections.Counter(w for i in items for w in i["wrd"].split())
    assert max(words.values()) < 1.15 * min(words.values())
    # Takes of one word and speaker are used in rounds: never one of them
    # twice more than another.
    used = collections.Counter(w for i in items for w in i["wavs"])
    for speaker, word in itertools.product("abc", WORDS):
        counts = [used[f"/x/{word}_{speaker}_{i}.wav"] for i in range(5)]
        assert max(counts) - min(counts) <= 1


def test_words_restrict():
    items = make_digit_strings(recordings(), 30, words=["TWO", "FOUR"])
    said = {w for i in items.values() for w in i["wrd"].split()}
    assert said == {"TWO", "FOUR"}


def test_a_speaker_who_lacks_a_word_does_not_say_it():
    takes = recordings(("theo",)) + recordings(("lucas",), words=("ONE",))
    for item in make_digit_strings(takes, 40).values():
        if item["spk_id"] == "lucas":
            assert set(item["wrd"].split()) == {"ONE"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"recordings": []}, "no recordings"),
        ({"count": 0}, "count=0"),
        ({"n_words": (0, 3)}, "n_words"),
        ({"n_words": (3, 2)}, "n_words"),
        ({"gap": (0.2, 0.1)}, "gap"),
        ({"edge": (-0.1, 0.1)}, "edge"),
        ({"words": ["ONE", "TEN"]}, "no recording of TEN"),
        ({"groups": {"a": ["ONE"], "b": []}}, "no word left in the group b"),
        (
            {"words": ["ONE"], "groups": {"a": ["TWO"]}},
            "no word left in the group a",
        ),
        (
            {
                "recordings": recordings(("theo",))
                + recordings(("lucas",), words=("ONE",)),
                "groups": {"rest": ["TWO", "THREE"]},
            },
            "speaker lucas has no recording of any word of the group rest",
        ),
    ],
)
def test_bad_plans(change, message):
    arguments = {"recordings": recordings(), "count": 5, **change}
    with pytest.raises(ValueError, match=message):
        make_digit_strings(**arguments)


def test_a_group_may_not_hold_a_word_that_nobody_says():
    with pytest.raises(ValueError, match="no recording of TEN"):
        make_digit_strings(recordings(), 5, groups={"a": ["ONE", "TEN"]})


def test_splits_are_not_mixed():
    takes = recordings() + recordings(("theo",), split="test")
    with pytest.raises(ValueError, match="must not join training and test"):
        make_digit_strings(takes, 5)


def test_the_waveform_is_recordings_and_pauses(tmp_path):
    waves = {
        w: to_pcm16(0.3 * torch.randn(400 + 100 * i))
        for i, w in enumerate("abc")
    }
    for name, wave in waves.items():
        write_audio(tmp_path / f"{name}.flac", wave, 16000)
    paths = [str(tmp_path / f"{n}.flac") for n in "abca"]
    gaps = [0.01, 0.02, 0.0, 0.005, 0.03]
    load = DigitStringLoader(16000, dither=0.0)
    expected = []
    for gap, name in zip(gaps, "abca"):
        expected += [0.0] * round(gap * 16000) + waves[name].tolist()
    expected += [0.0] * round(gaps[-1] * 16000)
    assert load(paths, gaps).tolist() == expected
    # From the cache now; the files are not needed any more.
    for name in waves:
        (tmp_path / f"{name}.flac").unlink()
    assert load(paths, gaps).tolist() == expected


def test_dither_is_small_and_always_the_same():
    cache = AudioCache(16000)
    cache.put("a", torch.zeros(20000))
    cache.put("b", torch.zeros(20000))
    load = DigitStringLoader(16000, cache=cache, dither=1e-3)
    one = load(["a", "b"], [0.1, 0.1, 0.1])
    assert abs(float(one.std()) - 1e-3) < 5e-5
    copy = pickle.loads(pickle.dumps(load))
    assert torch.equal(copy(["a", "b"], [0.1, 0.1, 0.1]), one)
    other = load(["b", "a"], [0.1, 0.1, 0.1])
    assert abs(float(torch.corrcoef(torch.stack([one, other]))[0, 1])) < 0.1


def test_dither_of_a_string_longer_than_the_tape():
    cache = AudioCache(16000)
    cache.put("a", torch.zeros(1_200_000))
    wave = DigitStringLoader(16000, cache=cache)(["a"], [0.0, 0.0])
    assert wave.shape == (1_200_000,)
    assert abs(float(wave[-10000:].std()) - 1e-4) < 1e-5


def test_levels():
    cache = AudioCache(16000)
    cache.put("quiet", 0.01 * torch.ones(1600))
    cache.put("peaky", torch.nn.functional.pad(torch.ones(1) * 0.9, (0, 1599)))
    cache.put("silent", torch.zeros(1600))
    load = DigitStringLoader(16000, rms_db=-20.0, dither=0.0, cache=cache)
    assert load(["quiet"], [0, 0]).max() == pytest.approx(0.1, rel=1e-3)
    assert 0.99 < float(load(["peaky"], [0, 0]).max()) <= 1.0  # not clipped
    assert load(["silent"], [0, 0]).abs().max() == 0.0


def test_pauses_must_fit():
    with pytest.raises(ValueError, match="2 recordings need 3 pauses"):
        DigitStringLoader()(["a", "b"], [0.1, 0.1])


def test_the_cache_forgets_what_was_used_longest_ago(tmp_path):
    for name in "abc":
        write_audio(tmp_path / f"{name}.wav", torch.zeros(16000), 16000)
    paths = [str(tmp_path / f"{name}.wav") for name in "abc"]
    cache = AudioCache(16000, max_seconds=2.0)
    cache[paths[0]], cache[paths[1]], cache[paths[0]], cache[paths[2]]
    assert [path in cache for path in paths] == [True, False, True]
    assert len(cache) == 2


def test_putting_again_does_not_count_twice():
    cache = AudioCache(100, max_seconds=3.0)
    for _ in range(10):
        cache.put("a", torch.zeros(200))
    cache.put("b", torch.zeros(100))
    assert len(cache) == 2


def test_the_cache_converts_or_refuses_other_rates(tmp_path):
    write_audio(tmp_path / "a.wav", torch.zeros(800), 8000)
    path = str(tmp_path / "a.wav")
    assert len(AudioCache(16000)[path]) == 1600
    with pytest.raises(ValueError, match="a.wav.*8000 Hz"):
        AudioCache(16000, resample=False)[path]
    with pytest.raises(ValueError, match="the cache holds 8000 Hz"):
        DigitStringLoader(16000, cache=AudioCache(8000))


def test_through_a_manifest_into_a_data_loader(tmp_path):
    from speechbrain.dataio.dataloader import make_dataloader
    from speechbrain.dataio.dataset import DynamicItemDataset

    takes = []
    for take in recordings(("theo",), takes=2):
        path = tmp_path / f"{take.ID}.flac"
        write_audio(path, 0.1 * torch.randn(6400), 16000)
        takes.append(Recording(take.ID, 0.4, str(path), "theo", take.wrd))
    items = make_digit_strings(takes, 6)
    write_manifest(
        tmp_path / "strings.json",
        [{"ID": key, **item} for key, item in items.items()],
        tmp_path,
    )
    data = DynamicItemDataset.from_json(
        str(tmp_path / "strings.json"), {"data_root": str(tmp_path)}
    )
    data.add_dynamic_item(
        DigitStringLoader(16000), takes=["wavs", "gaps"], provides="sig"
    )
    data.set_output_keys(["id", "sig", "wrd"])
    loader = make_dataloader(
        data, looped_nominal_epoch=None, batch_size=3, num_workers=2
    )
    seen = {}
    for batch in loader:
        signal, lens = batch.sig
        for name, wave, share, words in zip(batch.id, signal, lens, batch.wrd):
            seen[name] = round(float(share) * len(wave)) / 16000
            assert words == items[name]["wrd"]
    assert seen == pytest.approx(
        {key: item["duration"] for key, item in items.items()}, abs=2e-3
    )


@pytest.mark.real_data
def test_real_strings(shared_data):
    rows = read_manifest(shared_data / "fsdd" / "manifest.csv", splits="test")
    items = make_digit_strings(rows, 30)
    load = DigitStringLoader(16000)
    for item in items.values():
        wave = load(item["wavs"], item["gaps"])
        assert len(wave) / 16000 == pytest.approx(item["duration"], abs=5e-3)
        assert torch.isfinite(wave).all() and wave.abs().max() > 1e-3
