#!/usr/bin/env python3
"""Recipe for speech translation with auxiliary tasks.

One training of the method of arXiv 2311.03810: speech translation with
recognition and text translation as auxiliary tasks. `study.py` makes the
table: it trains the whole method, speech translation alone, and the method
without each of its parts, by changing some values of the YAML. Several corpora
have these scripts, as links; what differs is in their YAML.

To run this recipe, do the following:
> python train.py hparams/train.yaml --data_folder /path/to/corpus

From models of recognition and of text translation, as study.py trains them:
> python train.py hparams/train.yaml --data_folder /path/to/corpus \
>     --acoustic_from results/joint/0/models/asr/save \
>     --text_from results/joint/0/models/mt_local/save

Start a killed run again by the same command: it resumes.
"""

import collections
import sys
from pathlib import Path

import speechbrain as sb
import torch
from common.rows import load_rows
from common.settings import check_settings, note_settings
from history import TrainingHistory
from hyperpyyaml import load_hyperpyyaml
from report import plot_consistency, representation_entropy, write_result
from speechbrain.dataio.dataset import DynamicItemDataset
from speechbrain.dataio.sampler import DynamicBatchSampler
from speechbrain.tokenizers.SentencePiece import SentencePiece
from speechbrain.utils.checkpoints import Checkpointer
from speechbrain.utils.distributed import run_on_main
from speechbrain.utils.logger import get_logger

from speechbrain_taskarith.brains import (
    PieceLabels,
    TranslationBrain,
    best_key,
    optimizer_steps,
)
from speechbrain_taskarith.data import read_audio
from speechbrain_taskarith.translation import (
    TargetLanguages,
    initialise_from_text_translation,
    save_translator,
)
from speechbrain_taskarith.utils.files import atomic_write

logger = get_logger(__name__)

# Features of the whole corpus where they fit in memory: all epochs, and all
# trainings that study.py runs in this process, read them from here.
FEATURES = {}
# What a training is, with what it starts from: another in its folder would go
# on from its checkpoints.
TRAINING = ("row", "main", "tasks", "source", "targets", "languages")


class ST(TranslationBrain):
    """Class that manages the training loop, and measures its time.

    `compute_forward` and `compute_objectives` are those of `TranslationBrain`.
    It reads hparams.fea_augment, hparams.average_last, hparams.warm_up_frozen,
    hparams.warm_up_without, hparams.guard, hparams.objective, hparams.search,
    hparams.greedy_tokens and hparams.train_logger.
    """

    def fit_batch(self, batch):
        """Train on a batch; only this time counts as training."""
        with self.history.counting():
            return super().fit_batch(batch)

    def measure(self, losses):
        """Measure gradient consistency, which is not counted as training."""
        with self.history.paused():
            super().measure(losses)

    def on_validated(self, epoch):
        """Record the scores of an epoch."""
        self.history.end_of_epoch(epoch, self.stats)

    def epoch_meta(self, epoch):
        """Log the training time, too."""
        meta = super().epoch_meta(epoch)
        return {**meta, "seconds": self.history.seconds}


def prepare(hparams):
    """Prepare the manifests on the main process, unless they are there."""
    if hparams["prepare"] is not None:
        run_on_main(
            hparams["prepare"],
            kwargs={
                "data_folder": hparams["data_folder"],
                "save_folder": hparams["prepared_folder"],
                "skip_prep": hparams["skip_prep"],
            },
        )


def read_rows(split, hparams):
    """Read the manifest of a split of the speech."""
    path = Path(hparams["prepared_folder"], f"{split}.csv")
    return read_manifest(path, hparams)


def read_texts(hparams):
    """Read more text for the text models (`more_text`), a row as of speech."""
    path = hparams["more_text"]
    found = read_manifest(path, hparams, speech=False) if path else {}
    return {f"{path}/{ID}": row for ID, row in found.items()}


