"""The self-made corpus: its form, its determinism, and interrupted runs."""

import itertools
import os
import shutil

import pytest
import torch
from common import corpora
from common.corpora import (
    SIMULATED_SPEAKERS,
    SimulatedSpeaker,
    make_digits_corpus,
)
from common.digits import AudioCache, make_digit_strings
from common.simulate import RecordingSimulator
from common.synthesis import (
    ACCENT_SPELLINGS,
    DIGITS,
    SYNTHETIC_VOICES,
    spoken_form,
    synthesize_digits,
)

from speechbrain_taskarith.data import EspeakVoice, read_audio, read_manifest
from speechbrain_taskarith.utils.files import sha256_of

pytest.importorskip("espeakng_loader")

SMALL = dict(
    speakers=SIMULATED_SPEAKERS[1:4],
    takes=4,
    test_takes=1,
    voices=["en-us+f1", "en-us+m1", "en-gb+f2"],
    synthetic_takes=2,
    words=["ONE", "NINE"],
    show_progress=False,
)


def content(folder):
    return {
        os.path.relpath(os.path.join(parent, name), folder): sha256_of(
            os.path.join(parent, name)
        )
        for parent, _, names in os.walk(folder)
        for name in names
    }


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "corpus"
    make_digits_corpus(folder, **SMALL)
    return folder


def test_form(corpus):
    rows = read_manifest(
        corpus / "recorded" / "manifest.csv", sample_rate=16000, check="decode"
    )
    assert len(rows) == 3 * 2 * 4
    assert {r.accent for r in rows} == {"USA/neutral", "DEU/German"}
    assert sum(r.split == "test" for r in rows) == 3 * 2
    assert all(r.ID.endswith("_0") == (r.split == "test") for r in rows)
    rows = read_manifest(
        corpus / "synthetic" / "manifest.csv", sample_rate=16000, check="decode"
    )
    assert len(rows) == 3 * 2 * 2
    assert {r.spk_id for r in rows if r.split == "valid"} == {"en-gb+f2"}
    # It can be moved: no path of this machine inside.
    text = (corpus / "recorded" / "manifest.csv").read_text()
    assert str(corpus) not in text and "$data_root/audio/beth" in text
    assert "SIMULATED" in (corpus / "SIMULATED.txt").read_text()


def test_no_two_recordings_are_the_same(corpus):
    sums = [s for name, s in content(corpus).items() if name.endswith("flac")]
    assert len(set(sums)) == len(sums) == 3 * 2 * 4 + 3 * 2 * 2


def test_the_same_settings_give_the_same_bytes(corpus, tmp_path):
    make_digits_corpus(tmp_path / "again", **SMALL)
    assert content(tmp_path / "again") == content(corpus)


def test_another_seed_gives_other_speech(corpus, tmp_path):
    make_digits_corpus(tmp_path / "other", **SMALL, seed=1)
    one, other = content(corpus), content(tmp_path / "other")
    assert one.keys() == other.keys()
    assert all(one[k] != other[k] for k in one if k.endswith("flac"))


def test_a_finished_corpus_is_left_alone(corpus, monkeypatch):
    monkeypatch.setattr(corpora, "_write_part", None)  # calling it would fail
    paths = make_digits_corpus(corpus, **SMALL)
    assert paths["recorded"] == str(corpus / "recorded" / "manifest.csv")


