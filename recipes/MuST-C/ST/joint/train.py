#!/usr/bin/env python3
"""Recipe for speech translation with auxiliary tasks (MuST-C).

The method of arXiv 2311.03810 in two stages, a YAML each: text translation,
then speech translation with recognition and text translation as auxiliary
tasks, whose weights decay until they stop. Text of WMT and speech of
LibriSpeech are optional training data.

To run this recipe, do the following:
> python train.py hparams/text.yaml --data_folder /path/to/MuST-C
> python train.py hparams/train.yaml --data_folder /path/to/MuST-C \
>     --start_from results/text/de/1234

Start a killed run again by the same command: it resumes.
"""

import sys

import speechbrain as sb
import torch
from common.rows import load_rows
from common.settings import check_settings, note_settings
from hyperpyyaml import load_hyperpyyaml
from report import plot_consistency, write_report
from sampling import KindSampler
from speechbrain.dataio import audio_io
from speechbrain.dataio.dataset import DynamicItemDataset
from speechbrain.dataio.sampler import DynamicBatchSampler
from speechbrain.tokenizers.SentencePiece import SentencePiece
from speechbrain.utils.checkpoints import Checkpointer
from speechbrain.utils.distributed import run_on_main
from speechbrain.utils.logger import get_logger

from speechbrain_taskarith.brains import PieceLabels, TranslationBrain, best_key
from speechbrain_taskarith.translation import (
    initialise_from_text_translation,
    save_translator,
)

logger = get_logger(__name__)

# The tasks that can learn from each kind of data: MuST-C, LibriSpeech, WMT.
TASKS = {"st": ("st", "asr", "mt"), "asr": ("asr",), "mt": ("mt",)}


class ST(TranslationBrain):
    """Class that manages the training loop of both stages.

    `compute_forward` and `compute_objectives` are those of `TranslationBrain`.
    It reads hparams.compute_features, hparams.fea_augment,
    hparams.average_last, hparams.warm_up_frozen, hparams.warm_up_without,
    hparams.guard, hparams.objective, hparams.search, hparams.greedy_tokens and
    hparams.train_logger.
    """

    def tasks_of(self, batch, stage):
        """Return the tasks to compute of a batch: those of its kind of data."""
        active = super().tasks_of(batch, stage)
        if stage != sb.Stage.TRAIN:
            return active
        return tuple(task for task in TASKS[batch.kind[0]] if task in active)


def make_labels(hparams):
    """Train the tokenizer of both languages, or load it."""
    try:
        tokenizer = SentencePiece(
            model_dir=str(hparams["labels_folder"]),
            vocab_size=hparams["pieces"],
            annotation_train=f"{hparams['prepared_folder']}/train.csv",
            annotation_read="wrd",
            # Transcripts and translations.
            text_file=f"{hparams['prepared_folder']}/text_for_labels.txt",
            model_type="unigram",
            bos_id=hparams["bos_index"],
            eos_id=hparams["eos_index"],
        )
    except RuntimeError as error:
        raise ValueError(
            f"--pieces {hparams['pieces']}: SentencePiece says {error}"
        ) from error
    # One vocabulary; the CTC head also needs a blank.
    return {
        "source": PieceLabels(tokenizer.sp, ["<blank>"]),
        "target": PieceLabels(tokenizer.sp),
    }


def read_rows(hparams, name, kind):
    """Read a prepared CSV file and add the kind of data to every row."""
    path = f"{hparams['prepared_folder']}/{name}.csv"
    rows = load_rows(path, hparams["prepared_folder"])
    for row in rows.values():
        row["kind"] = kind
    return rows


