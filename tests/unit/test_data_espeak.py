"""Synthetic speech: determinism, forks, threads, errors."""

import concurrent.futures
import ctypes
import hashlib
import itertools
import multiprocessing
import os
import pickle
import random
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch

from speechbrain_taskarith.data import (
    EspeakVoice,
    espeak_engine,
    list_variants,
    list_voices,
)

pytest.importorskip("espeakng_loader")

# Voices that use each of the engine's back ends and sources of noise:
# flutter (all), breath (f1), whisper, creak, klatt, SpeechPlayer (Reed,
# caleb), and other languages.
VOICES = [
    "en-us",
    "en-gb+f1",
    "en-us+whisper",
    "en-us+croak",
    "en-us+klatt4",
    "en-us+Reed",
    "en-us+caleb",
    "de+m3",
    "el",
]


def digest(wave):
    return hashlib.sha256(wave.numpy().tobytes()).hexdigest()


def test_same_samples_whatever_was_said_before():
    pairs = list(itertools.product(VOICES, ["seven", "one two"]))
    first = {pair: digest(EspeakVoice(pair[0])(pair[1])) for pair in pairs}
    rng = random.Random(0)
    for _ in range(3):
        rng.shuffle(pairs)
        for voice, text in pairs:
            assert digest(EspeakVoice(voice)(text)) == first[voice, text], (
                voice,
                text,
            )
    assert len(set(first.values())) == len(first)


def test_same_samples_in_a_fresh_process():
    script = (
        "import hashlib, sys\n"
        "from speechbrain_taskarith.data import EspeakVoice\n"
        "for voice in sys.argv[1:]:\n"
        "    wave = EspeakVoice(voice)('nine four')\n"
        "    print(hashlib.sha256(wave.numpy().tobytes()).hexdigest())\n"
    )
    # In reverse, so that each voice has another history than here.
    root = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))
    out = subprocess.run(
        [sys.executable, "-c", script, *VOICES[::-1]],
        capture_output=True,
        text=True,
        check=True,
        cwd=root,
        env={**os.environ, "PYTHONPATH": root},
    ).stdout.split()
    assert out[::-1] == [digest(EspeakVoice(v)("nine four")) for v in VOICES]


def test_does_not_touch_other_random_numbers():
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    libc = ctypes.CDLL(None)
    libc.srand(7)
    expected = libc.rand(), libc.rand()
    libc.srand(7)
    states = torch.get_rng_state(), random.getstate()
    drawn = libc.rand()
    EspeakVoice("en-us+Reed")("seven")
    if sys.platform.startswith("linux"):
        assert (drawn, libc.rand()) == expected
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]


def test_leaves_another_engine_in_the_process_alone():
    # As another package would hold it: loaded from the installed path.
    other = ctypes.CDLL(espeak_engine.loader().get_library_path())
    rate = other.espeak_Initialize(
        2, 0, espeak_engine.data_folder().encode(), 0x8000
    )
    assert rate == espeak_engine.ENGINE_RATE
    assert other.espeak_SetVoiceByName(b"de") == 0
    assert other.espeak_SetParameter(1, 333, 0) == 0
    before = digest(EspeakVoice("en-us")("seven"))
    assert other.espeak_GetParameter(1, 1) == 333
    other.espeak_Terminate()
    assert digest(EspeakVoice("en-us")("seven")) == before


def test_in_threads():
    jobs = [(voice, text) for voice in VOICES for text in ("six", "two one")]
    alone = [digest(EspeakVoice(v)(t)) for v, t in jobs]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        together = list(
            pool.map(lambda job: digest(EspeakVoice(job[0])(job[1])), jobs)
        )
    assert together == alone


