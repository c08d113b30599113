"""The law of `EditingCheckpointer`, over random sequences of what runs do.

Every `model.ckpt` is `base + scale * (finetuned - base)` of the
`model.finetuned.ckpt` beside it, and every fine-tuned state is one that the
test has seen an optimizer make out of another (the first: out of the base), or
a mean of such. The test keeps its own account of those.
"""

import contextlib
import shutil

import pytest
import speechbrain as sb
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from speechbrain.utils.checkpoints import average_checkpoints

from speechbrain_taskarith.vectors import (
    EditingCheckpointer,
    TaskArithmetic,
    save_state,
)

SCALE = 0.4


class Net(torch.nn.Module):
    """With all that a state dict may hold."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(2, 2)
        self.norm = torch.nn.BatchNorm1d(2)
        self.tied = self.linear

    def forward(self, x):
        return self.norm(self.linear(x))


class Toy(sb.Brain):
    registers = True

    def init_optimizers(self):
        self.optimizer = torch.optim.SGD(self.modules.parameters(), lr=0.1)
        self.optimizers_dict = {"sgd": self.optimizer}
        if self.registers:
            self.checkpointer.add_recoverable("optimizer", self.optimizer)

    def compute_forward(self, batch, stage):
        return self.modules.net(batch)

    def compute_objectives(self, predictions, batch, stage):
        return (predictions - 1).square().mean() + self.modules.net.linear(
            batch
        ).square().mean()

    def on_fit_start(self):
        super().on_fit_start()
        self.world.check_start()

    def on_fit_batch_end(self, batch, outputs, loss, should_step):
        self.world.remember()

    def on_evaluate_start(self, max_key=None, min_key=None):
        super().on_evaluate_start()
        if self.averages:
            self.world.average()


class Interrupted(Exception):
    pass


class World:
    """A save folder, the runs on it, and the test's own account."""

    def __init__(self, folder):
        self.folder = folder
        torch.manual_seed(0)
        # Not zero, so that running statistics have something to keep.
        net = Net()
        net(torch.randn(9, 2))
        self.base = self.copy(net)
        self.path = save_state(net, folder / "base.ckpt")
        # Flat fine-tuned states that may be there.
        self.made = [self.flat(self.base)]
        self.breaks = False
        self.resume()

    @staticmethod
    def copy(net):
        return {k: v.clone() for k, v in net.state_dict().items()}

    @staticmethod
    def flat(state):
        return torch.cat([v.double().flatten() for v in state.values()])

    def resume(self, registers=True):
        """A new process: nothing in memory is what it was."""
        torch.manual_seed(1)
        self.net = Net()
        self.checkpointer = EditingCheckpointer(
            self.folder / "save",
            {"model": self.net},
            base=self.path,
            rule=TaskArithmetic(scale=SCALE),
            # One that only tests has no optimizer to save.
            allow_partial_load=True,
        )
        self.checkpointer.add_recoverable(
            "breaks", self, custom_save_hook=self.save_or_break,
            custom_load_hook=lambda *_: None,
        )  # fmt: skip
        self.brain = Toy(
            {"net": self.net},
            run_opts={"device": "cpu", "noprogressbar": True},
            checkpointer=self.checkpointer,
        )
        self.brain.world, self.brain.averages = self, False
        self.brain.registers = registers
        self.known = False

    def save_or_break(self, obj, path):
        path.write_bytes(b"half")
        if self.breaks:
            raise Interrupted

    # -- what happens ----------------------------------------------------------

    def fit(self, batches=2, seed=0):
        generator = torch.Generator().manual_seed(seed)
        x = [torch.randn(4, 2, generator=generator) for _ in range(batches)]
        self.brain.fit(range(1), x_loader(x), None)
        self.known = True

    def evaluate(self, averages=False):
        self.brain.averages = averages
        found = self.checkpointer.list_checkpoints()
        if averages and not found:
            return
        self.brain.evaluate(x_loader([torch.ones(4, 2)]))
        self.known = self.known or bool(found)

    def average(self, number=None):
        checkpoints = self.checkpointer.find_checkpoints(
            max_num_checkpoints=number
        )
        states = [
            torch.load(c.path / "model.finetuned.ckpt") for c in checkpoints
        ]
        # Integers do not become fractions: they are the first's.
        tuned = {
            name: sum(state[name].double() for state in states) / len(states)
            if value.is_floating_point()
            else value
            for name, value in states[0].items()
        }
        self.made.append(self.flat(tuned))
        mean = average_checkpoints(checkpoints, "model")
        self.net.load_state_dict(mean)
        # What is tested is the edit of the mean.
        base = self.base["linear.weight"].double()
        expected = base + SCALE * (tuned["linear.weight"] - base)
        torch.testing.assert_close(
            self.net.linear.weight.detach().double(), expected,
            atol=1e-6, rtol=1e-6,
        )  # fmt: skip
        saved = self.net.state_dict()
        assert torch.equal(
            saved["norm.running_var"], self.base["norm.running_var"]
        )

    def save(self, keep=2):
        before = self.listing()
        if self.known:
            self.checkpointer.save_and_keep_only(num_to_keep=keep)
            return
        with pytest.raises(RuntimeError, match="cannot be saved"):
            self.checkpointer.save_checkpoint()
        assert self.listing() == before

    def killed_save(self):
        self.breaks, before = True, self.listing()
        with contextlib.suppress(RuntimeError), pytest.raises(Interrupted):
            self.checkpointer.save_checkpoint()
        self.breaks = False
        assert self.listing() == before
        self.resume()

    def tamper(self):
        """Writes past autograd, as a moving average may do."""
        if self.checkpointer._parts["model"].contents.kind != "edited":
            return
        self.net.linear.weight.data[0, 0] += 1
        before = self.listing()
        with pytest.raises(RuntimeError, match="linear.weight.*has changed"):
            self.checkpointer.save_checkpoint()
        assert self.listing() == before
        self.resume()

    def load_from_outside(self):
        self.net.load_state_dict(Net().state_dict())
        if self.known:
            before = self.listing()
            with pytest.raises(RuntimeError, match="loaded from outside"):
                self.checkpointer.save_checkpoint()
            optimizer = torch.optim.SGD(self.net.parameters(), lr=0.1)
            with pytest.raises(RuntimeError, match="loaded from outside"):
                optimizer.step()
            assert self.listing() == before
        self.known = False

    # -- what holds ------------------------------------------------------------

    def listing(self):
        return sorted(c.path.name for c in self.checkpointer.list_checkpoints())

    def remember(self):
        self.made.append(self.flat(self.copy(self.net)))

    def is_made(self, state):
        flat = self.flat(state)
        return any(torch.allclose(flat, m, atol=1e-5) for m in self.made)

    def check_start(self):
        assert self.is_made(self.copy(self.net)), "trained from elsewhere"

    def check(self):
        for path in (self.folder / "save").glob("CKPT+*"):
            kept = torch.load(path / "model.ckpt")
            tuned = torch.load(path / "model.finetuned.ckpt")
            assert self.is_made(tuned), path
            for name, base in self.base.items():
                expected = base
                edited = base.is_floating_point() and "running" not in name
                if edited:
                    delta = tuned[name].double() - base.double()
                    expected = base.double() + SCALE * delta
                torch.testing.assert_close(
                    kept[name].double(), expected.double(),
                    atol=1e-6, rtol=1e-6, msg=name,
                )  # fmt: skip


