"""A whole sequence of domains in one process, for any Brain."""

import functools
from dataclasses import dataclass, field
from pathlib import Path

from speechbrain.utils.distributed import ddp_broadcast, if_main_process
from speechbrain.utils.logger import get_logger

from speechbrain_taskarith.brains.fine_tuning import (
    FIRST_TASK,
    FineTuneMixin,
    copy_of,
)
from speechbrain_taskarith.metrics import LifelongMatrix
from speechbrain_taskarith.vectors import (
    SequentialEditor,
    TaskVector,
    as_state,
    open_state,
    save_state,
)
from speechbrain_taskarith.vectors.lifelong.methods import FineTuning

logger = get_logger(__name__)


@dataclass
class Domain:
    """One domain of a sequence.

    Arguments
    ---------
    name : str
        Its name, as in tables and the edit log.
    train : list of dict
        Plain descriptions of training utterances (with an `id`), in the
        order to train in; what a lifelong method remembers are some of
        these.
    valid : object
        What `Brain.evaluate` takes: validation data.
    test : object
        What `Brain.evaluate` takes: test data.

    Example
    -------
    >>> Domain("german", train=[{"ID": "u1", "wrd": "ONE"}]).name
    'german'
    """

    name: str
    train: list = field(repr=False)
    valid: object = field(repr=False, default=None)
    test: object = field(repr=False, default=None)


