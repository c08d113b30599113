#!/usr/bin/env python3
"""The table of transfer learning of streaming transducers (FSDD), of one seed.

A streaming transducer learns the digits of other languages from synthetic
voices; its encoder is the start of a model that learns English from ten
minutes of recordings, with the transducer loss and then with MinWER.

To run this study, do the following:
> python study.py hparams/train.yaml --data_folder /path/to/FSDD --seed 0

A table over several seeds; models trained side by side:
> python study.py --merge results/transducer
> python study.py hparams/train.yaml --data_folder ... --workers 2

Start a killed study again by the same command: it resumes.
"""

import sys

from common.study import (
    Training,
    rerun_unmeasured,
    run_trainings,
    start_study,
    workers,
)
from report import TITLE, write_report
from strings import target_strings
from train import prepare, train

from speechbrain_taskarith.metrics import merge_seeds

# What is compared: `--coverage 0.8` changes a value.
OPTIONS = {
    # [in_domain, out_of_domain] adds rows of the second (see words.py)
    "pretraining_domains": ["in_domain"],
    # Of the running words, by the frequent ones; all others are rare
    "coverage": 0.9,
    # Frames of a segment without streaming
    "whole_string": 128,
    # Strings that are decoded as streams
    "streamed_strings": 50,
}


def plan_trainings(hparams, models):
    """List all models, `{name: training}`.

    Pretraining in and out of domain; English models from scratch and with the
    encoder of either; from these, MinWER and as many more steps of the
    transducer loss; the encoder brought in only before MinWER; a model without
    streaming.
    """
    trainings = {}

    def add(name, stage, start=None, encoder=None, **options):
        for key, parent in (("start_from", start), ("encoder_from", encoder)):
            folder = models / str(parent) / "save"
            options[key] = None if parent is None else str(folder)
        options |= {"stage": stage, "training_name": name}
        parents = tuple(p for p in (start, encoder) if p is not None)
        trainings[name] = Training(name, options, parents)

    domains = list(hparams["pretraining_domains"])
    for domain in domains:
        add(
            f"pretrained_{domain}",
            "pretraining",
            domain=domain,
            vocab_size=hparams["multilingual_neurons"],
        )
    first = f"pretrained_{domains[0]}"
    encoders = {"scratch": None, "transfer": first}
    for domain in domains[1:]:
        encoders[f"transfer_{domain}"] = f"pretrained_{domain}"
    for name, encoder in encoders.items():
        add(name, "rnnt", encoder=encoder)
    for name in encoders:
        for stage in ("min_wer", "more_rnnt"):
            add(f"{name}_{stage}", stage, start=name)
    add("transfer_at_min_wer", "min_wer", start="scratch", encoder=first)
    add(
        "full_context",
        "full_context",
        encoder=first,
        segment_frames=hparams["whole_string"],
    )
    return trainings


def main(argv):
    """Train all models, and write the table."""
    if argv[:1] == ["--merge"]:
        merge_seeds(argv[1], title=TITLE)
        return
    study = start_study(argv, OPTIONS)
    hparams, models = study.hparams, study.models
    prepare(hparams)
    # Fail early if the data lacks a word.
    strings = {
        split: target_strings(split, hparams)
        for split in ("train", hparams["report_on"])
    }

    trainings = plan_trainings(hparams, models)
    result = f"{hparams['report_on']}.json"
    rerun_unmeasured(
        trainings.values(), models, lambda name: models / name / result
    )
    with workers(study):
        run_trainings(train, list(trainings.values()), study.arguments, models)
    write_report(trainings, strings, study, hparams)


if __name__ == "__main__":
    main(sys.argv[1:])
