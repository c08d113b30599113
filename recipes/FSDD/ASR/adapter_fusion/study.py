#!/usr/bin/env python3
"""The tables of Audio-AdapterFusion on strings of digits (FSDD), of one seed.

A base is trained first and then frozen. Each accent gets an adapter of its
own; combinations of the adapters then serve all accents without being told
which one is spoken. They are compared with full fine-tuning, one shared
adapter, LoRA and routing by accent, and on accents that no adapter has seen.

To run this study, do the following:
> python study.py hparams/train.yaml --data_folder /path/to/FSDD --seed 0

Another seed on the same base; a table over the seeds:
> python study.py hparams/train.yaml --data_folder ... --seed 1 \
>     --base results/adapter_fusion/0/models/base/save
> python study.py --merge results/adapter_fusion

Start a killed study again by the same command: it resumes.
"""

import sys
from dataclasses import dataclass, field

import torch
from common.dataio import evaluation_loader
from common.study import (
    Training,
    rerun_unmeasured,
    run_trainings,
    start_study,
    workers,
)
from report import TITLE, write_report
from tasks import Tasks
from train import ASR, SHARED, load_start, prepare, train

from speechbrain_taskarith.metrics import merge_seeds
from speechbrain_taskarith.utils.files import read_json

# What is compared: `--zero_shot "[fusion_mt]"` changes a value.
OPTIONS = {
    # Another study's base, <its study_folder>/models/base/save
    "base": None,
    # Rows that are also measured on a task that they have not seen
    "zero_shot": ["fusion_mt", "full_fine_tuning"],
}


@dataclass
class Row:
    """What a row of the table came to, over all of its trainings.

    `wer`: `{task: WER in %}`; `trained`: parameters that it adds to the base
    or changes in it; `attention`: `{task: [layers][adapters]}` of a fusion.
    """

    wer: dict = field(default_factory=dict)
    trained: int = 0
    seconds: float = 0.0
    attention: dict = field(default_factory=dict)

    @property
    def mean(self):
        """Mean WER over the tasks."""
        return sum(self.wer.values()) / len(self.wer)


class Plan:
    """The trainings of the study, by the names of their folders."""

    def __init__(self, hparams, models):
        self.hparams, self.models = hparams, models
        self.tasks = list(hparams["tasks"])
        self.trainings = []
        self.base = hparams["base"] or str(models / "base" / "save")

    def add(self, name, row, start="base", adapters=(), **options):
        """Add a training of a row, from a model and from adapters' trainings.

        `adapters`: `{task: training}`.
        """
        parents = {start, *dict(adapters).values()} - {None}
        folder = self.base if start == "base" else f"{self.models}/{start}/save"
        options |= {
            "row": row,
            "training_name": name,
            "base_from": self.hparams["base"] if start is None else folder,
            "adapters_from": {
                task: f"{self.models}/{training}/adapter.safetensors"
                for task, training in dict(adapters).items()
            },
        }
        self.trainings.append(Training(name, options, tuple(parents)))

    def make(self):
        """List all trainings."""
        tasks, first = self.tasks, self.tasks[0]
        self.add("base", "base", start=None)
        self.add("full", "full_fine_tuning")
        before = "base"
        for task in tasks:
            row = "full_fine_tuning_each"
            self.add(f"full_{task}", row, learn=[task], measure=[task])
            # In turn: the first task has nothing to forget.
            if task != first:
                measure = tasks if task == tasks[-1] else [task]
                name = f"full_until_{task}"
                self.add(name, row, before, learn=[task], measure=measure)
            before = f"full_{task}" if task == first else f"full_until_{task}"
        self.add("lora", "lora")
        together = "extraction_together"
        self.add(together, together, learn=tasks, measure=[first])
        for task in tasks:
            only = {"learn": [task], "measure": [task]}
            self.add(f"extraction_{task}", "extraction", **only)
            self.add(
                f"extraction_from_shared_{task}",
                "from_shared",
                adapters={task: together},
                **only,
            )
        for name in self.hparams["compositions"]:
            self.add(name, name, adapters=self.adapters_of(name, tasks))
        for task in tasks:
            others = [other for other in tasks if other != task]
            for row in self.hparams["zero_shot"]:
                adapters = {}
                if row in self.hparams["compositions"]:
                    adapters = self.adapters_of(row, others)
                self.add(
                    f"without_{task}_{row}",
                    row,
                    adapters=adapters,
                    learn=others,
                    measure=[task],
                )
        self.add(SHARED, "shared_adapter")
        return self.trainings

    def adapters_of(self, composition, tasks):
        """Return the trainings whose adapters a composition combines."""
        start = self.hparams["compositions"][composition]["adapters"]
        prefix = {"fresh": "", "shared": "from_shared_"}[start]
        return {task: f"extraction_{prefix}{task}" for task in tasks}


