"""What all strings of digits have in common: pauses, and the form of an item."""

import random

# Pauses in seconds: between words, and before the first and after the last.
GAP = (0.0, 0.12)
EDGE = (0.03, 0.1)


def draw_pauses(rng, words, gap=GAP, edge=EDGE):
    """Draw the pauses around and between some words, in seconds."""
    pauses = [rng.uniform(*edge)]
    pauses += [rng.uniform(*gap) for _ in range(words - 1)]
    pauses += [rng.uniform(*edge)]
    return [round(pause, 4) for pause in pauses]


def join_takes(ID, takes, pauses):
    """Describe a string: the takes, one after another, with their pauses.

    `common.digits.DigitStringLoader` turns `wavs` and `gaps` into a waveform.
    """
    return {
        "ID": ID,
        "wavs": [take.wav for take in takes],
        "gaps": pauses,
        "wrd": " ".join(take.wrd for take in takes),
        "spk_id": takes[0].spk_id,
        "duration": sum(take.duration for take in takes) + sum(pauses),
    }


def in_order(strings, count, seed):
    """Return `count` strings in shuffled rounds; each comes once in a round."""
    rng, order = random.Random(f"order {seed}"), []
    while len(order) < count:
        turn = list(strings)
        rng.shuffle(turn)
        order += turn
    return order[:count]
