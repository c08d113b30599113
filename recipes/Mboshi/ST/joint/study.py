#!/usr/bin/env python3
"""The table of speech translation with auxiliary tasks.

Trains the rows of one seed by calls of train.py: speech translation alone,
with text translation, with recognition, the whole method by each rule of the
task weights, and the whole method without each of its parts. Before them come
the models that rows start from.

To run this study, do the following:
> python study.py hparams/train.yaml --data_folder /path/to/corpus --seed 0

Some rows only; the recognition model of another seed; a table over seeds:
> python study.py hparams/train.yaml --data_folder ... --only st,whole
> python study.py hparams/train.yaml --data_folder ... --seed 1 \
>     --acoustic_of results/joint/0
> python study.py --merge results/joint

Start a killed study again by the same command: it resumes.
"""

import sys
from pathlib import Path

from common.settings import check_settings
from common.study import (
    Training,
    rerun_unmeasured,
    run_trainings,
    start_study,
    workers,
)
from report import WHISPER, merge, result_path, write_report
from speechbrain.utils.logger import get_logger
from train import make_labels, prepare, starts_of, train

logger = get_logger(__name__)

# The study's own: `--only st,whole` changes a value.
OPTIONS = {
    # Rows to run, separated by commas; all: every row
    "only": "all",
    # Take the recognition model of another study_folder: seeds then share it,
    # as the paper's rows share one HuBERT. None: train it
    "acoustic_of": None,
    # Training of the models that rows start from
    "asr_epochs": 40,
    "mt_epochs": 20,
    "stage_lr": 0.001,
    "stage_batch_seconds": 30,
    # BLEU on validation data that training time is measured to
    "target_bleu": 1.5,
    # The row whose translator is kept for use; others are in their checkpoints
    "kept": "whole",
}

# Weights as the authors' code has them. Their interval is 5,000 updates: tasks
# end at 20,000 and 30,000, and the first 3,000 are without speech translation.
RELEASED = {
    "task_norms": "joint",
    "task_exponent": "growing",
    "task_measured": "attention",
    "task_average": 1,
    "last_update": "{asr: !ref <task_interval> * 4, mt: !ref <task_interval> * 6}",
    "warm_up": "!ref <task_interval> * 3 // 5",
    "warm_up_frozen": ["acoustic.encoder"],
    "warm_up_without": ["shrink"],
}
# Speech translation without any part of the method.
PLAIN = {
    "tasks": [],
    "shrink": None,
    "looking_back": None,
    "local": False,
    "make_noise": None,
    "contrast": False,
    "contrastive": 0.0,
    "ctc_in_st": False,
    "task_norms": "none",
}
# What the CTC head reads, translated as text
CASCADE = {
    **{key: value for key, value in PLAIN.items() if key != "shrink"},
    "local": True,
    "drop_blank": True,
    "labels": "alone",
}
# Models that rows start from.
STAGES = {
    "asr": {**PLAIN, "main": "asr", "num_textual_layers": 0},
    "mt": {**PLAIN, "main": "mt"},
    "mt_local": {**PLAIN, "main": "mt", "local": True},
}
# What a row starts from, unless it or the command line says otherwise.
START = {"acoustic_from": "asr", "text_from": "mt_local"}
# Each row is train.yaml with these values.
ROWS = {
    "st": {**PLAIN, "text_from": None},
    "st_from_mt": {**PLAIN, "text_from": "mt"},
    # From the text model that the whole method starts from
    "st_from_mt_local": {**PLAIN, "local": True},
    # The two models without another update, then trained on what CTC reads
    "cascade": {**CASCADE, "number_of_epochs": 0},
    "cascade_tuned": {**CASCADE},
    "st_mt": {**PLAIN, "text_from": "mt", "tasks": ["mt"]},
    "st_asr": {**PLAIN, "text_from": None, "tasks": ["asr"]},
    "st_mt_asr": {**PLAIN, "text_from": "mt", "tasks": ["asr", "mt"]},
    "st_mt_asr_local": {**PLAIN, "local": True, "tasks": ["asr", "mt"]},
    # The loss of "st" keeps CTC; the rule of the weights is that of the YAML
    "whole": {},
    "released_rule": {**RELEASED},
    # Not of the paper: segments are the text that CTC reads in them, too. It
    # starts as a cascade, which a higher rate would undo
    "with_labels": {
        "tasks": [],
        "labels": "added",
        "drop_blank": True,
        "lr": 0.0003,
    },
    "no_task_weights": {"task_norms": "none"},
    "no_tasks": {"tasks": []},  # but for CTC and contrast in the loss of "st"
    # CTC and contrastive loss are the task "asr" alone
    "ctc_in_asr": {"ctc_in_st": False},
    "no_shrink": {"shrink": None, "looking_back": None},
    "no_looking_back": {"looking_back": None},
    "no_local_to_global": {"local": False, "text_from": "mt"},
    "no_noise": {"make_noise": None},
    "no_contrastive": {"contrast": False, "contrastive": 0.0},
    # Its training time is compared with that of the whole method.
    "no_shrink_no_task_weights": {
        "shrink": None,
        "looking_back": None,
        "task_norms": "none",
    },
}


