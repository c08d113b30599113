"""Many trainings that build on one another, on one machine or on a cluster.

A study lists its trainings. Each is one call of the recipe's `train.py` with
an output folder of its own; joblib runs those that do not depend on one
another side by side. A study that was killed goes on where it stopped: what
has finished is not trained again, and what has not is resumed by `train.py`
itself, from its newest checkpoint.
"""

import argparse
import contextlib
import gc
import graphlib
import json
import logging
import os
import sys
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import filelock
import joblib
import speechbrain as sb
import torch
from hyperpyyaml import load_hyperpyyaml
from ruamel.yaml import YAML

from common.settings import check_settings, note_settings, settings_among
from speechbrain_taskarith.metrics import paired_bootstrap
from speechbrain_taskarith.utils.files import read_json, write_json
from speechbrain_taskarith.utils.progress import progress

logger = logging.getLogger(__name__)

FINISHED = "finished.json"
CONSOLE = "console.txt"

# Loky starts a new worker where the memory of one has grown: no fault.
warnings.filterwarnings("ignore", "A worker stopped while some jobs")

# SpeechBrain warns that torchvision is missing, which only its recipes for
# speech synthesis use.
logging.getLogger("speechbrain.utils.train_logger").addFilter(
    lambda record: "torchvision" not in record.getMessage()
)
# At the level of SpeechBrain's own log it writes hundreds of lines on fonts.
logging.getLogger("matplotlib").setLevel(logging.INFO)


@dataclass(frozen=True)
class Training:
    """One call of `train.py`.

    Arguments
    ---------
    name : str
        Its output folder, below the study's folder of trainings.
    options : dict
        What differs from the other trainings: `{hparams key: value}`.
    parents : tuple of str
        Names of the trainings that have to be finished before it.
    """

    name: str
    options: dict = field(default_factory=dict)
    parents: tuple = ()


def parse_study_arguments(argv, own=None):
    """Take the study's own options off a command line.

    `own`: options of one study alone, `{name: default}`; values are YAML, as
    those of hparams are. Returns `options` (`.output_folder`, `.backend`, `.workers`,
    `.scheduler`) and the words that remain, which are for `train.py`.
    """
    parser = argparse.ArgumentParser(
        usage="study.py HPARAMS.yaml [options] [--key value ...]",
        epilog="All other options override keys of the hparams file. "
        "study.py --merge FOLDER makes one table of the seeds in a folder.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--output_folder",
        "--study_folder",
        help="where tables and models go (default: the hparams file's "
        "study_folder)",
    )
    parser.add_argument(
        "--backend",
        default="loky",
        help="joblib backend that runs the trainings: loky (processes on this "
        "machine, default), dask, ray, ...",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=1,
        help="how many trainings run side by side (default: 1)",
    )
    parser.add_argument(
        "--scheduler",
        metavar="ADDRESS",
        help="dask scheduler, e.g. tcp://10.0.0.1:8786; without it dask runs "
        "on this machine. Its workers need the same files under the same "
        "paths: give absolute ones",
    )
    for name, default in (own or {}).items():
        parser.add_argument(
            f"--{name}",
            default=default,
            type=YAML(typ="safe").load,
            help=f"see OPTIONS in study.py (default: {default})",
        )
    return parser.parse_known_args(argv)


@dataclass
class Study:
    """What a study has read from its command line and hparams file.

    Arguments
    ---------
    options : argparse.Namespace
        The study's own options.
    arguments : list of str
        What every call of `train.py` gets.
    hparams, run_opts : dict
        As SpeechBrain reads them.
    folder : pathlib.Path
        Where everything goes; the trainings go into `models` in it.
    """

    options: argparse.Namespace
    arguments: list
    hparams: dict
    run_opts: dict
    folder: Path

    @property
    def models(self):
        return self.folder / "models"

    @property
    def settings(self):
        """What the trainings depend on: plain values, and no paths."""
        return settings_among(self.hparams)


