"""Measures models on manifests; nothing is measured twice."""

from pathlib import Path

import torch
from common.precision import choose_precision
from hyperpyyaml import load_hyperpyyaml
from scoring import recognised_once
from train import ASR, make_dataset, read_rows


class Listener(ASR):
    """Recognises a data set; what it found is in `hypotheses`."""

    def evaluate_batch(self, batch, stage):
        """Search for words, and do nothing else."""
        batch = batch.to(self.device)
        wavs, wav_lens = batch.sig
        whisper = self.hparams.whisper
        with self.evaluation_ctx:
            encoded = whisper.forward_encoder(whisper._get_mel(wavs))
            self.recognise(encoded, wav_lens, batch)
        return torch.zeros(())

    def on_stage_end(self, stage, stage_loss, epoch):
        """Write nothing."""


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
    data_root : str or pathlib.Path
        What stands for `$data_root` in the manifests.
    """

    def __init__(self, hparams_file, overrides, folder, data_root="."):
        with open(hparams_file, encoding="utf-8") as stream:
            manifests = {"data_folder": ".", "prepare": None}
            self.hparams = load_hyperpyyaml(stream, manifests | overrides)
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.hparams["data_root"] = str(data_root)
        whisper = self.hparams["whisper"]
        self.hparams["prompt_length"] = len(whisper.tokenizer.prefix_tokens)
        self.whisper = whisper
        self.brain = Listener(
            modules=self.hparams["modules"],
            hparams=self.hparams,
            # Autocast: with all of it in bfloat16 the public Whisper base has
            # 71 % WER where it has 58 % (Dutch), since sums are rounded too.
            run_opts={
                "eval_precision": choose_precision(
                    self.hparams["train_precision"], {}
                ),
                "noprogressbar": True,
            },
        )
        self._data = {}

    def check(self, manifests):
        """Refuse manifests that could not be learned or recognised."""
        for manifest in manifests:
            read_rows(str(manifest), self.hparams)

    def dataset(self, manifest):
        """Read a manifest, the shortest utterance first."""
        key = str(manifest)
        if key not in self._data:
            rows = read_rows(key, self.hparams)
            data = make_dataset(rows, self.hparams)
            self._data[key] = data.filtered_sorted(sort_key="duration")
        return self._data[key]

    def __call__(self, name, state, manifest):
        """Return `{"references", "hypotheses"}` of a state on a manifest.

        `name` says what the state is; `state` is a mapping or a function that
        makes one, called only where this was not measured before.
        """

        def recognise():
            weights = state() if callable(state) else state
            self.whisper.load_weights(weights)
            self.brain.evaluate(
                self.dataset(manifest),
                test_loader_kwargs=self.hparams["test_loader_kwargs"],
            )
            return self.brain.references, self.brain.hypotheses

        return recognised_once(self.folder, name, manifest, recognise)
