"""The strings of digits to train and test on."""

import dataclasses
import random

import torchaudio
from common.dataio import audio_cache
from common.digits import make_digit_strings
from common.synthesis import synthesize_digits

from speechbrain_taskarith.data import read_manifest


class Tasks:
    """Makes the strings of every task: of an accent, or of a speaker.

    `hparams` are the recipe's.
    """

    def __init__(self, hparams):
        self.hparams = hparams
        self.cache = audio_cache(hparams["sample_rate"])
        self.names = list(hparams["tasks"])
        self._recordings = {
            split: read_manifest(f"{hparams['prepared_folder']}/{split}.csv")
            for split in ("train", "valid", "test")
        }

    def of(self, task, split):
        """Return a task's recordings of a split.

        Of the training recordings `takes_per_word` of each speaker and word.
        """
        wanted = self.hparams["tasks"][task]
        recordings = self._recordings[split]
        found = [r for r in recordings if wanted in (r.accent, r.spk_id)]
        if not found:
            accents = sorted({r.accent for r in recordings})
            speakers = sorted({r.spk_id for r in recordings})
            raise ValueError(
                f"task {task!r}: no {split} recording has the accent or "
                f"speaker {wanted!r}; the data has {', '.join(accents)}; "
                f"{', '.join(speakers)}. Name accents or speakers of your "
                "data under `tasks`"
            )
        limit = self.hparams["takes_per_word"]
        if split != "train" or limit is None:
            return found
        chosen, seen = [], {}
        for recording in found:
            key = recording.spk_id, recording.wrd
            seen[key] = seen.get(key, 0) + 1
            if seen[key] <= limit:
                chosen.append(recording)
        return chosen

    def training(self, names, steps):
        """Make strings for some steps, equally many of each task, shuffled."""
        count = steps * self.hparams["batch_size"]
        strings = []
        for number, task in enumerate(names):
            share = count * (number + 1) // len(names)
            strings += self._strings(
                task,
                "train",
                share - len(strings),
                self.hparams["seed"],
            )
        random.Random(f"{self.hparams['seed']} {names}").shuffle(strings)
        return strings

    def held_out(self, task, split):
        """Make `strings_per_task` strings to test on, the same for all seeds."""
        return self._strings(task, split, self.hparams["strings_per_task"], 0)

    def for_base(self, steps):
        """Make the strings that the base is trained on, as `base_data` says.

        `synthetic`: of synthetic voices that sound recorded; `pooled`: of all
        tasks' training recordings.
        """
        if self.hparams["base_data"] == "pooled":
            return self.training(self.names, steps)
        if self.hparams["base_data"] != "synthetic":
            raise ValueError(
                f"base_data: {self.hparams['base_data']!r}, expected "
                "'synthetic' or 'pooled'"
            )
        strings = make_digit_strings(
            self._synthetic(),
            steps * self.hparams["batch_size"],
            n_words=tuple(self.hparams["n_words"]),
            seed=self.hparams["seed"],
            prefix="base",
        )
        return [{"ID": key, "task": "", **s} for key, s in strings.items()]

    def _strings(self, task, split, count, seed):
        strings = make_digit_strings(
            self.of(task, split),
            count,
            n_words=tuple(self.hparams["n_words"]),
            seed=seed,
            prefix=f"{task}-{split}",
        )
        return [{"ID": key, "task": task, **s} for key, s in strings.items()]

    def _synthetic(self):
        """Make synthetic digits of many voices, each take at another place."""
        takes = synthesize_digits(
            self.hparams["vocabulary"],
            self.hparams["voices"],
            takes=self.hparams["takes_per_voice"],
            sample_rate=self.hparams["sample_rate"],
            seed=self.hparams["seed"],
            prefix="base",
            cache=self.cache,
        )
        rate, simulate = self.hparams["sample_rate"], self.hparams["simulator"]
        recorded = []
        for take in takes:
            # All words of a take are from one speaker at one place.
            place = f"{take.spk_id} {take.ID.rsplit('_', 1)[1]}"
            speed = random.Random(f"{self.hparams['seed']} {place}").uniform(
                *self.hparams["speeds"]
            )
            wave = torchaudio.functional.resample(
                self.cache[take.wav], round(rate * speed / 100) * 100, rate
            )
            self.cache.put(take.wav, simulate(wave, take.ID, session=place))
            duration = round(len(wave) / rate, 4)
            recorded.append(
                dataclasses.replace(take, spk_id=place, duration=duration)
            )
        return recorded
