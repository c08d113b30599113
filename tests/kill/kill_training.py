"""A training with `EditingCheckpointer`, as something that writes."""

import multiprocessing

import speechbrain as sb
import torch

from speechbrain_taskarith.vectors import (
    EditingCheckpointer,
    TaskArithmetic,
    open_state,
    save_state,
)

_SCALE = 0.4


class _Tied(torch.nn.Module):
    """Two names for one tensor, a buffer, and what is no tensor."""

    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Linear(8, 8)
        self.outer = torch.nn.Linear(8, 8, bias=False)
        self.outer.weight = self.inner.weight
        self.norm = torch.nn.BatchNorm1d(8)
        self.steps = 0

    def forward(self, x):
        self.steps += self.training
        return self.outer(self.norm(self.inner(x).mT).mT)

    def get_extra_state(self):
        return {"steps": self.steps}

    def set_extra_state(self, state):
        self.steps = state["steps"]


class _Brain(sb.Brain):
    def compute_forward(self, batch, stage):
        return self.modules.model(self.modules.norm(batch[0]))

    def compute_objectives(self, predictions, batch, stage):
        return (predictions - batch[1]).square().mean()

    def on_stage_end(self, stage, loss, epoch=None):
        if stage == sb.Stage.VALID:
            self.checkpointer.save_and_keep_only(
                # Not by the time: the runs' folders are compared.
                name=f"epoch{epoch}",
                meta={"WER": float(loss)},
                min_keys=["WER"],
            )


class Training:
    """One more epoch of a training; the others' checkpoint is there.

    Arguments
    ---------
    begun : int
        Epochs before. 0: there is no checkpoint, and the run starts from the
        weights as built.
    """

    def __init__(self, begun):
        self.begun = begun

    def prepare(self, folder):
        """Write the base, and the checkpoint of the epochs before."""
        torch.manual_seed(1)
        base = _Tied()
        save_state(base, folder / "base.ckpt")
        if self.begun:
            # In a child, whose end unlocks the folder.
            arguments = folder, self.begun
            context = multiprocessing.get_context("fork")
            process = context.Process(target=self._train, args=arguments)
            process.start()
            process.join()
            assert process.exitcode == 0

    def work(self, folder):
        """Go on to the next epoch, and test."""
        self._train(folder, self.begun + 1)

    def follow(self, folder):
        """Be the next run, which saves: only then old checkpoints go."""
        self._train(folder, self.begun + 2)

    def content(self, folder):
        """Return the newest checkpoint's content; all listed are whole."""
        checkpointer, _ = self._checkpointer(folder, 1)
        found = checkpointer.find_checkpoints()
        for checkpoint in found:
            self._check(folder, checkpoint.path)
        if not found:
            return None
        newest = found[0].path
        files = sorted(newest.glob("*.ckpt"))
        # What other files hold (an optimizer's moments) is compared by the
        # weights that they lead to.
        states = [open_state(f) for f in files if f.name.startswith("model")]
        extra = [state.extra["_extra_state"]["steps"] for state in states]
        names = [file.name for file in files]
        return [state.fingerprint for state in states], extra, names

    def _check(self, folder, path):
        edited = open_state(path / "model.ckpt")
        finetuned = open_state(path / "model.finetuned.ckpt")
        start = folder / "save" / "start" / "model.ckpt"
        base = open_state(folder / "base.ckpt" if self.begun else start)
        for state in (edited, finetuned, base):
            state.verify()
        for name in base:
            expected = base[name]
            if "running" not in name and base.info(name).floating:
                step = finetuned[name] - expected
                expected = expected + _SCALE * step
            assert torch.allclose(edited[name], expected, atol=1e-6), name
        checkpointer, modules = self._checkpointer(folder, 1)
        for weights, state in (("edited", edited), ("finetuned", finetuned)):
            checkpointer.load_checkpoint(
                checkpointer._construct_checkpoint_objects([path])[0],
                weights=weights,
            )
            loaded = modules["model"].state_dict()
            assert all(torch.equal(loaded[name], state[name]) for name in state)

    def _checkpointer(self, folder, epochs):
        torch.manual_seed(2)
        modules = {
            "model": _Tied(),
            "norm": sb.processing.features.InputNormalization(),
        }
        self.counter = sb.utils.epoch_loop.EpochCounter(epochs)
        checkpointer = EditingCheckpointer(
            folder / "save",
            {
                "model": modules["model"],
                "normalizer": modules["norm"],
                "counter": self.counter,
            },
            base=folder / "base.ckpt" if self.begun else "start",
            rule=TaskArithmetic(scale=_SCALE),
        )
        return checkpointer, modules

    def _train(self, folder, epochs):
        checkpointer, modules = self._checkpointer(folder, epochs)
        brain = _Brain(
            modules,
            lambda parameters: torch.optim.Adam(parameters, lr=0.05),
            {},
            {"device": "cpu", "noprogressbar": True},
            checkpointer,
        )
        generator = torch.Generator().manual_seed(5)
        x = torch.randn(4, 3, 6, 8, generator=generator)
        data = torch.utils.data.DataLoader(
            [(part, part.flip(-1) * 2) for part in x], batch_size=None
        )
        brain.fit(self.counter, data, data)
        brain.evaluate(data, min_key="WER")
