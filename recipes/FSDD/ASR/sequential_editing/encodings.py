#!/usr/bin/env python3
"""What storing task vectors in fewer bytes costs in word errors.

Takes the edits of a finished run, stores every vector in every encoding,
edits again with what can be read back, and tests on all accents.

To run it, after study.py with the same hparams, folders and seed:
> python encodings.py hparams/train.yaml --data_folder /path/to/FSDD --seed 0
"""

import sys
import tempfile
from pathlib import Path

from common.study import start_study
from study import Measure

from speechbrain_taskarith.metrics import Summary
from speechbrain_taskarith.vectors import (
    SequentialEditor,
    TaskVector,
    open_state,
)
from speechbrain_taskarith.vectors.encodings import ENCODINGS

ROWS = ("task_arithmetic", "ties")
TABLE = "encodings"


def edited_again(editor, base, encoding, folder):
    """Apply all edits of a sequence, stored in another encoding.

    Returns the weights at the end, and the bytes of all vectors.
    """
    state, size = dict(base), 0
    for edit in editor.log:
        path = folder / f"{edit.name}-{encoding}.safetensors"
        editor.vector(edit.name).save(path, encoding=encoding)
        size += path.stat().st_size
        vector = TaskVector.load(path)
        state = vector.apply(state, edit.scale, any_base=True)
    return state, size


def main(argv):
    """Measure every encoding of the finished sequences of edits."""
    study = start_study(argv)
    hparams, save = study.hparams, study.folder / "save"
    measure = Measure(study)
    summary = Summary(study.folder / TABLE, title="Encodings")
    base = open_state(save / "first_model" / "kept.safetensors")
    for row in ROWS:
        editor = SequentialEditor.resume(save / row / "editor", read_only=True)
        for encoding in ENCODINGS:
            with tempfile.TemporaryDirectory() as folder:
                state, size = edited_again(editor, base, encoding, Path(folder))
            measure.model.load_state_dict(state)
            wers = [
                measure.brain.wer_on(measure.loader(domain, "test"))
                for domain in hparams["domains"]
            ]
            for metric, value, unit in (
                ("average_wer", sum(wers) / len(wers), "%"),
                ("size", size / 1e6, "MB"),
            ):
                summary.add(
                    table=TABLE,
                    row=f"{row}_{encoding}",
                    metric=metric,
                    value=value,
                    unit=unit,
                    seed=hparams["seed"],
                )
    summary.write()
    summary.print()


if __name__ == "__main__":
    main(sys.argv[1:])
