"""Strings of digits for every model of the study.

A domain is a group of words. Its strings hold the words of the group and, if
there are any, the words that all domains share. Strings come in pairs: the
same words with the same pauses, once from a person's recordings and once
from a synthetic voice, so that what differs between a real and a synthetic
model is the sound alone.
"""

import collections
import random

from common.digits import make_digit_strings

# Pauses in seconds: between words, and before the first and after the last.
GAP = (0.0, 0.12)
EDGE = (0.03, 0.1)


class Strings:
    """Makes strings from real and synthetic recordings.

    Arguments
    ---------
    recordings : dict
        `{"real" | "synthetic": {split: [Recording, ...]}}`.
    hparams : dict
        Of the recipe.
    """

    def __init__(self, recordings, hparams):
        self.recordings = recordings
        self.seed = hparams["seed"]
        self.batch_size = hparams["batch_size"]
        self.n_words = tuple(hparams["n_words"])
        self.held_out = {
            split: hparams[f"{split}_strings"] for split in ("valid", "test")
        }
        shared = list(hparams["shared_words"])
        self.words = {
            name: [*group, *shared]
            for name, group in hparams["domains"].items()
        }
        own = hparams["own_share"] if shared else 1.0
        self.weights = {
            name: [own / len(group)] * len(group)
            + [(1.0 - own) / max(1, len(shared))] * len(shared)
            for name, group in hparams["domains"].items()
        }
        self._takes = {}
        self._check_words()

    def _check_words(self):
        for side, splits in self.recordings.items():
            for split, takes in splits.items():
                missing = {w for ws in self.words.values() for w in ws}
                missing -= {take.wrd for take in takes}
                if missing:
                    raise ValueError(
                        f"{side} speech, split {split!r}: no recording of "
                        f"{', '.join(sorted(missing))}; name words of your "
                        "data under `domains` and `shared_words`"
                    )

    def general(self, steps):
        """Make strings of all words by synthetic voices.

        Arguments
        ---------
        steps : int
            Number of batches.

        Returns
        -------
        list of dict
            What the pre-trained model learns from.
        """
        items = make_digit_strings(
            self.recordings["synthetic"]["train"],
            steps * self.batch_size,
            n_words=self.n_words,
            gap=GAP,
            edge=EDGE,
            words=sorted({w for ws in self.words.values() for w in ws}),
            seed=self.seed,
            prefix="general",
        )
        return [{"ID": key, **item} for key, item in items.items()]

    def training(self, side, domain, steps):
        """Make one domain's training strings.

        Arguments
        ---------
        side : str
            `"real"` or `"synthetic"`: the n-th string has the same words
            and pauses on both sides.
        domain : str
            Name of the domain.
        steps : int
            Number of batches.

        Returns
        -------
        list of dict
            Strings.
        """
        count = steps * self.batch_size
        return self._strings(side, "train", domain, count, self.seed)

    def mixed(self, parts, steps):
        """Mix strings of several sides and domains, in equal parts.

        Arguments
        ---------
        parts : list of tuple of str
            `(side, domain)`; the sides are `"real"` and `"synthetic"`.
        steps : int
            Number of batches.

        Returns
        -------
        list of dict
            Strings.
        """
        count = steps * self.batch_size
        each = -(-count // len(parts))
        items = [
            item
            for side, domain in parts
            for item in self._strings(side, "train", domain, each, self.seed)
        ]
        random.Random(f"mixed {self.seed}").shuffle(items)
        return items[:count]

    def held_out_strings(self, side, split, domain):
        """Make strings to measure on; they are the same for all seeds.

        Arguments
        ---------
        side : str
            `"real"` or `"synthetic"`.
        split : str
            `"valid"` or `"test"`.
        domain : str
            Name of the domain.

        Returns
        -------
        list of dict
            Strings.
        """
        return self._strings(side, split, domain, self.held_out[split], 0)

    def _strings(self, side, split, domain, count, seed):
        # Two random streams: words are drawn alike on both sides, speakers
        # and takes are not.
        text = random.Random(f"words {split} {domain} {seed}")
        voice = random.Random(f"{side} {split} {domain} {seed}")
        takes = self._by_speaker(side, split)
        speakers = sorted(takes)
        strings = []
        for number in range(count):
            words = text.choices(
                self.words[domain],
                self.weights[domain],
                k=text.randint(*self.n_words),
            )
            gaps = [text.uniform(*EDGE)]
            gaps += [text.uniform(*GAP) for _ in words[1:]]
            gaps += [text.uniform(*EDGE)]
            speaker = voice.choice(speakers)
            chosen = [voice.choice(takes[speaker][word]) for word in words]
            strings.append(
                {
                    "ID": f"{domain}-{side}-{split}-{number:05d}",
                    "wavs": [take.wav for take in chosen],
                    "gaps": [round(gap, 4) for gap in gaps],
                    "wrd": " ".join(words),
                    "spk_id": speaker,
                    "duration": sum(take.duration for take in chosen)
                    + sum(gaps),
                }
            )
        return strings

    def _by_speaker(self, side, split):
        key = (side, split)
        if key not in self._takes:
            found = collections.defaultdict(
                lambda: collections.defaultdict(list)
            )
            for take in self.recordings[side][split]:
                found[take.spk_id][take.wrd].append(take)
            self._takes[key] = found
        return self._takes[key]
