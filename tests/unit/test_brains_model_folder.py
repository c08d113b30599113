"""Models that several processes train, and the processes that help."""

import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from speechbrain_taskarith.brains import ModelFolder

ROOT = Path(__file__).resolve().parents[2]
# Forked: what is imported already need not be imported again.
processes = multiprocessing.get_context("fork")


def plan(**parents):
    return [
        SimpleNamespace(name=name, parents=found)
        for name, found in parents.items()
    ]


def wait_for(path):
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline, path
        time.sleep(0.01)


@pytest.fixture
def models(tmp_path):
    return ModelFolder(tmp_path / "models")


def test_what_is_kept_comes_back(models):
    layer, other = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    assert not models.finished("a/b")
    models.keep("a/b", {"model": layer}, {"loss": torch.tensor(0.5)})
    assert models.finished("a/b") and not models.finished("a")
    assert models.meta("a/b")["model"] == "a/b"
    assert models.meta("a/b")["loss"] == 0.5
    models.recover("a/b", {"model": other})
    assert torch.equal(layer.weight, other.weight)
    with pytest.raises(FileNotFoundError, match="'c' is not trained"):
        models.recover("c", {"model": other})


def test_every_model_once_and_after_its_parents(models):
    trained = []

    def train(model):
        assert all(models.finished(name) for name in model.parents)
        trained.append(model.name)
        models.keep(model.name, {}, {})

    order = plan(base=[], a=["base"], b=["base"], both=["a", "b"])
    models.keep("a", {}, {})
    models.train_all(order, train, show_progress=False)
    assert trained == ["base", "b", "both"]
    models.train_all(order, train, show_progress=False)
    assert len(trained) == 3


def test_a_fault_leaves_the_model_free(models):
    def broken(model):
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        models.train_all(plan(a=[]), broken, show_progress=False)
    assert not models.finished("a")
    models.train_all(
        plan(a=[]), lambda m: models.keep(m.name, {}, {}), show_progress=False
    )
    assert models.finished("a")


@pytest.mark.parametrize(
    "order", [plan(a=["b"], b=[]), plan(a=["gone"]), plan(a=["a"])]
)
def test_what_could_never_be_trained_is_refused(models, order):
    with pytest.raises(ValueError, match="model 'a' starts from"):
        models.train_all(order, None, show_progress=False)


def test_two_processes_train_side_by_side(models, tmp_path):
    def train(model):
        (tmp_path / f"{model.name}-{os.getpid()}").touch()
        if model.name != "last":
            # Goes on only when the other process has the other model.
            other = {"a": "b", "b": "a"}[model.name]
            (tmp_path / f"began-{model.name}").touch()
            wait_for(tmp_path / f"began-{other}")
        models.keep(model.name, {}, {})

    def work():
        order = plan(a=[], b=[], last=["a", "b"])
        models.train_all(order, train, show_progress=False)

    child = processes.Process(target=work)
    child.start()
    work()
    child.join(60)
    assert child.exitcode == 0
    for name in ("a", "b", "last"):
        assert models.finished(name)
        assert len(list(tmp_path.glob(f"{name}-*"))) == 1, "trained once"


def test_what_a_killed_process_had_taken_is_free(models, tmp_path):
    def hold(model):
        (tmp_path / "taken").touch()
        time.sleep(600)

    trained = []

    def train(model):
        trained.append(model.name)
        models.keep(model.name, {}, {})
        if model.name == "b":  # all that was free: now the other dies
            child.kill()

    child = processes.Process(
        target=models.train_all, args=(plan(a=[]), hold, False)
    )
    child.start()
    wait_for(tmp_path / "taken")
    models.train_all(plan(a=[], b=[], c=["a"]), train, show_progress=False)
    assert trained == ["b", "a", "c"]
    child.join(60)


SCRIPT = """
import os, sys, time
from pathlib import Path
from speechbrain_taskarith.brains import helpers, is_helper

folder, what = Path(sys.argv[1]), sys.argv[2]
with helpers(2) as started:
    name = "helper" if is_helper() else "main"
    words = map(str, (name, len(started), *(p.pid for p in started)))
    # One call: three processes write into one pipe.
    os.write(1, (" ".join(words) + "\\n").encode())
    if what == "fails" and is_helper():
        time.sleep(600)
    if what == "fails":
        raise RuntimeError("the main process fails")
"""


def run_script(tmp_path, what):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path), what],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    lines = [line.split() for line in done.stdout.splitlines()]
    return done, {line[0]: line[1:] for line in lines}, lines


def test_helpers_are_copies_that_start_none(tmp_path):
    done, said, lines = run_script(tmp_path, "works")
    assert done.returncode == 0, done.stderr
    assert sorted(line[0] for line in lines) == ["helper", "helper", "main"]
    assert said["main"][0] == "2" and said["helper"] == ["0"]


def test_helpers_end_where_the_main_process_fails(tmp_path):
    done, said, _ = run_script(tmp_path, "fails")
    assert done.returncode == 1
    assert "the main process fails" in done.stderr
    for pid in map(int, said["main"][1:]):
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
