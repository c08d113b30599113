#!/usr/bin/env python3
"""Recipe for speech translation with auxiliary tasks (Mboshi-French).

Speech translation alone, with text translation, with recognition, the whole
method of arXiv 2311.03810, and the whole method without each of its parts: a
row of the table each, behind the stages that they start from. One run makes
the rows of one seed. A row that is done
is not trained again, and a run that was killed goes on where it stopped.

To run this recipe, do the following:
> python train.py hparams/train.yaml --data_folder /path/to/mboshi --seed 0

Some rows only, then a table over several seeds:
> python train.py hparams/train.yaml --data_folder ... --only st,whole
> python train.py --merge results/joint
"""

import functools
import sys
from pathlib import Path

import ruamel.yaml
import speechbrain as sb
import torch
from entropy import representation_entropy
from history import TrainingHistory
from hyperpyyaml import load_hyperpyyaml
from report import TITLE, result_path, write_report, write_result
from speechbrain.dataio.dataset import DynamicItemDataset
from speechbrain.dataio.sampler import DynamicBatchSampler
from speechbrain.tokenizers.SentencePiece import SentencePiece
from speechbrain.utils.checkpoints import Checkpointer
from speechbrain.utils.distributed import run_on_main
from speechbrain.utils.logger import get_logger

from speechbrain_taskarith.brains import PieceLabels, TranslationBrain, best_key
from speechbrain_taskarith.data import read_audio
from speechbrain_taskarith.metrics import merge_seeds
from speechbrain_taskarith.translation import initialise_from_text_translation

logger = get_logger(__name__)


class ST(TranslationBrain):
    """Trains one row of the table, and counts the time that it takes."""

    def fit_batch(self, batch):
        """Train on a batch, by the clock."""
        with self.history.counting():
            return super().fit_batch(batch)

    def measure(self, losses):
        """Measure gradient consistency; that is no training."""
        with self.history.paused():
            super().measure(losses)

    def on_validated(self, epoch):
        """Keep the scores of an epoch."""
        self.history.end_of_epoch(epoch, self.stats)

    def epoch_meta(self, epoch):
        """Show the time, too."""
        meta = super().epoch_meta(epoch)
        return {**meta, "seconds": self.history.seconds}


def make_labels(hparams):
    """Train the tokenizers of both languages, or load them."""
    labels = {}
    for side, column, marks in (
        ("source", "wrd", {}),
        (
            "target",
            "translation",
            {"bos_id": hparams["bos_index"], "eos_id": hparams["eos_index"]},
        ),
    ):
        tokenizer = SentencePiece(
            model_dir=str(Path(hparams["output_folder"]) / "tokenizer" / side),
            vocab_size=hparams[f"{side}_pieces"],
            annotation_train=f"{hparams['prepared_folder']}/train.csv",
            annotation_read=column,
            model_type=hparams[f"{side}_type"],
            **marks,
        )
        # The source is what the CTC head writes.
        reserved = ["<blank>"] if side == "source" else []
        labels[side] = PieceLabels(tokenizer.sp, reserved)
    return labels


def make_datasets(hparams, labels):
    """Make training, validation and test data."""
    bos, eos = hparams["bos_index"], hparams["eos_index"]
    datasets = {}
    for split in ("train", "valid", "test"):
        path = f"{hparams['prepared_folder']}/{split}.csv"
        data = DynamicItemDataset.from_csv(path)
        if split != "train":
            data = data.filtered_sorted(sort_key="duration")
        datasets[split] = data
    every = list(datasets.values())

    # Rows and epochs see the same audio: 4.5 hours of features fit in memory.
    @sb.utils.data_pipeline.takes("wav")
    @sb.utils.data_pipeline.provides("sig")
    @functools.cache
    def audio_pipeline(wav):
        return model_input(read_audio(wav, hparams["sample_rate"]), hparams)

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
        sb.dataio.dataset.add_dynamic_item(every, pipeline)
    keys = ["id", "sig", "source", "target_bos", "target_eos"]
    sb.dataio.dataset.set_output_keys(every, [*keys, "wrd", "translation"])
    return datasets


@torch.no_grad()
def model_input(wave, hparams):
    """Turn a recording into what the acoustic encoder takes."""
    if hparams["features"] is None:
        return wave
    features = hparams["features"](wave[None])
    return hparams["normalize"](features, torch.ones(1))[0]


def wanted_rows(hparams):
    """Return the rows that `only` names, behind the stages they start from.

    An unknown row is an error.
    """
    wanted = str(hparams["only"]).split(",")
    everything = {**hparams["stages"], **hparams["rows"]}
    unknown = set(wanted) - set(everything) - {"all"}
    if unknown:
        raise ValueError(
            f"only: no rows {', '.join(sorted(unknown))}; there are "
            f"{', '.join(everything)}"
        )
    rows = {
        name: row
        for name, row in everything.items()
        if "all" in wanted or name in wanted
    }
    needed = {
        stage
        for row in rows.values()
        for stage, _ in starts_of({**hparams, **row})
    }
    stages = {n: s for n, s in hparams["stages"].items() if n in needed}
    return {
        name: row
        for name, row in {**stages, **rows}.items()
        if not of_another_run(name, hparams)
    }


def of_another_run(stage, hparams):
    """Tell whether a stage is taken from another run, not trained here."""
    shared = hparams["acoustic_of"] is not None
    return shared and stage == hparams["acoustic_from"]


def starts_of(hparams):
    """Return the stages that a row starts from, and what is taken of each."""
    starts = (
        (hparams["acoustic_from"], ("acoustic", "ctc_lin")),
        (hparams["text_from"], ("source_embedding", "textual", "decoder")),
    )
    return [start for start in starts if start[0] is not None]


