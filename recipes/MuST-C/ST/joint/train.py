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

Authors
 * speechbrain_taskarith contributors 2026
"""

import random
import sys
import zlib

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
from speechbrain.utils.distributed import get_rank, run_on_main
from speechbrain.utils.logger import get_logger

from speechbrain_taskarith.metrics import merge_seeds, translation_scores
from speechbrain_taskarith.translation import (
    greedy_translation,
    initialise_from_text_translation,
)

logger = get_logger(__name__)

# What a batch of a kind of data is good for.
TASKS = {"st": ("st", "asr", "mt"), "asr": ("asr",), "mt": ("mt",)}


class ST(sb.Brain):
    """The Brain of both stages."""

    def tasks_of(self, batch, stage):
        """Return what to compute of a batch."""
        if stage != sb.Stage.TRAIN:
            return (self.hparams.main,)
        active = self.hparams.task_weights.active
        return tuple(t for t in TASKS[batch.kind[0]] if t in active)

    def compute_forward(self, batch, stage):
        """Compute the tasks that are still going."""
        batch = batch.to(self.device)
        tasks = self.tasks_of(batch, stage)
        x = lens = None
        wants = {"transcripts": batch.wrd}
        if batch.kind[0] != "asr":
            wants["translations"] = batch.translation
        if {"st", "asr"} & set(tasks):
            x, lens = batch.sig
            if self.hparams.translation["features"] is not None:
                x = self.hparams.translation["features"](x)
                x = self.modules.normalize(x, lens)
        good = self.hparams.guard(batch.id, x, lens, **wants)
        augment = self.hparams.fea_augment
        if stage == sb.Stage.TRAIN and x is not None and augment is not None:
            x, lens = augment(x, lens)
        self.batch = taken_rows(batch, x, lens, good)
        names = ("x", "lens", "source", "source_lens", "target_bos", "ids")
        inputs = {name: self.batch.get(name) for name in names}
        return self.modules.model(tasks=tasks, **inputs)

    def compute_objectives(self, predictions, batch, stage):
        """Return the weighted sum of losses; outside training translate."""
        names = ("source", "source_lens", "target_eos", "target_lens")
        targets = {name: self.batch[name] for name in names}
        losses = self.hparams.objective(predictions, **targets)
        if stage != sb.Stage.TRAIN:
            self.translate(predictions, stage)
            return losses[self.hparams.main]
        weights, model = self.hparams.task_weights, self.bare_model
        if weights.due:
            share = 1 / self.grad_accumulation_factor
            weights.observe(losses, model.parts(), share)
        if self.should_step:
            self.hparams.consistency.step(losses, model)
        return weights.total(losses)

    def translate(self, predictions, stage):
        """Search for translations; greedily while training goes on."""
        speech = self.hparams.main == "st"
        found = predictions.speech if speech else predictions.text
        translation = self.hparams.translation
        if stage == sb.Stage.VALID:
            hypotheses = greedy_translation(
                self.bare_model.decoder,
                found.encoded,
                found.lens,
                translation["bos_index"],
                translation["eos_index"],
                self.hparams.greedy_tokens,
            )
        else:
            hypotheses = translation["search"](found.encoded, found.lens)[0]
        self.ids += self.batch["ids"]
        self.references += self.batch["translations"]
        self.hypotheses += self.labels.decode_ids(
            [list(map(int, one)) for one in hypotheses]
        )

    @property
    def bare_model(self):
        """The model without what DDP puts around it."""
        return self.hparams.translation["model"]

    def fit_batch(self, batch):
        """Train on a batch, unless its task has stopped."""
        if not self.tasks_of(batch, sb.Stage.TRAIN):
            return torch.zeros(())
        return super().fit_batch(batch)

    def on_fit_batch_start(self, batch, should_step):
        """Seed every batch: a resumed run draws what it would have drawn."""
        self.should_step = should_step
        epoch = self.hparams.epoch_counter.current
        key = f"{self.hparams.seed} {epoch} {self.step} {get_rank()}"
        torch.manual_seed(zlib.crc32(key.encode()))
        random.seed(key)

    def on_fit_batch_end(self, batch, outputs, loss, should_step):
        """Move learning rate and task weights on."""
        if should_step:
            self.hparams.lr_annealing(self.optimizer)
            self.hparams.task_weights.step()

    def _should_save_intra_epoch_ckpt(self, *when):
        """Save behind whole updates only: half a gradient is not kept."""
        whole = self.step % self.grad_accumulation_factor == 0
        return super()._should_save_intra_epoch_ckpt(*when) and whole

    def on_stage_start(self, stage, epoch=None):
        """Forget what was said in the stage before."""
        self.ids, self.references, self.hypotheses = [], [], []

    def on_stage_end(self, stage, stage_loss, epoch=None):
        """Score, log, and save after validation."""
        if stage == sb.Stage.TRAIN:
            self.train_stats = {"loss": float(stage_loss)}
            return
        scores = translation_scores(self.references, self.hypotheses)
        stats = {
            "loss": float(stage_loss),
            "BLEU": scores.bleu,
            "chrF": scores.chrf,
            "length_ratio": scores.length_ratio,
        }
        if stage == sb.Stage.TEST:
            self.hparams.train_logger.log_stats(
                {"stage": "test"}, test_stats=stats
            )
            self.scores = scores
            return
        weights = self.hparams.task_weights
        self.hparams.train_logger.log_stats(
            {
                "epoch": epoch,
                "lr": self.optimizer.param_groups[0]["lr"],
                **{f"weight_{t}": weights[t] for t in weights.tasks},
            },
            train_stats=self.train_stats,
            valid_stats=stats,
        )
        logger.info(self.hparams.guard.summary())
        self.checkpointer.save_and_keep_only(
            meta={"BLEU": stats["BLEU"], "epoch": epoch}, max_keys=["BLEU"]
        )


def taken_rows(batch, x, lens, good=None):
    """Return what the model needs of a batch, of its good utterances only."""
    fields = {"x": x, "lens": lens} if x is not None else {}
    for name in ("source", "target_bos", "target_eos"):
        fields[name], relative = getattr(batch, name)
        if name != "target_bos":
            fields[f"{name.split('_')[0]}_lens"] = relative
    lists = {"ids": batch.id, "translations": batch.translation}
    if good is not None:
        fields = {n: f[good.to(f.device)] for n, f in fields.items()}
        lists = {n: [one[i] for i in good.tolist()] for n, one in lists.items()}
    return {**fields, **lists}


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
        bos_id=hparams["translation"]["bos_index"],
        eos_id=hparams["translation"]["eos_index"],
    )
    return tokenizer.sp


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
    bos = hparams["translation"]["bos_index"]
    eos = hparams["translation"]["eos_index"]

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
        # 0 is the blank.
        return torch.tensor(labels.encode_as_ids(wrd)).long() + 1

    @sb.utils.data_pipeline.takes("translation")
    @sb.utils.data_pipeline.provides("target_bos", "target_eos")
    def translation_pipeline(translation):
        ids = labels.encode_as_ids(translation)
        yield torch.tensor([bos, *ids])
        yield torch.tensor([*ids, eos])

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
    found = Checkpointer(folder).find_checkpoint(max_key="BLEU")
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
    labels = make_labels(hparams)
    datasets, counts = make_datasets(hparams, labels)
    logger.info(f"training data: {counts}")

    pieces = [labels.id_to_piece(i) for i in range(len(labels))]
    hparams["translation"]["model"].noise = hparams["make_noise"](
        ["<blank>", *pieces],
        blank_token=hparams["translation"]["blank_index"],
    )
    if hparams["start_from"]:
        start_from_text(hparams)
    # An update has a batch of every kind of data.
    hparams["grad_accumulation_factor"] = len(counts)
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
    brain.train_sampler, brain.labels = sampler, labels
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
    brain.evaluate(datasets["test"], max_key="BLEU", test_loader_kwargs=loading)
    run_on_main(write_report, args=[brain, hparams])
    # Without it a process that ends first may take the others down.
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
