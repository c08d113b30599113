"""A ready Brain for speech translation with auxiliary tasks."""

import logging

import speechbrain as sb
import torch
from speechbrain.utils.distributed import get_rank

from speechbrain_taskarith.brains.averaging import load_average, save_epoch
from speechbrain_taskarith.brains.ctc import bare
from speechbrain_taskarith.brains.training import WholeUpdates
from speechbrain_taskarith.data.batches import (
    augmented,
    labelled_texts,
    select_inputs,
)
from speechbrain_taskarith.metrics import translation_scores, wer
from speechbrain_taskarith.translation import (
    GradientAggregator,
    greedy_translation,
)
from speechbrain_taskarith.translation.distributed import names_of_all
from speechbrain_taskarith.utils.recoverable import RunningMeans
from speechbrain_taskarith.utils.seeds import seed_random_numbers

logger = logging.getLogger(__name__)


class TranslationBrain(WholeUpdates, sb.Brain):
    """Train and test a `SpeechTranslationModel` on any of its tasks.

    `modules` holds `model` and, if wanted, `normalize` (SpeechBrain's
    `InputNormalization`). `hparams` holds:

    - `main`: the task to score, `"st"`, `"mt"` or `"asr"`;
    - `objective`: a `TranslationObjective`;
    - `task_weights`: a `TaskNormWeights` with the same `main`; it names the
      auxiliary tasks, and those that are still computed;
    - `target_labels`: `decode(list of lists of indices) -> list of str`, as
      `PieceLabels` and SentencePiece have it; where "asr" is a task, or the
      objective has CTC in "st", also `source_labels`, whose index 0 is the
      blank;
    - `bos_index`, `eos_index`: of the decoder;
    - `greedy_tokens`: longest translation of the greedy search;
    - `seed`: int;
    - `search` (optional): a `TranslationBeamSearch`, used in tests only;
    - `bleu_tokenize` (optional): sacrebleu's tokeniser (see
      `bleu_tokenizer`), 13a by default;
    - `average_last` (optional): tests the mean of the last so many epochs'
      checkpoints, which are kept for it, in place of the best one;
    - `compute_features`, `fea_augment` (optional): waveforms to features, and
      their augmentation in training; without the first, the model takes
      `batch.sig` as it is;
    - `guard` (optional): an `InputGuard`;
    - `consistency` (optional): a `ConsistencyProbe`;
    - `warm_up_frozen`, `warm_up_without` (optional): names of the model's
      parts, such as `acoustic.encoder`, that train only after the task
      weights' `warm_up`, and of those left out of it, such as `shrink`;
    - `aggregator` (optional): a `GradientAggregator`, whose gradient takes the
      place of the weighted sum's; each task's row is that of its weighted loss;
    - `lr_annealing` (optional): called with the optimizer before each update,
      unless `brain.lr_annealing` is set;
    - `train_logger` (optional).

    A batch holds `id`, `sig`, `source` (labels of the transcript),
    `target_bos` and `target_eos` (labels of the translation, after the
    beginning token and before the end token), `wrd` and `translation` (both
    as text).

    Random numbers are seeded for every batch, so that a resumed run ends with
    the same weights. Validation and test leave their texts in `ids`,
    `references` and `hypotheses`, and their scores in `stats`. Each epoch saves
    a checkpoint; the one with the best BLEU on the validation data is kept, or
    with the lowest WER if the main task is "asr" (see `best_key`).

    Arguments
    ---------
    modules, opt_class, hparams, run_opts, checkpointer : object
        As `sb.Brain` takes them.

    Example
    -------
    >>> from functools import partial
    >>> from speechbrain.dataio.batch import PaddedBatch
    >>> from speechbrain_taskarith.brains import WordLabels
    >>> from speechbrain_taskarith import translation as st
    >>> class Tiny(torch.nn.Module):
    ...     def forward(self, x, lens):
    ...         return x
    >>> _ = torch.manual_seed(0)
    >>> model = st.SpeechTranslationModel(
    ...     st.AcousticEncoder(Tiny(), 8),
    ...     st.TextEncoder(8, 2, num_layers=1),
    ...     st.TranslationDecoder(6, 8, 2, num_layers=1),
    ...     source_vocab=3,
    ... )
    >>> source = WordLabels(["good", "day"])
    >>> target = WordLabels(["<s>", "</s>", "bon", "jour", "."])
    >>> brain = TranslationBrain(
    ...     {"model": model},
    ...     opt_class=partial(torch.optim.Adam, lr=0.02),
    ...     hparams={
    ...         "main": "st",
    ...         "objective": st.TranslationObjective(blank_index=0),
    ...         "task_weights": st.TaskNormWeights(["asr", "mt"], interval=10),
    ...         "source_labels": source,
    ...         "target_labels": target,
    ...         **{"bos_index": 1, "eos_index": 2, "greedy_tokens": 5, "seed": 0},
    ...     },
    ...     run_opts={"device": "cpu", "noprogressbar": True},
    ... )
    >>> utterance = {
    ...     "id": "u1",
    ...     "sig": torch.rand(6, 8),
    ...     "source": source.encode("good day"),
    ...     "target_bos": target.encode("<s> bon jour ."),
    ...     "target_eos": target.encode("bon jour . </s>"),
    ...     "wrd": "good day",
    ...     "translation": "bon jour .",
    ... }
    >>> loader = torch.utils.data.DataLoader(
    ...     [utterance], collate_fn=PaddedBatch
    ... )
    >>> brain.fit(range(30), loader)
    >>> _ = brain.evaluate(loader)
    >>> brain.hypotheses
    ['bon jour .']
    >>> sorted(brain.stats)
    ['BLEU', 'CTC_CER', 'CTC_WER', 'chrF', 'length_ratio', 'loss']
    """

    #: Called with the optimizer before every update, if set.
    lr_annealing = None

    def __init__(
        self,
        modules=None,
        opt_class=None,
        hparams=None,
        run_opts=None,
        checkpointer=None,
    ):
        super().__init__(modules, opt_class, hparams, run_opts, checkpointer)
        aggregator = self._optional("aggregator")
        if not isinstance(aggregator, GradientAggregator | None):
            raise ValueError(
                f"aggregator: {aggregator!r}; expected a GradientAggregator "
                "(see its docstring for the YAML)"
            )
        tokenize = self._optional("bleu_tokenize")
        if tokenize is not None and self.hparams.main != "asr":
            # One that is not installed is an error before the training.
            translation_scores(["a"], ["a"], tokenize=tokenize)
        self.task_losses = RunningMeans()
        self.train_stats, self.stats, self.scores = {}, {}, None
        self._held_parameters = None
        if self.checkpointer is not None:
            self.checkpointer.add_recoverable("task_losses", self.task_losses)

    def compute_forward(self, batch, stage):
        """Forward computations from the waveforms to all tasks' outputs."""
        batch = batch.to(self.device)
        tasks = self.tasks_of(batch, stage) or (self.hparams.main,)
        x = lens = None
        if "st" in tasks or "asr" in tasks:
            x, lens = self.features(batch)
        rows = self._valid_rows(batch, tasks, x, lens)
        self.inputs = select_inputs(batch, x, lens, rows)
        augment = self._optional("fea_augment")
        if stage == sb.Stage.TRAIN and x is not None and augment is not None:
            self.inputs = augmented(self.inputs, augment)
        names = ("x", "lens", "source", "source_lens", "target_bos", "ids")
        inputs = {name: self.inputs.get(name) for name in names}
        return self.modules.model(tasks=tasks, **inputs)

    def compute_objectives(self, predictions, batch, stage):
        """Return the weighted sum of the losses; outside training translate."""
        names = ("source", "source_lens", "target_eos", "target_lens")
        targets = {name: self.inputs[name] for name in names}
        ids = self.inputs["ids"]
        losses = self.hparams.objective(predictions, **targets, ids=ids)
        if stage != sb.Stage.TRAIN:
            self._collect(predictions, stage)
            return losses[self.hparams.main]
        weights = self.hparams.task_weights
        if weights.due:
            share = 1 / self.grad_accumulation_factor
            # The bare module: gradients of our own must not start DDP's.
            parts = bare(self.modules.model).parts()
            weights.observe(losses, parts, share)
        if self.should_step and self._optional("consistency") is not None:
            self.measure(losses)
        self.task_losses.add(losses)
        total, aggregator = weights.total(losses), self._optional("aggregator")
        if aggregator is None:
            return total
        rows = {t: weights[t] * x for t, x in losses.items() if weights[t] > 0}
        if not names_of_all(rows):
            return total
        # All processes aggregate; one without rows only takes part.
        scale = self.scaler.get_scale()
        combined = aggregator.total(rows, self.modules, scale)
        return combined if rows else total

    def tasks_of(self, batch, stage):
        """Return the tasks to compute of a batch; override it for mixed data.

        Arguments
        ---------
        batch : PaddedBatch
            See the class.
        stage : sb.Stage
            Training computes all active tasks, other stages the main task.

        Returns
        -------
        tuple of str
            Tasks. A batch without any is not trained on.
        """
        if stage == sb.Stage.TRAIN:
            return self.hparams.task_weights.active
        return (self.hparams.main,)

    def features(self, batch):
        """Turn a batch's waveforms into the model's input.

        Arguments
        ---------
        batch : PaddedBatch
            On the device.

        Returns
        -------
        torch.Tensor
            [batch, time, features], or `batch.sig` as it is.
        torch.Tensor
            [batch], relative lengths.
        """
        x, lens = batch.sig
        if self._optional("compute_features") is not None:
            x = self.hparams.compute_features(x)
        if "normalize" in self.modules:
            x = self.modules.normalize(x, lens)
        return x, lens

    def _optional(self, name):
        return getattr(self.hparams, name, None)

    def _trains_ctc(self):
        """Tell whether the CTC head is, or was, trained by a task."""
        tasks = {self.hparams.main, *self.hparams.task_weights.tasks}
        in_st = "st" in tasks and self.hparams.objective.st_needs_source
        return "asr" in tasks or in_st

    def _valid_rows(self, batch, tasks, x, lens):
        """Return the rows of a batch that pass the guard, None for all."""
        if self._optional("guard") is None:
            return None
        needed, weights = {}, self.hparams.task_weights
        # Of all tasks: a stopped task must not change who is left out.
        all_tasks = {self.hparams.main, *weights.tasks}
        if {"asr", "mt"} & all_tasks or self._trains_ctc():
            needed["transcripts"] = labelled_texts(batch.wrd, batch.source)
        if {"st", "mt"} & set(tasks):
            needed["translations"] = batch.translation
        return self.hparams.guard(batch.id, x, lens, **needed)

    def measure(self, losses):
        """Measure the consistency of the tasks' gradients, when it is due.

        Arguments
        ---------
        losses : dict of str: torch.Tensor
            With their graphs.
        """
        self.hparams.consistency.step(losses, bare(self.modules.model))

    def _collect(self, predictions, stage):
        """Translate a batch, and transcribe it if the CTC head is trained."""
        main = self.hparams.main
        self.ids += self.inputs["ids"]
        if main != "asr":
            encoding = predictions.speech if main == "st" else predictions.text
            self.references += self.inputs["translations"]
            self.hypotheses += self._translate(encoding, stage)
        speech = predictions.speech
        if speech is not None and self._trains_ctc():
            labels = sb.decoders.ctc_greedy_decode(
                speech.logits,
                speech.frame_lens,
                self.hparams.objective.blank_index,
            )
            self.transcripts += self.inputs["transcripts"]
            self.ctc_hypotheses += self.hparams.source_labels.decode(labels)

    def _translate(self, encoding, stage):
        """Translate. Validation is greedy: a beam takes several times as long."""
        # It names the target language, where there are several.
        begin = self.inputs["target_bos"][:, 0]
        if stage == sb.Stage.TEST and self._optional("search") is not None:
            usual = bool((begin == self.hparams.bos_index).all())
            found = self.hparams.search(
                encoding.encoded, encoding.lens, *([] if usual else [begin])
            )[0]
        else:
            found = greedy_translation(
                bare(self.modules.model).decoder,
                encoding.encoded,
                encoding.lens,
                begin,
                self.hparams.eos_index,
                self.hparams.greedy_tokens,
            )
        return self.hparams.target_labels.decode(
            [[int(token) for token in tokens] for tokens in found]
        )

    def fit_batch(self, batch):
        """Train on a batch, unless none of its tasks is active.

        Of the batches that share an update the last one has to be of the main
        task, which never stops, and counts as 0 while it waits for the warm-up.
        """
        last = self.step % self.grad_accumulation_factor == 0
        waits = self.hparams.task_weights.warming_up and last
        tasks = self.tasks_of(batch, sb.Stage.TRAIN)
        if not waits and not tasks:
            return torch.zeros(())
        loss = super().fit_batch(batch)
        # Upstream's mean has a 0 for each batch that was not trained on.
        if tasks and torch.isfinite(loss):
            self.task_losses.add({"loss": loss})
        return loss

    def _hold_parameters(self):
        """Freeze, and leave out, parts of the model in the warm-up."""
        model = bare(self.modules.model)
        if self._held_parameters is None:
            self._held_parameters = [
                parameter
                for name in self._optional("warm_up_frozen") or ()
                for parameter in model.get_submodule(name).parameters()
                if parameter.requires_grad
            ]
        waits = self.hparams.task_weights.warming_up
        if any(p.requires_grad == waits for p in self._held_parameters):
            for parameter in self._held_parameters:
                parameter.requires_grad_(not waits)
                # Cached outputs still enter the encoder below it.
                parameter.held = waits
            # What is frozen rests in evaluation mode: not from the next epoch
            # on only, or a resumed run would differ.
            model.train()
        if without := self._optional("warm_up_without"):
            model.leave_out(without if waits else ())

    def on_fit_batch_start(self, batch, should_step):
        """Seed this batch and update the rate; see `TranslationBrain`."""
        self.should_step = should_step
        self._hold_parameters()
        seed_random_numbers(
            self.hparams.seed, self.epoch, self.step, get_rank()
        )
        annealing = self.lr_annealing or self._optional("lr_annealing")
        if should_step and annealing is not None:
            annealing(self.optimizer)

    def on_fit_batch_end(self, batch, outputs, loss, should_step):
        """Update the task weights."""
        if should_step:
            self.hparams.task_weights.step()

    def on_evaluate_start(self, max_key=None, min_key=None):
        """Load what is tested: the best checkpoint, or the mean of the last."""
        super().on_evaluate_start(max_key, min_key)
        count = self._optional("average_last") or 1
        if self.checkpointer is not None and count > 1:
            load_average(self.checkpointer, bare(self.modules.model), count)

    def on_stage_start(self, stage, epoch=None):
        """Start with empty lists of texts."""
        self.epoch = epoch
        self.ids, self.references, self.hypotheses = [], [], []
        self.transcripts, self.ctc_hypotheses = [], []
        if stage == sb.Stage.TRAIN:
            # The last epoch may have ended within an update.
            self.hparams.task_weights.drop_unfinished()
            # A resumed run starts in the middle of its epoch.
            if self.step == 0:
                self.task_losses.clear()
                if self._optional("guard") is not None:
                    self.hparams.guard.counts.clear()

    def on_stage_end(self, stage, stage_loss, epoch=None):
        """Score, log, and save a checkpoint after validation."""
        if stage == sb.Stage.TRAIN:
            means = self.task_losses.means()
            self.train_stats = {"loss": float(stage_loss), **means}
            return
        self._score(float(stage_loss))
        train_logger = self._optional("train_logger")
        if stage == sb.Stage.VALID:
            self.on_validated(epoch)
            if train_logger is not None:
                train_logger.log_stats(
                    self.epoch_meta(epoch),
                    train_stats=self.train_stats,
                    valid_stats=self.stats,
                )
            if self._optional("guard") is not None:
                logger.info(self.hparams.guard.summary())
            self._save_epoch(epoch)
            return
        if train_logger is not None:
            train_logger.log_stats({"stage": "test"}, test_stats=self.stats)
        if self.scores is not None:
            logger.info(
                f"BLEU: {self.scores.bleu_signature}, chrF: "
                f"{self.scores.chrf_signature}"
            )

    def on_validated(self, epoch):
        """Hook for subclasses: after the scores, before the checkpoint.

        Arguments
        ---------
        epoch : int
            Its number; its scores are in `stats`.
        """

    def _score(self, loss):
        self.stats, self.scores = {"loss": loss}, None
        if self.hypotheses:
            self.scores = translation_scores(
                self.references,
                self.hypotheses,
                tokenize=self._optional("bleu_tokenize") or "13a",
            )
            self.stats["BLEU"] = self.scores.bleu
            self.stats["chrF"] = self.scores.chrf
            self.stats["length_ratio"] = self.scores.length_ratio
        if self.transcripts:
            report = wer(self.transcripts, self.ctc_hypotheses)
            self.stats["CTC_WER"] = report.wer
            characters = (self.transcripts, self.ctc_hypotheses)
            report = wer(*([list(t) for t in side] for side in characters))
            self.stats["CTC_CER"] = report.wer

    def epoch_meta(self, epoch):
        """Return what the log shows of an epoch besides losses and scores.

        Arguments
        ---------
        epoch : int
            Its number.

        Returns
        -------
        dict of str: float
            Epoch, learning rate, weights of the tasks.
        """
        weights = self.hparams.task_weights
        return {
            "epoch": epoch,
            "lr": self.optimizer.param_groups[0]["lr"],
            **{f"weight_{task}": weights[task] for task in weights.tasks},
        }

    def _save_epoch(self, epoch):
        if self.checkpointer is None:
            return
        best = best_key(self.hparams.main)
        (key,) = best.values()
        save_epoch(
            self.checkpointer,
            {key: float(self.stats[key]), "epoch": epoch},
            max(1, self._optional("average_last") or 1),
            best,
        )


def best_key(main):
    """Return how to find the best checkpoint of a main task.

    Arguments
    ---------
    main : str
        `"st"`, `"mt"` or `"asr"`.

    Returns
    -------
    dict of str: str
        For `Checkpointer.find_checkpoint` and `Brain.evaluate`.

    Example
    -------
    >>> best_key("st"), best_key("asr")
    ({'max_key': 'BLEU'}, {'min_key': 'CTC_WER'})
    """
    return {"min_key": "CTC_WER"} if main == "asr" else {"max_key": "BLEU"}