def start_from_stages(hparams):
    """Take what the row starts from: acoustic encoder, text translation."""
    for stage, taken in starts_of(hparams):
        folder = Path(hparams["save_folder"]).parent / stage
        if of_another_run(stage, hparams):
            check_same_pieces(hparams)
            folder = Path(hparams["acoustic_of"]) / "save" / stage
        best = best_key(hparams["stages"][stage]["main"])
        found = Checkpointer(folder).find_checkpoint(**best)
        if found is None:
            raise FileNotFoundError(
                f"{folder}: no checkpoint, which this row starts from; take "
                f"{result_path(stage, hparams)} away, and the stage "
                "is trained again (`acoustic_of`: name the output_folder of "
                "a run that trained it)"
            )
        initialise_from_text_translation(hparams["model"], found.path, taken)
        logger.info(f"{', '.join(taken)}: from {found.path}")


def check_same_pieces(hparams):
    """Raise an error where another run's CTC head writes other pieces."""
    vocabularies = [
        {
            path.name: path.read_bytes()
            for path in Path(folder, "tokenizer", "source").glob("*.vocab")
        }
        for folder in (hparams["output_folder"], hparams["acoustic_of"])
    ]
    if vocabularies[0] != vocabularies[1]:
        raise ValueError(
            f"acoustic_of: {hparams['acoustic_of']} has other source pieces "
            "than this run; give both the same data, `source_type` and "
            "`source_pieces`"
        )


def run_row(name, hparams, labels, datasets, run_opts):
    """Train and test one row, from the YAML as the row has it."""
    Path(hparams["save_folder"]).mkdir(parents=True, exist_ok=True)
    if hparams["make_noise"] is not None:
        hparams["model"].noise = hparams["make_noise"](
            labels["source"].pieces, blank_token=hparams["blank_index"]
        )
    start_from_stages(hparams)
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
    sampler = DynamicBatchSampler(
        datasets["train"],
        max_batch_length=hparams["max_batch_seconds"],
        num_buckets=hparams["num_buckets"],
        length_func=lambda row: float(row["duration"]),
        shuffle=True,
        seed=hparams["seed"],
    )
    # Told the epoch, it gives a resumed run the batches of that epoch.
    brain.train_sampler = sampler
    brain.history = TrainingHistory()
    batches = brain.grad_accumulation_factor  # of an update
    if torch.distributed.is_initialized():
        batches *= torch.distributed.get_world_size()
    updates = len(sampler) // batches * hparams["epoch_counter"].limit
    brain.lr_annealing = hparams["make_lr_annealing"](
        num_warmup_steps=round(hparams["warmup_share"] * updates),
        num_training_steps=updates,
    )
    brain.checkpointer.add_recoverable("history", brain.history)
    brain.checkpointer.add_recoverable("lr_annealing", brain.lr_annealing)
    loading = {"batch_size": hparams["test_batch_size"]}
    brain.fit(
        hparams["epoch_counter"],
        datasets["train"],
        datasets["valid"],
        train_loader_kwargs={"batch_sampler": sampler},
        valid_loader_kwargs=loading,
    )
    history = brain.history.state()
    weights = list(hparams["task_weights"].history)
    brain.evaluate(
        datasets[hparams["report_on"]],
        test_loader_kwargs=loading,
        **best_key(hparams["main"]),
    )
    entropies = representation_entropy(brain, datasets["valid"], hparams)
    run_on_main(
        write_result,
        args=[name, brain, history, weights, entropies, hparams],
    )


def load_row(path, overrides, more):
    """Load the YAML with a row's values in the place of its own."""
    # Kept as nodes: values with tags (!new:, !name:) stay what they are.
    given = ruamel.yaml.YAML().load(overrides) if overrides else {}
    with open(path, encoding="utf-8") as fin:
        return load_hyperpyyaml(fin, {**given, **more})


if __name__ == "__main__":
    if sys.argv[1:2] == ["--merge"]:
        merge_seeds(sys.argv[2], title=TITLE)
        sys.exit()

    # CLI
    hparams_file, run_opts, overrides = sb.parse_arguments(sys.argv[1:])
    sb.utils.distributed.ddp_init_group(run_opts)
    with open(hparams_file, encoding="utf-8") as fin:
        hparams = load_hyperpyyaml(fin, overrides)
    rows = wanted_rows(hparams)

    sb.create_experiment_directory(
        experiment_directory=hparams["output_folder"],
        hyperparams_to_save=hparams_file,
        overrides=overrides,
    )

    # Data preparation
    from mboshi_prepare import prepare_mboshi  # noqa: E402

    run_on_main(
        prepare_mboshi,
        kwargs={
            "data_folder": hparams["data_folder"],
            "save_folder": hparams["prepared_folder"],
            "valid_one_in": hparams["valid_one_in"],
            "skip_bad": hparams["skip_bad"],
            "skip_prep": hparams["skip_prep"],
        },
    )
    # By one process: where several make a tokenizer's folder, one fails.
    labels = run_on_main(make_labels, args=[hparams])
    datasets = make_datasets(hparams, labels)
    vocabularies = {
        "source_vocab": len(labels["source"]),
        "target_vocab": len(labels["target"]),
    }
    for name, row in rows.items():
        if result_path(name, hparams).exists():
            logger.info(f"row {name}: done before")
            continue
        logger.info(f"row {name}")
        loaded = load_row(
            hparams_file, overrides, {**row, **vocabularies, "row": name}
        )
        run_row(name, loaded, labels, datasets, run_opts)
    run_on_main(write_report, args=[hparams])
    # Without it a process that ends first may take the others down.
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
