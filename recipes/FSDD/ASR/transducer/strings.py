"""Strings of words: synthetic ones of many languages, real English ones."""

import collections
import random

from common.digits import make_digit_strings
from common.simulate import RecordingSimulator
from words import words_of

from speechbrain_taskarith.data import EspeakVoice, Recording
from speechbrain_taskarith.utils.progress import progress

# Pauses in seconds: between words, and before the first and after the last.
GAP = (0.0, 0.12)
EDGE = (0.03, 0.1)


def multilingual_strings(domain, hparams, cache, show_progress=True):
    """Make pre-training strings: synthetic voices as if they were recorded.

    Arguments
    ---------
    domain : str
        `"in_domain"` or `"out_of_domain"`, see `words.py`.
    hparams : dict
        Of the recipe.
    cache : AudioCache
        Where the waveforms go.
    show_progress : bool
        Show a bar.

    Returns
    -------
    list of dict
        Strings, each in one language and by one voice.
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
    recordings = []
    for language, variant, take in progress(
        plan, desc=f"synthetic speech, {domain}", enable=show_progress
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


def target_strings(recordings, hparams, *, seconds=None, count=None, seed=0):
    """Make strings of real recordings, in which some words are rare.

    Speakers take turns. A recording comes again only when all others of its
    word and speaker have been used.

    Arguments
    ---------
    recordings : list of Recording
        Of one split.
    hparams : dict
        Of the recipe: `vocabulary`, `rare_words`, `rare_share`, `n_words`.
    seconds : float or None
        How much audio.
    count : int or None
        How many strings, where `seconds` is not given.
    seed : int
        Another seed gives other strings.

    Returns
    -------
    list of dict
        Strings.
    """
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
            f"no {recordings[0].split} recording of {', '.join(missing[:5])}; "
            "name words of your data under `vocabulary`"
        )
    split = recordings[0].split
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
        gaps = [rng.uniform(*EDGE)]
        gaps += [rng.uniform(*GAP) for _ in chosen[1:]]
        gaps += [rng.uniform(*EDGE)]
        gaps = [round(gap, 4) for gap in gaps]
        duration = sum(take.duration for take in chosen) + sum(gaps)
        total += duration
        strings.append(
            {
                "ID": f"{split}-{len(strings):05d}",
                "wavs": [take.wav for take in chosen],
                "gaps": gaps,
                "wrd": " ".join(take.wrd for take in chosen),
                "spk_id": speaker,
                "duration": duration,
            }
        )
    return strings


def in_order(strings, count, seed):
    """Return strings in the order to train in: shuffled rounds.

    Arguments
    ---------
    strings : list of dict
        The training set.
    count : int
        Number of utterances to train on.
    seed : int
        Another seed gives another order.

    Returns
    -------
    list of dict
        Every string once in a round.
    """
    rng, order = random.Random(f"order {seed}"), []
    while len(order) < count:
        turn = list(strings)
        rng.shuffle(turn)
        order += turn
    return order[:count]
