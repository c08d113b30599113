#!/usr/bin/env python3
"""Recipe for speech translation with auxiliary tasks (MuST-C).

The method of arXiv 2311.03810 in two stages, a YAML each: translation of
text, then speech translation with recognition and text translation beside it,
whose weights fall until they stop. Text of WMT and speech of LibriSpeech join
in where they are given.

To run this recipe, do the following:
> python train.py hparams/text.yaml --data_folder /path/to/MuST-C
> python train.py hparams/train.yaml --data_folder /path/to/MuST-C \
>     --start_from results/text/de/1234

A run that was killed goes on where it stopped when started again.
"""

import sys

import speechbrain as sb
import torch
from hyperpyyaml import load_hyperpyyaml
from report import TITLE, write_report
from sampling import KindSampler
from speechbrain.dataio import audio_io
from speechbrain.dataio.dataset import DynamicItemDataset
from speechbrain.dataio.sampler import DynamicBatchSampler
from speechbrain.tokenizers.SentencePiece import SentencePiece
from speechbrain.utils.checkpoints import Checkpointer
from speechbrain.utils.distributed import run_on_main
from speechbrain.utils.logger import get_logger

from speechbrain_taskarith.brains import PieceLabels, TranslationBrain, best_key
from speechbrain_taskarith.metrics import merge_seeds
from speechbrain_taskarith.translation import initialise_from_text_translation

logger = get_logger(__name__)

# What a batch of a kind of data is good for.
TASKS = {"st": ("st", "asr", "mt"), "asr": ("asr",), "mt": ("mt",)}


class ST(TranslationBrain):
    """The Brain of both stages, for data of several kinds."""

    def tasks_of(self, batch, stage):
        """Return what to compute of a batch of its kind."""
        going = super().tasks_of(batch, stage)
        if stage != sb.Stage.TRAIN:
            return going
        return tuple(task for task in TASKS[batch.kind[0]] if task in going)


def make_labels(hparams):
    """Train the tokenizer of both languages, or load it."""
    tokenizer = SentencePiece(
        model_dir=str(hparams["labels_folder"]),
        vocab_size=hparams["pieces"],
        annotation_train=f"{hparams['prepared_folder']}/train.csv",
        annotation_read="wrd",
        # Both columns.
        text_file=f"{hparams['prepared_folder']}/text_for_labels.txt",
        model_type="unigram",
        bos_id=hparams["bos_index"],
        eos_id=hparams["eos_index"],
    )
    # One vocabulary; the CTC head writes a blank besides.
    return {
        "source": PieceLabels(tokenizer.sp, ["<blank>"]),
        "target": PieceLabels(tokenizer.sp),
    }


def read_rows(hparams, name, kind):
    """Read a CSV file of the preparation; every row says its kind."""
    path = f"{hparams['prepared_folder']}/{name}.csv"
    rows = sb.dataio.dataio.load_data_csv(path)
    for row in rows.values():
        row["kind"] = kind
    return rows


def make_datasets(hparams, labels):
    """Make training data, kind after kind, and validation and test data.

    Returns the datasets, and the numbers of rows of each kind of training
    data, the main kind last.
    """
    main = hparams["main"]
    kinds = {}
    if main == "st":
        kinds["asr"] = read_rows(hparams, "asr", "asr")
        kinds["mt"] = read_rows(hparams, "text", "mt")
    kinds[main] = read_rows(hparams, "train", main)
    if main == "mt":
        kinds[main].update(read_rows(hparams, "text", main))
    kinds = {
        kind: rows
        for kind, rows in kinds.items()
        if rows and kind in (main, *hparams["tasks"])
    }
    train = {ID: row for rows in kinds.values() for ID, row in rows.items()}
    datasets = {"train": DynamicItemDataset(train)}
    for split in ("valid", "test"):
        rows = read_rows(hparams, split, main)
        data = DynamicItemDataset(rows).filtered_sorted(sort_key="duration")
        datasets[split] = data
    add_pipelines(list(datasets.values()), hparams, labels)
    return datasets, {kind: len(rows) for kind, rows in kinds.items()}


def add_pipelines(datasets, hparams, labels):
    """Say how audio and labels are made."""
    bos, eos = hparams["bos_index"], hparams["eos_index"]

    @sb.utils.data_pipeline.takes("kind", "id", "wav", "start", "duration")
    @sb.utils.data_pipeline.provides("sig")
    def audio_pipeline(kind, ID, wav, start, duration):
        if kind == "mt":
            return torch.zeros(1)
        rate = hparams["sample_rate"]
        sig, found = audio_io.load(
            wav,
            frame_offset=round(float(start) * rate),
            num_frames=round(float(duration) * rate),
        )
        if found != rate:
            raise ValueError(
                f"utterance {ID!r}: {wav} has {found} Hz, expected {rate}; "
                "convert it beforehand"
            )
        return sig.mean(0)

    @sb.utils.data_pipeline.takes("wrd")
    @sb.utils.data_pipeline.provides("source")
    def transcript_pipeline(wrd):
        return labels["source"].encode(wrd)

    @sb.utils.data_pipeline.takes("translation")
    @sb.utils.data_pipeline.provides("target_bos", "target_eos")
    def translation_pipeline(translation):
        pieces = labels["target"].encode(translation)
        yield torch.cat([torch.tensor([bos]), pieces])
        yield torch.cat([pieces, torch.tensor([eos])])

    for pipeline in (audio_pipeline, transcript_pipeline, translation_pipeline):
        sb.dataio.dataset.add_dynamic_item(datasets, pipeline)
    keys = ["id", "kind", "sig", "source", "target_bos", "target_eos"]
    sb.dataio.dataset.set_output_keys(datasets, [*keys, "wrd", "translation"])