def start_study(argv, own=None):
    """Read a command line and start the study's log; returns a `Study`.

    `own`: see `parse_study_arguments`; they are among the study's hparams.
    Raises ValueError where the folder holds a study with other settings.
    """
    options, arguments = parse_study_arguments(argv, own)
    if options.output_folder:
        folder = Path(options.output_folder).resolve()
        arguments.append(f"--study_folder={folder}")
    hparams_file, run_opts, overrides = sb.parse_arguments(arguments)
    # Workers elsewhere may have been started in another folder.
    arguments[arguments.index(hparams_file)] = str(Path(hparams_file).resolve())
    with open(hparams_file, encoding="utf-8") as fin:
        hparams = load_hyperpyyaml(fin, overrides)
    hparams.update({name: getattr(options, name) for name in own or ()})
    if not options.output_folder:
        folder = Path(hparams["study_folder"]).resolve()
        arguments.append(f"--study_folder={folder}")
    hparams["noprogressbar"] = True  # one bar over all trainings instead
    study = Study(options, arguments, hparams, run_opts, folder)
    # Before the folder's hyperparams.yaml becomes this run's.
    check_settings(folder, study.settings)
    level = os.environ.get("SB_LOG_LEVEL", "INFO")
    logging.getLogger("speechbrain.utils.quirks").setLevel(level)
    sb.create_experiment_directory(
        experiment_directory=str(folder),
        hyperparams_to_save=hparams_file,
        overrides=overrides,
    )
    # SpeechBrain sets it to DEBUG for everything that is imported from now on.
    os.environ["SB_LOG_LEVEL"] = level
    return study


@contextlib.contextmanager
def workers(study):
    """Note a study's settings, and let joblib use the backend it asks for.

    Raises ImportError, with the command that installs it, where the package
    of a backend is missing.
    """
    options = study.options
    if options.workers < 1:
        raise ValueError(f"--workers {options.workers}: expected 1 or more")
    with contextlib.ExitStack() as stack:
        settings = {"n_jobs": options.workers}
        if options.backend == "dask":
            client = stack.enter_context(_dask_client(options))
            # All workers of the cluster; LocalCluster has `--workers`.
            settings = {"n_jobs": -1, "client": client}
        elif options.backend == "ray":
            _import("ray.util.joblib", "ray").register_ray()
        stack.enter_context(joblib.parallel_config(options.backend, **settings))
        note_settings(study.folder, study.settings)
        yield


@contextlib.contextmanager
def _dask_client(options):
    """Connect to a scheduler, or start a cluster on this machine."""
    distributed = _import("dask.distributed", "dask[distributed]")
    with contextlib.ExitStack() as stack:
        address = options.scheduler
        if address is None:
            address = stack.enter_context(
                distributed.LocalCluster(
                    n_workers=options.workers,
                    threads_per_worker=1,
                    dashboard_address=None,
                )
            )
        client = stack.enter_context(distributed.Client(address))
        # Workers import train.py; they were not started in its folder.
        client.run(exec, f"import sys; sys.path[:0] = {sys.path!r}")
        yield client


def _import(module, package):
    try:
        return __import__(module, fromlist=["*"])
    except ImportError as error:
        backend = module.split(".")[0]
        raise ImportError(
            f"--backend {backend} needs a package that is not installed: "
            f'pip install "{package}"'
        ) from error


def run_trainings(train, trainings, arguments, folder, show_progress=True):
    """Run all trainings that have not finished, parents before children.

    Arguments
    ---------
    train : callable
        `train(argv)` of the recipe's `train.py`, by which workers find it.
    trainings : list of Training
        In any order; a parent that is not in the list has finished before.
    arguments : list of str
        The command line that all trainings share: hparams file and options.
    folder : str or pathlib.Path
        The trainings' output folders are made in it.
    show_progress : bool
        Show a bar.
    """
    _refuse_options_of_trainings(arguments, trainings)
    folder = Path(folder).resolve()
    with progress(
        total=len(trainings),
        desc="trainings",
        unit="training",
        show_progress=show_progress,
    ) as bar:
        for generation in generations(trainings, folder):
            missing = [t for t in generation if not is_finished(folder, t.name)]
            bar.update(len(generation) - len(missing))
            # Unordered: the bar moves when any of them is done.
            parallel = joblib.Parallel(return_as="generator_unordered")
            for _ in parallel(
                joblib.delayed(_run_one)(train, training, arguments, folder)
                for training in missing
            ):
                bar.update()


def _refuse_options_of_trainings(arguments, trainings):
    """Refuse options that the study itself gives to each training."""
    own = {f"--{key}" for training in trainings for key in training.options}
    for word in arguments:
        option = word.split("=")[0]
        if option in own:
            raise ValueError(
                f"{option}: the study sets it for each training; leave it "
                "out, or call train.py"
            )


def generations(trainings, folder):
    """Yield groups of trainings; a group needs only the groups before it."""
    by_name = {training.name: training for training in trainings}
    for training in trainings:
        for parent in training.parents:
            if parent not in by_name and not is_finished(folder, parent):
                raise ValueError(
                    f"training {training.name!r} starts from {parent!r}, "
                    "which is neither finished nor among the trainings"
                )
    sorter = graphlib.TopologicalSorter(
        {t.name: [p for p in t.parents if p in by_name] for t in trainings}
    )
    sorter.prepare()
    while sorter.is_active():
        ready = set(sorter.get_ready())
        sorter.done(*ready)
        yield [t for t in by_name.values() if t.name in ready]


