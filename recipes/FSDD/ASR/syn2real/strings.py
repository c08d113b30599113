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
from common.strings import EDGE, GAP, draw_pauses, join_takes

# What `training_of` may name, and whose steps and learning rate it takes.
TRAININGS = {
    "pretrained": "pretraining",
    "mixed": "mixed",
    "joint": "domain",
    "synthetic": "domain",
    "real": "domain",
}


# Stands for all domains together.
ALL = "all"
# Leaves another speaker out for each seed.
BY_SEED = "by_seed"


class Strings:
    """Makes strings from real and synthetic recordings.

    `recordings` is `{"real" | "synthetic": {split: [Recording, ...]}}`.
    """

    def __init__(self, recordings, hparams):
        self.recordings = recordings
        self.steps = {
            training_of: hparams[f"{stage}_steps"]
            for training_of, stage in TRAININGS.items()
        }
        self.seed = hparams["seed"]
        self.batch_size = hparams["batch_size"]
        self.n_words = tuple(hparams["n_words"])
        self.counts = {
            split: hparams[f"{split}_strings"] for split in ("valid", "test")
        }
        shared = list(hparams["shared_words"])
        self.words = {
            name: [*group, *shared]
            for name, group in hparams["domains"].items()
        }
        everything = sorted({w for words in self.words.values() for w in words})
        own = hparams["own_share"] if shared else 1.0
        self.weights = {
            name: [own / len(group)] * len(group)
            + [(1.0 - own) / max(1, len(shared))] * len(shared)
            for name, group in hparams["domains"].items()
        }
        self.domains = list(self.words)
        self.words[ALL], self.weights[ALL] = everything, [1.0] * len(everything)
        self._takes = {}
        self._check_words()
        #: Whom the study leaves out, or None.
        self.left_out_speaker = self._speaker(hparams["left_out_speaker"])

    def of_training(self, training_of, domain, without=None):
        """Return the strings that one training learns, in their order.

        `pretrained`: synthetic voices say all words. `synthetic`, `real`: the
        domain's strings. `mixed`: those of all other domains, synthetic and
        real. `joint`: the same, and the domain's synthetic ones. No recording
        of the speaker `without` is in them.
        """
        if domain not in self.words:
            raise ValueError(
                f"domain {domain!r}: expected {', '.join(self.words)}"
            )
        speakers = sorted({t.spk_id for t in self.recordings["real"]["train"]})
        if without is not None and without not in speakers:
            raise ValueError(
                f"without_speaker: no training recording is of {without!r}; "
                f"the speakers are {', '.join(speakers)}"
            )
        count = self.steps[training_of] * self.batch_size
        if training_of == "pretrained":
            return self._all_words(count)
        if training_of in ("synthetic", "real"):
            return self._draw(
                training_of, "train", domain, count, self.seed, without=without
            )
        parts = [
            (side, other)
            for other in self.domains
            for side in ("real", "synthetic")
            if other != domain
        ]
        if training_of == "joint":
            parts.append(("synthetic", domain))
        return self._mix(parts, count, without)

    def held_out(self, side, split, domain, without=None, only=None):
        """Return strings to measure on; they are the same for all seeds.

        Recordings are of all speakers, of all but `without`, or of the
        speaker `only`.
        """
        return self._draw(
            side, split, domain, self.counts[split], 0, without, only
        )

    def _speaker(self, wanted):
        """Return the speaker to leave out; `by_seed` takes them in turn."""
        if wanted is None:
            return None
        speakers = sorted({t.spk_id for t in self.recordings["real"]["test"]})
        others = {t.spk_id for t in self.recordings["real"]["train"]}
        if wanted == BY_SEED:
            wanted = speakers[self.seed % len(speakers)]
        if wanted not in speakers or others <= {wanted}:
            raise ValueError(
                f"left_out_speaker: {wanted!r} cannot be left out; expected "
                f"{BY_SEED}, one of the test speakers ({', '.join(speakers)}) "
                "who is not the only training speaker, or null for none"
            )
        return wanted

    def _check_words(self):
        for side, splits in self.recordings.items():
            for split, takes in splits.items():
                missing = set(self.words[ALL]) - {take.wrd for take in takes}
                if missing:
                    raise ValueError(
                        f"{side} speech, split {split!r}: no recording of "
                        f"{', '.join(sorted(missing))}; name words of your "
                        "data under `domains` and `shared_words`"
                    )

    def _all_words(self, count):
        items = make_digit_strings(
            self.recordings["synthetic"]["train"],
            count,
            n_words=self.n_words,
            gap=GAP,
            edge=EDGE,
            words=self.words[ALL],
            seed=self.seed,
            prefix="general",
        )
        return [{"ID": key, **item} for key, item in items.items()]

    def _mix(self, parts, count, without):
        """Mix strings of several sides and domains, in equal parts."""
        each = -(-count // len(parts))
        items = [
            item
            for side, domain in parts
            for item in self._draw(
                side, "train", domain, each, self.seed, without=without
            )
        ]
        random.Random(f"mixed {self.seed}").shuffle(items)
        return items[:count]

    def _draw(self, side, split, domain, count, seed, without=None, only=None):
        # Two random streams: words are drawn alike on both sides, speakers
        # and takes are not.
        text = random.Random(f"words {split} {domain} {seed}")
        voice = random.Random(f"{side} {split} {domain} {seed}")
        takes = self._by_speaker(side, split)
        speakers = sorted(takes)
        if side == "real":
            speakers = [
                s for s in speakers if s != without and only in (None, s)
            ]
        strings = []
        for number in range(count):
            words = text.choices(
                self.words[domain],
                self.weights[domain],
                k=text.randint(*self.n_words),
            )
            pauses = draw_pauses(text, len(words))
            speaker = voice.choice(speakers)
            strings.append(
                join_takes(
                    f"{domain}-{side}-{split}-{number:05d}",
                    [voice.choice(takes[speaker][word]) for word in words],
                    pauses,
                )
            )
        return strings

    def _by_speaker(self, side, split):
        """Return `{speaker: {word: [Recording, ...]}}`, looked up once."""
        if (side, split) not in self._takes:
            found = collections.defaultdict(
                lambda: collections.defaultdict(list)
            )
            for take in self.recordings[side][split]:
                found[take.spk_id][take.wrd].append(take)
            self._takes[side, split] = found
        return self._takes[side, split]
