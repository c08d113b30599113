"""A corpus of spoken digits for those who have no recordings at hand.

Beside a synthetic side of clean voices it has a *simulated* recorded side in
the form of FSDD: other voices, some with a foreign accent, each in its own
room with its own noise, microphone and 8 kHz codec.
"""

import concurrent.futures
import dataclasses
import functools
import hashlib
import json
import os
import random
import shutil

from common.simulate import RecordingSimulator
from common.synthesis import (
    DIGITS,
    SYNTHETIC_VOICES,
    spoken_form,
    synthesize_digits,
)
from speechbrain_taskarith.data import espeak_engine
from speechbrain_taskarith.data.audio import encode_audio
from speechbrain_taskarith.data.espeak import EspeakVoice
from speechbrain_taskarith.data.manifests import (
    Recording,
    read_manifest,
    write_manifest,
)
from speechbrain_taskarith.utils.files import (
    atomic_folder,
    atomic_write,
    read_json,
    remove_leftovers,
    write_json,
)
from speechbrain_taskarith.utils.progress import progress

# Raised whenever the same settings would make another corpus.
_VERSION = 1


@dataclasses.dataclass(frozen=True)
class SimulatedSpeaker:
    """A speaker of the simulated recorded side.

    `voice` is an espeak-ng voice with its variant; `rate` (words per minute)
    and `pitch` (0 to 99) are what the speaker varies around.
    """

    name: str
    accent: str
    voice: str
    rate: int = 160
    pitch: int = 50

    @property
    def language(self):
        """Language of the voice without its variant and region."""
        return self.voice.split("+")[0].split("-")[0]


SIMULATED_SPEAKERS = (
    SimulatedSpeaker("amos", "USA/neutral", "en-us+Andy", 165, 40),
    SimulatedSpeaker("beth", "USA/neutral", "en-us+belinda", 150, 60),
    SimulatedSpeaker("dirk", "DEU/German", "de+Michael", 150, 42),
    SimulatedSpeaker("elke", "DEU/German", "de+Alicia", 170, 58),
    SimulatedSpeaker("fotis", "GRC/Greek", "el+john", 165, 45),
    SimulatedSpeaker("gilles", "BEL/French", "fr+michel", 155, 48),
    SimulatedSpeaker("hamish", "GBR/Scottish", "en-gb-scotland+rob", 170, 44),
    SimulatedSpeaker("iris", "CAR/Caribbean", "en-029+linda", 160, 62),
)


def make_digits_corpus(
    folder,
    *,
    speakers=SIMULATED_SPEAKERS,
    takes=50,
    test_takes=5,
    simulator=None,
    voices=SYNTHETIC_VOICES,
    synthetic_takes=4,
    words=DIGITS,
    sample_rate=16000,
    seed=0,
    show_progress=True,
):
    """Make a corpus of digits with a synthetic and a simulated side.

    `folder/recorded` has the form of FSDD (`manifest.csv`, the first
    `test_takes` takes for testing) and takes its place in a recipe;
    `folder/synthetic` holds clean voices, the last eighth of them for
    validation. Each speaker appears whole or not at all: a run that was
    killed goes on where it stopped, and a finished corpus with the same
    settings is left alone. One with other settings is replaced.

    Returns `{"recorded": path, "synthetic": path}`, the two manifests.
    """
    folder = os.path.abspath(os.fspath(folder))
    if simulator is None:
        simulator = RecordingSimulator(sample_rate=sample_rate, seed=seed)
    _check_corpus(speakers, takes, test_takes, simulator, sample_rate, voices)
    settings = {
        "version": _VERSION,
        "engine": _engine_version(),
        "speakers": [dataclasses.asdict(speaker) for speaker in speakers],
        "takes": takes,
        "test_takes": test_takes,
        "simulator": dataclasses.asdict(simulator),
        "voices": list(voices),
        "synthetic_takes": synthetic_takes,
        "words": list(words),
        "sample_rate": sample_rate,
        "seed": seed,
    }
    # Through JSON and back, since tuples come back as lists.
    settings = json.loads(json.dumps(settings))
    paths = {
        side: os.path.join(folder, side, "manifest.csv")
        for side in ("recorded", "synthetic")
    }
    marker = os.path.join(folder, "finished.json")
    if _same(marker, settings) and all(map(os.path.isfile, paths.values())):
        return paths

    held_out = len(voices) // 8 or int(len(voices) > 1)
    trained = len(voices) - held_out
    parts = {
        "recorded": {
            speaker.name: functools.partial(
                _recorded_takes, speaker, simulator, settings
            )
            for speaker in speakers
        },
        "synthetic": {
            voice: functools.partial(
                _synthetic_takes,
                voice,
                "train" if number < trained else "valid",
                settings,
            )
            for number, voice in enumerate(voices)
        },
    }
    if os.path.exists(marker):
        os.unlink(marker)
    for side, make in parts.items():
        rows = _make_side(
            os.path.join(folder, side, "audio"), make, settings, show_progress
        )
        write_manifest(paths[side], rows, os.path.join(folder, side))
    _write_notice(folder)
    # Last, so that it vouches for everything before it.
    write_json(marker, settings)
    return paths


