#!/usr/bin/env python3
"""SYN2REAL and sequential editing with your Whisper, on your speech.

Takes any Whisper and two domains (languages, accents, kinds of text) of a
corpus, and prints the two tables of the repository's quickstart in about 20
minutes of two cores, with fewer lines where they do not calculate in bfloat16.
`make quickstart MODEL=... DATA=...` calls it. It is the small form of the studies
in this folder: few lines, short trainings, fixed scales, one seed.

To run it by hand:
> python quickstart.py --model openai/whisper-base --data fillets/debs
> python quickstart.py --model whisper-tiny.en --data corpus/manifest.csv

What has been trained is not trained again when it is started again.
"""

import argparse
import hashlib
import json
import os
import shutil
import sys
import textwrap
import time
import warnings
from pathlib import Path

# Before the packages are imported, which take the level of their logs from here,
# as do the processes of the trainings.
if __name__ == "__main__":
    os.environ["SB_LOG_LEVEL"] = "WARNING"
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("PYTHONWARNINGS", "ignore::FutureWarning")
    warnings.simplefilter("ignore", FutureWarning)

import joblib
import torch
from common.settings import note_settings
from common.study import run_trainings
from studies.lineage import keep_weights
from studies.lines import check_domains, read_csv
from studies.quickstart_data import (
    EXPECTED,
    check_languages,
    choose_window,
    describe,
    domains_of,
    draw_lines,
    read_corpus,
)
from studies.quickstart_report import write_report
from studies.quickstart_rows import (
    RULES,
    measure_sequence,
    measure_target,
    plan_sequence,
    write_starts,
)
from syn2real import HPARAMS, plan_trainings
from train import train
from transformers.utils.logging import disable_progress_bar
from tune_window import tune_window
from whisper_window import cut_window

from speechbrain_taskarith.brains import fast_precision
from speechbrain_taskarith.utils.hub.download import local_path
from speechbrain_taskarith.vectors import open_state

# What two cores do in 20 minutes with Whisper base, with and without bfloat16
SIZES = {
    "lines": (160, 40),
    "test": (60, 32),
    "window_steps": (40, 14),
    "longest": (6, 4),
}


def parse_arguments(argv):
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--model", required=True, help="a Whisper: a folder or a hub name")
    add("--data", required=True, help="a corpus, a prepared folder or a CSV")
    add("--output", default="results", help="where tables and models go")
    add("--domains", nargs=2, metavar="NAME", help="default: the largest two")
    add("--language", help="of manifests without a column lang, e.g. nl")
    for name, what in (
        ("lines", "of each domain, to learn from"),
        ("test", "lines of each domain"),
        ("window_steps", "to tune a cut window"),
        ("longest", "seconds of a line, where most lines are not longer"),
    ):
        fast, slow = SIZES[name]
        told = f"{what} (default: {fast}, without bfloat16 {slow})"
        add(f"--{name}", type=int, help=told)
    add("--epochs", type=int, default=2)
    add("--workers", type=int, default=min(2, os.cpu_count()))
    add("--seed", type=int, default=1234)
    given = parser.parse_args(argv)
    for name, sizes in SIZES.items():
        if getattr(given, name) is None:
            setattr(given, name, sizes[fast_precision() == "fp32"])
    return given


def choose_domains(found, data, wanted=None):
    """Return the two domains of both tables, and say which they are."""
    unknown = set(wanted or ()) - set(found)
    if unknown:
        raise ValueError(
            f"--domains: no {', '.join(sorted(unknown))} in {data}; there are "
            f"{', '.join(found)}"
        )
    chosen = wanted or list(found)[:2]
    check_domains({name: found[name] for name in chosen}, apart=False)
    sizes = ", ".join(
        f"{name} ({len(found[name]['train'])} lines)" for name in chosen
    )
    rest = [name for name in found if name not in chosen]
    print(
        f"Domains: {sizes}"
        + (f"; not used: {', '.join(rest)}" if rest else "")
        + "."
    )
    return {name: found[name] for name in chosen}


def settings_of(given, state, domains):
    """Return what all models and results in the folder depend on."""
    rows = json.dumps(domains, sort_keys=True).encode()
    own = ("output", "workers")
    return {
        **{key: v for key, v in vars(given).items() if key not in own},
        "data": str(Path(given.data).expanduser().resolve()),
        "model": state.fingerprint,
        "content of the data": hashlib.sha256(rows).hexdigest(),
    }


