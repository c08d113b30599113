"""Training and measuring one model of the study, and what a row holds.

Each training has a folder under `save` with its SpeechBrain checkpoints and,
when it has ended, its weights; what has ended is not trained again.
"""

import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from speechbrain.utils.logger import get_logger

from speechbrain_taskarith.brains import Domain
from speechbrain_taskarith.utils.files import read_json, write_json
from speechbrain_taskarith.utils.seeds import seed_random_numbers
from speechbrain_taskarith.vectors import open_state, save_state
from speechbrain_taskarith.vectors.lifelong.methods import FineTuning

logger = get_logger(__name__)


@dataclass
class Row:
    """What one row of the table came to.

    Arguments
    ---------
    wer : dict
        `{task: WER in %}`.
    trained : int
        How many parameters were trained, over all of its stages; they are
        what this row adds to the base, or changes in it.
    seconds : float
        Of training, over all of its stages.
    attention : dict
        `{task: [layers, N]}`, of a fusion.
    """

    wer: dict
    trained: int = 0
    seconds: float = 0.0
    attention: dict = field(default_factory=dict)

    @property
    def mean(self):
        """Mean WER over the tasks."""
        return sum(self.wer.values()) / len(self.wer)


class Only(FineTuning):
    """Trains what a function chooses.

    Arguments
    ---------
    choose : callable
        Called when training is about to start; returns the parameters.
    """

    def __init__(self, choose):
        super().__init__()
        self.choose, self.count = choose, 0

    def freeze(self, model):
        """See `FineTuning.freeze`.

        Arguments
        ---------
        model : torch.nn.Module
            The model.

        Returns
        -------
        list of str
            The names that stay trainable.
        """
        chosen = {id(parameter) for parameter in self.choose()}
        model.requires_grad_(False)
        names = []
        for name, parameter in model.named_parameters():
            if id(parameter) in chosen:
                parameter.requires_grad_(True)
                self.count += parameter.numel()
                names.append(name)
        return names


