"""Editing in recipes with SpeechBrain's habits, by their YAML alone.

The law: what is kept is `base + scale * (fine-tuned - base)`, and fine-tuned
is what an optimizer made of the base: compared with a training by hand.
"""

import subprocess
import sys

import pytest
import torch
from checks import changed, weights
from processes import ROOT, environment
from test_kill_resume import Moments, collect, in_child, run_once
from upstream_habits import (
    EDITING,
    PLAIN,
    PRETRAINER,
    YAML,
    Averages,
    Recipe,
    RecoversBefore,
    SwitchesOptimizer,
    Unregistered,
    Whisper,
    assert_law,
    data,
    run,
)

HABITS = [
    Recipe,
    Averages,
    Unregistered,
    SwitchesOptimizer,
    Whisper,
    RecoversBefore,
]


@pytest.fixture(scope="module")
def us(tmp_path_factory):
    """The base: a training of the plain recipe."""
    folder = tmp_path_factory.mktemp("us")
    run(Recipe, YAML + PLAIN, folder, seed=0, number_of_epochs=1)
    return folder / "save"


def base_of(save):
    return weights(next(save.glob("CKPT+*")) / "model.ckpt")


def by_hand(us, brain_class, epochs=3):
    """Return the fine-tuned weights after each epoch: a loop from the base."""
    encoder, output = torch.nn.Linear(3, 4), torch.nn.Linear(4, 1)
    model = torch.nn.ModuleList([encoder, output])
    model.load_state_dict(base_of(us))
    stored = weights(next(us.glob("CKPT+*")) / "normalizer.ckpt")
    mean, std = stored["glob_mean"], stored["glob_std"]
    adam = [torch.optim.Adam(model.parameters(), lr=0.05)]
    if brain_class is Unregistered:
        adam = [torch.optim.Adam(m.parameters(), lr=0.05) for m in model]
    sgd = [torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)]
    epochs_done = []
    for epoch in range(1, epochs + 1):
        switched = brain_class is SwitchesOptimizer and epoch > 2
        optimizers = sgd if switched else adam
        for x, y in data(1):
            hidden = torch.tanh(encoder((x - mean) / std))
            loss = (output(hidden).squeeze(-1) - y).square().mean()
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss.backward()
            for optimizer in optimizers:
                torch.nn.utils.clip_grad_norm_(
                    optimizer.param_groups[0]["params"], 5.0
                )
                optimizer.step()
        state = {k: v.clone() for k, v in model.state_dict().items()}
        epochs_done.append(state)
    return epochs_done


def assert_close(one, other):
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(
            one[name], other[name], atol=1e-5, rtol=1e-4, msg=name
        )


@pytest.mark.parametrize("habit", HABITS)
def test_the_law_holds_after_a_run_with_two_test_sets(us, tmp_path, habit):
    brain = run(habit, YAML + EDITING, tmp_path, base=str(us))
    base = base_of(us)
    found = assert_law(tmp_path / "save", base, 0.4)
    epochs = by_hand(us, habit)
    if issubclass(habit, Averages):
        # One is left: the mean of the three, for both test sets.
        [tuned] = found.values()
        mean = {k: sum(e[k] for e in epochs) / 3 for k in base}
        assert_close(tuned, mean)
        assert_close(
            brain.tested,
            {k: base[k] + 0.4 * (mean[k] - base[k]) for k in base},
        )
    else:
        assert len(found) == 3
        for tuned, expected in zip(found.values(), epochs):
            assert_close(tuned, expected)


@pytest.mark.parametrize("habit", HABITS)
def test_testing_alone_changes_nothing(us, tmp_path, habit):
    """Evaluating a model again and again used to shrink its edit."""
    first = run(habit, YAML + EDITING, tmp_path, base=str(us))
    before = assert_law(tmp_path / "save", base_of(us), 0.4)
    for _ in range(2):
        again = run(
            habit,
            YAML + EDITING,
            tmp_path,
            base=str(us),
            run_opts={"test_only": True},
        )
        found = assert_law(tmp_path / "save", base_of(us), 0.4)
        assert len(found) == len(before)
        for one, other in zip(before.values(), found.values()):
            assert_close(one, other)
        assert_close(again.tested, first.tested)


