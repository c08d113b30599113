#!/usr/bin/env python3
"""The table of sequential model editing on strings of digits (FSDD), one seed.

A small Conformer CTC model learns US English first, then one accent after
another without old data: task arithmetic, TIES and chosen scales against the
usual baselines of lifelong learning.

To run this study, do the following:
> python study.py hparams/train.yaml --data_folder /path/to/FSDD --seed 0

Several seeds make one table (mean and standard deviation):
> python study.py hparams/train.yaml --data_folder ... --seed 1
> python study.py --merge results/sequential_editing

Rows of the table are trained side by side, here or on a cluster (README.md):
> python study.py hparams/train.yaml --data_folder ... --workers 2
> python study.py hparams/train.yaml ... --backend dask --workers 2

A study that was killed goes on where it stopped when started again.
"""

import sys
from pathlib import Path

from common.dataio import evaluation_loader, in_memory
from common.study import Training, run_trainings, start_study, workers
from report import PAIRED, TABLE, TITLE, with_earlier_rows, write_report
from speechbrain.utils.logger import get_logger
from train import ASR, PLAIN, domain_strings, prepare, train

from speechbrain_taskarith.metrics import LifelongMatrix, merge_seeds
from speechbrain_taskarith.utils.progress import progress
from speechbrain_taskarith.vectors import (
    SequentialEditor,
    TaskVector,
    open_state,
    save_state,
    search_scale,
)
from speechbrain_taskarith.vectors.lifelong.methods import FineTuning

logger = get_logger(__name__)

# What is compared: `--only fine_tuning,ties` changes a value.
OPTIONS = {
    # Rows of the hparams file, separated by commas; "all" runs every one
    "only": "all",
    # What the tables show: test, or valid while something is being tuned
    "report_on": "test",
}


class Row:
    """One row of the table: a sequence of models, and their WERs.

    Its folder holds `NN_<domain>/kept.safetensors` (the weights after the
    domain), the editor's folder where there is a rule, and the WER matrix.
    """

    def __init__(self, name, settings, folder, study):
        self.name, self.settings, self.folder = name, settings, folder
        self.study, self.hparams = study, study.hparams
        self.method = settings.get("method") or FineTuning()
        self.lr = settings.get("lr", self.hparams["lr"])
        self.training = None  # the newest
        self.kept = folder.parent / "first_model" / "kept.safetensors"

    def plan(self, seen, domain):
        """Return the training of the next domain, from the weights kept."""
        options = {"domain": domain, "seen": seen, "base": str(self.kept)}
        if self.method.changes_training:
            name = f"{self.name}/{len(seen) + 1:02d}_{domain}"
            options["row"] = self.name
            if len(seen) > 1:
                memory = self.study.models / self.training.name
                options["memory"] = str(memory / "memory.safetensors")
        else:
            # Rows that begin alike share their fine-tunings.
            digest = fingerprint(open_state(self.kept))
            name = f"{PLAIN}_{self.lr}/{domain}-{digest}"
            options.update(lr=self.lr, noise_name=Path(name).name)
        self.training = Training(name, options)
        return self.training

    def keep(self, seen, domain, choose_scale):
        """Keep what the row makes of the fine-tuned weights."""
        task = len(seen) + 1
        kept = self.folder / f"{task:02d}_{domain}" / "kept.safetensors"
        if not kept.exists():
            before = dict(open_state(self.kept))
            trained = self.study.models / self.training.name / "save"
            finetuned = dict(open_state(trained))
            if "rule" in self.settings:
                after = self.edit(before, finetuned, seen, domain, choose_scale)
            else:
                after = self.method.after_task(before, finetuned, task)
            kept.parent.mkdir(parents=True, exist_ok=True)
            save_state(after, kept)
        self.kept = kept

    def edit(self, before, finetuned, seen, domain, choose_scale):
        """Return base + scale * rule(fine-tuned - base), and log the edit."""
        rule, scale = self.settings["rule"], self.settings.get("scale")
        chosen = selected_on = None
        if "choose_on" in self.settings:
            tau = rule.combine([TaskVector.between(before, finetuned)])
            chosen, selected_on = choose_scale(self, before, tau, seen, domain)
        folder = self.folder / "editor"
        if len(seen) == 1:
            editor = SequentialEditor.open(before, rule, folder, scale=scale)
        else:
            editor = SequentialEditor.resume(folder, rule, scale=scale)
        with editor:
            if domain not in [edit.name for edit in editor.log]:
                editor.learn(
                    domain, finetuned, scale=chosen, selected_on=selected_on
                )
            return editor.state()


