#!/usr/bin/env python3
"""The main job from one command: SYN2REAL and sequential editing, end to end.

Runs the two recipes beside this file in their small form and prints their
two tables. `make quickstart` calls it; the studies behind the tables in the
recipes' README files are `train.py` with `hparams/train.yaml`.

To run it by hand:
> python quickstart.py --output results
> python quickstart.py --output results --data <free-spoken-digit-dataset>
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
STUDIES = ("syn2real", "sequential_editing")
SIMULATED = (
    "No recordings were given: the 'recorded' side below is SIMULATED. "
    "espeak-ng speaks with other voices, through rooms, noise and a "
    "telephone codec; no person speaks in it. For real recordings: "
    "make quickstart DATA=<free-spoken-digit-dataset>"
)


def parse_arguments(arguments=None):
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--data",
        help="a clone of the Free Spoken Digit Dataset (recordings/, "
        "metadata.py) or a folder with manifest.csv; without it speech is "
        "made by espeak-ng",
    )
    parser.add_argument(
        "--output", default="results", help="where tables and plots go"
    )
    parser.add_argument("--seed", type=int, default=1234)
    return parser.parse_args(arguments)


def check_data(folder):
    """Say at once, not minutes later, that a data folder is none."""
    folder = Path(folder).expanduser().resolve()
    if (folder / "recordings").is_dir() or (folder / "manifest.csv").exists():
        return folder
    sys.exit(
        f"quickstart: {folder}: expected the folder recordings/ (a clone of "
        "the Free Spoken Digit Dataset) or the file manifest.csv in it"
    )


def make_data(folder):
    """Make a corpus of spoken digits in place of recordings."""
    from common.corpora import make_digits_corpus

    make_digits_corpus(folder)
    return folder / "recorded"


def run_study(name, data, output, seed):
    """Run a recipe in its small form; its own bars show the progress."""
    recipe = HERE / name
    command = [
        sys.executable,
        str(recipe / "train.py"),
        str(recipe / "hparams" / "quickstart.yaml"),
        f"--data_folder={data}",
        f"--output_folder={output / name}",
        f"--seed={seed}",
    ]
    # Only bars and tables: SpeechBrain logs each of many short trainings.
    environment = {
        "SB_LOG_LEVEL": "WARNING",
        **os.environ,
        "TASKARITH_PROGRESS": "1",
    }
    status = subprocess.run(command, cwd=recipe, env=environment).returncode
    if status:
        sys.exit(
            f"quickstart: {name} stopped with status {status}; its log is "
            f"{output / name / 'log.txt'}. Started again, it goes on from "
            "where it was"
        )


def show(output, simulated):
    """Print both tables, and write them side by side as Markdown."""
    from speechbrain_taskarith.metrics import merge_summaries

    summary = merge_summaries(
        [output / name for name in STUDIES], output, title="Quickstart"
    )
    if simulated:
        summary.note(SIMULATED)
    summary.write()
    summary.print()


def main(arguments=None):
    """Make or find the data, run both studies, print the tables."""
    arguments = parse_arguments(arguments)
    output = Path(arguments.output).resolve()
    output.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    if arguments.data:
        data = check_data(arguments.data)
    else:
        print(SIMULATED, flush=True)
        data = make_data(output / "corpus")
    for name in STUDIES:
        print(f"\n== {name} ==", flush=True)
        run_study(name, data, output, arguments.seed)
    show(output, simulated=not arguments.data)
    if not arguments.data:
        print(SIMULATED)
    print(
        f"Tables, CSV, plots and checkpoints are in {output} "
        f"({time.monotonic() - start:.0f} s of computing)."
    )


if __name__ == "__main__":
    main()