def plan_trainings(given, folder, hparams):
    """List the trainings to run: the rows of `only`, and their stages.

    `given` are the options of the command line, `folder` holds the trainings.
    """
    trainings = {}
    for name, row in {**STAGES, **ROWS}.items():
        options = {**START, **given, **row, "row": name}
        if name in STAGES:
            options |= {
                "acoustic_from": None,
                "text_from": None,
                "number_of_epochs": hparams[f"{row['main']}_epochs"],
                "lr": hparams["stage_lr"],
                "max_batch_seconds": hparams["stage_batch_seconds"],
            }
        if name != hparams["kept"]:
            options["translator_folder"] = None
        parents = []
        for key in START:
            stage = options[key]
            if stage == "asr" and hparams["acoustic_of"]:
                other = Path(hparams["acoustic_of"]).resolve()
                options[key] = str(other / folder.name / stage / "save")
            elif stage in STAGES:
                options[key] = str(folder / stage / "save")
                parents.append(stage)
        trainings[name] = Training(name, options, tuple(parents))
    only = str(hparams["only"]).split(",")
    unknown = sorted(set(only) - {*trainings, "all"})
    if unknown:
        raise ValueError(
            f"only: no rows {', '.join(unknown)}; there are "
            f"{', '.join(trainings)}"
        )
    wanted = set(trainings if "all" in only else only)
    wanted |= {stage for name in wanted for stage in trainings[name].parents}
    if hparams["acoustic_of"]:
        wanted.discard("asr")
    return [trainings[name] for name in trainings if name in wanted]


def check_same_pieces(hparams):
    """Raise an error if another study's CTC head writes other pieces."""
    vocabularies = [
        {
            path.name: path.read_bytes()
            for path in Path(folder, "tokenizer", "source").glob("*.vocab")
        }
        for folder in (hparams["study_folder"], hparams["acoustic_of"])
    ]
    if vocabularies[0] != vocabularies[1]:
        raise ValueError(
            f"acoustic_of: {hparams['acoustic_of']} has other source pieces "
            "than this run; give both the same data, `source_type` and "
            "`source_pieces`"
        )


def split_options(words):
    """Split a command line into `{key: value}` and the words that remain.

    Run options without a value, such as `--noprogressbar`, remain.
    """
    given, rest = {}, []
    words = list(words)
    while words:
        word = words.pop(0)
        key, equals, value = word.removeprefix("--").partition("=")
        if word.startswith("--") and equals:
            given[key] = value
        elif word.startswith("--") and words and words[0][:2] != "--":
            given[key] = words.pop(0)
        else:
            rest.append(word)
    return given, rest


def main(argv):
    """Train the rows that are not done, and write the table."""
    if argv[:1] == ["--merge"]:
        merge(argv[1])
        return
    # The prepare script stands beside hparams/, also where this file is a link.
    files = [word for word in argv if word.endswith(".yaml")]
    sys.path += [str(Path(name).resolve().parents[1]) for name in files]
    study = start_study(argv, OPTIONS)
    hparams = {**study.hparams, "study_folder": str(study.folder)}
    given, rest = split_options(study.arguments)
    trainings = plan_trainings(given, study.models, hparams)
    # Now, not after hours: one that train.py did alone is not a row's
    for training in trainings:
        folder = study.models / training.name
        check_settings(folder, starts_of(training.options))

    # Here, before trainings run side by side
    prepare(hparams)
    make_labels(hparams)
    if hparams["acoustic_of"]:
        check_same_pieces(hparams)

    for training in trainings:
        if result_path(training.name, hparams).exists():
            logger.info(f"row {training.name}: done before")
    rerun_unmeasured(
        trainings, study.models, lambda name: result_path(name, hparams)
    )
    with workers(study):
        run_trainings(train, trainings, rest, study.models)
    write_report([*STAGES, WHISPER, *ROWS], hparams)


if __name__ == "__main__":
    main(sys.argv[1:])
