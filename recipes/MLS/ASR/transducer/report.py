"""What a stage leaves behind: its row of the table, and its recogniser."""

import collections
import io
import re
import shutil
from pathlib import Path

import torch

from speechbrain_taskarith.metrics import (
    RareWords,
    Summary,
    rare_words_by_language,
)
from speechbrain_taskarith.utils.files import atomic_write

TABLE = "mls_transducer"
DESCRIPTION = Path(__file__).parent / "hparams/models/transcriber.yaml"
NOTE = (
    "WER on the test sets. A word is rare when its count in the language's "
    "training transcripts is below that of the most frequent words which "
    "cover 90 % of the running words; `insertions` are apart, in % of all "
    "words."
)


def write_report(brain, train, tokenizer_file, hparams):
    """Write the row of this stage, and the recogniser.

    Arguments
    ---------
    brain : ASR
        After the test, with the weights that were tested.
    train : DynamicItemDataset
        Training data, for what is rare.
    tokenizer_file : pathlib.Path
        The SentencePiece model.
    hparams : dict
        Of the recipe.
    """
    summary = Summary(hparams["output_folder"], title="MLS transducer")
    summary.note(NOTE)
    lines = collections.defaultdict(list)
    for row in train.data.values():
        lines[row["accent"]].append(row["wrd"])
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
                row=f"{hparams['row']}, {language}",
                metric=metric,
                value=value,
                unit="%",
                seed=hparams["seed"],
            )
    summary.write()
    summary.print()
    keep_transcriber(
        hparams["transducer"],
        tokenizer_file,
        Path(hparams["output_folder"]) / "transcriber",
    )


def keep_transcriber(transducer, tokenizer_file, folder):
    """Keep the recogniser in the form that `taskarith transcribe` reads.

    Arguments
    ---------
    transducer : dict
        What `transcriber.yaml` made, trained.
    tokenizer_file : pathlib.Path
        The SentencePiece model.
    folder : pathlib.Path
        Where it goes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(tokenizer_file, folder / "tokenizer.model")
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