def _make_side(audio, make, settings, show_progress):
    """Make the parts of one side that are not there yet; return all rows."""
    digest = _digest(settings)

    def one(name):
        part = os.path.join(audio, name)
        made = {"settings": digest, "name": name}
        if not _same(os.path.join(part, "made.json"), made):
            _write_part(part, make[name](), settings["sample_rate"], made)
        return read_manifest(os.path.join(part, "manifest.csv"), check="files")

    if os.path.isdir(audio):
        remove_leftovers(audio)
        for entry in os.scandir(audio):
            # Voices of a corpus with other settings; nothing that is not
            # ours is touched.
            if entry.name not in make and os.path.isfile(
                os.path.join(entry.path, "made.json")
            ):
                shutil.rmtree(entry.path)
    label = os.path.basename(os.path.dirname(audio)) + " side"
    # Two threads, so that one computes while the other waits for the disk.
    pool = concurrent.futures.ThreadPoolExecutor(2)
    try:
        done = progress(
            pool.map(one, make),
            total=len(make),
            desc=label,
            unit="voice",
            show_progress=show_progress,
        )
        return [row for rows in done for row in rows]
    finally:
        # After an interrupt only the voices at hand are finished.
        pool.shutdown(cancel_futures=True)


def _recorded_takes(speaker, simulator, settings):
    """Yield (Recording with a bare file name, waveform) of one speaker."""
    rate = settings["sample_rate"]
    for word in settings["words"]:
        text = spoken_form(word, speaker.voice)
        for take in range(settings["takes"]):
            rng = random.Random(
                f"{settings['seed']} {speaker.name} {word} {take}"
            )
            voice = EspeakVoice(
                speaker.voice,
                rate=_clip(speaker.rate + rng.randint(-25, 25), 80, 450),
                pitch=_clip(speaker.pitch + rng.randint(-8, 8), 0, 99),
            )
            ID = f"sim_{word}_{speaker.name}_{take}"
            wave = simulator(voice(text, rate), ID, session=speaker.name)
            split = "test" if take < settings["test_takes"] else "train"
            yield _recording(ID, wave, rate, speaker, word, split), wave


def _synthetic_takes(voice, split, settings):
    from common.digits import AudioCache

    rate = settings["sample_rate"]
    cache = AudioCache(rate)
    for take in synthesize_digits(
        settings["words"],
        [voice],
        settings["synthetic_takes"],
        sample_rate=rate,
        seed=settings["seed"],
        split=split,
        cache=cache,
        show_progress=False,
    ):
        yield take, cache[take.wav]


def _recording(ID, wave, rate, speaker, word, split):
    return Recording(
        ID=ID,
        duration=round(len(wave) / rate, 4),
        wav=ID,
        spk_id=speaker.name,
        wrd=word,
        accent=speaker.accent,
        split=split,
    )


def _write_part(part, recordings, sample_rate, part_settings):
    """Write one voice's recordings; they appear all at once."""
    with atomic_folder(part) as inside:
        rows = []
        for take, wave in recordings:
            name = take.ID + ".flac"
            # The folder is flushed as a whole, and renamed after that.
            (inside / name).write_bytes(encode_audio(wave, sample_rate, "flac"))
            rows.append(dataclasses.replace(take, wav="$data_root/" + name))
        write_manifest(inside / "manifest.csv", rows)
        write_json(inside / "made.json", part_settings)


def _write_notice(folder):
    with atomic_write(os.path.join(folder, "SIMULATED.txt"), "w") as stream:
        stream.write(
            "Spoken digits, all of them made by espeak-ng.\n"
            "synthetic/  clean voices.\n"
            "recorded/   SIMULATED recordings: other voices, rooms, noise,\n"
            "            microphones and a codec. No person speaks here.\n"
        )


def _check_corpus(speakers, takes, test_takes, simulator, rate, voices):
    names = [speaker.name for speaker in speakers]
    if not names or len(set(names)) < len(names):
        raise ValueError(
            f"speakers {names}: expected at least one, and unique names"
        )
    for name in names:
        if not name.isalnum():
            raise ValueError(
                f"speaker {name!r}: expected a name of letters and digits"
            )
    if not voices or len(set(voices)) < len(voices):
        raise ValueError("voices: expected at least one, each one once")
    for voice in (*voices, *(speaker.voice for speaker in speakers)):
        EspeakVoice(voice)  # an unknown one is an error here, not halfway
    if not 0 < test_takes < takes:
        raise ValueError(
            f"test_takes={test_takes}: expected 1 to takes - 1 = {takes - 1}"
        )
    if simulator.sample_rate != rate:
        raise ValueError(
            f"sample_rate={rate} but the simulator has "
            f"{simulator.sample_rate} Hz: make both with the same rate"
        )


def _same(path, settings):
    """Tell whether a JSON file is there and holds just these settings."""
    return os.path.isfile(path) and read_json(path) == settings


def _digest(settings):
    text = json.dumps(settings, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _engine_version():
    from importlib.metadata import version

    espeak_engine.loader()
    return version("espeakng-loader")


def _clip(value, least, most):
    return max(least, min(most, value))