def fit_window(model, output, seconds, whole, manifests, given):
    """Return a model whose window is `seconds`, tuned where it was cut."""
    if seconds >= whole:
        return model
    tuned = output / f"whisper-{seconds}s"
    if tuned.exists():
        return tuned
    cut = output / "cut"
    shutil.rmtree(cut, ignore_errors=True)
    cut_window(str(model), str(cut), seconds)
    torch.set_num_threads(given.workers)
    losses = tune_window(
        str(model), str(cut), tuned, manifests, given.window_steps
    )
    torch.set_num_threads(1)
    shutil.rmtree(cut)
    tenth = max(1, len(losses) // 10)
    first, last = losses[:tenth], losses[-tenth:]
    print(
        f"Window of {seconds} s: {sum(first) / tenth:.3f} -> "
        f"{sum(last) / tenth:.3f} nats a token from the whole window."
    )
    return tuned


def run_all(trainings, folder, base, given, longest):
    """Run trainings that have not finished, side by side."""
    shared = [
        str(HPARAMS),
        "--data_folder=.",
        "--prepare=null",
        "--valid_csv=null",
        "--test_csv=null",
        f"--whisper_hub={base}",
        f"--avoid_if_longer_than={longest}",
        f"--number_of_epochs={given.epochs}",
    ]
    run_trainings(train, trainings, shared, folder / "models")
    for training in trainings:
        keep_weights(folder / "models" / training.name)


def spread(tasks):
    """Call `(function, *arguments)` side by side; results in that order."""
    return joblib.Parallel()(
        joblib.delayed(function)(*arguments) for function, *arguments in tasks
    )


def run(given):
    """Do it; returns the summary."""
    start = time.monotonic()
    if not given.data:
        raise ValueError(f"a model needs data, too (DATA=...): {EXPECTED}")
    output = Path(given.output).resolve()
    output.mkdir(parents=True, exist_ok=True)
    model = local_path(given.model)
    if __name__ == "__main__":
        # Of loading it, in the processes of the trainings, too
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
        disable_progress_bar()
    languages, whole = describe(model)
    state = open_state(model)
    splits = read_corpus(given.data, output / "prepared")
    found = domains_of(
        splits,
        given.data,
        given.language or ("en" if languages == {"en"} else None),
    )
    domains = choose_domains(found, given.data, given.domains)
    check_languages(domains, languages, given.model)
    longest = choose_window(domains, whole, given.longest)
    note_settings(output, settings_of(given, state, domains))
    folder = output / str(given.seed)
    manifests, held_out, left_out = draw_lines(
        domains,
        longest,
        folder,
        lines=given.lines,
        test=given.test,
        seed=given.seed,
    )
    print(
        f"Lines of at most {longest:g} s; longer ones, left out: "
        + ", ".join(f"{n} of {name}" for name, n in left_out.items())
        + "."
    )
    # No recording: the model must not hear the target.
    spoken = [manifests[f"synthetic/{name}"] for name in domains]
    base = fit_window(model, output, longest, whole, spoken, given)

    order = list(domains)
    trainings = plan_trainings(manifests, given.seed)
    lines = {name: len(read_csv(path)) for name, path in manifests.items()}
    steps = (
        -(-sum(lines.values()) // 8)
        + (len(RULES) * lines[f"real/{order[1]}"]) // 8
    )
    slow = fast_precision() == "fp32"
    print(
        f"{len(trainings) + len(RULES)} trainings, about "
        f"{steps * given.epochs} steps of 8 lines; a step takes about "
        + (
            "7 s of a core with Whisper base, 3 s with tiny: this processor "
            "does not calculate in bfloat16."
            if slow
            else "2 s of a core with Whisper base, 1 s with tiny."
        ),
        flush=True,
    )
    with joblib.parallel_config("loky", n_jobs=given.workers):
        run_all(trainings, folder, base, given, longest)
        starts = write_starts(base, folder, order[0])
        later = plan_sequence(starts, manifests[f"real/{order[1]}"], given.seed)
        run_all(later, folder, base, given, longest)
        print("Measuring.", flush=True)
        common = (str(base), folder, held_out)
        targets = spread(
            (measure_target, *common, target, source)
            for target, source in (order, order[::-1])
        )
        rows = ["pretrained", *RULES, "separately"]
        sequence = {}
        for part in spread(
            (measure_sequence, *common, order, part)
            for part in (rows[0::2], rows[1::2])
        ):
            sequence |= part
    minutes = (time.monotonic() - start) / 60
    write_report(
        output,
        order,
        dict(zip(order, targets)),
        {row: sequence[row] for row in rows},
        model=given.model,
        seed=given.seed,
        lines={name: lines[f"real/{name}"] for name in order},
        longest=longest,
    )
    print(
        f"\nWhat the rows mean, all tables: {output}/results.md\n"
        f"({minutes:.0f} minutes of computing)"
    )


def main(argv=None):
    """Run, with errors in one line."""
    given = parse_arguments(argv)
    try:
        run(given)
    except (ImportError, OSError, ValueError) as error:
        told = f"quickstart: {error}"
        whole = {"break_long_words": False, "break_on_hyphens": False}
        sys.exit(textwrap.fill(told, 79, **whole))
    except KeyboardInterrupt:
        sys.exit("\nquickstart: stopped; the same command goes on from there.")


if __name__ == "__main__":
    main()