def _speak_into(connection, voice):
    # As DataLoader's workers: OpenMP's threads do not outlive a fork.
    torch.set_num_threads(1)
    connection.send(digest(voice("three")))
    connection.close()


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_in_other_processes(method):
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"no {method} here")
    context = multiprocessing.get_context(method)
    voice = EspeakVoice("en-us", "f3")
    expected = digest(voice("three"))
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_speak_into, args=(send, voice))
    process.start()
    assert receive.poll(60), "the child said nothing: a lock held at the fork?"
    assert receive.recv() == expected
    process.join(60)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_fork_while_another_thread_speaks():
    stop = threading.Event()

    def babble():
        while not stop.is_set():
            EspeakVoice("en-gb")("one two three four five")

    thread = threading.Thread(target=babble)
    thread.start()
    context = multiprocessing.get_context("fork")
    try:
        for _ in range(5):
            receive, send = context.Pipe(duplex=False)
            process = context.Process(
                target=_speak_into, args=(send, EspeakVoice("en-us"))
            )
            process.start()
            assert receive.poll(60), "deadlock in the forked child"
            assert receive.recv() == digest(EspeakVoice("en-us")("three"))
            process.join(60)
    finally:
        stop.set()
        thread.join()


class Spoken(torch.utils.data.Dataset):
    """Speaks in the worker; at module level so that it pickles."""

    def __init__(self, texts):
        self.texts, self.voice = texts, EspeakVoice("en-us", "m2")

    def __len__(self):
        return len(self.texts)

    def __getitem__(self, index):
        return self.voice(self.texts[index])


def test_in_data_loader_workers():
    texts = ["one", "two", "three", "four"]
    loader = torch.utils.data.DataLoader(
        Spoken(texts), batch_size=None, num_workers=2
    )
    alone = [digest(EspeakVoice("en-us", "m2")(text)) for text in texts]
    assert [digest(wave) for wave in loader] == alone


def test_without_running_from_memory(monkeypatch):
    expected = digest(EspeakVoice()("seven"))
    monkeypatch.setattr(espeak_engine, "_image_descriptor", None)
    monkeypatch.delattr(os, "memfd_create", raising=False)
    assert digest(EspeakVoice()("seven")) == expected


def test_after_all_descriptors_were_closed(monkeypatch, tmp_path):
    # What a daemon does; the number may belong to any other file by then.
    expected = digest(EspeakVoice()("seven"))
    with open(tmp_path / "something else", "wb") as other:
        other.write(b"no library")
        other.flush()
        monkeypatch.setattr(espeak_engine, "_image_descriptor", other.fileno())
        assert digest(EspeakVoice()("seven")) == expected


def test_data_folder_with_a_long_path(monkeypatch, tmp_path):
    # espeak-ng itself keeps 160 characters of it, and fails beyond.
    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("needs /proc/self/fd")
    expected = digest(EspeakVoice()("seven"))
    deep = tmp_path / ("x" * 200)
    os.symlink(espeak_engine.data_folder(), deep)
    monkeypatch.setattr(espeak_engine, "data_folder", lambda: str(deep))
    assert digest(EspeakVoice()("seven")) == expected


def test_keeps_the_locale():
    import locale

    before = locale.setlocale(locale.LC_CTYPE)
    EspeakVoice()("seven")
    assert locale.setlocale(locale.LC_CTYPE) == before


def test_rate_and_word_gap_change_the_length():
    slow, fast = (EspeakVoice(rate=r)("one two three") for r in (100, 300))
    assert 1.8 < len(slow) / len(fast) < 4.0
    plain, gaps = (EspeakVoice(word_gap=g)("one two") for g in (0, 30))
    assert len(gaps) - len(plain) > 0.1 * 16000