def read_manifest(path, hparams, speech=True):
    """Read a manifest: a row for each utterance and target language.

    Columns are named by the YAML (`transcript`, `translation`); utterances
    without a translation into a language are left out for that language.
    """
    given = load_rows(path, hparams["prepared_folder"])
    targets, languages = hparams["targets"], hparams["languages"]
    if isinstance(targets, str) or isinstance(languages, str):
        raise ValueError(
            f"targets: {targets!r}, languages: {languages!r}; expected lists, "
            "such as --targets [de]"
        )
    columns = {t: hparams["translation"].format(t) for t in targets}
    needed = {hparams["transcript"], *columns.values()}
    needed |= {"lang"} if languages else set()
    needed |= {"duration", "wav"} if speech else {"duration"}
    there = set(next(iter(given.values()), {}))
    if not needed <= there:
        raise ValueError(
            f"{path}: no column {', '.join(sorted(needed - there))}; there "
            f"are {', '.join(sorted(there))}. Check `targets`, `transcript` "
            "and `translation`"
        )
    found = {language: {} for language in languages or [None]}
    without = collections.Counter()
    for ID, row in given.items():
        language = row["lang"] if languages else None
        for target, column in columns.items():
            if language not in found:
                continue
            if not row[column].strip():
                without[target] += 1
                continue
            name = ID if len(targets) == 1 else f"{ID}-{target}"
            found[language][name] = {
                "utterance": ID,
                "wav": row["wav"] if speech else "",
                "duration": row["duration"],
                "wrd": row[hparams["transcript"]],
                "translation": row[column],
                "target": target,
            }
    for target, count in without.items():
        logger.info(f"{path}: {count} rows without text in {target}")
    for language, rows in found.items():
        if not rows:
            of = f" of language {language!r}" if language else ""
            raise ValueError(
                f"{path}: no utterance{of} with a translation into "
                f"{', '.join(targets)}"
            )
    return {ID: row for rows in found.values() for ID, row in rows.items()}


def with_recordings(rows, split, skip_bad):
    """Leave out rows without a recording, or raise an error that names one."""
    missing = {
        row["utterance"]: row["wav"]
        for row in rows.values()
        if not Path(row["wav"]).is_file()
    }
    for utterance, wav in missing.items():
        if not skip_bad:
            raise FileNotFoundError(
                f"{split}.csv: utterance {utterance!r}: {wav}: no such "
                "recording; check data_folder, or give --skip_bad True"
            )
    if missing:
        logger.warning(
            f"{split}.csv: {len(missing)} utterances without recording are "
            f"left out, {next(iter(missing))!r} among them"
        )
    return {
        ID: row for ID, row in rows.items() if row["utterance"] not in missing
    }


def write_text(path, text):
    """Write what a tokenizer learns, unless it has learned another text."""
    learned = path.is_file() and any(path.parent.glob("*.model"))
    if learned and path.read_bytes() != text.encode("utf-8"):
        raise ValueError(
            f"{path.parent}: holds a tokenizer of other text than that of this "
            "training; give another --study_folder, or remove the tokenizer"
        )
    with atomic_write(path, "w") as stream:
        stream.write(text)


def make_labels(hparams):
    """Train the tokenizers of both languages, or load them.

    Returns the labels of `source` and `target`, and in `languages` the
    decoder's first token for each target language.
    """
    labels, targets = {}, hparams["targets"]
    train = read_rows("train", hparams) | read_texts(hparams)
    marks = {"bos_id": hparams["bos_index"], "eos_id": hparams["eos_index"]}
    if len(targets) > 1:
        marks["user_defined_symbols"] = ",".join(f"<{t}>" for t in targets)
    for side, column, reserved, settings in (
        # The CTC head writes the source labels.
        ("source", "wrd", ["<blank>"], {}),
        ("target", "translation", [], marks),
    ):
        folder = Path(hparams["tokenizer_folder"], side)
        # A transcript stands there once for each target language.
        texts = dict.fromkeys(row[column] for row in train.values())
        write_text(folder / "train.txt", "".join(f"{t}\n" for t in texts))
        pieces = hparams[f"{side}_pieces"]
        try:
            tokenizer = SentencePiece(
                model_dir=str(folder),
                vocab_size=pieces,
                annotation_train=f"{hparams['prepared_folder']}/train.csv",
                annotation_read=hparams["transcript"],
                text_file=str(folder / "train.txt"),
                model_type=hparams[f"{side}_type"],
                **settings,
            )
        except RuntimeError as error:
            raise ValueError(
                f"--{side}_pieces {pieces}: SentencePiece says {error}"
            ) from error
        found = len(tokenizer.sp)
        if found != pieces:
            # There are only so many characters.
            raise ValueError(
                f"the {side} tokenizer has {found} pieces, not {pieces}; give "
                f"--{side}_pieces {found}"
            )
        labels[side] = PieceLabels(tokenizer.sp, reserved)
    languages = TargetLanguages({targets[0]: hparams["bos_index"]})
    if len(targets) > 1:
        pieces = labels["target"].pieces
        languages = TargetLanguages.for_pieces(pieces, targets)
    labels["languages"] = languages
    return labels