def is_finished(folder, name):
    """Tell whether a training has finished."""
    return (Path(folder) / name / FINISHED).is_file()


def rerun_unmeasured(trainings, folder, result_of):
    """Let finished trainings run again that lack a result.

    They were tested on other data: `train.py` resumes at the end of the
    training, and only tests. `result_of(name)` is the path of the result.
    """
    for training in trainings:
        if not result_of(training.name).exists():
            (Path(folder) / training.name / FINISHED).unlink(missing_ok=True)


def about(folder, name):
    """Return what was noted about a finished training, e.g. `seconds`."""
    return read_json(Path(folder) / name / FINISHED)


def _run_one(train, training, arguments, folder):
    """Run a training in this worker, unless it has finished by now."""
    output = folder / training.name
    output.mkdir(parents=True, exist_ok=True)
    # A worker may outlive a study that was killed: wait until it is done with
    # this folder. A lock of the system's, which ends with its process.
    with filelock.FileLock(output / ".lock"):
        if is_finished(folder, training.name):
            return
        # Small models gain nothing from more threads, and with one the result
        # does not depend on the number of cores.
        torch.set_num_threads(1)
        start = time.monotonic()
        options = {"output_folder": str(output), **training.options}
        argv = [*arguments, *map(_as_option, options.items())]
        # Bars and the list of installed packages: the study's are enough.
        argv += ["--noprogressbar", "--save_env_desc=False"]
        attempts = 1
        try:
            with _console_of_its_own(output / CONSOLE):
                train(argv)
        except RuntimeError as error:
            if "Loss is not finite" not in str(error.__cause__):
                raise
            # Seen once in many trainings, with bfloat16 on a CPU, and gone
            # when the same training ran again; we do not know why.
            logger.warning(
                "training %s: the loss was not finite; running it once more",
                training.name,
            )
            attempts = 2
            with _console_of_its_own(output / CONSOLE):
                train(argv)
        gc.collect()  # loky ends a worker whose memory grows
        # Last, since it says that everything before it is there.
        write_json(
            output / FINISHED,
            {
                "name": training.name,
                "parents": list(training.parents),
                "seconds": round(time.monotonic() - start, 1),
                "attempts": attempts,
            },
        )


@contextlib.contextmanager
def _console_of_its_own(path):
    """Keep what a training prints and logs off the study's terminal."""
    root, level = logging.getLogger(), os.environ.get("SB_LOG_LEVEL")
    before = list(root.handlers)
    with (
        open(path, "a", encoding="utf-8") as stream,
        contextlib.redirect_stdout(stream),
        contextlib.redirect_stderr(stream),
    ):
        try:
            yield
        except Exception as error:
            message = f"a training failed; what it printed is in {path}"
            raise RuntimeError(message) from error
        finally:
            # SpeechBrain has opened the training's log.txt.
            for handler in set(root.handlers) - set(before):
                handler.close()
            root.handlers[:] = before
            os.environ.pop("SB_LOG_LEVEL", None)
            if level is not None:
                os.environ["SB_LOG_LEVEL"] = level


def _as_option(item):
    key, value = item
    # JSON is YAML, which is how SpeechBrain reads options.
    text = value if isinstance(value, str) else json.dumps(value)
    return f"--{key}={text}"


def relative_reduction(*, before, after):
    """Return the relative reduction in %; 0 where there was nothing before."""
    return 100.0 * (before - after) / before if before else 0.0


def add_paired_tests(summary, table, reports, pairs, **run):
    """Add a table: is a row better than another on the same utterances?

    `reports` is `{row: WERReport}`, `pairs` a list of (rival, ours); a pair of
    which a row is missing is left out. See `metrics.paired_bootstrap`.
    """
    summary.note(
        f"`{table}_paired`: points of WER over all strings together, positive "
        "where the row named first is better; 95 % interval and two-sided p "
        "by a paired bootstrap over strings. Strings share recordings and "
        "speakers, so that the interval is rather too narrow."
    )
    for rival, ours in pairs:
        if rival == ours or not {rival, ours} <= set(reports):
            continue
        test = paired_bootstrap(reports[rival], reports[ours])
        summary.add_paired_test(
            f"{table}_paired", f"{ours} against {rival}", test, **run
        )