def test_an_interrupted_run_goes_on(corpus, tmp_path, monkeypatch):
    folder, speak = tmp_path / "corpus", EspeakVoice.__call__
    spoken = itertools.count(1)  # two threads count

    def interrupted(voice, text, rate):
        if next(spoken) == 20:
            raise KeyboardInterrupt
        return speak(voice, text, rate)

    monkeypatch.setattr(EspeakVoice, "__call__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make_digits_corpus(folder, **SMALL)
    assert not (folder / "finished.json").exists()
    # What stands under a final name is whole.
    for part in (folder / "recorded" / "audio").iterdir():
        assert len(list(part.glob("*.flac"))) == 8
    make_digits_corpus(folder, **SMALL)
    assert content(folder) == content(corpus)
    # Some speakers were not spoken again: 36 takes in all.
    assert next(spoken) - 1 < 20 + 36


def test_leftovers_of_a_killed_run_are_removed(corpus, tmp_path):
    folder = tmp_path / "corpus"
    shutil.copytree(corpus, folder)
    os.unlink(folder / "finished.json")
    shutil.rmtree(folder / "recorded" / "audio" / "beth")
    left = folder / "recorded" / "audio" / ".partial-xyz"
    left.mkdir()
    (left / "half.flac").write_bytes(b"half")
    make_digits_corpus(folder, **SMALL)
    assert content(folder) == content(corpus)


def test_other_settings_replace_the_corpus(corpus, tmp_path):
    folder = tmp_path / "corpus"
    shutil.copytree(corpus, folder)
    (folder / "recorded" / "audio" / "mine").mkdir()
    changed = {**SMALL, "speakers": SIMULATED_SPEAKERS[2:4], "takes": 3}
    make_digits_corpus(folder, **changed)
    rows = read_manifest(folder / "recorded" / "manifest.csv")
    assert {r.spk_id for r in rows} == {"dirk", "elke"}
    assert len(rows) == 2 * 2 * 3
    # Nothing that is not ours is touched.
    assert sorted(os.listdir(folder / "recorded" / "audio")) == [
        "dirk",
        "elke",
        "mine",
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"speakers": []}, "speakers"),
        ({"speakers": [SIMULATED_SPEAKERS[0]] * 2}, "unique names"),
        (
            {"speakers": [SimulatedSpeaker("a/b", "x", "en-us")]},
            "letters and digits",
        ),
        ({"voices": []}, "voices"),
        ({"voices": ["en-us", "en-us"]}, "each one once"),
        ({"test_takes": 0}, "test_takes=0"),
        ({"test_takes": 4}, "test_takes=4"),
        ({"simulator": RecordingSimulator(sample_rate=8000)}, "8000 Hz"),
        ({"voices": ["en-us+nobody"]}, "unknown espeak-ng variant 'nobody'"),
    ],
)
def test_bad_settings_write_nothing(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        make_digits_corpus(tmp_path / "corpus", **{**SMALL, **change})
    assert not (tmp_path / "corpus").exists()


def test_the_two_sides_share_no_voice():
    speakers = [speaker.voice for speaker in SIMULATED_SPEAKERS]
    assert not set(speakers) & set(SYNTHETIC_VOICES)
    assert len(set(speakers)) == len(speakers)
    variants = {voice.split("+")[1] for voice in SYNTHETIC_VOICES}
    assert not variants & {voice.split("+")[1] for voice in speakers}
    for voice in (*speakers, *SYNTHETIC_VOICES):
        EspeakVoice(voice)


def test_accents_say_every_digit_and_differ():
    for language, spellings in ACCENT_SPELLINGS.items():
        assert set(spellings) == set(DIGITS)
        waves = [EspeakVoice(language)(spellings[word]) for word in DIGITS]
        assert len({wave.sum().item() for wave in waves}) == len(DIGITS)
    assert spoken_form("ZERO", "de+f1") == "siero"
    assert spoken_form("ZERO", "en-gb-scotland+f1") == "zero"
    assert spoken_form("HELLO", "fr") == "hello"


def test_synthetic_speech_in_memory_and_on_disk_is_the_same(tmp_path):
    cache = AudioCache(16000)
    options = dict(takes=2, seed=4, show_progress=False)
    args = (["ONE", "TWO"], ["en-us+f3", "en-gb"])
    kept = synthesize_digits(*args, **options, cache=cache)
    written = synthesize_digits(*args, **options, folder=tmp_path)
    assert [r.ID for r in kept] == [r.ID for r in written]
    for one, other in zip(kept, written):
        assert torch.equal(cache[one.wav], read_audio(other.wav, 16000))
    assert read_manifest(tmp_path / "manifest.csv") == written
    assert len(make_digit_strings(kept, 5)) == 5


def test_a_take_depends_neither_on_other_words_nor_on_other_voices():
    caches = AudioCache(16000), AudioCache(16000)
    synthesize_digits(
        ["TWO"], ["en-gb"], 1, cache=caches[0], show_progress=False
    )
    synthesize_digits(
        ["ONE", "TWO"],
        ["en-us", "en-gb"],
        2,
        cache=caches[1],
        show_progress=False,
    )
    key = "syn_TWO_en-gb_0"
    assert torch.equal(caches[0][key], caches[1][key])


def test_where_synthetic_speech_goes_must_be_said():
    with pytest.raises(ValueError, match="either a cache or a folder"):
        synthesize_digits(["ONE"], ["en-us"])
    with pytest.raises(ValueError, match="the cache holds 8000 Hz"):
        synthesize_digits(["ONE"], ["en-us"], cache=AudioCache(8000))
