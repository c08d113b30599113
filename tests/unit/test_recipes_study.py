"""Trainings that build on one another, side by side: `common.study`."""

import builtins
import json
import multiprocessing
import threading
import time
from types import SimpleNamespace

import filelock
import pytest
import study_toy
import torch
from common.settings import note_settings
from common.study import (
    Training,
    about,
    is_finished,
    parse_study_arguments,
    run_trainings,
    start_study,
    workers,
)


def study(folder, backend="loky", count=1, **settings):
    options = SimpleNamespace(backend=backend, workers=count, scheduler=None)
    return SimpleNamespace(options=options, folder=folder, settings=settings)


def plan(folder):
    """A first model, two that start from it, and one of the second."""
    return [
        Training("last", {"seed": 4, "base": str(folder / "b/c")}, ("b/c",)),
        Training("a", {"seed": 1, "base": str(folder / "first")}, ("first",)),
        Training("b/c", {"seed": 2, "base": str(folder / "first")}, ("first",)),
        Training("first", {"seed": 3}),
    ]


def run(folder, trainings, backend="loky", count=1):
    with workers(study(folder, backend, count)):
        run_trainings(study_toy.train, trainings, ["toy.yaml"], folder)


def weights(folder):
    return {
        str(path.parent.relative_to(folder)): torch.load(path)
        for path in folder.rglob("weights.pt")
    }


