"""A ready Brain for CTC models."""

import speechbrain as sb
import torch

from speechbrain_taskarith.brains.training import WholeUpdates
from speechbrain_taskarith.metrics import wer


class CTCBrain(WholeUpdates, sb.Brain):
    """Train and test a `CTCNetwork`; everything it needs comes from hparams.

    In `modules`: `model` (a `CTCNetwork`, or any module with
    `model(x, lens) -> log-probabilities`) and, if wanted, `normalize`
    (SpeechBrain's `InputNormalization`).

    In `hparams`:

    - `ctc_cost`: e.g. `!name:speechbrain.nnet.losses.ctc_loss` with
      `blank_index` and `reduction: batchmean` (a mean over utterances: equal
      shards then average to the whole batch);
    - `blank_index`: int;
    - `tokenizer`: with `decode(list of lists of labels) -> list of
      transcripts`, as `CharacterLabels` and SentencePiece have it;
    - `compute_features` (optional): waveforms to features; without it the
      model takes waveforms;
    - `wav_augment`, `fea_augment` (optional): `augment(x, lens)`, used in
      training, e.g. SpeechBrain's augmentations; lengths must stay;
    - `lr_annealing` (optional): called with the optimizer after every step,
      as SpeechBrain's `LinearWarmupScheduler`;
    - `keep_best` (optional): True keeps the checkpoint with the least WER
      beside the newest, for `evaluate(..., min_key="WER")`;
    - `train_logger` (optional).

    A batch holds `id`, `sig` (waveforms), `tokens` (label indices) and `wrd`
    (transcripts).

    Each stage but training leaves its words in `self.references` and
    `self.hypotheses`, their errors in `self.report` (a `WERReport`); each
    epoch ends with a checkpoint. Only the newest is kept, from which a
    sequence of tasks goes on, unless `keep_best` is set.

    Arguments
    ---------
    modules, opt_class, hparams, run_opts, checkpointer : object
        As `sb.Brain` takes them.

    Example
    -------
    >>> from functools import partial
    >>> from speechbrain.dataio.batch import PaddedBatch
    >>> from speechbrain.nnet.losses import ctc_loss
    >>> from speechbrain_taskarith.brains import CharacterLabels
    >>> class Model(torch.nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.layer = torch.nn.Linear(3, 3)
    ...     def forward(self, x, lens):
    ...         return self.layer(x).log_softmax(-1)
    >>> model, labels = Model(), CharacterLabels("AB")
    >>> brain = CTCBrain(
    ...     {"model": model},
    ...     opt_class=partial(torch.optim.Adam, lr=0.1),
    ...     hparams={
    ...         "ctc_cost": partial(
    ...             ctc_loss, blank_index=0, reduction="batchmean"
    ...         ),
    ...         "blank_index": 0,
    ...         "tokenizer": labels,
    ...     },
    ...     run_opts={"device": "cpu", "noprogressbar": True},
    ... )
    >>> batch = PaddedBatch(
    ...     [
    ...         {
    ...             "id": "u1",
    ...             "sig": torch.eye(3),
    ...             "tokens": labels.encode("BAB"),
    ...             "wrd": "BAB",
    ...         }
    ...     ]
    ... )
    >>> loader = torch.utils.data.DataLoader(
    ...     [batch], batch_size=1, collate_fn=lambda batches: batches[0]
    ... )
    >>> brain.fit(range(50), loader)
    >>> _ = brain.evaluate(loader)
    >>> brain.report.wer
    0.0
    """

    #: False keeps tests out of the train log, as in a search over scales.
    log_tests = True

    def compute_forward(self, batch, stage):
        """Score every frame; in float32, whatever the precision of training."""
        batch = batch.to(self.device)
        features, lens = self.features(batch, stage)
        self._inputs = (features, lens)
        return self._score(self.modules.model, *self._inputs).float(), lens

    def _score(self, model, *inputs):
        """Run a model (ours, or an older copy) on a batch's inputs.

        This and what `compute_forward` keeps in `self._inputs` is all that
        differs between kinds of models where a lifelong method is at work.
        """
        return model(*inputs)

    def features(self, batch, stage):
        """Turn a batch's waveforms into the model's input.

        Arguments
        ---------
        batch : PaddedBatch
            On the device.
        stage : sb.Stage
            Training augments.

        Returns
        -------
        torch.Tensor
            [batch, time, features], or waveforms without
            `compute_features`.
        torch.Tensor
            [batch], relative lengths.
        """
        x, lens = batch.sig
        training = stage == sb.Stage.TRAIN
        if training and hasattr(self.hparams, "wav_augment"):
            x = _augmented(self.hparams.wav_augment, x, lens)
        if hasattr(self.hparams, "compute_features"):
            x = self.hparams.compute_features(x)
        if "normalize" in self.modules:
            x = self.modules.normalize(x, lens)
        if training and hasattr(self.hparams, "fea_augment"):
            x = _augmented(self.hparams.fea_augment, x, lens)
        return x, lens

    def compute_objectives(self, predictions, batch, stage):
        """Return the loss; outside training also collect words."""
        log_probs, lens = predictions
        tokens, token_lens = batch.tokens
        loss = self.hparams.ctc_cost(
            log_probs, tokens.to(log_probs.device), lens, token_lens
        )
        if stage == sb.Stage.TRAIN:
            return loss
        labels = sb.decoders.ctc_greedy_decode(
            log_probs, lens, blank_id=self.hparams.blank_index
        )
        self._collect(batch, self.hparams.tokenizer.decode(labels))
        return loss

    def _collect(self, batch, hypotheses):
        self._ids += list(batch.id)
        self.references += list(batch.wrd)
        self.hypotheses += hypotheses

    def on_stage_start(self, stage, epoch=None):
        """Forget the words of the stage before."""
        self._ids, self.references, self.hypotheses = [], [], []

    def on_stage_end(self, stage, stage_loss, epoch=None):
        """Count the words' errors, log, and save after validation."""
        if stage == sb.Stage.TRAIN:
            self._train_loss = float(stage_loss)
            return
        self.report = wer(self.references, self.hypotheses, ids=self._ids)
        stats = {"loss": float(stage_loss), "WER": self.report.wer}
        logger = getattr(self.hparams, "train_logger", None)
        if stage == sb.Stage.VALID:
            if logger is not None:
                logger.log_stats(
                    {"epoch": epoch},
                    train_stats={"loss": self._train_loss},
                    valid_stats=stats,
                )
            if self.checkpointer is not None:
                best = getattr(self.hparams, "keep_best", False)
                self.checkpointer.save_and_keep_only(
                    meta={"WER": float(self.report.wer), "epoch": epoch},
                    min_keys=["WER"] if best else [],
                )
        elif logger is not None and self.log_tests:
            logger.log_stats({"stage": "test"}, test_stats=stats)

    def on_fit_batch_end(self, batch, outputs, loss, should_step):
        """Move the learning rate on."""
        annealing = getattr(self.hparams, "lr_annealing", None)
        if should_step and annealing is not None:
            annealing(self.optimizer)

    def wer_on(self, data):
        """Return the WER of the weights at hand, e.g. in a search over scales.

        No checkpoint is loaded and nothing is logged.

        Arguments
        ---------
        data : object
            What `evaluate` takes.

        Returns
        -------
        float
            In %.
        """
        before = self.checkpointer, self.log_tests
        self.checkpointer, self.log_tests = None, False
        try:
            self.evaluate(data, progressbar=False)
        finally:
            self.checkpointer, self.log_tests = before
        return self.report.wer

    def loss_of(self, batch):
        """Return the loss of a batch, with gradient and no augmentation.

        Arguments
        ---------
        batch : PaddedBatch
            See the class; of one utterance, for the Fisher information.

        Returns
        -------
        torch.Tensor
            A scalar: with one utterance its negative log-likelihood.
        """
        batch = batch.to(self.device)
        x, lens = self.features(batch, sb.Stage.VALID)
        # The bare module: a gradient of our own must not start DDP's.
        log_probs = self._score(bare(self.modules.model), x, lens)
        tokens, token_lens = batch.tokens
        return self.hparams.ctc_cost(log_probs, tokens, lens, token_lens)

    def penalty(self, method, predictions):
        """Return what a lifelong method adds to the loss of this batch.

        Arguments
        ---------
        method : speechbrain_taskarith.vectors.lifelong.methods.FineTuning
            Or a subclass.
        predictions : tuple
            From `compute_forward`, for the batch at hand.

        Returns
        -------
        torch.Tensor or None
            A scalar, or None.
        """
        log_probs, lens = predictions
        return method.penalty(
            bare(self.modules.model),
            lambda model: self._score(model, *self._inputs),
            log_probs,
            lens,
        )


def bare(module):
    """Return a module without the wrappers of DDP and `torch.compile`.

    Its names carry no `module.` or `_orig_mod.`.
    """
    parallel = (
        torch.nn.parallel.DistributedDataParallel,
        torch.nn.DataParallel,
    )
    while True:
        if isinstance(module, parallel):
            module = module.module
        elif hasattr(module, "_orig_mod"):
            module = module._orig_mod
        else:
            return module


def _augmented(augment, x, lens):
    """Augment; SpeechBrain's Augmenter returns a pair, others a tensor."""
    result = augment(x, lens)
    if isinstance(result, tuple):
        result, new_lens = result
        if len(new_lens) != len(lens):
            raise ValueError(
                f"the augmentation made {len(new_lens)} utterances of "
                f"{len(lens)}; set concat_original: False (a Brain of ours "
                "takes one augmented copy of each)"
            )
    return result