class SequentialMixin(FineTuneMixin):
    """For a Brain that learns one domain after another.

    Put it before the Brain: `class Lifelong(SequentialMixin, CTCBrain)`. The
    model is `hparams.model`, the recoverable, so that no name carries DDP's
    `module.`; the epoch counter is `hparams.epoch_counter`; the optimizer is
    made by `hparams.opt_class(parameters, lr=brain.lr)`, and the schedule, if
    wanted, by `hparams.make_lr_annealing`: `!name:` of SpeechBrain's
    `LinearWarmupScheduler`, with `hparams.warmup_share` of the steps. The
    Brain keeps its own `compute_forward` and `compute_objectives`; the recipe
    says how a list of utterances becomes a loader (`make_train_loader`).

    Each fine-tuning has a checkpoint folder of its own and starts with a
    fresh epoch counter, scheduler and optimizer. A run that was killed is
    simply started again: what is finished is read, what is not goes on from
    its newest checkpoint. Random numbers are seeded for every batch from
    (`hparams.seed`, folder, step), so that the resumed run gives the same
    weights as one that was never killed.

    With several processes the main one edits and writes, then all read the
    same files.

    Example
    -------
    >>> from functools import partial
    >>> import torch
    >>> from speechbrain.dataio.batch import PaddedBatch
    >>> from speechbrain.nnet.losses import ctc_loss
    >>> from speechbrain.utils.epoch_loop import EpochCounter
    >>> from speechbrain_taskarith.brains import CharacterLabels, CTCBrain
    >>> from speechbrain_taskarith.vectors import TaskArithmetic
    >>> class Model(torch.nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.layer = torch.nn.Linear(3, 3)
    ...     def forward(self, x, lens):
    ...         return self.layer(x).log_softmax(-1)
    >>> class Lifelong(SequentialMixin, CTCBrain):
    ...     def make_train_loader(self, items):
    ...         return torch.utils.data.DataLoader(
    ...             items, batch_size=2, collate_fn=PaddedBatch
    ...         )
    ...     def make_item_batch(self, item):
    ...         return PaddedBatch([item])
    >>> model, labels = Model(), CharacterLabels("AB")
    >>> brain = Lifelong(
    ...     {"model": model},
    ...     hparams={
    ...         "seed": 0,
    ...         "model": model,
    ...         "batch_size": 2,
    ...         "epoch_counter": EpochCounter(limit=5),
    ...         "opt_class": torch.optim.Adam,
    ...         "ctc_cost": partial(
    ...             ctc_loss, blank_index=0, reduction="batchmean"
    ...         ),
    ...         "blank_index": 0,
    ...         "tokenizer": labels,
    ...     },
    ...     run_opts={"device": "cpu", "noprogressbar": True},
    ... )
    >>> brain.lr = 0.1
    >>> def utterances(name, turn):
    ...     tokens = labels.encode("AB")
    ...     return [
    ...         {"id": name, "sig": x, "tokens": tokens, "wrd": "AB"}
    ...         for x in (turn * torch.eye(3), turn * torch.eye(3)[:2])
    ...     ]
    >>> domains = []
    >>> for name, turn in (("us", 1.0), ("german", -1.0)):
    ...     items = utterances(name, turn)
    ...     test = torch.utils.data.DataLoader(items, collate_fn=PaddedBatch)
    ...     domains.append(Domain(name, items, test, test))
    >>> folder = getfixture("tmp_path")
    >>> start = dict(model.state_dict())
    >>> first = brain.fine_tune(domains[0], start, folder / "first")
    >>> matrix = brain.learn_sequence(
    ...     domains, first, folder / "edited", rule=TaskArithmetic(scale=0.4)
    ... )
    >>> matrix.domains, sorted(p.name for p in (folder / "edited").iterdir())
    (('us', 'german'), ['01_us', '02_german', 'editor', 'matrix_test.json'])
    """

    @functools.cached_property
    def _tested(self):
        return {}

    def on_evaluate_start(self, max_key=None, min_key=None):
        """Evaluate the weights at hand, not a checkpoint of some training.

        Arguments
        ---------
        max_key, min_key : str
            Not used.
        """

    def learn_sequence(
        self,
        domains,
        first,
        folder,
        *,
        method=None,
        rule=None,
        scale=None,
        choose_scale=None,
        shared=None,
        split="test",
    ):
        """Learn domains one after another; test on all after each.

        Arguments
        ---------
        domains : list of Domain
            The first of them is what `first` was trained on.
        first : dict of str to torch.Tensor
            Weights of the first model.
        folder : str or pathlib.Path
            Of this sequence: `NN_<domain>` with the kept weights for each
            step, the method's memory, the edit log, `matrix_<split>.json`.
        method : FineTuning
            Or another lifelong method; not together with `rule`.
        rule : object
            A merging rule: after each task the model is edited by a
            `SequentialEditor`.
        scale : object
            The editor's scale, see `SequentialEditor`.
        choose_scale : callable
            `choose_scale(brain, base, tau, seen) -> (scale, selected_on)`,
            called for each task with the weights before it, the task vector
            after the rule, and the domains seen, the new one last.
        shared : str or pathlib.Path
            Where fine-tunings without any method of their own are kept, by
            the fingerprint of the weights that they start from: sequences
            that begin alike then train once.
        split : str
            `"test"` or `"valid"`: what the matrix holds.

        Returns
        -------
        LifelongMatrix
            WER on every domain after every step.
        """
        if rule is not None and method is not None:
            raise ValueError("give a lifelong method or a rule, not both")
        folder = Path(folder)
        method = FineTuning() if method is None else method
        matrix = LifelongMatrix([domain.name for domain in domains])
        path = folder / f"matrix_{split}.json"
        if _exists(path):
            matrix = LifelongMatrix.load(path)
        state = first
        for task, domain in enumerate(domains, start=FIRST_TASK):
            here = folder / f"{task:02d}_{domain.name}"
            if task > FIRST_TASK:
                state = self._learn_one(
                    domains[:task],
                    state,
                    here,
                    method=method,
                    rule=rule,
                    scale=scale,
                    choose_scale=choose_scale,
                    shared=shared,
                )
            self._consolidate(method, domain, state, here)
            self._record(matrix, path, domains, domain, state, split)
        return matrix

    def _learn_one(
        self, seen, before, here, *, method, rule, scale, choose_scale, shared
    ):
        """Return the weights kept after the last of the domains seen."""
        domain, task = seen[-1], len(seen)
        kept = here / "kept.safetensors"
        if _exists(kept):
            return copy_of(open_state(kept))
        training = here / "training"
        if shared is not None and not method.changes_training:
            training = Path(shared) / f"{domain.name}-{_digest(before)}"
        finetuned = self.fine_tune(
            domain, before, training, method=method, task=task
        )
        if rule is None:
            after = method.after_task(before, finetuned, task)
        else:
            after = self._edit(
                seen, before, finetuned, here, rule, scale, choose_scale
            )
        if if_main_process():
            save_state(after, kept)
        ddp_broadcast(None, src=0)
        # What goes on is what can be read back, in every process.
        return copy_of(open_state(kept))

    def _edit(self, seen, before, finetuned, here, rule, scale, choose_scale):
        domain, folder = seen[-1], here.parent / "editor"
        chosen = selected_on = None
        if choose_scale is not None:
            tau = rule.combine([TaskVector.between(before, finetuned)])
            # All processes evaluate alike, and take the main one's word.
            chosen, selected_on = ddp_broadcast(
                choose_scale(self, before, tau, seen), src=0
            )
        after = before
        if if_main_process():
            if len(seen) == FIRST_TASK + 1:
                editor = SequentialEditor.open(
                    before, rule, folder, scale=scale
                )
            else:
                editor = SequentialEditor.resume(folder, rule, scale=scale)
            try:
                if domain.name not in [edit.name for edit in editor.log]:
                    editor.learn(
                        domain.name,
                        finetuned,
                        scale=chosen,
                        selected_on=selected_on,
                    )
                after = editor.state()
            finally:
                editor.close()
        return after

    def _consolidate(self, method, domain, state, here):
        """Let a method remember the domain, or read what it remembered."""
        memory = here / "memory.safetensors"
        self.hparams.model.load_state_dict(state)
        if not _exists(memory):
            method.consolidate(
                self.hparams.model,
                domain.train,
                lambda item: self.loss_of(self.make_item_batch(item)),
            )
            if if_main_process():
                method.save(memory)
            ddp_broadcast(None, src=0)
        method.load(memory)

    def _record(self, matrix, path, domains, after, state, split):
        """Fill a row of the matrix, cell by cell, and save it each time."""
        self._unwrap()
        self.hparams.model.load_state_dict(state)
        digest = _digest(state)
        for domain in domains:
            if (after.name, domain.name) in matrix:
                continue
            # Sequences share their first states: test each state once.
            known = (digest, domain.name, split)
            if known not in self._tested:
                self._tested[known] = self.wer_on(getattr(domain, split))
            matrix.record(
                after=after.name, on=domain.name, wer=self._tested[known]
            )
            cell = matrix[after.name, domain.name]
            logger.info(
                f"{path.parent.name}: after {after.name} on {domain.name}: "
                f"{cell:.1f} % WER ({split})"
            )
            if if_main_process():
                matrix.save(path)
        ddp_broadcast(None, src=0)

    def wer_on(self, data):
        """Return the WER of the weights at hand on some data.

        Arguments
        ---------
        data : object
            What `Brain.evaluate` takes.

        Returns
        -------
        float
            In %.
        """
        self.log_tests = False  # the matrix holds it, under its own name
        try:
            self.evaluate(data, progressbar=False)
        finally:
            self.log_tests = True
        return self.report.wer


def _exists(path):
    """Tell whether a file is there, the same in all processes.

    The main one may be ahead and have written it by the time that another
    looks: what it saw counts for all.
    """
    return ddp_broadcast(path.exists(), src=0)


def _digest(state):
    return as_state(state).fingerprint.split(":")[-1][:12]
