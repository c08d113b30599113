"""The strings of digits that the study trains and tests on."""

import dataclasses
import random

import torchaudio
from common.digits import make_digit_strings
from common.synthesis import synthesize_digits

from speechbrain_taskarith.data import read_manifest


class Tasks:
    """Makes strings of every task; a task is an accent or a speaker.

    Arguments
    ---------
    hparams : dict
        Of the recipe.
    cache : AudioCache
        Where synthetic recordings go.
    """

    def __init__(self, hparams, cache):
        self.hparams, self.cache = hparams, cache
        self.names = list(hparams["tasks"])
        self._recordings = {
            split: read_manifest(f"{hparams['prepared_folder']}/{split}.csv")
            for split in ("train", "valid", "test")
        }

    def of(self, task, split):
        """Return the recordings of a task.

        Arguments
        ---------
        task : str
            Its name.
        split : str
            `"train"`, `"valid"` or `"test"`.

        Returns
        -------
        list of Recording
            Of training recordings, `takes_per_word` of every speaker and
            word, or all.

        Raises
        ------
        ValueError
            The data has no recording of the task's accent or speaker.
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
        most = self.hparams["takes_per_word"]
        if split != "train" or most is None:
            return found
        kept, seen = [], {}
        for recording in found:
            key = recording.spk_id, recording.wrd
            seen[key] = seen.get(key, 0) + 1
            if seen[key] <= most:
                kept.append(recording)
        return kept

    def seconds(self, task):
        """Return how much training speech a task has, in seconds.

        Arguments
        ---------
        task : str
            Its name.

        Returns
        -------
        float
            Sum over its recordings.
        """
        return sum(r.duration for r in self.of(task, "train"))

    def training(self, names, steps):
        """Make strings to train on, equally many of each task, mixed.

        Arguments
        ---------
        names : sequence of str
            Tasks.
        steps : int
            Batches.

        Returns
        -------
        list of dict
            In the order to train in.
        """
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
        """Make strings to measure on, the same for all seeds.

        Arguments
        ---------
        task : str
            Its name.
        split : str
            `"valid"` or `"test"`.

        Returns
        -------
        list of dict
            `strings_per_task` of them.
        """
        return self._strings(task, split, self.hparams["strings_per_task"], 0)

    def for_base(self):
        """Make the strings that the base is trained on.

        Returns
        -------
        list of dict
            Of synthetic voices that sound recorded, or of all tasks' own
            training recordings, as `base_data` says.

        Raises
        ------
        ValueError
            Another `base_data`.
        """
        steps = self.hparams["base_steps"]
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
        """Make synthetic digits by many voices, each take somewhere else."""
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