def read_features(wav, hparams):
    """Return an utterance's features, or its waveform where there are none."""
    rate, features = hparams["sample_rate"], hparams["features"]
    sig = read_audio(wav, rate, resample=hparams["resample"])
    if features is None:
        return sig
    with torch.no_grad():
        x = features(sig[None])
        if hparams["normalize"] is not None:
            x = hparams["normalize"](x, torch.ones(1))
    return x[0]


def recordings_of(datasets):
    """Return `{utterance: {"wav": path}}` of all splits."""
    found = {}
    for row in (row for data in datasets for row in data.data.values()):
        name, wav = row["utterance"], row["wav"]
        known = found.setdefault(name, {"wav": wav})["wav"]
        if known != wav:
            raise ValueError(
                f"utterance {name!r} is {known} in one manifest and {wav} in "
                "another; give them other IDs, or set cache to null"
            )
    return found


def dataio_prepare(hparams, labels):
    """Prepare the datasets and the sampler of the training batches."""
    languages, eos = labels["languages"], hparams["eos_index"]
    datasets = {}
    speech = {hparams["main"], *hparams["tasks"]} != {"mt"}
    for split in ("train", "valid", "test"):
        rows = read_rows(split, hparams)
        if speech:
            rows = with_recordings(rows, split, hparams["skip_bad"])
        elif split == "train":
            rows |= read_texts(hparams)
        data = DynamicItemDataset(rows)
        if split != "train":
            data = data.filtered_sorted(sort_key="duration")
        datasets[split] = data
    all_datasets = list(datasets.values())
    cache = hparams["cache"] if speech else None
    if cache is not None:
        run_on_main(cache.fill, args=[recordings_of(all_datasets)])

    @sb.utils.data_pipeline.takes("utterance", "wav")
    @sb.utils.data_pipeline.provides("sig")
    def audio_pipeline(utterance, wav):
        if not speech:
            return torch.zeros(1)
        if cache is not None:
            return cache(utterance, wav).float()
        if not hparams["keep_features"]:
            return read_features(wav, hparams)
        key = (wav, hparams["sample_rate"], hparams.get("n_mels"))
        if key not in FEATURES:
            FEATURES[key] = read_features(wav, hparams)
        return FEATURES[key]

    @sb.utils.data_pipeline.takes("wrd")
    @sb.utils.data_pipeline.provides("source")
    def transcript_pipeline(wrd):
        return labels["source"].encode(wrd)

    @sb.utils.data_pipeline.takes("translation", "target")
    @sb.utils.data_pipeline.provides("target_bos", "target_eos")
    def translation_pipeline(translation, target):
        pieces = labels["target"].encode(translation)
        yield torch.cat([torch.tensor([languages.bos(target)]), pieces])
        yield torch.cat([pieces, torch.tensor([eos])])

    for pipeline in (audio_pipeline, transcript_pipeline, translation_pipeline):
        sb.dataio.dataset.add_dynamic_item(all_datasets, pipeline)
    keys = ["id", "sig", "source", "target_bos", "target_eos"]
    sb.dataio.dataset.set_output_keys(
        all_datasets, [*keys, "wrd", "translation"]
    )
    train_sampler = DynamicBatchSampler(
        datasets["train"],
        max_batch_length=hparams["max_batch_seconds"],
        num_buckets=hparams["num_buckets"],
        length_func=lambda row: float(row["duration"]),
        shuffle=True,
        seed=hparams["seed"],
    )
    return datasets, train_sampler


def starts_of(options):
    """Say what a training starts from, for `check_settings`."""
    return {
        key: "random weights"
        if options[key] in (None, "null")
        else "a trained model"
        for key in ("acoustic_from", "text_from")
    }