def runs(folder, name):
    return (folder / name / "runs.txt").read_text().splitlines()


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The study in one process."""
    folder = tmp_path_factory.mktemp("alone")
    run(folder, plan(folder))
    return folder


def test_every_training_once_and_after_its_parents(alone):
    assert len(weights(alone)) == 4
    assert all(is_finished(alone, training.name) for training in plan(alone))
    assert about(alone, "b/c")["parents"] == ["first"]
    assert about(alone, "b/c")["seconds"] >= 0
    run(alone, plan(alone))
    assert all(len(runs(alone, t.name)) == 1 for t in plan(alone))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["loky", "dask"])
def test_two_workers_give_the_same(alone, tmp_path, backend):
    if backend == "dask":
        pytest.importorskip("distributed")
    # Each goes on only when the other has begun.
    trainings = plan(tmp_path)
    for one, other in ((1, "b/c"), (2, "a")):
        wait = str(tmp_path / other / "runs.txt")
        trainings[one].options["wait_for"] = wait
    run(tmp_path, trainings, backend, 2)
    found, expected = weights(tmp_path), weights(alone)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[n], expected[n]) for n in expected)
    lines = [line.split() for n in expected for line in runs(tmp_path, n)]
    assert len({pid for pid, _ in lines}) == 2
    assert {threads for _, threads in lines} == {"1"}


@pytest.mark.slow
def test_a_cluster_that_runs_already(alone, tmp_path):
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(
        n_workers=1, threads_per_worker=1, dashboard_address=None
    ) as cluster:
        chosen = study(tmp_path, "dask")
        chosen.options.scheduler = cluster.scheduler_address
        with workers(chosen):
            run_trainings(
                study_toy.train, plan(tmp_path), ["toy.yaml"], tmp_path
            )
    found, expected = weights(tmp_path), weights(alone)
    assert all(torch.equal(found[n], expected[n]) for n in expected)


def test_a_fault_names_its_console_and_leaves_the_training_open(tmp_path):
    repaired = tmp_path / "repaired"
    broken = Training("a", {"fail": True, "repaired": str(repaired)})
    with pytest.raises(RuntimeError, match="console.txt") as caught:
        run(tmp_path, [broken])
    assert "out of memory" in str(caught.value.__cause__)
    assert "own words" in (tmp_path / "a" / "console.txt").read_text()
    assert not is_finished(tmp_path, "a")
    repaired.touch()
    run(tmp_path, [broken])
    assert is_finished(tmp_path, "a")


def test_what_could_never_be_trained_is_refused(tmp_path):
    lost = [Training("a", {}, ("gone",))]
    with pytest.raises(ValueError, match="'a' starts from 'gone'"):
        run(tmp_path, lost)
    circle = [Training("a", {}, ("b",)), Training("b", {}, ("a",))]
    with pytest.raises(ValueError, match="cycle"):
        run(tmp_path, circle)
    # A parent of an earlier run is fine.
    run(tmp_path, [Training("gone")])
    run(tmp_path, lost)


@pytest.mark.parametrize("words", [["--seed=7"], ["--seed", "7"]])
def test_an_option_that_differs_between_trainings_is_refused(tmp_path, words):
    with pytest.raises(ValueError, match="--seed: the study sets it"):
        run_trainings(
            study_toy.train, plan(tmp_path), ["toy.yaml", *words], tmp_path
        )
    assert not list(tmp_path.iterdir())


def hold(path, ready):
    with filelock.FileLock(path):
        ready.set()
        time.sleep(600)


def test_a_worker_that_is_still_at_it_is_waited_for(tmp_path):
    """And one that is killed gives its folder back."""
    (tmp_path / "a").mkdir()
    forked = multiprocessing.get_context("fork")
    ready = forked.Event()
    orphan = forked.Process(
        target=hold, args=(tmp_path / "a" / ".lock", ready), daemon=True
    )
    orphan.start()
    assert ready.wait(60)
    study = threading.Thread(
        target=run_trainings,
        args=(study_toy.train, [Training("a")], ["toy.yaml"], tmp_path),
    )
    study.start()
    time.sleep(0.5)
    assert not (tmp_path / "a" / "runs.txt").exists()
    # Had the orphan finished the training, it would not be run again.
    orphan.kill()
    study.join(60)
    assert len(runs(tmp_path, "a")) == 1


def test_what_another_has_finished_meanwhile_is_taken(tmp_path):
    (tmp_path / "a").mkdir()
    with filelock.FileLock(tmp_path / "a" / ".lock"):
        study = threading.Thread(
            target=run_trainings,
            args=(study_toy.train, [Training("a")], ["toy.yaml"], tmp_path),
        )
        study.start()
        time.sleep(0.5)
        (tmp_path / "a" / "finished.json").write_text(json.dumps({}))
    study.join(60)
    assert not (tmp_path / "a" / "runs.txt").exists()


@pytest.mark.parametrize(
    ("backend", "package"),
    [("dask", r"dask\[distributed\]"), ("ray", "ray")],
)
def test_a_missing_package_is_named(monkeypatch, tmp_path, backend, package):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith(backend):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=f'pip install "{package}"'):
        with workers(study(tmp_path, backend, 2)):
            pass


def test_options_of_the_study_are_not_train_pys(tmp_path):
    found, rest = parse_study_arguments(
        ["h.yaml", "--backend", "dask", "--seed=1", "--workers=2", "--debug"]
    )
    assert (found.backend, found.workers, found.scheduler) == ("dask", 2, None)
    assert rest == ["h.yaml", "--seed=1", "--debug"]
    with pytest.raises(ValueError, match="expected 1 or more"):
        with workers(study(tmp_path, count=0)):
            pass


def test_a_study_has_options_of_its_own():
    own = {"only": "all", "scales": [0.5, 1.0], "base": None, "lr": 0.1}
    found, rest = parse_study_arguments(["h.yaml", "--steps=3"], own)
    assert rest == ["h.yaml", "--steps=3"]
    assert {name: getattr(found, name) for name in own} == own
    found, rest = parse_study_arguments(
        ["h.yaml", "--scales=[0.2, 1]", "--only", "a,b", "--lr", "1e-3"], own
    )
    assert rest == ["h.yaml"]
    assert (found.scales, found.only) == ([0.2, 1], "a,b")
    assert found.lr == 0.001


@pytest.mark.parametrize("times", [1, 2])
def test_a_loss_that_is_not_finite_is_tried_once_more(tmp_path, times):
    """A second time is a failure, and what happened once is noted."""
    calls = []

    def train(argv):
        calls.append(argv)
        if len(calls) <= times:
            raise ValueError("Loss is not finite and patience is exhausted.")

    def start():
        with workers(study(tmp_path, "sequential")):
            run_trainings(train, [Training("a")], ["toy.yaml"], tmp_path)

    if times == 1:
        start()
        assert about(tmp_path, "a")["attempts"] == 2
    else:
        with pytest.raises(RuntimeError, match="console.txt"):
            start()
        assert not is_finished(tmp_path, "a")
    assert len(calls) == 2


def test_a_folder_keeps_its_settings(tmp_path):
    first = {"lines": 4, "test": None, "sources": ("a", "b")}
    note_settings(tmp_path, first)
    note_settings(tmp_path, first)
    # Something new is no other value, and is remembered.
    note_settings(tmp_path, {"lines": 4, "lines of c": "12ab"})
    for changed in ({"lines": 2}, {"test": 3}, {"lines of c": "34cd"}):
        [name] = changed
        with pytest.raises(ValueError, match=f"another {name} .*--output"):
            note_settings(tmp_path, first | changed)
    note_settings(tmp_path, first)
    note_settings(tmp_path / "other", {"lines": 2})


def test_a_study_goes_on_with_its_own_settings_only(tmp_path):
    hparams = tmp_path / "toy.yaml"
    hparams.write_text(
        "seed: 1\nlr: 0.1\ntargets: [en]\nstudy_folder: !PLACEHOLDER\n"
        "data_folder: here/data\nskip_prep: False\nmodel: !name:torch.nn.Linear\n"
        "domains: {us: USA/neutral, german: DEU/German}\nrows:\n"
        "  a:\n    rule: !new:speechbrain_taskarith.vectors.TaskArithmetic\n"
        "      scale: 0.4\n    lr: 0.1\n"
        "  b:\n    method: !new:speechbrain_taskarith.vectors.lifelong.EWC\n"
        "      strength: 1\n"
    )

    def begin(*more, folder="a"):
        argv = [str(hparams), f"--study_folder={tmp_path / folder}", *more]
        return start_study(argv, {"only": "all", "epochs": 2})

    # What was never trained may be begun in another way.
    begin("--lr=0.3")
    with workers(begin()):
        noted = (tmp_path / "a" / "hyperparams.yaml").read_text()
    for name, more in (
        ("seed", "--seed=2"),
        ("lr", "--lr=0.2"),
        ("targets", "--targets=[de]"),
        ("epochs", "--epochs=3"),
        ("domains", "--domains={us: USA/neutral, german: DEU/Swiss}"),
        ("row a", "--rows={a: {rule: {scale: 0.5}}}"),
        ("row a", "--rows={a: {lr: 0.2}}"),
        ("row b", "--rows={b: {method: {strength: 2}}}"),
    ):
        with pytest.raises(ValueError, match=f"another {name} "):
            begin(more)
        assert (tmp_path / "a" / "hyperparams.yaml").read_text() == noted
    begin("--only=x", "--data_folder=/there/data", "--skip_prep=True")
    begin("--lr=0.2", folder="b")
    # As a changed file does, but for one row more; the order of domains counts.
    text = hparams.read_text()
    hparams.write_text(text + "  c:\n    lr: 0.1\n")
    begin()
    us, german = "us: USA/neutral", "german: DEU/German"
    turned = text.replace(f"{us}, {german}", f"{german}, {us}")
    hparams.write_text(turned)
    with pytest.raises(ValueError, match="another domains "):
        begin()
    hparams.write_text(text)
    hparams.write_text(hparams.read_text().replace("0.1", "0.2"))
    with pytest.raises(ValueError, match=r"another lr \(0.1, now 0.2\)"):
        begin()