def make_sampler(data, counts, hparams):
    """Return a sampler of batches of about the same size, kind by kind."""
    rows = list(data.data.values())
    parts, offset = [], 0
    for kind, count in counts.items():
        if kind == "mt":
            size, most = _words, hparams["max_batch_words"]
        else:
            size, most = _seconds, hparams["max_batch_seconds"]
        lengths = [size(row) for row in rows[offset : offset + count]]
        sampler = DynamicBatchSampler(
            lengths,  # as many as there are rows of this kind
            max_batch_length=most,
            num_buckets=hparams["num_buckets"],
            lengths_list=lengths,
            shuffle=True,
            seed=hparams["seed"],
        )
        parts.append((offset, sampler))
        offset += count
    processes = 1
    if torch.distributed.is_initialized():
        processes = torch.distributed.get_world_size()
    return KindSampler(parts, processes)


def _words(row):
    return max(len(row["wrd"].split()), len(row["translation"].split()))


def _seconds(row):
    return float(row["duration"])


def start_from_text(hparams):
    """Take textual encoder and decoder from the best model of stage 1."""
    folder = f"{hparams['start_from']}/save"
    found = Checkpointer(folder).find_checkpoint(**best_key("mt"))
    if found is None:
        raise FileNotFoundError(
            f"{folder}: no checkpoint; start_from is the output folder of "
            "stage 1 (hparams/text.yaml)"
        )
    taken = initialise_from_text_translation(
        hparams["translation"]["model"], found.path
    )
    logger.info(f"{len(taken)} tensors taken from {found.path}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--merge"]:
        merge_seeds(sys.argv[2], title=TITLE)
        sys.exit()

    # CLI
    hparams_file, run_opts, overrides = sb.parse_arguments(sys.argv[1:])
    sb.utils.distributed.ddp_init_group(run_opts)
    with open(hparams_file, encoding="utf-8") as fin:
        hparams = load_hyperpyyaml(fin, overrides)

    sb.create_experiment_directory(
        experiment_directory=hparams["output_folder"],
        hyperparams_to_save=hparams_file,
        overrides=overrides,
    )

    # Data preparation
    from must_c_prepare import prepare_must_c  # noqa: E402

    run_on_main(
        prepare_must_c,
        kwargs={
            "save_folder": hparams["prepared_folder"],
            "data_folder": hparams["data_folder"],
            "language": hparams["language"],
            "wmt_folder": hparams["wmt_folder"],
            "wmt_lines": hparams["wmt_lines"],
            "librispeech_folder": hparams["librispeech_folder"],
            "librispeech_sets": hparams["librispeech_sets"],
            "max_seconds": hparams["max_seconds"],
            "skip_bad": hparams["skip_bad"],
            "skip_prep": hparams["skip_prep"],
        },
    )
    # By one process: where several make a tokenizer's folder, one fails.
    labels = run_on_main(make_labels, args=[hparams])
    datasets, counts = make_datasets(hparams, labels)
    logger.info(f"training data: {counts}")

    hparams["translation"]["model"].noise = hparams["make_noise"](
        labels["source"].pieces,
        blank_token=hparams["translation"]["blank_index"],
    )
    if hparams["start_from"]:
        start_from_text(hparams)
    # An update has a batch of every kind of data.
    hparams["grad_accumulation_factor"] = len(counts)
    hparams["source_labels"] = labels["source"]
    hparams["target_labels"] = labels["target"]
    # Under DDP batches stay in the sampler's order.
    hparams["sorting"] = "as sampled"
    brain = ST(
        modules=hparams["modules"],
        opt_class=hparams["opt_class"],
        hparams=hparams,
        run_opts=run_opts,
        checkpointer=hparams["checkpointer"],
    )
    sampler = make_sampler(datasets["train"], counts, hparams)
    # Told the epoch, it gives a resumed run the batches of that epoch.
    brain.train_sampler = sampler
    loading = {"batch_size": hparams["test_batch_size"]}
    brain.fit(
        hparams["epoch_counter"],
        datasets["train"],
        datasets["valid"],
        train_loader_kwargs={
            "batch_sampler": sampler,
            "num_workers": hparams["num_workers"],
        },
        valid_loader_kwargs=loading,
    )
    brain.evaluate(
        datasets["test"],
        test_loader_kwargs=loading,
        **best_key(hparams["main"]),
    )
    run_on_main(write_report, args=[brain, hparams])
    # Without it a process that ends first may take the others down.
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
