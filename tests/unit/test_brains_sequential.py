"""Whole sequences in one process: results, resuming, several processes."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from brains_toy import domains, initial, make_brain

from speechbrain_taskarith.metrics import LifelongMatrix
from speechbrain_taskarith.vectors import (
    TIES,
    SequentialEditor,
    TaskArithmetic,
    open_state,
)
from speechbrain_taskarith.vectors.lifelong.memory import JointTraining, Replay
from speechbrain_taskarith.vectors.lifelong.methods import (
    Averaging,
    FineTuning,
    PartialUpdate,
)
from speechbrain_taskarith.vectors.lifelong.penalties import EWC, LwF


def same(a, b):
    assert a.keys() == b.keys()
    return all(torch.equal(a[name], b[name]) for name in a)


def kept(folder, step):
    return dict(open_state(next(folder.glob(f"{step:02d}_*/kept.*"))))


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A first model, trained once; and the domains."""
    brain, data = make_brain(epochs=20), domains()
    folder = tmp_path_factory.mktemp("first")
    return brain.fine_tune(data[0], initial(brain), folder)


class TestFineTune:
    def test_learns(self, first):
        brain, data = make_brain(), domains()
        brain.hparams.model.load_state_dict(first)
        assert brain.wer_on(data[0].test) < 30.0
        assert brain.wer_on(data[2].test) > 40.0

    def test_a_finished_training_is_read_not_repeated(self, tmp_path):
        brain, data = make_brain(), domains()
        start = initial(brain)
        state = brain.fine_tune(data[1], start, tmp_path)
        again = make_brain()
        again.compute_objectives = None  # training would call it
        data[1].valid = None
        assert same(again.fine_tune(data[1], start, tmp_path), state)

    def test_every_training_starts_afresh(self, tmp_path):
        """Counter, schedule and optimizer of the task before do not leak."""
        data, one, two = domains(), make_brain(), make_brain()
        start = initial(one)
        one.fine_tune(data[0], start, tmp_path / "other")
        state = one.fine_tune(data[1], start, tmp_path / "1" / "x")
        assert same(two.fine_tune(data[1], start, tmp_path / "2" / "x"), state)

    def test_resumes_within_an_epoch_to_the_same_weights(self, tmp_path):
        data, start = domains(), initial(make_brain())
        whole = make_brain(ckpt_interval_steps=2)
        expected = whole.fine_tune(data[1], start, tmp_path / "a" / "x")

        broken = make_brain(ckpt_interval_steps=2)
        forward, calls = broken.compute_forward, []

        def failing(batch, stage):
            calls.append(stage)
            if len(calls) == 4:
                raise KeyboardInterrupt
            return forward(batch, stage)

        broken.compute_forward = failing
        with pytest.raises(KeyboardInterrupt):
            broken.fine_tune(data[1], start, tmp_path / "b" / "x")
        again = make_brain(ckpt_interval_steps=2)
        steps = []
        fit_batch = again.fit_batch
        again.fit_batch = lambda batch: (steps.append(1), fit_batch(batch))[1]
        found = again.fine_tune(data[1], start, tmp_path / "b" / "x")
        assert same(found, expected)
        assert len(steps) == 24 - 2, "the first two steps were not repeated"


