"""Strings of words, put together from recordings of single words.

Each string is spoken by one speaker: that speaker's recordings, one after
another, with pauses between them. Nothing is written: an item lists its
files, and a loader puts the waveform together when it is asked for, from a
cache of decoded recordings.
"""

import collections
import functools
import random
import zlib
from os.path import basename, splitext

import torch

from speechbrain_taskarith.data.audio import read_audio, resample_wave, to_pcm16


def make_digit_strings(
    recordings,
    count,
    *,
    n_words=(3, 6),
    gap=(0.05, 0.25),
    edge=(0.1, 0.2),
    words=None,
    groups=None,
    seed=0,
    prefix="string",
):
    """Plan strings of words, each from one speaker's recordings.

    Speakers take turns (so do groups), every word is equally likely, and a
    recording is used again only when all others of its word and speaker have
    been used. The plan depends on the arguments only, not on the order of
    the recordings.

    `n_words`, `gap` and `edge` are (least, greatest): the number of words,
    the pause between words, and before the first and after the last, in
    seconds. `words` limits the words; with `groups`, `{name: [words]}`, each
    string takes its words from one of these groups.

    Returns `{ID: item}` for `DynamicItemDataset`; an item holds `wavs`
    (paths), `gaps` (seconds, one more than `wavs`), `wrd`, `spk_id`,
    `accent`, `split`, `group` and `duration`. ValueError where no plan is
    possible, or where recordings of several splits would be joined.
    """
    _check_ranges(count, n_words, gap, edge)
    groups = _word_groups(recordings, words, groups)
    takes = _by_speaker_and_word(recordings, groups)
    rng = random.Random(f"digit strings {seed}")
    bags = collections.defaultdict(list)
    speakers = sorted(takes)
    turns = [(speaker, name) for name in groups for speaker in speakers]
    items = {}
    for number in range(count):
        if number % len(turns) == 0:
            rng.shuffle(turns)
        speaker, group = turns[number % len(turns)]
        said = [w for w in groups[group] if w in takes[speaker]]
        chosen = []
        for _ in range(rng.randint(*n_words)):
            word = rng.choice(said)
            bag = bags[speaker, word]
            if not bag:
                bag.extend(takes[speaker][word])
                rng.shuffle(bag)
            chosen.append(bag.pop())
        inner = [rng.uniform(*gap) for _ in chosen[1:]]
        gaps = [rng.uniform(*edge), *inner, rng.uniform(*edge)]
        gaps = [round(value, 4) for value in gaps]
        items[f"{prefix}-{number:05d}"] = {
            "wavs": [take.wav for take in chosen],
            "gaps": gaps,
            "wrd": " ".join(take.wrd for take in chosen),
            "spk_id": speaker,
            "accent": chosen[0].accent,
            "split": chosen[0].split,
            "group": group,
            "duration": round(
                sum(take.duration for take in chosen) + sum(gaps), 4
            ),
        }
    return items


class AudioCache:
    """Decoded recordings, kept in memory as 16-bit samples.

    A recording of another rate is converted, or refused without `resample`.
    Beyond `max_seconds` (an hour at 16 kHz takes 115 MB) what was used longest
    ago is dropped, and decoded again when asked for.
    """

    def __init__(self, sample_rate=16000, resample=True, max_seconds=7200.0):
        self.sample_rate = sample_rate
        self.resample = resample
        self.max_seconds = max_seconds
        self._kept = collections.OrderedDict()
        self._samples = 0

    def __getitem__(self, path):
        """Return the waveform of a path (or of a key given to `put`)."""
        pcm = self._kept.get(path)
        if pcm is None:
            wave = read_audio(path, self.sample_rate, resample=self.resample)
            self.put(path, wave)
            pcm = self._kept[path]
        else:
            self._kept.move_to_end(path)
        return pcm.to(torch.float32) / 32768.0

    def put(self, key, wave, sample_rate=None):
        """Keep a waveform [T] under a key, without any file.

        `sample_rate` is the waveform's, by default the cache's own.
        """
        if sample_rate is not None:
            wave = resample_wave(wave, sample_rate, self.sample_rate)
        pcm = (to_pcm16(wave) * 32768.0).to(torch.int16)
        old = self._kept.pop(key, None)
        self._samples += len(pcm) - (0 if old is None else len(old))
        self._kept[key] = pcm
        while (
            self._samples > self.max_seconds * self.sample_rate
            and len(self._kept) > 1
        ):
            self._samples -= len(self._kept.popitem(last=False)[1])

    def __len__(self):
        return len(self._kept)

    def __contains__(self, key):
        return key in self._kept