@pytest.mark.parametrize("habit", HABITS)
def test_a_run_that_goes_on_equals_one_in_one_go(us, tmp_path, habit):
    """Two epochs, tests, then one more: not for means, which start anew."""
    part, whole = tmp_path / "part", tmp_path / "whole"
    run(habit, YAML + EDITING, part, base=str(us), number_of_epochs=2)
    run(habit, YAML + EDITING, part, base=str(us))
    run(habit, YAML + EDITING, whole, base=str(us))
    ours = assert_law(part / "save", base_of(us), 0.4)
    theirs = assert_law(whole / "save", base_of(us), 0.4)
    # Optimizers that are not registered lose their state.
    if habit in (Recipe, Whisper, RecoversBefore):
        for one, other in zip(ours.values(), theirs.values()):
            assert_close(one, other)
    assert len(ours) == len(theirs)


@pytest.mark.parametrize("habit", HABITS)
def test_scale_0_learns_nothing_to_the_byte(us, tmp_path, habit):
    yaml = (YAML + EDITING).replace("scale: 0.4", "scale: 0.0")
    run(habit, yaml, tmp_path, base=str(us))
    base = next(us.glob("CKPT+*"))
    for path in (tmp_path / "save").glob("CKPT+*"):
        for name in ("model", "normalizer"):
            ours, theirs = (weights(p / f"{name}.ckpt") for p in (path, base))
            assert not changed(ours, theirs), name


@pytest.mark.parametrize("habit", HABITS)
def test_a_run_may_start_from_its_own_weights(tmp_path, habit):
    """`base: start`, kept once and used again by the run that goes on."""
    options = {"base": "start", "number_of_epochs": 1}
    run(habit, YAML + EDITING, tmp_path, **options)
    torch.manual_seed(7)
    start = weights(tmp_path / "save" / "start" / "model.ckpt")
    assert_law(tmp_path / "save", start, 0.4)
    run(habit, YAML + EDITING, tmp_path, base="start", seed=7)
    again = weights(tmp_path / "save" / "start" / "model.ckpt")
    assert all(torch.equal(start[k], again[k]) for k in start)
    assert_law(tmp_path / "save", start, 0.4)


@pytest.mark.parametrize("habit", [Whisper, Averages])
def test_pre_trained_weights_are_a_start(us, tmp_path, habit):
    """Loaded by a Pretrainer, once more when the run goes on."""
    yaml = YAML + EDITING + PRETRAINER
    options = {"base": "start", "source": str(us)}
    run(habit, yaml, tmp_path, number_of_epochs=2, **options)
    run(habit, yaml, tmp_path, **options)
    base = base_of(us)
    found = assert_law(tmp_path / "save", base, 0.4)
    if habit is Whisper:
        for tuned, expected in zip(found.values(), by_hand(us, habit)):
            assert_close(tuned, expected)
    kept = weights(tmp_path / "save" / "start" / "model.ckpt")
    assert all(torch.equal(kept[name], base[name]) for name in base)


def test_mean_of_edits_by_a_rule_that_is_not_linear(us, tmp_path):
    """TIES of a mean is not the mean of TIES: the first is kept."""
    yaml = (YAML + EDITING).replace(
        "TaskArithmetic {scale: 0.4}", "TIES {density: 0.3, scale: 0.6}"
    )
    run(Averages, yaml, tmp_path, base=str(us))
    base = base_of(us)
    mean = {k: sum(e[k] for e in by_hand(us, Averages)) / 3 for k in base}
    flat = torch.cat([(mean[k] - base[k]).flatten() for k in base])
    kept = round(0.3 * len(flat))
    threshold = flat.abs().sort(descending=True).values[kept - 1]
    [path] = (tmp_path / "save").glob("CKPT+*")
    for key, value in weights(path / "model.ckpt").items():
        delta = mean[key] - base[key]
        delta = torch.where(delta.abs() >= threshold, delta, 0.0)
        torch.testing.assert_close(
            value, base[key] + 0.6 * delta, atol=1e-4, rtol=1e-3
        )


