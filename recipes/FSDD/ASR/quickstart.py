#!/usr/bin/env python3
"""The main job from one command: SYN2REAL and sequential editing, end to end.

Runs the studies of the two recipes beside this file in their small form;
each prints its table. `make quickstart` calls it. The studies behind the
tables in the recipes' README files take `hparams/train.yaml` instead.

To run it by hand:
> python quickstart.py --output results
> python quickstart.py --output results --data <free-spoken-digit-dataset>
"""

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

# Before SpeechBrain is imported, which takes the level of its logs from here.
if __name__ == "__main__":
    os.environ["SB_LOG_LEVEL"] = "WARNING"

HERE = Path(__file__).resolve().parent
STUDIES = ("syn2real", "sequential_editing")
FSDD = "https://github.com/Jakobovski/free-spoken-digit-dataset"
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
        "metadata.py), or a folder with its digits and accents in a "
        "manifest.csv; without it speech is made by espeak-ng",
    )
    parser.add_argument(
        "--output", default="results", help="where tables and plots go"
    )
    parser.add_argument("--seed", type=int, default=1234)
    return parser.parse_args(arguments)


def check_data(folder, prepared):
    """Fail early where a folder does not hold the digits and accents needed.

    Returns the folder's absolute path; `prepared` is for the manifests made
    of it.
    """
    sys.path.insert(0, str(HERE.parent))
    from fsdd_prepare import prepare_fsdd

    from speechbrain_taskarith.data import read_manifest

    folder = Path(folder).expanduser().resolve()
    remedy = f"Give a clone of {FSDD}, or leave the data out"
    if not (
        (folder / "recordings").is_dir() or (folder / "manifest.csv").exists()
    ):
        sys.exit(
            f"quickstart: {folder}: expected the folder recordings/ (a clone "
            "of the Free Spoken Digit Dataset) or the file manifest.csv in "
            f"it. {remedy}"
        )
    try:
        prepare_fsdd(str(folder), str(prepared))
    except (OSError, ValueError) as error:
        sys.exit(f"quickstart: {error}")
    digits, accents = expected()
    for split in ("train", "valid", "test"):
        takes = read_manifest(prepared / f"{split}.csv", check="none")
        for what, wanted, found in (
            ("words", digits, {take.wrd for take in takes}),
            ("accents", accents, {take.accent for take in takes}),
        ):
            # More accents than needed do no harm; a word has no label.
            odd = wanted - found or (what == "words" and found - wanted)
            if odd:
                sys.exit(
                    f"quickstart: {folder}: expected the {what} "
                    f"{', '.join(sorted(wanted))}; the split {split!r} has "
                    f"{', '.join(sorted(found)) or 'none'}. {remedy}"
                )
    return folder


def expected():
    """Return the words and the accents that the two studies are about."""
    import yaml

    class Plain(yaml.SafeLoader):
        """Reads an hparams file without making its objects."""

    Plain.add_multi_constructor("!", lambda loader, suffix, node: None)
    syn2real, sequential = (
        yaml.load((HERE / name / "hparams/quickstart.yaml").read_text(), Plain)
        for name in STUDIES
    )
    return set(syn2real["vocabulary"]), set(sequential["domains"].values())


def make_data(folder):
    """Make a corpus of spoken digits in place of recordings."""
    sys.path.insert(0, str(HERE.parent))
    from common.corpora import make_digits_corpus

    make_digits_corpus(folder)
    return folder / "recorded"


def run_studies(data, output, seed):
    """Run both studies side by side: each often has work for one core only.

    The first one has the terminal. What the others print follows when they
    are done.
    """
    consoles = {name: output / name / "console.txt" for name in STUDIES[1:]}
    running = {}
    try:
        for name in STUDIES:
            (output / name).mkdir(parents=True, exist_ok=True)
            running[name] = start_study(
                name, data, output, seed, consoles.get(name)
            )
        for name, study in running.items():
            print(f"\n== {name} ==", flush=True)
            status = study.wait()
            if name in consoles:
                print(consoles[name].read_text(encoding="utf-8"), end="")
            if status:
                log = output / name / "log.txt"
                sys.exit(f"quickstart: {name} {reason(status)} Its log: {log}")
    except KeyboardInterrupt:
        sys.exit(f"\nquickstart: {reason(-signal.SIGINT)}")
    finally:
        for study in running.values():
            study.terminate()
            study.wait()


def start_study(name, data, output, seed, console=None):
    """Start a recipe's study in its small form; `console` takes its words."""
    recipe = HERE / name
    command = [
        sys.executable,
        str(recipe / "study.py"),
        str(recipe / "hparams" / "quickstart.yaml"),
        f"--data_folder={data}",
        f"--output_folder={output / name}",
        f"--seed={seed}",
        "--workers=2",
    ]
    # Tables, and bars on a terminal: SpeechBrain logs many short trainings.
    environment = {**os.environ, "SB_LOG_LEVEL": "WARNING"}
    with contextlib.ExitStack() as stack:
        stream = console and stack.enter_context(open(console, "w"))
        return subprocess.Popen(
            command, cwd=recipe, env=environment, stdout=stream, stderr=stream
        )


def reason(status):
    """Say how a study ended, and what to do."""
    if status < 0:
        return (
            f"was stopped by signal {-status}. The same command goes on from "
            "where it was."
        )
    return f"failed with status {status}; the error is above."


def summarise(output, simulated):
    """Write both tables with their notes and plots as one `results.md`."""
    from speechbrain_taskarith.metrics import merge_summaries

    summary = merge_summaries(
        [output / name for name in STUDIES], output, title="Quickstart"
    )
    if simulated:
        summary.note(SIMULATED)
    summary.write()


def main(arguments=None):
    """Make or check the data, run both studies."""
    arguments = parse_arguments(arguments)
    output = Path(arguments.output).resolve()
    output.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    if arguments.data:
        data = check_data(arguments.data, output / "prepared")
    else:
        print(textwrap.fill(SIMULATED, 79), flush=True)
        data = make_data(output / "corpus")
    run_studies(data, output, arguments.seed)
    summarise(output, simulated=not arguments.data)
    if not arguments.data:
        print("\n" + textwrap.fill(SIMULATED, 79))
    print(
        f"\nWhat the rows mean, all tables and plots: {output}/results.md\n"
        f"({time.monotonic() - start:.0f} s of computing)"
    )


if __name__ == "__main__":
    main()