class DigitStringLoader:
    """Puts the waveform of a string together: the audio pipeline's function.

    `rms_db` is the level every recording is brought to first, in dB below
    full scale (e.g. -26); None leaves levels as they are. `dither` is the
    standard deviation of the white noise under the whole string, so that
    pauses are not digitally silent (log spectra of exact zeros are a
    giveaway); the same string always gets the same noise.
    """

    def __init__(self, sample_rate=16000, rms_db=None, dither=1e-4, cache=None):
        if cache is not None and cache.sample_rate != sample_rate:
            raise ValueError(
                f"sample_rate={sample_rate} but the cache holds "
                f"{cache.sample_rate} Hz: make both with the same rate"
            )
        self.sample_rate = sample_rate
        self.rms_db = rms_db
        self.dither = dither
        self.cache = AudioCache(sample_rate) if cache is None else cache

    def __call__(self, wavs, gaps):
        """Return the waveform [T] of one string.

        `gaps` are the pauses in seconds: before the first of `wavs` (paths, or
        keys of the cache), between them, after the last.
        """
        if len(gaps) != len(wavs) + 1:
            raise ValueError(
                f"{len(wavs)} recordings need {len(wavs) + 1} pauses, found "
                f"{len(gaps)} (first recording: {next(iter(wavs), None)})"
            )
        parts = []
        for path, pause in zip(wavs, gaps):
            parts += [self._silence(pause), self._recording(path)]
        wave = torch.cat([*parts, self._silence(gaps[-1])])
        if self.dither:
            # By file names, not folders: the same wherever the data lies.
            names = [splitext(basename(path))[0] for path in wavs]
            wave += self.dither * _noise(len(wave), [*names, *gaps])
        return wave

    def _silence(self, seconds):
        return torch.zeros(round(float(seconds) * self.sample_rate))

    def _recording(self, path):
        wave = self.cache[path]
        if self.rms_db is None:
            return wave
        level = wave.square().mean().sqrt().clamp_min(1e-6)
        gain = 10.0 ** (self.rms_db / 20.0) / level
        # A gain that would clip is lowered, not the waveform cut.
        return wave * min(float(gain), 0.999 / float(wave.abs().max() + 1e-9))


@functools.lru_cache(maxsize=1)
def _noise_tape():
    """Half a minute of white noise: drawing it anew would cost the most."""
    return torch.randn(1 << 19, generator=torch.Generator().manual_seed(0))


def _noise(length, key):
    """Return a stretch of the tape that depends on the key."""
    tape = _noise_tape()
    start = zlib.crc32("|".join(map(str, key)).encode()) % len(tape)
    stretch = tape[start : start + length]
    while len(stretch) < length:
        stretch = torch.cat([stretch, tape[: length - len(stretch)]])
    return stretch


def _check_ranges(count, n_words, gap, edge):
    if count < 1:
        raise ValueError(f"count={count}: expected at least one string")
    for name, (least, most), floor in (
        ("n_words", n_words, 1),
        ("gap", gap, 0.0),
        ("edge", edge, 0.0),
    ):
        if not floor <= least <= most:
            raise ValueError(
                f"{name}=({least}, {most}): expected {floor} <= least <= "
                "greatest"
            )


def _word_groups(recordings, words, groups):
    """Return {name: sorted words} after checking that somebody says them."""
    recordings = list(recordings)
    if not recordings:
        raise ValueError("no recordings: is the split or speaker misspelt?")
    splits = sorted({take.split for take in recordings})
    if len(splits) > 1:
        raise ValueError(
            f"recordings of the splits {', '.join(map(repr, splits))} "
            "together: a string must not join training and test recordings. "
            "Give one split at a time"
        )
    said = {take.wrd for take in recordings}
    if groups is None:
        groups = {"all": said if words is None else words}
    asked = {word for group in groups.values() for word in group}
    absent = sorted(asked.union(words or ()) - said)
    if absent:
        raise ValueError(
            f"no recording of {', '.join(absent)}; the words recorded are "
            f"{', '.join(sorted(said))}"
        )
    groups = {
        name: sorted(w for w in group if words is None or w in words)
        for name, group in groups.items()
    }
    empty = [str(name) for name, group in groups.items() if not group]
    if empty:
        raise ValueError(
            f"no word left in the group {', '.join(empty)}: groups and "
            "words exclude one another"
        )
    return groups


def _by_speaker_and_word(recordings, groups):
    takes = collections.defaultdict(lambda: collections.defaultdict(list))
    for take in sorted(recordings, key=lambda take: take.ID):
        takes[take.spk_id][take.wrd].append(take)
    for speaker, said in takes.items():
        for name, group in groups.items():
            if not any(word in said for word in group):
                raise ValueError(
                    f"speaker {speaker} has no recording of any word of the "
                    f"group {name} ({', '.join(group)}): leave the speaker "
                    "or the group out"
                )
    return takes
