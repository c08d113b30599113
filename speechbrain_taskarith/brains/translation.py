"""A ready Brain for speech translation with auxiliary tasks."""

import logging

import speechbrain as sb
import torch
from speechbrain.utils.distributed import get_rank

from speechbrain_taskarith.brains.ctc import bare
from speechbrain_taskarith.brains.running_means import RunningMeans
from speechbrain_taskarith.brains.translation_batch import taken_rows
from speechbrain_taskarith.metrics import translation_scores, wer
from speechbrain_taskarith.translation import greedy_translation
from speechbrain_taskarith.utils.seeds import seed_random_numbers

logger = logging.getLogger(__name__)


class TranslationBrain(sb.Brain):
    """Train and test a `SpeechTranslationModel` on any of its tasks.

    In `modules`: `model` and, if wanted, `normalize` (SpeechBrain's
    `InputNormalization`). In `hparams`:

    - `main`: the task that counts, `"st"`, `"mt"` or `"asr"`;
    - `objective`: a `TranslationObjective`;
    - `task_weights`: a `TaskNormWeights` with the same `main`; it says which
      auxiliary tasks there are, and which of them are still computed;
    - `target_labels`: `decode(list of lists of indices) -> list of str`, as
      `PieceLabels` and SentencePiece have it; also `source_labels`, whose
      index 0 is the blank, where "asr" is a task;
    - `bos_index`, `eos_index`: of the decoder;
    - `greedy_tokens`: longest translation of the greedy search;
    - `seed`: int;
    - `search` (optional): a `TranslationBeamSearch`, for tests alone;
    - `compute_features`, `fea_augment` (optional): waveforms to features,
      and what is done to them in training; without the first, what the
      batch brings goes to the model as it is;
    - `guard` (optional): an `InputGuard`;
    - `consistency` (optional): a `ConsistencyProbe`;
    - `lr_annealing` (optional): called with the optimizer before each update,
      unless `brain.lr_annealing` is set;
    - `train_logger` (optional).

    A batch holds `id`, `sig`, `source` (labels of the transcript),
    `target_bos` and `target_eos` (the translation behind its beginning token,
    and before its end token), `wrd` and `translation` (both as text).

    With every batch random numbers are seeded anew, so that a run that was
    killed and started again gives what it would have given. Each stage but
    training leaves its texts in `ids`, `references`, `hypotheses`, its scores
    in `stats`, and each epoch a checkpoint: the one of best development BLEU
    is kept, for the main task "asr" that of least WER (see `best_key`).

    Arguments
    ---------
    modules, opt_class, hparams, run_opts, checkpointer : object
        As `sb.Brain` takes them.

    Example
    -------
    >>> from functools import partial
    >>> from speechbrain.dataio.batch import PaddedBatch
    >>> from speechbrain_taskarith.brains import WordLabels
    >>> from speechbrain_taskarith.translation import (
    ...     AcousticEncoder,
    ...     SpeechTranslationModel,
    ...     TaskNormWeights,
    ...     TextEncoder,
    ...     TranslationDecoder,
    ...     TranslationObjective,
    ... )
    >>> class Tiny(torch.nn.Module):
    ...     def forward(self, x, lens):
    ...         return x
    >>> _ = torch.manual_seed(0)
    >>> model = SpeechTranslationModel(
    ...     AcousticEncoder(Tiny(), 8),
    ...     TextEncoder(8, 2, num_layers=1),
    ...     TranslationDecoder(6, 8, 2, num_layers=1),
    ...     source_vocab=3,
    ... )
    >>> source = WordLabels(["good", "day"])
    >>> target = WordLabels(["<s>", "</s>", "bon", "jour", "."])
    >>> brain = TranslationBrain(
    ...     {"model": model},
    ...     opt_class=partial(torch.optim.Adam, lr=0.02),
    ...     hparams={
    ...         "main": "st",
    ...         "objective": TranslationObjective(blank_index=0),
    ...         "task_weights": TaskNormWeights(["asr", "mt"], interval=10),
    ...         "source_labels": source,
    ...         "target_labels": target,
    ...         **{"bos_index": 1, "eos_index": 2, "greedy_tokens": 5, "seed": 0},
    ...     },
    ...     run_opts={"device": "cpu", "noprogressbar": True},
    ... )
    >>> batch = PaddedBatch(
    ...     [
    ...         {
    ...             "id": "u1",
    ...             "sig": torch.rand(6, 8),
    ...             "source": source.encode("good day"),
    ...             "target_bos": target.encode("<s> bon jour ."),
    ...             "target_eos": target.encode("bon jour . </s>"),
    ...             "wrd": "good day",
    ...             "translation": "bon jour .",
    ...         }
    ...     ]
    ... )
    >>> loader = torch.utils.data.DataLoader(
    ...     [batch], batch_size=1, collate_fn=lambda batches: batches[0]
    ... )
    >>> brain.fit(range(30), loader)
    >>> _ = brain.evaluate(loader)
    >>> brain.hypotheses
    ['bon jour .']
    >>> sorted(brain.stats)
    ['BLEU', 'CTC_WER', 'chrF', 'length_ratio', 'loss']
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
        self.task_losses = RunningMeans()
        self.train_stats, self.stats, self.scores = {}, {}, None
        if self.checkpointer is not None:
            self.checkpointer.add_recoverable("task_losses", self.task_losses)

    def _given(self, name):
        return getattr(self.hparams, name, None)

    def tasks_of(self, batch, stage):
        """Return what to compute of a batch; override it for mixed data.

        Arguments
        ---------
        batch : PaddedBatch
            See the class.
        stage : sb.Stage
            Training computes all tasks that are still going.

        Returns
        -------
        tuple of str
            Tasks. Where none is left of a batch it is not trained on.
        """
        del batch
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
            [batch, time, features], or what the batch brings.
        torch.Tensor
            [batch], relative lengths.
        """
        x, lens = batch.sig
        if self._given("compute_features") is not None:
            x = self.hparams.compute_features(x)
        if "normalize" in self.modules:
            x = self.modules.normalize(x, lens)
        return x, lens

    def compute_forward(self, batch, stage):
        """Compute the tasks that are still going.

        Arguments
        ---------
        batch : PaddedBatch
            See the class.
        stage : sb.Stage
            Training augments.

        Returns
        -------
        TranslationOutput
            Of the model.
        """
        batch = batch.to(self.device)
        tasks = self.tasks_of(batch, stage)
        x = lens = None
        if {"st", "asr"} & set(tasks):
            x, lens = self.features(batch)
        good = self._good(batch, tasks, x, lens)
        augment = self._given("fea_augment")
        if stage == sb.Stage.TRAIN and x is not None and augment is not None:
            x, lens = augment(x, lens)
        self.taken = taken_rows(batch, x, lens, good)
        names = ("x", "lens", "source", "source_lens", "target_bos", "ids")
        inputs = {name: self.taken.get(name) for name in names}
        return self.modules.model(tasks=tasks, **inputs)

    def _good(self, batch, tasks, x, lens):
        """Return the positions of good utterances, None where all are."""
        if self._given("guard") is None:
            return None
        wants, weights = {}, self.hparams.task_weights
        # Of all tasks, stopped or not: who is left out does not change.
        if {"asr", "mt"} & {self.hparams.main, *weights.tasks}:
            wants["transcripts"] = batch.wrd
        if {"st", "mt"} & set(tasks):
            wants["translations"] = batch.translation
        return self.hparams.guard(batch.id, x, lens, **wants)

    def compute_objectives(self, predictions, batch, stage):
        """Return the weighted sum of losses; outside training translate.

        Arguments
        ---------
        predictions : TranslationOutput
            From `compute_forward`.
        batch : PaddedBatch
            See the class.
        stage : sb.Stage
            Training or not.

        Returns
        -------
        torch.Tensor
            A scalar.
        """
        names = ("source", "source_lens", "target_eos", "target_lens")
        targets = {name: self.taken[name] for name in names}
        losses = self.hparams.objective(predictions, **targets)
        if stage != sb.Stage.TRAIN:
            self.collect(predictions, stage)
            return losses[self.hparams.main]
        weights = self.hparams.task_weights
        if weights.due:
            share = 1 / self.grad_accumulation_factor
            # The bare module: gradients of our own must not start DDP's.
            parts = bare(self.modules.model).parts()
            weights.observe(losses, parts, share)
        if self.should_step and self._given("consistency") is not None:
            self.measure(losses)
        self.task_losses.add(losses)
        return weights.total(losses)

    def measure(self, losses):
        """Measure how consistent the tasks' gradients are, when it is due.

        Arguments
        ---------
        losses : dict of str: torch.Tensor
            With their graphs.
        """
        self.hparams.consistency.step(losses, bare(self.modules.model))

    def collect(self, predictions, stage):
        """Translate, and transcribe where the CTC head is trained.

        Arguments
        ---------
        predictions : TranslationOutput
            From `compute_forward`.
        stage : sb.Stage
            Tests search with a beam.
        """
        main = self.hparams.main
        self.ids += self.taken["ids"]
        if main != "asr":
            found = predictions.speech if main == "st" else predictions.text
            self.references += self.taken["translations"]
            self.hypotheses += self.translate(found, stage)
        speech = predictions.speech
        every = (main, *self.hparams.task_weights.tasks)
        if speech is not None and "asr" in every:
            labels = sb.decoders.ctc_greedy_decode(
                speech.logits,
                speech.frame_lens,
                self.hparams.objective.blank_index,
            )
            self.said += self.taken["transcripts"]
            self.heard += self.hparams.source_labels.decode(labels)

    def translate(self, encoding, stage):
        """Search for translations.

        Arguments
        ---------
        encoding : SpeechEncoding or TextEncoding
            What to translate.
        stage : sb.Stage
            Development data are translated greedily: a beam costs several
            times as much.

        Returns
        -------
        list of str
            Translations.
        """
        if stage == sb.Stage.TEST and self._given("search") is not None:
            found = self.hparams.search(encoding.encoded, encoding.lens)[0]
        else:
            found = greedy_translation(
                bare(self.modules.model).decoder,
                encoding.encoded,
                encoding.lens,
                self.hparams.bos_index,
                self.hparams.eos_index,
                self.hparams.greedy_tokens,
            )
        return self.hparams.target_labels.decode(
            [[int(token) for token in one] for one in found]
        )

    def fit_batch(self, batch):
        """Train on a batch, unless its tasks have all stopped.

        Arguments
        ---------
        batch : PaddedBatch
            See the class. Of those that share an update the last one has to
            be of the main task, which never stops.

        Returns
        -------
        torch.Tensor
            Its loss.
        """
        if not self.tasks_of(batch, sb.Stage.TRAIN):
            return torch.zeros(())
        return super().fit_batch(batch)

    def on_fit_batch_start(self, batch, should_step):
        """Seed this batch, and move the learning rate on; see the class.

        Arguments
        ---------
        batch : PaddedBatch
            Not used.
        should_step : bool
            True where the optimizer is about to move.
        """
        self.should_step = should_step
        seed_random_numbers(
            self.hparams.seed, self.epoch, self.step, get_rank()
        )
        annealing = self.lr_annealing or self._given("lr_annealing")
        if should_step and annealing is not None:
            annealing(self.optimizer)

    def on_fit_batch_end(self, batch, outputs, loss, should_step):
        """Move the task weights on.

        Arguments
        ---------
        batch, outputs, loss, should_step : object
            The last is True where the optimizer moved.
        """
        if should_step:
            self.hparams.task_weights.step()

    def _should_save_intra_epoch_ckpt(self, *when):
        """Save behind whole updates only: half a gradient is not kept."""
        whole = self.step % self.grad_accumulation_factor == 0
        return super()._should_save_intra_epoch_ckpt(*when) and whole

    def on_stage_start(self, stage, epoch=None):
        """Forget what was said in the stage before.

        Arguments
        ---------
        stage : sb.Stage
            The stage.
        epoch : int, optional
            Its number.
        """
        self.epoch = epoch
        self.ids, self.references, self.hypotheses = [], [], []
        self.said, self.heard = [], []
        # A resumed run goes on in the middle of its epoch.
        if stage == sb.Stage.TRAIN and self.step == 0:
            self.task_losses.clear()

    def on_stage_end(self, stage, stage_loss, epoch=None):
        """Score, log, and save after validation.

        Arguments
        ---------
        stage : sb.Stage
            The stage.
        stage_loss : float
            Its mean loss.
        epoch : int, optional
            Its number.
        """
        if stage == sb.Stage.TRAIN:
            means = self.task_losses.means()
            self.train_stats = {"loss": float(stage_loss), **means}
            return
        self._score(float(stage_loss))
        train_logger = self._given("train_logger")
        if stage == sb.Stage.VALID:
            self.on_validated(epoch)
            if train_logger is not None:
                train_logger.log_stats(
                    self.epoch_meta(epoch),
                    train_stats=self.train_stats,
                    valid_stats=self.stats,
                )
            if self._given("guard") is not None:
                logger.info(self.hparams.guard.summary())
            self._save_epoch(epoch)
        elif train_logger is not None:
            train_logger.log_stats({"stage": "test"}, test_stats=self.stats)

    def on_validated(self, epoch):
        """Do nothing; for subclasses: scores are there, nothing is saved yet.

        Arguments
        ---------
        epoch : int
            Its number; its scores are in `stats`.
        """

    def _score(self, loss):
        self.stats, self.scores = {"loss": loss}, None
        if self.hypotheses:
            self.scores = translation_scores(self.references, self.hypotheses)
            self.stats["BLEU"] = self.scores.bleu
            self.stats["chrF"] = self.scores.chrf
            self.stats["length_ratio"] = self.scores.length_ratio
        if self.said:
            self.stats["CTC_WER"] = wer(self.said, self.heard).wer

    def epoch_meta(self, epoch):
        """Return what the log says of an epoch besides losses and scores.

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
        self.checkpointer.save_and_keep_only(
            meta={key: float(self.stats[key]), "epoch": epoch},
            **{f"{which}s": [key] for which in best},
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
