#!/usr/bin/env python3
"""Recipe for transfer learning of streaming transducers (FSDD).

A streaming transducer learns the digits of other languages from synthetic
voices; its encoder is taken over by a model that learns English from ten
minutes of recordings, with the transducer loss and then with MinWER. One run
makes the whole table of one seed; a run that was killed goes on where it
stopped when started again.

To run this recipe, do the following:
> python train.py hparams/train.yaml --data_folder /path/to/FSDD --seed 0

Several seeds make one table (mean and standard deviation):
> python train.py hparams/train.yaml --data_folder ... --seed 1
> python train.py --merge results/transducer

Models that do not depend on one another are trained by several processes:
> python train.py hparams/train.yaml --data_folder ... --processes 2
"""

import sys
from pathlib import Path

import speechbrain as sb
import torch
from common.digits import AudioCache, DigitStringLoader
from hyperpyyaml import load_hyperpyyaml
from models import StudyModels, plan_models
from report import TITLE, write_report
from speechbrain.dataio.batch import PaddedBatch
from speechbrain.dataio.dataloader import SaveableDataLoader
from speechbrain.dataio.dataset import DynamicItemDataset
from speechbrain.utils.distributed import run_on_main
from strings import in_order, multilingual_strings, target_strings

from speechbrain_taskarith.brains import (
    Domain,
    FineTuneMixin,
    helpers,
    is_helper,
)
from speechbrain_taskarith.data import read_manifest
from speechbrain_taskarith.metrics import merge_seeds
from speechbrain_taskarith.transducer import joint_transducer_loss


class Transducer(FineTuneMixin, sb.Brain):
    """The Brain: RNN-T or MinWER on strings of words, one training a model.

    Arguments
    ---------
    part : str
        Which of the models: `"multilingual"`, `"target"`, `"full_context"`.
    own : dict
        That model, as `transcriber.yaml` makes it.
    hparams : dict
        Of the recipe.
    run_opts : dict
        As for `sb.Brain`.
    cache : AudioCache
        Of recordings and synthetic waveforms.
    """

    def __init__(self, part, own, hparams, run_opts, cache):
        super().__init__(
            modules={"model": own["model"], "normalize": own["normalize"]},
            hparams={**hparams, **own},
            run_opts=run_opts,
        )
        self.part = part
        self.train_stats = {}
        self.min_wer = None  # the loss of the last stage, while it is trained
        self.load_audio = DigitStringLoader(own["sample_rate"], cache=cache)

    def features(self, batch, stage):
        """Turn waveforms into normalised features; training augments."""
        wavs, lens = batch.to(self.device).sig
        if stage == sb.Stage.TRAIN:
            wavs = self.hparams.speed_perturb(wavs)
        x = self.hparams.features(wavs)
        # The statistics are those of `learn_statistics`: no update.
        x = self.modules.normalize(x, lens, epoch=1)
        if stage == sb.Stage.TRAIN:
            x, lens = self.hparams.fea_augment(x, lens)
        return x, lens

    def compute_forward(self, batch, stage):
        """Encode a batch: [batch, frames, d_model] and relative lengths."""
        model = self.modules.model
        x, lens = model["frontend"](*self.features(batch, stage))
        x = model["encoder"](x, lens)
        return torch.nn.functional.dropout(
            x, self.hparams.dropout, training=self.modules.training
        ), lens

    def compute_objectives(self, predictions, batch, stage):
        """Return the loss of the stage; outside training decode, too."""
        x, lens = predictions
        tokens, token_lens = batch.tokens
        if stage == sb.Stage.TRAIN and self.min_wer is not None:
            return self.min_wer(x, lens, tokens, token_lens, batch.wrd)
        blank, model = self.hparams.blank_index, self.modules.model
        predictor_out, _ = model["predictor"](
            torch.nn.functional.pad(tokens, (1, 0), value=blank)
        )
        loss = joint_transducer_loss(
            model["joint"],
            x,
            predictor_out,
            tokens,
            lens,
            token_lens,
            blank,
            memory_budget=self.hparams.memory_budget,
        )
        if stage != sb.Stage.TRAIN:
            found = self.hparams.searcher.decode(x, lens)
            tokenizer = self.hparams.tokenizers[self.part]
            self.references += batch.wrd
            self.hypotheses += tokenizer.decode([n[0].tokens for n in found])
        return loss

    def on_stage_start(self, stage, epoch=None):
        """Forget the words of the stage before."""
        self.references, self.hypotheses = [], []

    def on_stage_end(self, stage, stage_loss, epoch=None):
        """Log a training: loss, and what the n-best lists were like."""
        if stage == sb.Stage.TRAIN:
            stats = {"loss": float(stage_loss)}
            if self.min_wer is not None:
                stats.update(self.min_wer.statistics())
            self.train_stats = stats
            self.hparams.train_logger.log_stats(
                {"model": self.training_of, "lr": self.lr}, train_stats=stats
            )

    def on_fit_batch_end(self, batch, outputs, loss, should_step):
        """Move the learning rate on."""
        if should_step:
            self.lr_annealing(self.optimizer)

    def learn_statistics(self, strings):
        """Take mean and deviation of the features of a training set."""
        normalize = self.modules.normalize.train()
        normalize.count = 0
        for batch in self.evaluation_loader(strings):
            wavs, lens = batch.to(self.device).sig
            normalize(self.hparams.features(wavs), lens, epoch=0)

    def dataset(self, items):
        """Make a data set with `id`, `sig`, `tokens` and `wrd`."""
        data = DynamicItemDataset(
            {f"{n:06d}-{item['ID']}": item for n, item in enumerate(items)}
        )
        data.add_dynamic_item(
            self.load_audio, takes=["wavs", "gaps"], provides="sig"
        )
        data.add_dynamic_item(
            self.hparams.tokenizers[self.part].encode,
            takes="wrd",
            provides="tokens",
        )
        data.set_output_keys(["id", "sig", "tokens", "wrd"])
        return data

    def make_train_loader(self, items):
        """Make a loader that goes on in the middle after a kill."""
        return SaveableDataLoader(
            self.dataset(items),
            batch_size=self.hparams.batch_size,
            collate_fn=PaddedBatch,
        )

    def evaluation_loader(self, items):
        """Make a loader of all strings, the shortest first."""
        return torch.utils.data.DataLoader(
            self.dataset(sorted(items, key=lambda item: item["duration"])),
            batch_size=self.hparams.test_batch_size,
            collate_fn=PaddedBatch,
        )

    def train_model(self, model, start, strings, folder):
        """Train one model of the study.

        Arguments
        ---------
        model : models.Model
            What to train.
        start : dict of str to torch.Tensor
            Weights to start from.
        strings : list of dict
            The training set.
        folder : pathlib.Path
            For checkpoints on the way.
        """
        self.lr, self.training_of = model.lr, model.name
        self.learn_statistics(strings)
        if model.min_wer:
            self.min_wer = self.hparams.min_wer(
                self.hparams.searcher,
                detokenize=self.hparams.detokenize,
                memory_budget=self.hparams.memory_budget,
            )
        count = model.steps * self.hparams.batch_size
        items = in_order(strings, count, self.hparams.seed)
        try:
            self.fine_tune(Domain(model.name, items), start, folder)
        finally:
            self.min_wer = None

    def transcripts(self, strings):
        """Decode strings with the weights at hand.

        Arguments
        ---------
        strings : list of dict
            To measure on.

        Returns
        -------
        list of str, list of str
            References and hypotheses.
        """
        self.evaluate(self.evaluation_loader(strings))
        return self.references, self.hypotheses


