"""Strings of words: synthetic ones of other languages, real English ones."""

import collections
import random
from pathlib import Path

from common.dataio import audio_cache
from common.digits import make_digit_strings
from common.simulate import RecordingSimulator
from common.strings import EDGE, GAP, draw_pauses, join_takes
from words import words_of

from speechbrain_taskarith.data import EspeakVoice, Recording, read_manifest
from speechbrain_taskarith.utils.progress import progress


def multilingual_strings(domain, hparams):
    """Make pretraining strings: synthetic voices as if they were recorded.

    Each is in one language and by one voice; for `domain` see `words.py`.
    """
    rate, seed = hparams["sample_rate"], hparams["seed"]
    simulate = RecordingSimulator(
        sample_rate=rate, seed=seed, **hparams["simulation"]
    )
    plan = [
        (language, variant, take)
        for language in hparams["languages"]
        for variant in hparams["variants"]
        for take in range(hparams["takes_per_voice"])
    ]
    recordings, cache = [], audio_cache(rate)
    for language, variant, take in progress(
        plan, desc=f"synthetic speech, {domain}"
    ):
        speaker = f"{language}+{variant}-{take}"
        rng = random.Random(f"{seed} {speaker}")
        voice = EspeakVoice(
            language,
            variant,
            rate=rng.randint(120, 220),
            pitch=rng.randint(30, 70),
        )
        for word in words_of(domain, language):
            key = f"{domain} {speaker} {word}"
            wave = simulate(voice(word, rate), key, session=speaker)
            cache.put(key, wave)
            recordings.append(
                Recording(
                    ID=key,
                    duration=len(wave) / rate,
                    wav=key,
                    spk_id=speaker,
                    wrd=word,
                    accent=language,
                    split="train",
                )
            )
    strings = make_digit_strings(
        recordings,
        hparams["pretraining_strings"],
        n_words=tuple(hparams["n_words"]),
        gap=GAP,
        edge=EDGE,
        seed=seed,
        prefix=domain,
    )
    return [{"ID": key, **item} for key, item in strings.items()]


def target_strings(split, hparams):
    """Make strings of real recordings of a split, in which some words are rare.

    Speakers take turns. A recording is used again only when all others of its
    word and speaker have been used.
    """
    recordings = read_manifest(Path(hparams["prepared_folder"], f"{split}.csv"))
    if split == "train":
        seconds, count = 60 * hparams["train_minutes"], None
        seed = hparams["seed"]
    else:
        # The same for all seeds.
        seconds, count, seed = None, hparams[f"{split}_strings"], 0
    words = list(hparams["vocabulary"])
    rare, share = set(hparams["rare_words"]), hparams["rare_share"]
    weights = [
        share / len(rare)
        if word in rare
        else (1 - share) / (len(words) - len(rare))
        for word in words
    ]
    takes = collections.defaultdict(list)
    for take in sorted(recordings, key=lambda take: take.ID):
        takes[take.spk_id, take.wrd].append(take)
    speakers = sorted({take.spk_id for take in recordings})
    missing = [
        f"{word} by {speaker}"
        for speaker in speakers
        for word in words
        if not takes[speaker, word]
    ]
    if missing:
        raise ValueError(
            f"no {split} recording of {', '.join(missing[:5])}; "
            "name words of your data under `vocabulary`"
        )
    rng, bags = random.Random(f"{split} {seed}"), {}
    strings, total = [], 0.0
    while total < seconds if seconds else len(strings) < count:
        speaker = speakers[len(strings) % len(speakers)]
        chosen = []
        for word in rng.choices(
            words, weights, k=rng.randint(*hparams["n_words"])
        ):
            bag = bags.setdefault((speaker, word), [])
            if not bag:
                bag.extend(takes[speaker, word])
                rng.shuffle(bag)
            chosen.append(bag.pop())
        pauses = draw_pauses(rng, len(chosen))
        string = join_takes(f"{split}-{len(strings):05d}", chosen, pauses)
        total += string["duration"]
        strings.append(string)
    return strings