def make_rows(hparams, models):
    """Read the rows of the table, and those of the zero-shot table."""
    tasks, split = list(hparams["tasks"]), hparams["report_on"]

    def read(name):
        return Row(**read_json(models / name / f"{split}.json"))

    def join(names):
        """Put trainings together: WERs, parameters and seconds add up."""
        found = [read(name) for name in names]
        wer = {task: value for row in found for task, value in row.wer.items()}
        trained = sum(row.trained for row in found)
        return Row(wer, trained, sum(row.seconds for row in found))

    rows = {"base": Row(read("base").wer), "full_fine_tuning": read("full")}
    each = [f"full_{task}" for task in tasks]
    rows["full_fine_tuning_each"] = join(each)
    turn = [each[0], *(f"full_until_{task}" for task in tasks[1:])]
    in_turn = rows["full_fine_tuning_in_turn"] = join(turn)
    in_turn.wer, in_turn.trained = read(turn[-1]).wer, read(turn[0]).trained
    rows["lora"] = read("lora")
    # Each task's own adapter, by where the adapters started.
    rows["routing"] = join(f"extraction_{task}" for task in tasks)
    from_shared = join(f"extraction_from_shared_{task}" for task in tasks)
    from_shared.seconds += read("extraction_together").seconds
    rows["routing_from_shared"] = from_shared
    routing = {"fresh": rows["routing"], "shared": from_shared}
    for name, settings in hparams["compositions"].items():
        rows[name] = read(name)
        rows[name].seconds += routing[settings["adapters"]].seconds
    rows["shared_adapter"] = read(SHARED)
    zero_shot = {
        row: join(f"without_{task}_{row}" for task in tasks)
        for row in hparams["zero_shot"]
    }
    return rows, zero_shot


@torch.no_grad()
def fifth_adapter_harms_none(hparams, run_opts, models):
    """Tell whether scores through the first adapters stay the same bytes.

    They are compared before the shared adapter is added, and with it trained.
    """
    adapters = hparams["adapters"]
    hparams["base_from"] = hparams["base"] or models / "base" / "save"
    tasks = Tasks(hparams)
    hparams["adapters_from"] = {
        task: models / f"extraction_{task}" / "adapter.safetensors"
        for task in tasks.names
    }
    load_start(hparams)
    brain = ASR(hparams["modules"], hparams=hparams, run_opts=run_opts)
    brain.modules.eval()

    def scores():
        found = []
        for task in tasks.names:
            strings = tasks.held_out(task, hparams["report_on"])
            batch = next(iter(evaluation_loader(strings, hparams)))
            with adapters.use(task):
                found.append(brain.compute_forward(batch, "probe")[0].clone())
        return found

    before = scores()
    adapters.load_adapter(models / SHARED / "adapter.safetensors", SHARED)
    return all(map(torch.equal, before, scores()))


def count_base(hparams):
    """Return the number of parameters without adapters."""
    total = sum(p.numel() for p in hparams["model"].parameters())
    return total - sum(p.numel() for p in hparams["adapters"].parameters())


def main(argv):
    """Train all models, and write the tables."""
    if argv[:1] == ["--merge"]:
        merge_seeds(argv[1], title=TITLE)
        return
    study = start_study(argv, OPTIONS)
    hparams, models = study.hparams, study.models
    prepare(hparams)
    tasks = Tasks(hparams)
    # Fail early if the data lacks a task.
    for split in ("train", "valid", "test"):
        for task in tasks.names:
            tasks.of(task, split)

    trainings = Plan(hparams, models).make()
    result = f"{hparams['report_on']}.json"
    rerun_unmeasured(trainings, models, lambda name: models / name / result)
    with workers(study):
        run_trainings(train, trainings, study.arguments, models)

    rows, zero_shot = make_rows(hparams, models)
    adapter = models / f"extraction_{tasks.names[-1]}" / "adapter.safetensors"
    results = {
        "rows": rows,
        "zero_shot": zero_shot,
        "parameters": count_base(hparams),
        "bytes": adapter.stat().st_size,
        "unharmed": fifth_adapter_harms_none(hparams, study.run_opts, models),
    }
    write_report(results, study.folder, hparams)


if __name__ == "__main__":
    main(sys.argv[1:])
