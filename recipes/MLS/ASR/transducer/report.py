#!/usr/bin/env python3
"""The result of a stage: its row of the table, and the recogniser.

One table over the seeds of a stage, whose output folders are in a folder:
> python report.py results/min_wer
"""

import collections
import io
import re
import shutil
import sys
from pathlib import Path

import torch

from speechbrain_taskarith.metrics import (
    RareWords,
    Summary,
    merge_seeds,
    rare_words_by_language,
)
from speechbrain_taskarith.utils.files import atomic_write

TITLE = "Transfer learning of streaming transducers on MLS"
TABLE = "mls_transducer"
DESCRIPTION = Path(__file__).parent / "hparams/models/transcriber.yaml"
NOTE = (
    "WER on the test sets. The most frequent words that cover 90 % of the "
    "running words of a language's training transcripts are not rare; all "
    "others are. `insertions` are counted apart, in % of all words."
)


def write_report(brain, row, train, tokenizer_file, hparams):
    """Write the row of a tested stage, and the recogniser."""
    summary = Summary(hparams["output_folder"], title="MLS transducer")
    summary.note(NOTE)
    lines = collections.defaultdict(list)
    for item in train.data.values():
        lines[item["accent"]].append(item["wrd"])
    rare = {
        language: RareWords.from_transcripts(texts)
        for language, texts in lines.items()
    }
    reports = rare_words_by_language(
        rare, brain.references, brain.hypotheses, brain.languages, brain.ids
    )
    for language, report in reports.items():
        for metric, value in (
            ("wer", report.wer),
            ("rare_wer", report.rare.wer),
            ("non_rare_wer", report.frequent.wer),
            ("insertions", report.insertion_rate),
        ):
            summary.add(
                table=TABLE,
                row=f"{row}, {language}",
                metric=metric,
                value=value,
                unit="%",
                seed=hparams["seed"],
            )
    summary.write()
    summary.print()
    save_transcriber(
        hparams["transducer"],
        tokenizer_file,
        Path(hparams["output_folder"]) / "transcriber",
    )


def save_transcriber(transducer, tokenizer_file, folder):
    """Save the recogniser in the form that `taskarith transcribe` reads."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(tokenizer_file, folder / "tokenizer.model")
    # The YAML of the model, with the sizes of this run.
    text = DESCRIPTION.read_text(encoding="utf-8")
    for key, value in transducer.items():
        if isinstance(value, (bool, int, float)):
            text = re.sub(
                rf"^{key}: [^!\n]*$", f"{key}: {value}", text, flags=re.M
            )
    with atomic_write(folder / "hyperparams.yaml", "w") as stream:
        stream.write(text)
    weights = io.BytesIO()
    torch.save(transducer["transcriber"].state_dict(), weights)
    with atomic_write(folder / "transcriber.ckpt", "wb") as stream:
        stream.write(weights.getvalue())


if __name__ == "__main__":
    merge_seeds(sys.argv[1], title=TITLE)