def fundamental(wave):
    """Return F0 in Hz of the middle of a vowel, by autocorrelation."""
    middle = wave[len(wave) // 3 : len(wave) // 3 + 2048].double().numpy()
    correlation = np.correlate(middle, middle, "full")[2047:]
    lags = range(16000 // 400, 16000 // 60)
    return 16000 / max(lags, key=lambda lag: correlation[lag])


def test_pitch_and_variants_change_the_fundamental():
    low, high = (fundamental(EspeakVoice(pitch=p)("aaaa")) for p in (20, 80))
    assert high > 1.3 * low
    assert fundamental(EspeakVoice(variant="f2")("aaaa")) > fundamental(
        EspeakVoice(variant="m7")("aaaa")
    )


@pytest.mark.parametrize("rate", [8000, 16000, 22050, 44100])
def test_sample_rates(rate):
    wave = EspeakVoice()("seven", sample_rate=rate)
    native = EspeakVoice()("seven", sample_rate=22050)
    assert abs(len(wave) / rate - len(native) / 22050) <= 1 / rate
    grid = wave * 32768
    assert torch.equal(grid, grid.round()) and wave.abs().max() <= 1


def test_settings_pickle_compare_and_hash():
    voice = EspeakVoice("en-gb", "f3", rate=150)
    copy = pickle.loads(pickle.dumps(voice))
    assert copy == voice and len({copy, voice}) == 1
    assert copy != EspeakVoice("en-gb", "f3", rate=151)
    assert len(pickle.dumps(voice)) < 500
    assert EspeakVoice("en-gb+f3").name == "en-gb+f3"


def test_from_yaml():
    from hyperpyyaml import load_hyperpyyaml

    loaded = load_hyperpyyaml(
        "v: !new:speechbrain_taskarith.data.EspeakVoice\n"
        "    voice: en-us\n    variant: f3\n    rate: 150\n"
    )
    assert loaded["v"] == EspeakVoice("en-us", "f3", rate=150)


@pytest.mark.parametrize(
    "name", ["en-us", "EN-US", "English (America)", "gmw/en-US"]
)
def test_names_of_one_voice(name):
    assert digest(EspeakVoice(name)("one")) == digest(EspeakVoice()("one"))


def test_every_listed_voice_and_variant_speaks():
    # Digits are read by every language, whatever its script.
    for code in list_voices():
        assert len(EspeakVoice(code)("7 a")) > 500, code
    for variant in list_variants():
        assert len(EspeakVoice("en-us", variant)("seven")) > 1000, variant


def test_british_is_not_american():
    assert digest(EspeakVoice("en-gb")("nine")) != digest(
        EspeakVoice("en-us")("nine")
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"voice": "en-uk"}, "unknown espeak-ng voice 'en-uk'; nearest: en"),
        ({"variant": "f33"}, "unknown espeak-ng variant 'f33'; nearest: f3"),
        ({"voice": "en-us+nobody"}, "unknown espeak-ng variant 'nobody'"),
        # Its dictionary is not in the package: the engine would babble.
        ({"voice": "kaa"}, "unknown espeak-ng voice 'kaa'"),
        ({"rate": 79}, "rate=79: expected a whole number from 80 to 450"),
        ({"rate": 175.0}, "rate=175.0"),
        ({"pitch": 100}, "pitch=100"),
        ({"pitch_range": -1}, "pitch_range=-1"),
        ({"word_gap": True}, "word_gap=True"),
    ],
)
def test_bad_settings(arguments, message):
    with pytest.raises(ValueError) as caught:
        EspeakVoice(**arguments)
    assert message in str(caught.value)


@pytest.mark.parametrize("text", ["", "  \n", "...", "one\0two", None, 7])
def test_nothing_to_say(text):
    with pytest.raises(ValueError, match="text"):
        EspeakVoice()(text)


def test_bad_sample_rate():
    with pytest.raises(ValueError, match="sample rate 0"):
        EspeakVoice()("one", sample_rate=0)


def test_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    with pytest.raises(ImportError, match=r"taskarith\[synthesis\]"):
        EspeakVoice()
    with pytest.raises(ImportError, match=r"taskarith\[synthesis\]"):
        list_voices()


def test_broken_data_folder_is_an_error(monkeypatch, tmp_path, capfd):
    voice = EspeakVoice()
    monkeypatch.setattr(espeak_engine, "data_folder", lambda: str(tmp_path))
    with pytest.raises(RuntimeError, match="did not start with its data"):
        voice("seven")
    monkeypatch.undo()
    assert len(voice("seven")) > 1000  # the lock was given back


def test_interrupt_in_the_callback_is_not_swallowed(monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    voice = EspeakVoice()
    expected = digest(voice("seven"))
    monkeypatch.setattr(espeak_engine.ctypes, "string_at", interrupt)
    with pytest.raises(KeyboardInterrupt):
        voice("seven")
    monkeypatch.undo()
    assert digest(voice("seven")) == expected