class TestSequence:
    def test_fine_tuning_is_the_naive_chain(self, first, tmp_path):
        brain, data = make_brain(), domains()
        matrix = brain.learn_sequence(data, first, tmp_path / "a")
        state = first
        for number in (1, 2):
            other = make_brain()
            place = tmp_path / "naive" / str(number) / "training"
            state = other.fine_tune(data[number], state, place)
            assert same(kept(tmp_path / "a", number + 1), state)
        other.hparams.model.load_state_dict(state)
        for domain in data:
            assert matrix["d2", domain.name] == other.wer_on(domain.test)

    def test_editing_is_the_papers_formula(self, first, tmp_path):
        brain, data = make_brain(), domains()
        brain.learn_sequence(
            data, first, tmp_path / "a", rule=TaskArithmetic(scale=0.4)
        )
        state = first
        for number in (1, 2):
            place = tmp_path / "naive" / str(number) / "training"
            tuned = make_brain().fine_tune(data[number], state, place)
            state = {
                name: state[name] + 0.4 * (tuned[name] - state[name])
                for name in state
            }
            found = kept(tmp_path / "a", number + 1)
            for name in state:
                assert torch.allclose(found[name], state[name], atol=1e-6)
            state = found

    def test_undo_gives_back_the_weights_before(self, first, tmp_path):
        make_brain().learn_sequence(
            domains(), first, tmp_path, rule=TIES(density=0.5, scale=0.6)
        )
        with_all = kept(tmp_path, 3)
        editor = SequentialEditor.resume(tmp_path / "editor")
        assert same(editor.state(), with_all)
        editor.undo("d2")
        assert same(editor.state(), kept(tmp_path, 2))
        editor.undo("d1")
        assert same(editor.state(), first)
        editor.close()

    def test_a_scale_is_chosen_for_each_task(self, first, tmp_path):
        asked = []

        def choose(brain, base, tau, seen):
            asked.append([domain.name for domain in seen])
            assert all(v.isfinite().all() for v in tau.values())
            return (0.25, 0.75)[len(asked) - 1], "valid_seen"

        make_brain().learn_sequence(
            domains(),
            first,
            tmp_path,
            rule=TaskArithmetic(scale=1.0),
            choose_scale=choose,
        )
        assert asked == [["d0", "d1"], ["d0", "d1", "d2"]]
        log = SequentialEditor.resume(tmp_path / "editor", read_only=True).log
        assert [edit.scale for edit in log] == [0.25, 0.75]
        assert {edit.selected_on for edit in log} == {"valid_seen"}

    @pytest.mark.parametrize(
        "method",
        [
            FineTuning(),
            Averaging("1/t"),
            PartialUpdate("encoder.*"),
            Replay(memory=6, share=0.5),
            JointTraining(),
            EWC(strength=5.0, samples=4),
            LwF(strength=1.0),
        ],
        ids=lambda method: type(method).__name__,
    )
    def test_every_method_runs_and_fills_the_matrix(
        self, first, tmp_path, method
    ):
        matrix = make_brain().learn_sequence(
            domains(), first, tmp_path, method=method
        )
        assert all(
            (after, on) in matrix
            for after in matrix.domains
            for on in matrix.domains
        )
        last = kept(tmp_path, 3)
        assert not any(name.startswith("module.") for name in last)
        moved = {n for n in last if not torch.equal(last[n], first[n])}
        if isinstance(method, PartialUpdate):
            assert moved == {n for n in last if n.startswith("encoder.")}
        else:
            assert moved == set(last)
        assert LifelongMatrix.load(tmp_path / "matrix_test.json") == matrix

    def test_sequences_that_begin_alike_train_once(self, first, tmp_path):
        for name, method in [("a", FineTuning()), ("b", Averaging(0.5))]:
            make_brain().learn_sequence(
                domains(),
                first,
                tmp_path / name,
                method=method,
                shared=tmp_path / "shared",
            )
        trained = sorted(p.name[:2] for p in (tmp_path / "shared").iterdir())
        assert trained == ["d1", "d2", "d2"]

    def test_method_and_rule_together_are_refused(self, first, tmp_path):
        with pytest.raises(ValueError, match="not both"):
            make_brain().learn_sequence(
                domains(), first, tmp_path, method=EWC(), rule=TIES()
            )


