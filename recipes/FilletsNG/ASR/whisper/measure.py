"""Measures models on manifests; nothing is measured twice."""

import hashlib
import json
from pathlib import Path

from hyperpyyaml import load_hyperpyyaml
from train import ASR, load_weights, make_dataset, read_rows

from speechbrain_taskarith.brains import fast_precision
from speechbrain_taskarith.utils.files import read_json, write_json


class Listener(ASR):
    """Recognises a data set; the counts stay with `references`."""

    def on_stage_end(self, stage, stage_loss, epoch):
        """Count, and write nothing."""
        self.score()


class Measure:
    """Measures states of one Whisper model on manifests.

    Arguments
    ---------
    hparams_file : str or pathlib.Path
        As `train.py` takes it.
    overrides : dict
        Values that replace those of the file.
    folder : str or pathlib.Path
        Where what was measured is kept: a later run reads it from there.
    """

    def __init__(self, hparams_file, overrides, folder):
        with open(hparams_file, encoding="utf-8") as stream:
            self.hparams = load_hyperpyyaml(stream, overrides)
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        whisper = self.hparams["whisper"]
        self.hparams["prompt_length"] = len(whisper.tokenizer.prefix_tokens)
        self.whisper = whisper
        self.brain = Listener(
            modules=self.hparams["modules"],
            hparams=self.hparams,
            run_opts={
                "eval_precision": fast_precision(),
                "noprogressbar": True,
            },
        )
        self._data = {}

    def dataset(self, manifest, limit=None, data_root=None):
        """Read a manifest's first `limit` utterances, the shortest first."""
        key = str(manifest), limit
        if key not in self._data:
            hparams = {**self.hparams}
            if data_root is not None:
                hparams["data_folder"] = str(data_root)
            rows = read_rows(str(manifest), hparams)
            rows = dict(list(rows.items())[:limit])
            data = make_dataset(rows, hparams)
            self._data[key] = data.filtered_sorted(sort_key="duration")
        return self._data[key]

    def load(self, state):
        """Put the weights of a checkpoint or a `transformers` folder in."""
        load_weights(self.whisper, state)

    def __call__(self, name, state, manifest, limit=None, data_root=None):
        """Return the errors of a state on a manifest.

        `name` says what the state is; `state` is a mapping or a function that
        makes one, called only where this was not measured before. Returns
        `(words, characters, references, hypotheses)`.
        """
        told = json.dumps([name, str(manifest), limit])
        key = hashlib.sha256(told.encode()).hexdigest()[:16]
        path = self.folder / f"{key}.json"
        if not path.exists():
            state = state() if callable(state) else state
            self.load(state)
            self.brain.evaluate(
                self.dataset(manifest, limit, data_root),
                test_loader_kwargs=self.hparams["test_loader_kwargs"],
            )
            write_json(
                path,
                {
                    "name": name,
                    "manifest": str(manifest),
                    "references": self.brain.references,
                    "hypotheses": self.brain.hypotheses,
                },
            )
        return read_json(path)
