#!/usr/bin/env python3
"""What storing task vectors in fewer bytes costs in word errors.

Takes the edits of a finished run, stores every vector in every encoding,
edits again with what can be read back, and tests on all accents.

To run it, after train.py with the same hparams, folders and seed:
> python encodings.py hparams/train.yaml --data_folder /path/to/FSDD --seed 0
"""

import sys
import tempfile
from pathlib import Path

import speechbrain as sb
from common.brain import DigitStringBrain
from hyperpyyaml import load_hyperpyyaml
from train import make_domains

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

    Arguments
    ---------
    editor : SequentialEditor
        The finished sequence.
    base : State
        What it starts from.
    encoding : str
        See `TaskVector.save`.
    folder : pathlib.Path
        For the stored vectors.

    Returns
    -------
    state : dict
        The weights at the end.
    size : int
        Bytes of all vectors.
    """
    state, size = dict(base), 0
    for edit in editor.log:
        path = folder / f"{edit.name}-{encoding}.safetensors"
        editor.vector(edit.name).save(path, encoding=encoding)
        size += path.stat().st_size
        vector = TaskVector.load(path)
        state = vector.apply(state, edit.scale, any_base=True)
    return state, size


if __name__ == "__main__":
    hparams_file, run_opts, overrides = sb.parse_arguments(sys.argv[1:])
    with open(hparams_file, encoding="utf-8") as fin:
        hparams = load_hyperpyyaml(fin, overrides)
    brain = DigitStringBrain(
        modules=hparams["modules"], hparams=hparams, run_opts=run_opts
    )
    domains = make_domains(brain, hparams)
    save = Path(hparams["save_folder"])
    summary = Summary(Path(hparams["output_folder"]) / TABLE, title="Encodings")
    for row in ROWS:
        editor = SequentialEditor.resume(save / row / "editor", read_only=True)
        base = open_state(save / "first_model" / "kept.safetensors")
        with tempfile.TemporaryDirectory() as folder:
            for encoding in ENCODINGS:
                state, size = edited_again(editor, base, encoding, Path(folder))
                brain.hparams.model.load_state_dict(state)
                wers = [brain.wer_on(d.test) for d in domains]
                entry = {
                    "table": TABLE,
                    "row": f"{row}_{encoding}",
                    "seed": hparams["seed"],
                }
                summary.add(
                    metric="average_wer",
                    value=sum(wers) / len(wers),
                    **entry,
                )
                summary.add(
                    metric="size",
                    value=size / 1e6,
                    unit="MB",
                    **entry,
                )
    summary.write()
    summary.print()