class Measure:
    """Measures WERs on the domains; every state is tested once."""

    def __init__(self, study):
        self.hparams, self.model = study.hparams, study.hparams["model"]
        self.brain = ASR(
            modules=self.hparams["modules"],
            hparams=self.hparams,
            run_opts=study.run_opts,
        )
        self.output, self.loaders, self.tested = study.folder, {}, {}

    def loader(self, domain, split):
        if (domain, split) not in self.loaders:
            strings = domain_strings(domain, split, self.hparams)
            loader = in_memory(evaluation_loader(strings, self.hparams))
            self.loaders[domain, split] = loader
        return self.loaders[domain, split]

    def test(self, row, after):
        """Add a line to a row's matrix: the WER on every domain."""
        split = self.hparams["report_on"]
        path = row.folder / f"matrix_{split}.json"
        matrix = LifelongMatrix(list(self.hparams["domains"]))
        if path.exists():
            matrix = LifelongMatrix.load(path)
        state = open_state(row.kept)
        digest = fingerprint(state)
        for domain in matrix.domains:
            if (after, domain) in matrix:
                continue
            report = self.errors(state, digest, domain)
            matrix.record(after=after, on=domain, wer=report)
            logger.info(f"{row.name}: after {after} on {domain}: {report}")
        matrix.save(path)
        return matrix

    def errors(self, state, digest, domain):
        """Return the `WERReport` of a state on a domain's reported strings."""
        if (digest, domain) not in self.tested:
            self.model.load_state_dict(dict(state))
            split = self.hparams["report_on"]
            self.brain.wer_on(self.loader(domain, split))
            self.tested[digest, domain] = self.brain.report
        return self.tested[digest, domain]

    def reports(self, rows, save):
        """Return the errors of rows on all domains, at the sequence's end."""
        domains, found = list(self.hparams["domains"]), {}
        for row in rows:
            last = f"{len(domains):02d}_{domains[-1]}"
            state = open_state(save / row / last / "kept.safetensors")
            digest = fingerprint(state)
            found[row] = sum(self.errors(state, digest, d) for d in domains)
        return found

    def choose_scale(self, row, before, tau, seen, domain):
        """Choose a scale on valid recordings, as the row's `choose_on` says.

        Returns the scale and what it was chosen on.
        """
        choose_on = row.settings["choose_on"]
        domains = [*seen, domain] if choose_on == "seen" else [domain]
        search = search_scale(
            self.model,
            before,
            tau,
            lambda model: {
                d: self.brain.wer_on(self.loader(d, "valid")) for d in domains
            },
            [0.0, *row.settings["scales"]],
            split="valid",
            select_on=f"valid_{choose_on}",
            hopeless=None,
        )
        best = search.best
        if choose_on == "new":
            share = row.settings["share_of_gain"]
            best = smallest_scale(search.table, domain, share)
        name = f"{row.name}_{domain}"
        search.to_csv(self.output / "scales" / f"{name}.csv")
        search.plot(self.output / "plots" / f"wer_against_scale_{name}.png")
        logger.info(f"{name}: scale {best} ({search.select_on})")
        return best, search.select_on


def smallest_scale(table, domain, share):
    """Return the smallest scale with a share of the gain at scale 1."""
    wers = {row["scale"]: row["domains"][domain] for row in table}
    enough = wers[0.0] - share * (wers[0.0] - wers[max(wers)])
    return min(scale for scale, value in wers.items() if value <= enough)


def fingerprint(state):
    """Return a short name of some weights."""
    return state.fingerprint.split(":")[-1][:12]


def wanted_rows(hparams):
    """Return the rows that `only` names; an unknown one is an error."""
    wanted = hparams["only"].split(",")
    unknown = set(wanted) - set(hparams["rows"]) - {"all"}
    if unknown:
        raise ValueError(
            f"only: no rows {', '.join(sorted(unknown))}; there are "
            f"{', '.join(hparams['rows'])}"
        )
    return {
        name: row
        for name, row in hparams["rows"].items()
        if "all" in wanted or name in wanted
    }


def main(argv):
    """Learn the sequence of domains once for each row; report."""
    if argv[:1] == ["--merge"]:
        merge_seeds(argv[1], title=TITLE, only=[TABLE])
        return
    study = start_study(argv, OPTIONS)
    hparams, models = study.hparams, study.models
    save = study.folder / "save"
    wanted = wanted_rows(hparams)
    prepare(hparams)
    measure = Measure(study)
    rows = [Row(name, r, save / name, study) for name, r in wanted.items()]
    first, *others = hparams["domains"]
    for domain in others:
        # An accent that nobody has is an error here, not after a training.
        domain_strings(domain, "train", hparams)

    with workers(study):
        # The first domain, from random weights: all rows start from it.
        name = f"{PLAIN}/{first}"
        training = Training(name, {"domain": first})
        run_trainings(train, [training], study.arguments, models)
        kept = save / "first_model" / "kept.safetensors"
        if not kept.exists():
            kept.parent.mkdir(parents=True, exist_ok=True)
            save_state(dict(open_state(models / name / "save")), kept)
        matrices = {row.name: measure.test(row, first) for row in rows}

        seen = [first]
        for domain in progress(others, desc="domains"):
            trainings = {
                t.name: t for t in (r.plan(seen, domain) for r in rows)
            }
            run_trainings(
                train, list(trainings.values()), study.arguments, models
            )
            for row in rows:
                row.keep(seen, domain, measure.choose_scale)
                matrices[row.name] = measure.test(row, domain)
            seen = [*seen, domain]
    matrices = with_earlier_rows(matrices, study.folder, hparams)
    reports = measure.reports([row for row in PAIRED if row in matrices], save)
    write_report(matrices, reports, study.folder, hparams)


if __name__ == "__main__":
    main(sys.argv[1:])