def test_testing_without_the_base(us, tmp_path):
    """As on another machine: what was kept is tested and kept."""
    base = tmp_path / "us.ckpt"
    base.write_bytes((next(us.glob("CKPT+*")) / "model.ckpt").read_bytes())
    run(Averages, YAML + EDITING, tmp_path, base=str(base))
    before = assert_law(tmp_path / "save", base_of(us), 0.4)
    base.unlink()
    options = {"base": str(base), "run_opts": {"test_only": True}}
    run(Averages, YAML + EDITING, tmp_path, **options)
    after = assert_law(tmp_path / "save", base_of(us), 0.4)
    for one, other in zip(before.values(), after.values()):
        assert all(torch.equal(one[name], other[name]) for name in one)
    # Without it, a mean of several edits cannot be made.
    base.write_bytes((next(us.glob("CKPT+*")) / "model.ckpt").read_bytes())
    run(Recipe, YAML + EDITING, tmp_path / "several", base=str(base))
    base.unlink()
    with pytest.raises(FileNotFoundError, match="us.ckpt"):
        run(Averages, YAML + EDITING, tmp_path / "several", **options)


@pytest.mark.parametrize(
    "run_opts",
    [
        {"ckpt_interval_steps": 1},
        {"precision": "bf16", "eval_precision": "bf16"},
        {"grad_accumulation_factor": 3},
    ],
)
def test_options_of_a_training(us, tmp_path, run_opts):
    run(Averages, YAML + EDITING, tmp_path, base=str(us), run_opts=run_opts)
    assert_law(tmp_path / "save", base_of(us), 0.4)


def test_another_scale_at_the_test_is_kept_with_it(us, tmp_path):
    run(Averages, YAML + EDITING, tmp_path, base=str(us))
    yaml = (YAML + EDITING).replace("scale: 0.4", "scale: 0.9")
    options = {"base": str(us), "run_opts": {"test_only": True}}
    run(Averages, yaml, tmp_path, **options)
    assert_law(tmp_path / "save", base_of(us), 0.9)
    # Training goes on with the scale that it began with, or not at all.
    with pytest.raises(ValueError, match="rule"):
        run(Averages, YAML + EDITING, tmp_path, base=str(us))


@pytest.mark.slow
def test_killed_at_random_moments_the_law_holds(us, tmp_path):
    """In training, in the test that averages, while it saves and deletes."""
    base = base_of(us)

    def train(folder):
        options = {"base": str(us), "number_of_epochs": 2}
        return lambda report: (
            run(Averages, YAML + EDITING, folder, **options),
            report(1),
        )

    _, seconds = run_once(train(tmp_path / "whole"))
    moments, kills, listed = Moments(5, seconds), 0, 0
    for attempt in range(60):
        # Some folders are killed again and again.
        folder = tmp_path / str(attempt // 3)
        pid, reader = in_child(train(folder))
        killed, _ = collect(pid, reader, kill_after=moments.draw())
        moments.learn(killed)
        kills += killed
        if list((folder / "save").glob("CKPT+*/CKPT.yaml")):
            assert_law(folder / "save", base, 0.4)
            listed += 1
        if kills >= 12 and listed >= 4:
            break
    assert kills >= 12 and listed >= 4
    run_once(train(folder))
    assert_law(folder / "save", base, 0.4)


DISTRIBUTED = """
import sys
import speechbrain as sb
import torch
from upstream_habits import EDITING, YAML, Averages, run

_, run_opts, _ = sb.parse_arguments(
    ["none.yaml", "--device=cpu", "--distributed_backend=gloo"]
)
sb.utils.distributed.ddp_init_group(run_opts)
base, folder = sys.argv[1:]
run(Averages, YAML + EDITING, folder, base=base, run_opts=run_opts)
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_average_and_keep_the_law(us, tmp_path):
    """The same data in both: the result of one process."""
    (tmp_path / "script.py").write_text(DISTRIBUTED)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    words = [tmp_path / "script.py", us, tmp_path / "two"]
    tests = ROOT / "tests"
    paths = f"{ROOT}:{tests / 'integration'}:{tests / 'drop_in'}"
    for _ in range(2):  # and once more, which only tests
        done = subprocess.run(
            [*command, "--nproc_per_node=2", *map(str, words)],
            env={**environment(), "PYTHONPATH": paths},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-6000:]
        [tuned] = assert_law(
            tmp_path / "two" / "save", base_of(us), 0.4
        ).values()
        epochs = by_hand(us, Averages)
        mean = {k: sum(e[k] for e in epochs) / 3 for k in tuned}
        assert_close(tuned, mean)