class Trainer:
    """Trains and measures single models.

    Arguments
    ---------
    brain : AdapterFusionBrain
        Trains and decodes.
    tasks : Tasks
        Makes the strings.
    hparams : dict
        Of the recipe.
    """

    def __init__(self, brain, tasks, hparams):
        self.brain, self.tasks, self.hparams = brain, tasks, hparams
        self.model, self.adapters = hparams["model"], hparams["adapters"]
        self.folder = Path(hparams["save_folder"])
        self._loaders = {}
        self.bar = None

    def seed_for(self, name):
        """Seed what is about to be made from random numbers.

        What trainings before it have drawn depends on where a killed run
        was started again.

        Arguments
        ---------
        name : str
            Of the training.
        """
        seed_random_numbers(self.hparams["seed"], name)

    def train(self, name, tasks, start, choose, row, use):
        """Train from some weights, or read what an earlier run has made.

        Arguments
        ---------
        name : str
            Its folder under `save`.
        tasks : None or list of str
            Whose recordings it learns, all alike; None: the base's.
        start : dict of str to torch.Tensor
            The weights to start from.
        choose : callable
            Returns the parameters to train.
        row : str
            Whose `training` says steps and learning rate.
        use : None or str
            The adapter that is in use, or `"combined"`.

        Returns
        -------
        dict of str to torch.Tensor, int, float
            Weights, number of trained parameters, seconds.
        """
        next(self.bar, None)
        folder = self.folder / name
        path, about = folder / "kept.safetensors", folder / "kept.json"
        if not (path.exists() and about.exists()):
            settings = self.hparams["training"][row]
            self.brain.lr = settings["lr"]
            self.brain.training_of = name
            method = Only(choose)
            self.adapters.use(use)
            begin = time.perf_counter()
            if tasks is None:
                items = self.tasks.for_base()
            else:
                items = self.tasks.training(tasks, settings["steps"])
            state = self.brain.fine_tune(
                Domain(name, items),
                start,
                folder / "training",
                method=method,
            )
            seconds = time.perf_counter() - begin
            write_json(about, {"trained": method.count, "seconds": seconds})
            save_state(state, path)
        told = read_json(about)
        return dict(open_state(path)), told["trained"], told["seconds"]

    def measure(self, use, state, trained=0, seconds=0.0, tasks=None):
        """Measure tasks with some weights.

        Arguments
        ---------
        use : None or str
            What is put in use; `"own"`: each task's own adapter.
        state : dict of str to torch.Tensor
            The weights.
        trained : int
            Goes into the row.
        seconds : float
            Goes into the row.
        tasks : list of str, optional
            Which ones; all by default.

        Returns
        -------
        Row
            The result.
        """
        self.model.load_state_dict(state)
        row = Row({}, trained, seconds)
        for name in tasks or self.tasks.names:
            with self.adapters.use(name if use == "own" else use):
                row.wer[name] = self.wer_of(name)
            seen = self.brain.attention
            if seen:
                total = sum(count for count, _ in seen)
                row.attention[name] = sum(n * a for n, a in seen) / total
        logger.info(
            f"{use}: "
            + " ".join(f"{n} {w:.1f}" for n, w in row.wer.items())
            + f" mean {row.mean:.2f}"
        )
        return row

    def wer_of(self, name):
        """Measure one task with what is in use.

        Arguments
        ---------
        name : str
            The task.

        Returns
        -------
        float
            WER in %.
        """
        return self.brain.wer_on(_Batches(self.batches(name)))

    def batches(self, name):
        """Return the batches to measure a task on, put together once.

        Arguments
        ---------
        name : str
            The task.

        Returns
        -------
        list of PaddedBatch
            The shortest strings first.
        """
        if name not in self._loaders:
            items = self.tasks.held_out(name, self.hparams["report_on"])
            self._loaders[name] = list(self.brain.evaluation_loader(items))
        return self._loaders[name]

    @torch.no_grad()
    def outputs(self, name):
        """Return a task's scores of one batch, through its own adapter.

        Arguments
        ---------
        name : str
            The task.

        Returns
        -------
        torch.Tensor
            [batch, frames, labels]
        """
        self.model.eval()
        with self.adapters.use(name):
            batch = self.batches(name)[0]
            return self.brain.compute_forward(batch, "probe")[0].clone()

    def state(self):
        """Return a copy of all weights at hand.

        Returns
        -------
        dict of str to torch.Tensor
            By name.
        """
        return {k: v.clone() for k, v in self.model.state_dict().items()}

    def base_only(self):
        """Return every parameter of the base.

        Returns
        -------
        list of torch.nn.Parameter
            Without those of adapters and combination.
        """
        own = {id(p) for p in self.adapters.parameters()}
        return [p for p in self.model.parameters() if id(p) not in own]

    def base_parameters(self):
        """Count them.

        Returns
        -------
        int
            Of the whole model without adapters.
        """
        return sum(p.numel() for p in self.base_only())

    def handle_name(self):
        """Return how the adapters are called within the model.

        Returns
        -------
        str
            Its name among the modules.
        """
        return next(
            name
            for name, module in self.model.named_modules()
            if module is self.adapters
        )

    @contextmanager
    def other_model(self, model):
        """Let the Brain train and measure another model for a while.

        Arguments
        ---------
        model : torch.nn.Module
            Takes what the Brain's own takes.

        Yields
        ------
        None
        """
        brain = self.brain
        before = brain.hparams.model, brain.modules["model"]
        brain.hparams.model = brain.modules["model"] = model.to(brain.device)
        brain.has_adapters = False
        try:
            yield
        finally:
            brain.hparams.model, brain.modules["model"] = before
            brain.has_adapters = True


class _Batches(torch.utils.data.DataLoader):
    """Batches that were put together once."""

    def __init__(self, batches):
        super().__init__(batches, batch_size=None, collate_fn=lambda b: b)
