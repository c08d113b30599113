"""One fine-tuning from given weights, in a checkpoint folder of its own."""

import functools
from pathlib import Path

import speechbrain as sb
import torch

from speechbrain_taskarith.utils.seeds import seed_random_numbers
from speechbrain_taskarith.vectors.lifelong.methods import FineTuning
from speechbrain_taskarith.vectors.recipe_hooks.atomic_checkpointer import (
    AtomicCheckpointer,
)

FIRST_TASK = 1


class FineTuneMixin:
    """For a Brain that is fine-tuned again and again, by a lifelong method.

    Put it before the Brain. What it asks of `hparams` and of the recipe is
    said in `SequentialMixin`, which builds on it.

    Each fine-tuning starts with a fresh epoch counter, schedule and
    optimizer, and goes on from its newest checkpoint when the process was
    killed. Random numbers are seeded for every batch from (`hparams.seed`,
    folder name, step), so that a resumed run gives the same weights as one
    that was never killed.

    Example
    -------
    >>> FineTuneMixin.lr is None  # set `brain.lr` before each fine-tuning
    True
    """

    #: The lifelong method at work; `penalty` is asked in every batch.
    method = None

    #: Peak learning rate of the next fine-tuning.
    lr = None

    def make_train_loader(self, items):
        """Return a loader over training utterances.

        Arguments
        ---------
        items : list of dict
            Utterances, in the order to train in.

        Returns
        -------
        DataLoader
            Saveable, if training is to resume within an epoch.
        """
        raise NotImplementedError

    def make_item_batch(self, item):
        """Return a batch of one utterance, for the Fisher information.

        Arguments
        ---------
        item : dict
            The utterance.

        Returns
        -------
        PaddedBatch
            What `loss_of` takes.
        """
        raise NotImplementedError

    def fine_tune(self, domain, start, folder, *, method=None, task=FIRST_TASK):
        """Train on one domain from given weights.

        Arguments
        ---------
        domain : Domain
            What to train and validate on.
        start : dict of str to torch.Tensor
            Weights to start from, as `hparams.model` names them.
        folder : str or pathlib.Path
            Of this training alone: its checkpoints.
        method : FineTuning
            Or another lifelong method.
        task : int
            Number of the domain in its sequence, from 1.

        Returns
        -------
        dict of str to torch.Tensor
            The fine-tuned weights.
        """
        folder = Path(folder)
        model = self.hparams.model
        self.method = FineTuning() if method is None else method
        self._unwrap()
        model.load_state_dict(start)
        self.method.before_task(model, task)
        self.method.freeze(model)
        items = self._with_extra_items(self.method.items(domain.train, task))
        loader = self.make_train_loader(items)
        self._fresh(folder, loader)
        try:
            self.fit(self.hparams.epoch_counter, loader, domain.valid)
            return copy_of(model.state_dict())
        finally:
            self.checkpointer = self.lr_annealing = None
            self._unwrap()
            model.requires_grad_(True)

    def _with_extra_items(self, items):
        """Put a method's remembered utterances into every batch.

        They take the places of new ones, so that every method makes the
        same number of steps.
        """
        size = self.hparams.batch_size
        planned = []
        for draw, start in enumerate(range(0, len(items), size)):
            batch = items[start : start + size]
            extra = self.method.extra_items(len(batch), draw)
            planned += batch[: len(batch) - len(extra)] + extra
        return planned

    def _fresh(self, folder, loader):
        """Start counters and schedule anew, in a checkpoint folder."""
        counter = self.hparams.epoch_counter
        counter.current = 0
        recoverables = {
            "model": self.hparams.model,
            "counter": counter,
            "brain": self,
        }
        if hasattr(loader, "_speechbrain_save"):
            recoverables["dataloader-TRAIN"] = loader
        make = getattr(self.hparams, "make_lr_annealing", None)
        if make is not None:
            steps = len(loader) * counter.limit
            self.lr_annealing = make(
                initial_value=self.lr,
                num_warmup_steps=round(self.hparams.warmup_share * steps),
                num_training_steps=steps,
            )
            recoverables["lr_annealing"] = self.lr_annealing
        self.step = self.optimizer_step = 0
        self.avg_train_loss = 0.0
        self.checkpointer = AtomicCheckpointer(folder, recoverables)
        self._task_seed = f"{self.hparams.seed} {folder.name}"

    def init_optimizers(self):
        """Make the optimizer with the learning rate at hand."""
        self.opt_class = functools.partial(self.hparams.opt_class, lr=self.lr)
        super().init_optimizers()

    def _unwrap(self):
        """Take off DDP: the next task may train other parameters."""
        for name, module in self.modules.items():
            parallel = (torch.nn.parallel.DistributedDataParallel,)
            if isinstance(module, parallel):
                self.modules[name] = module.module

    def on_fit_batch_start(self, batch, should_step):
        """Seed this batch; see the class.

        Arguments
        ---------
        batch : PaddedBatch
            Not used.
        should_step : bool
            Passed on.
        """
        super().on_fit_batch_start(batch, should_step)
        seed_random_numbers(self._task_seed, self.optimizer_step, self.step)

    def compute_objectives(self, predictions, batch, stage):
        """Add the lifelong method's term to the training loss.

        Arguments
        ---------
        predictions : object
            From `compute_forward`.
        batch : PaddedBatch
            The batch.
        stage : sb.Stage
            Only training has the term.

        Returns
        -------
        torch.Tensor
            A scalar.
        """
        loss = super().compute_objectives(predictions, batch, stage)
        if stage == sb.Stage.TRAIN and self.method is not None:
            term = self.penalty(self.method, predictions)
            if term is not None:
                loss = loss + term
        return loss


def copy_of(state):
    """Copy a state, so that training does not change it.

    Arguments
    ---------
    state : dict of str to torch.Tensor
        Weights.

    Returns
    -------
    dict of str to torch.Tensor
        The same, in memory of their own.

    Example
    -------
    >>> model = torch.nn.Linear(1, 1)
    >>> state = copy_of(model.state_dict())
    >>> _ = torch.nn.init.constant_(model.weight, 7.0)
    >>> state["weight"].item() == 7.0
    False
    """
    return {name: tensor.detach().clone() for name, tensor in state.items()}