def sequence(folder, first):
    """What the killed processes run: a rule, then a method with a memory."""
    brain = make_brain(ckpt_interval_steps=2)
    data = domains(count=16)
    brain.learn_sequence(
        data, first, folder / "rule", rule=TaskArithmetic(scale=0.5)
    )
    brain.learn_sequence(
        data, first, folder / "ewc", method=EWC(strength=5.0, samples=4)
    )


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork()")
def test_killed_at_random_moments_it_ends_with_the_same_weights(
    first, tmp_path
):
    """At least 10 kills; each process goes on where the last one stopped."""
    torch.set_num_threads(1)
    start = time.monotonic()
    sequence(tmp_path / "whole", first)
    whole = time.monotonic() - start
    chance, kills = random.Random(0), 0

    def compare():
        for row in ("rule", "ewc"):
            for step in (2, 3):
                assert same(
                    kept(tmp_path / "whole" / row, step),
                    kept(tmp_path / "killed" / row, step),
                )
            assert LifelongMatrix.load(
                tmp_path / "whole" / row / "matrix_test.json"
            ) == LifelongMatrix.load(
                tmp_path / "killed" / row / "matrix_test.json"
            )

    while True:
        child = os.fork()
        if child == 0:
            try:
                sequence(tmp_path / "killed", first)
                os._exit(0)
            finally:
                os._exit(1)
        # The first ones get little time, so that there are enough of them.
        patience = whole * chance.uniform(0.01, 0.25 if kills < 10 else 1.5)
        deadline = time.monotonic() + patience
        done = 0
        while not done and time.monotonic() < deadline:
            done, status = os.waitpid(child, os.WNOHANG)
            time.sleep(0.002)
        if done:
            assert status == 0, "the resumed run failed"
            compare()
            if kills >= 10:
                break
            # Done before it was killed often enough: once more from the
            # start, or it would only be found finished from now on.
            shutil.rmtree(tmp_path / "killed")
            continue
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        kills += 1
        assert kills < 200


TWO_PROCESSES = """
import sys
sys.path.insert(0, {here!r})
import speechbrain as sb, torch
torch.set_num_threads(1)
_, run_opts, _ = sb.parse_arguments(
    ["none.yaml", "--device", "cpu", "--distributed_backend", "gloo"]
)
sb.utils.distributed.ddp_init_group(run_opts)
from test_brains_sequential import sequence_for_ddp
sequence_for_ddp({folder!r}, run_opts)
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


def sequence_for_ddp(folder, run_opts):
    first = dict(open_state(f"{folder}/first.safetensors"))
    brain = make_brain(**run_opts)
    for name, arguments in (
        ("rule", {"rule": TaskArithmetic(scale=0.5)}),
        ("ewc", {"method": EWC(strength=5.0, samples=4)}),
        ("lwf", {"method": LwF()}),
        ("encoder", {"method": PartialUpdate("encoder.*")}),
    ):
        brain.learn_sequence(domains(), first, Path(folder) / name, **arguments)


@pytest.mark.slow
def test_two_processes_give_the_result_of_one(first, tmp_path):
    """The same global batches, shared out and padded alike.

    Not bit for bit: each process sums over its own utterances before the
    gradients are averaged, and floating-point sums depend on their order.
    """
    from speechbrain_taskarith.vectors import save_state

    for count in (1, 2):
        folder = tmp_path / str(count)
        folder.mkdir()
        save_state(first, folder / "first.safetensors")
    sequence_for_ddp(tmp_path / "1", {})
    script = tmp_path / "script.py"
    here = str(Path(__file__).parent)
    script.write_text(
        TWO_PROCESSES.format(here=here, folder=str(tmp_path / "2"))
    )
    root = str(Path(__file__).parents[2])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*command, "--nproc_per_node=2", str(script)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for row in ("rule", "ewc", "lwf", "encoder"):
        for step in (2, 3):
            one = kept(tmp_path / "1" / row, step)
            two = kept(tmp_path / "2" / row, step)
            assert one.keys() == two.keys()
            for name, value in one.items():
                assert torch.allclose(value, two[name], atol=1e-4), name
        assert LifelongMatrix.load(
            tmp_path / "1" / row / "matrix_test.json"
        ) == LifelongMatrix.load(tmp_path / "2" / row / "matrix_test.json")
