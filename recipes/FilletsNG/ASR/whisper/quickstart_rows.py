"""The rows of the quickstart: which trainings, merged how, and their WER."""

from argparse import Namespace
from pathlib import Path

from common.study import Training
from syn2real import Study, edit

from speechbrain_taskarith.metrics import LifelongMatrix, wer
from speechbrain_taskarith.vectors import (
    TIES,
    TaskArithmetic,
    TaskVector,
    open_state,
    save_state,
)

# Nothing is chosen: the scales are those of the papers, and one half.
SCALE = 0.25
SHRINK = 0.5
GRID = [(b, a) for b in (0.5, 1.0) for a in (0.0, 0.25, 0.5, 1.0)]
# What is kept of a training on one more domain, row by row.
RULES = {
    "fine_tuning": None,
    "task_arithmetic": TaskArithmetic(scale=0.4),
    "ties": TIES(density=0.5, scale=0.6),
    "averaging": TaskArithmetic(scale=0.5),
}


def syn2real_rows(target, source):
    """Name the rows of SYN2REAL: `{row: {training: weight}}`."""
    synthetic, real = f"synthetic/{target}", f"real/{source}"
    return {
        "pretrained": {},
        "baseline": {synthetic: 1.0},
        "real_source": {real: 1.0},
        "mean_of_baseline_and_real": {synthetic: 0.5, real: 0.5},
        "joint": {f"joint/{target}": 1.0},
        "shrunk": {synthetic: SHRINK},
        "edited": edit(target, [source], 1.0, SCALE),
        "real_target": {f"real/{target}": 1.0},
    }


def open_study(whisper, folder, held_out):
    """Make what measures sums of vectors; in each process its own."""
    given = Namespace(output=str(Path(folder).parent), whisper_hub=str(whisper))
    return Study(given, Path(folder).name, held_out)


def measure_target(whisper, folder, held_out, target, source):
    """Measure all rows of one target, and the grid that nobody may choose."""
    study = open_study(whisper, folder, held_out)
    rows = {
        row: study.wer(weights, target)
        for row, weights in syn2real_rows(target, source).items()
    }
    grid = {
        point: study.wer(edit(target, [source], *point), target)
        for point in GRID
    }
    return rows, grid


def write_starts(whisper, folder, first):
    """Write what each rule makes of the first domain's training.

    Returns the trainings on the second domain's manifest, from there.
    """
    models, starts = folder / "models", {}
    base, vector = open_state(whisper), None
    for row, rule in RULES.items():
        if rule is None:
            starts[row] = models / "real" / first / "save"
            continue
        starts[row] = folder / "starts" / f"{row}.safetensors"
        if not starts[row].exists():
            starts[row].parent.mkdir(exist_ok=True)
            if vector is None:
                tuned = models / "real" / first / "save"
                vector = TaskVector.between(base, tuned)
            save_state(rule(base, [vector]), starts[row])
    return starts


def plan_sequence(starts, manifest, seed):
    """List the trainings on the second domain."""
    return [
        Training(
            f"sequence/{row}",
            {"train_csv": str(manifest), "seed": seed, "base": str(start)},
        )
        for row, start in starts.items()
    ]


class Sequence:
    """Models after each of two domains, and what they do on all domains."""

    def __init__(self, whisper, folder, held_out, order):
        self.study = open_study(whisper, folder, held_out)
        self.folder, self.order = Path(folder), order
        self.held_out = held_out

    def starts(self, row):
        """Return where the weights after the first domain lie."""
        if row in (None, "fine_tuning", "separately"):
            return self.folder / "models" / "real" / self.order[0] / "save"
        return self.folder / "starts" / f"{row}.safetensors"

    def after(self, row, step):
        """Return the weights of a row after the first or second domain."""
        first, second = (f"real/{name}" for name in self.order)
        if row == "separately":
            weights = {first: 0.5, second: 0.5} if step else {first: 1.0}
            return self.study.state(weights)
        start = open_state(self.starts(row))
        if step == 0:
            return start
        tuned = self.folder / "models" / "sequence" / row / "save"
        if row == "fine_tuning":
            return open_state(tuned)
        return RULES[row](start, [TaskVector.between(start, tuned)])

    def wer(self, row, step, domain):
        """Return the WER of a row on a domain after a step."""
        manifest = self.held_out[domain, "test"]
        if step == 0 and row in ("fine_tuning", "separately"):
            # The same model as a row of SYN2REAL.
            return self.study.wer({f"real/{self.order[0]}": 1.0}, domain)
        found = self.study.measure(
            {"sequence": row, "step": step},
            lambda: self.after(row, step),
            manifest,
        )
        return wer(found["references"], found["hypotheses"]).wer

    def matrix(self, row):
        """Return the `LifelongMatrix` of a row."""
        found = LifelongMatrix(self.order)
        for step, learned in enumerate(self.order):
            for domain in self.order[: step + 1]:
                found.record(learned, domain, self.wer(row, step, domain))
        return found


def measure_sequence(whisper, folder, held_out, order, rows):
    """Measure some rows: their matrices, and the domain that none learned."""
    sequence = Sequence(whisper, folder, held_out, order)
    others = {name for name, _ in held_out} - set(order)
    return {
        row: (
            sequence.matrix(row),
            {name: sequence.wer(row, 1, name) for name in sorted(others)},
        )
        for row in rows
    }