def x_loader(batches):
    return torch.utils.data.DataLoader(batches, batch_size=None)


ACTS = {
    "fit": lambda w, n: w.fit(1 + n % 3, n),
    "fit, no optimizer registered": lambda w, n: (
        w.resume(registers=False),
        w.fit(1 + n % 2, n),
    ),
    "evaluate": lambda w, n: w.evaluate(),
    "two test sets of a mean": lambda w, n: [
        (w.evaluate(averages=True), w.save(1 + n % 2)) for _ in range(2)
    ],
    "save": lambda w, n: w.save(1 + n % 3),
    "new process": lambda w, n: w.resume(),
    "test only": lambda w, n: (
        w.resume(),
        w.evaluate(averages=True),
        w.save(1),
    ),
    "killed save": lambda w, n: w.killed_save(),
    "tamper": lambda w, n: w.tamper(),
    "load from outside": lambda w, n: w.load_from_outside(),
    "load": lambda w, n: [
        w.checkpointer.load_checkpoint(c)
        for c in w.checkpointer.find_checkpoints()[: 1 + n % 2]
    ]
    and setattr(w, "known", True),
}


@settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
@given(
    st.lists(
        st.tuples(st.sampled_from(sorted(ACTS)), st.integers(0, 9)),
        min_size=3,
        max_size=9,
    )
)
@example(
    [
        ("fit", 1),
        ("save", 1),
        ("fit", 2),
        ("save", 1),
        ("test only", 0),
        ("fit", 3),
        ("save", 1),
        ("two test sets of a mean", 0),
    ]
)
def test_the_law(tmp_path, acts):
    shutil.rmtree(tmp_path, ignore_errors=True)
    world = World(tmp_path)
    for name, number in acts:
        ACTS[name](world, number)
        world.check()