def make_strings(hparams, cache, show_progress):
    """Return all sets of strings: `{name: [string, ...]}`, made when read."""
    recordings = {
        split: read_manifest(Path(hparams["prepared_folder"], f"{split}.csv"))
        for split in ("train", "valid", "test")
    }
    strings = {
        domain: multilingual_strings(domain, hparams, cache, show_progress)
        for domain in hparams["pretraining_domains"]
    }
    strings["train"] = target_strings(
        recordings["train"],
        hparams,
        seconds=60 * hparams["train_minutes"],
        seed=hparams["seed"],
    )
    # What is measured on is the same for all seeds.
    for split in ("valid", "test"):
        strings[split] = target_strings(
            recordings[split], hparams, count=hparams[f"{split}_strings"]
        )
    return strings


if __name__ == "__main__":
    if sys.argv[1:2] == ["--merge"]:
        merge_seeds(sys.argv[2], title=TITLE)
        sys.exit()

    # CLI
    hparams_file, run_opts, overrides = sb.parse_arguments(sys.argv[1:])
    with open(hparams_file, encoding="utf-8") as fin:
        hparams = load_hyperpyyaml(fin, overrides)

    if not is_helper():
        sb.create_experiment_directory(
            experiment_directory=hparams["output_folder"],
            hyperparams_to_save=hparams_file,
            overrides=overrides,
        )

        # Data preparation
        from fsdd_prepare import prepare_fsdd  # noqa: E402

        run_on_main(
            prepare_fsdd,
            kwargs={
                "data_folder": hparams["data_folder"],
                "save_folder": hparams["prepared_folder"],
                "skip_prep": hparams["skip_prep"],
            },
        )

    hparams["noprogressbar"] = True  # one bar over all models instead
    cache = AudioCache(hparams["sample_rate"])
    strings = make_strings(hparams, cache, show_progress=not is_helper())
    brains = {
        part: Transducer(part, own, hparams, run_opts, cache)
        for part, own in (
            ("multilingual", hparams["multilingual"]),
            ("target", hparams["target"]),
            ("full_context", hparams["full_context"]),
        )
    }
    models = plan_models(hparams)
    folder = StudyModels(Path(hparams["save_folder"], "models"), brains)
    with helpers(hparams["processes"] - 1):
        folder.train_all(
            models,
            lambda model: folder.train(model, strings[model.strings]),
            show_progress=not is_helper(),
        )
    if not is_helper():
        write_report(folder, models, strings, hparams)