def load_start(folder, main, parts, model):
    """Load parts of the best model of a training with another main task.

    `folder`: its save folder; with None the parts keep their random weights.
    """
    if folder is None:
        return
    found = Checkpointer(folder).find_checkpoint(**best_key(main))
    if found is None:
        raise FileNotFoundError(
            f"{folder}: no checkpoint; expected the save folder of a training "
            f"with `main: {main}`"
        )
    initialise_from_text_translation(model, found.path, parts)
    logger.info(f"{', '.join(parts)}: from {found.path}")


def train(argv):
    """Train and test the model of a command line; study.py calls it as well."""
    # CLI
    hparams_file, run_opts, overrides = sb.parse_arguments(argv)
    sb.utils.distributed.ddp_init_group(run_opts)
    # The prepare script stands beside hparams/, also where this file is a link.
    sys.path.append(str(Path(hparams_file).resolve().parents[1]))
    with open(hparams_file, encoding="utf-8") as fin:
        hparams = load_hyperpyyaml(fin, overrides)

    settings = {key: hparams.get(key) for key in TRAINING}
    settings |= starts_of(hparams)
    check_settings(hparams["output_folder"], settings)
    sb.create_experiment_directory(
        experiment_directory=hparams["output_folder"],
        hyperparams_to_save=hparams_file,
        overrides=overrides,
        save_env_desc=hparams["save_env_desc"],
    )

    # Data preparation
    prepare(hparams)
    # On the main process: several that make the folder at once would fail.
    labels = run_on_main(make_labels, args=[hparams])
    datasets, train_sampler = dataio_prepare(hparams, labels)

    # The model, and what it starts from
    model = hparams["model"]
    if hparams["make_noise"] is not None:
        model.noise = hparams["make_noise"](
            labels["source"].pieces, blank_token=hparams["blank_index"]
        )
    model.languages = labels["languages"]
    starts = (hparams["acoustic_from"], hparams["text_from"])
    if hparams["tie_ctc"] and None not in starts:
        raise ValueError(
            "tie_ctc: one matrix cannot be that of two models; give "
            "--acoustic_from null or --text_from null"
        )
    parts = ("acoustic", "ctc_lin")
    load_start(hparams["acoustic_from"], "asr", parts, model)
    parts = ("source_embedding", "textual", "decoder")
    load_start(hparams["text_from"], "mt", parts, model)
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
    train_loader = st_brain.make_dataloader(
        datasets["train"],
        sb.Stage.TRAIN,
        batch_sampler=train_sampler,
        num_workers=hparams["num_workers"],
    )
    updates = optimizer_steps(
        st_brain, train_loader, hparams["number_of_epochs"]
    )
    st_brain.lr_annealing = hparams["make_lr_annealing"](
        num_warmup_steps=round(hparams["warmup_share"] * updates),
        num_training_steps=updates,
    )
    st_brain.history = TrainingHistory()
    st_brain.checkpointer.add_recoverable("history", st_brain.history)
    st_brain.checkpointer.add_recoverable("lr_annealing", st_brain.lr_annealing)

    # Training
    run_on_main(note_settings, args=[hparams["output_folder"], settings])
    loader_kwargs = {"batch_size": hparams["test_batch_size"]}
    st_brain.fit(
        hparams["epoch_counter"],
        train_loader,
        datasets["valid"],
        valid_loader_kwargs=loader_kwargs,
    )
    # Before the test, which loads the best checkpoint and its history.
    history = st_brain.history.state()
    history["updates"] = hparams["task_weights"].updates
    task_weights = list(hparams["task_weights"].history)
    run_on_main(plot_consistency, args=[hparams])

    # Testing
    st_brain.evaluate(
        datasets[hparams["report_on"]],
        test_loader_kwargs=loader_kwargs,
        **best_key(hparams["main"]),
    )
    entropies = representation_entropy(
        st_brain,
        datasets["valid"],
        hparams["entropy_windows"],
        hparams["entropy_utterances"],
    )
    if hparams["translator_folder"] and hparams["main"] == "st":
        run_on_main(
            save_translator,
            kwargs={
                "folder": hparams["translator_folder"],
                "translator": hparams["translator"],
                "hyperparams": f"{hparams['output_folder']}/hyperparams.yaml",
                "target_labels": labels["target"],
                "source_labels": labels["source"],
            },
        )
    run_on_main(
        write_result,
        args=[st_brain, history, task_weights, entropies, hparams],
    )
    # Without it a process that ends first may take the others down.
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    train(sys.argv[1:])
