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
from studies.lineage import KEPT

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

    Returns `{row: weights that the second training starts from}`.
    """
    tuned = folder / "models" / "real" / first / KEPT
    base, starts = open_state(whisper), {}
    (folder / "starts").mkdir(exist_ok=True)
    for row, rule in RULES.items():
        if rule is None:
            starts[row] = tuned
            continue
        starts[row] = folder / "starts" / f"{row}.safetensors"
        if not starts[row].exists():
            edited = rule(base, [TaskVector.between(base, tuned)])
            save_state(edited, starts[row])
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

    def edited(self, row, step):
        """Return the weights of an edited row after a domain."""
        start = open_state(self.folder / "starts" / f"{row}.safetensors")
        if step == 0:
            return start
        tuned = self.folder / "models" / "sequence" / row / KEPT
        return RULES[row](start, [TaskVector.between(start, tuned)])

    def wer(self, row, step, domain):
        """Return the WER of a row on a domain after a step."""
        first, second = (f"real/{name}" for name in self.order)
        # The same models as in SYN2REAL are not measured again.
        sums = {
            ("pretrained", 0): {},
            ("pretrained", 1): {},
            ("fine_tuning", 0): {first: 1.0},
            ("fine_tuning", 1): {"sequence/fine_tuning": 1.0},
            ("separately", 0): {first: 1.0},
            ("separately", 1): {first: 0.5, second: 0.5},
        }
        if (row, step) in sums:
            return self.study.wer(sums[row, step], domain)
        found = self.study.measure(
            {"sequence": row, "step": step},
            lambda: self.edited(row, step),
            self.held_out[domain, "test"],
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
    """Measure some rows; returns their matrices."""
    sequence = Sequence(whisper, folder, held_out, order)
    return {row: sequence.matrix(row) for row in rows}