def dataio_prepare(hparams, labels):
    """Prepare the datasets and the sampler of the training batches.

    Also returns the number of training utterances of each kind of data, the
    main kind last.
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
    counts = {kind: len(rows) for kind, rows in kinds.items()}
    return datasets, make_sampler(datasets["train"], counts, hparams), counts


def add_pipelines(datasets, hparams, labels):
    """Define how audio and labels are read."""
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
    """Return a sampler of batches of similar size, each of one kind of data."""
    rows = list(data.data.values())
    parts, offset = [], 0
    for kind, count in counts.items():
        if kind == "mt":
            size, max_length = _words, hparams["max_batch_words"]
        else:
            size, max_length = _seconds, hparams["max_batch_seconds"]
        lengths = [size(row) for row in rows[offset : offset + count]]
        sampler = DynamicBatchSampler(
            lengths,  # only its length is used: the rows of this kind
            max_batch_length=max_length,
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
    """Load textual encoder and decoder of the best model of stage 1."""
    folder = f"{hparams['start_from']}/save"
    found = Checkpointer(folder).find_checkpoint(**best_key("mt"))
    if found is None:
        raise FileNotFoundError(
            f"{folder}: no checkpoint; start_from has to be the output folder "
            "of stage 1 (hparams/text.yaml)"
        )
    loaded = initialise_from_text_translation(
        hparams["translation"]["model"], found.path
    )
    logger.info(f"{len(loaded)} tensors loaded from {found.path}")


if __name__ == "__main__":
    # CLI
    hparams_file, run_opts, overrides = sb.parse_arguments(sys.argv[1:])
    sb.utils.distributed.ddp_init_group(run_opts)
    with open(hparams_file, encoding="utf-8") as fin:
        hparams = load_hyperpyyaml(fin, overrides)

    # Another training in this folder would go on with its checkpoints.
    settings = {
        key: hparams[key] for key in ("row", "main", "tasks", "start_from")
    }
    check_settings(hparams["output_folder"], settings)
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
            "test_set": hparams["test_set"],
            "wmt_folder": hparams["wmt_folder"],
            "wmt_lines": hparams["wmt_lines"],
            "librispeech_folder": hparams["librispeech_folder"],
            "librispeech_sets": hparams["librispeech_sets"],
            "max_seconds": hparams["max_seconds"],
            "skip_bad": hparams["skip_bad"],
            "skip_prep": hparams["skip_prep"],
        },
    )
    # On the main process: several that make the folder at once would fail.
    labels = run_on_main(make_labels, args=[hparams])
    datasets, train_sampler, counts = dataio_prepare(hparams, labels)
    logger.info(f"training data: {counts}")

    # The model, and what it starts from
    hparams["translation"]["model"].noise = hparams["make_noise"](
        labels["source"].pieces,
        blank_token=hparams["translation"]["blank_index"],
    )
    if hparams["start_from"]:
        start_from_text(hparams)
    # An update has one batch of each kind of data.
    hparams["grad_accumulation_factor"] = len(counts)
    hparams["source_labels"] = labels["source"]
    hparams["target_labels"] = labels["target"]
    # Under DDP batches stay in the sampler's order.
    hparams["sorting"] = "as sampled"
    st_brain = ST(
        modules=hparams["modules"],
        opt_class=hparams["opt_class"],
        hparams=hparams,
        run_opts=run_opts,
        checkpointer=hparams["checkpointer"],
    )
    # The Brain tells it the epoch: a resumed run gets that epoch's batches.
    st_brain.train_sampler = train_sampler

    # Training
    run_on_main(note_settings, args=[hparams["output_folder"], settings])
    loader_kwargs = {"batch_size": hparams["test_batch_size"]}
    st_brain.fit(
        hparams["epoch_counter"],
        datasets["train"],
        datasets["valid"],
        train_loader_kwargs={
            "batch_sampler": train_sampler,
            "num_workers": hparams["num_workers"],
        },
        valid_loader_kwargs=loader_kwargs,
    )
    # Before the test, which loads the best checkpoint and its measurements
    run_on_main(plot_consistency, args=[hparams])

    # Testing
    st_brain.evaluate(
        datasets["test"],
        test_loader_kwargs=loader_kwargs,
        **best_key(hparams["main"]),
    )
    run_on_main(write_report, args=[st_brain, hparams["row"], hparams])
    if hparams["translator_folder"]:
        section = hparams["translator"]
        language = {hparams["language"]: hparams["bos_index"]}
        run_on_main(
            save_translator,
            kwargs={
                "folder": hparams["translator_folder"],
                "translator": {**section, "languages": language},
                "hyperparams": f"{hparams['output_folder']}/hyperparams.yaml",
                "target_labels": labels["target"],
                "source_labels": labels["source"],
            },
        )
    # Without it a process that ends first may take the others down.
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
