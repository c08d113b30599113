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

Authors
 * speechbrain_taskarith contributors 2026
"""

import random
import sys
import zlib
from pathlib import Path

import ruamel.yaml
import speechbrain as sb
import torch
from history import TrainingHistory
from hyperpyyaml import load_hyperpyyaml
from report import TITLE, result_path, write_report, write_result
from speechbrain.dataio.dataset import DynamicItemDataset
from speechbrain.dataio.sampler import DynamicBatchSampler
from speechbrain.decoders import ctc_greedy_decode
from speechbrain.tokenizers.SentencePiece import SentencePiece
from speechbrain.utils.checkpoints import Checkpointer
from speechbrain.utils.distributed import get_rank, run_on_main
from speechbrain.utils.logger import get_logger

from speechbrain_taskarith.data import read_audio
from speechbrain_taskarith.metrics import merge_seeds, translation_scores, wer
from speechbrain_taskarith.translation import (
    greedy_translation,
    initialise_from_text_translation,
)

logger = get_logger(__name__)


class ST(sb.Brain):
    """Trains one row of the table."""

    def compute_forward(self, batch, stage):
        """Compute the tasks that are still going; the main one at least."""
        batch = batch.to(self.device)
        training = stage == sb.Stage.TRAIN
        main = self.hparams.main
        tasks = self.hparams.task_weights.active if training else (main,)
        x = lens = None
        if {"st", "asr"} & set(tasks):
            wavs, lens = batch.sig
            x = self.hparams.compute_features(wavs)
            x = self.modules.normalize(x, lens)
        good = self.hparams.guard(
            batch.id, x, lens, batch.wrd, batch.translation
        )
        if training and x is not None:
            x, lens = self.hparams.fea_augment(x, lens)
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
            self.collect(predictions, stage)
            return losses[self.hparams.main]
        weights = self.hparams.task_weights
        if weights.due:
            share = 1 / self.grad_accumulation_factor
            weights.observe(losses, self.hparams.model.parts(), share)
        if self.should_step:
            with self.history.paused():
                self.hparams.consistency.step(losses, self.hparams.model)
        for task, loss in losses.items():
            self.sums.setdefault(task, []).append(loss.detach())
        return weights.total(losses)

    def collect(self, predictions, stage):
        """Translate, and transcribe where the CTC head is trained."""
        main = self.hparams.main
        self.ids += self.batch["ids"]
        if main != "asr":
            found = predictions.speech if main == "st" else predictions.text
            self.references += self.batch["translations"]
            self.hypotheses += self.translate(found, stage)
        if "asr" in (main, *self.hparams.task_weights.tasks):
            speech = predictions.speech
            labels = ctc_greedy_decode(
                speech.logits, speech.frame_lens, self.hparams.blank_index
            )
            # 0 is the blank.
            self.transcripts += self.labels["source"].decode_ids(
                [[label - 1 for label in one] for one in labels]
            )
            self.said += self.batch["transcripts"]

    def translate(self, encoding, stage):
        """Search for translations; greedily while training goes on."""
        if stage == sb.Stage.VALID:
            found = greedy_translation(
                self.hparams.model.decoder,
                encoding.encoded,
                encoding.lens,
                self.hparams.bos_index,
                self.hparams.eos_index,
                self.hparams.greedy_tokens,
            )
        else:
            found = self.hparams.search(encoding.encoded, encoding.lens)[0]
        return self.labels["target"].decode_ids(
            [list(map(int, one)) for one in found]
        )

    def fit_batch(self, batch):
        """Train on a batch, and count the time that it takes."""
        with self.history.counting():
            return super().fit_batch(batch)

    def on_fit_batch_start(self, batch, should_step):
        """Seed every batch: a resumed run draws what it would have drawn."""
        self.should_step = should_step
        epoch = self.hparams.epoch_counter.current
        key = f"{self.hparams.seed} {epoch} {self.step} {get_rank()}"
        torch.manual_seed(zlib.crc32(key.encode()))
        random.seed(key)
        if should_step:
            self.lr_annealing(self.optimizer)

    def on_fit_batch_end(self, batch, outputs, loss, should_step):
        """Move the task weights on."""
        if should_step:
            self.hparams.task_weights.step()

    def _should_save_intra_epoch_ckpt(self, *when):
        """Save behind whole updates only: half a gradient is not kept."""
        whole = self.step % self.grad_accumulation_factor == 0
        return super()._should_save_intra_epoch_ckpt(*when) and whole

    def on_stage_start(self, stage, epoch=None):
        """Forget what was said in the stage before."""
        self.ids, self.references, self.hypotheses = [], [], []
        self.transcripts, self.said = [], []
        if stage == sb.Stage.TRAIN:
            self.sums = {}

    def on_stage_end(self, stage, stage_loss, epoch=None):
        """Score, log, and save after validation."""
        if stage == sb.Stage.TRAIN:
            # Of what was computed since the run was (re)started.
            self.train_stats = {"loss": float(stage_loss)} | {
                task: float(torch.stack(losses).mean())
                for task, losses in self.sums.items()
            }
            return
        stats, scores = {"loss": float(stage_loss)}, None
        if self.hypotheses:
            scores = translation_scores(self.references, self.hypotheses)
            stats["BLEU"], stats["chrF"] = scores.bleu, scores.chrf
            stats["length_ratio"] = scores.length_ratio
        if self.said:
            stats["CTC_WER"] = wer(self.said, self.transcripts).wer
        if stage == sb.Stage.TEST:
            self.hparams.train_logger.log_stats(
                {"stage": "test"}, test_stats=stats
            )
            self.scores, self.test_stats = scores, stats
            return
        weights = self.hparams.task_weights
        self.history.end_of_epoch(epoch, stats)
        self.hparams.train_logger.log_stats(
            {
                "epoch": epoch,
                "lr": self.optimizer.param_groups[0]["lr"],
                "seconds": self.history.seconds,
                **{f"weight_{t}": weights[t] for t in weights.tasks},
            },
            train_stats=self.train_stats,
            valid_stats=stats,
        )
        logger.info(self.hparams.guard.summary())
        key, which = best_by(self.hparams.main)
        self.checkpointer.save_and_keep_only(
            meta={key: stats[key], "epoch": epoch}, **{f"{which}_keys": [key]}
        )


def best_by(main):
    """Return the score that chooses a checkpoint, and `"min"` or `"max"`."""
    return ("CTC_WER", "min") if main == "asr" else ("BLEU", "max")


def taken_rows(batch, x, lens, good=None):
    """Return what the model needs of a batch, of its good utterances only."""
    fields = {"x": x, "lens": lens} if x is not None else {}
    for name in ("source", "target_bos", "target_eos"):
        fields[name], relative = getattr(batch, name)
        if name != "target_bos":
            fields[f"{name.split('_')[0]}_lens"] = relative
    lists = {
        "ids": batch.id,
        "transcripts": batch.wrd,
        "translations": batch.translation,
    }
    if good is not None:
        fields = {n: f[good.to(f.device)] for n, f in fields.items()}
        lists = {n: [one[i] for i in good.tolist()] for n, one in lists.items()}
    return {**fields, **lists}


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
        labels[side] = tokenizer.sp
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

    @sb.utils.data_pipeline.takes("wav")
    @sb.utils.data_pipeline.provides("sig")
    def audio_pipeline(wav):
        return read_audio(wav, hparams["sample_rate"])

    @sb.utils.data_pipeline.takes("wrd")
    @sb.utils.data_pipeline.provides("source")
    def transcript_pipeline(wrd):
        # 0 is the blank.
        return torch.tensor(labels["source"].encode_as_ids(wrd)).long() + 1

    @sb.utils.data_pipeline.takes("translation")
    @sb.utils.data_pipeline.provides("target_bos", "target_eos")
    def translation_pipeline(translation):
        ids = labels["target"].encode_as_ids(translation)
        yield torch.tensor([bos, *ids])
        yield torch.tensor([*ids, eos])

    for pipeline in (audio_pipeline, transcript_pipeline, translation_pipeline):
        sb.dataio.dataset.add_dynamic_item(every, pipeline)
    keys = ["id", "sig", "source", "target_bos", "target_eos"]
    sb.dataio.dataset.set_output_keys(every, [*keys, "wrd", "translation"])
    return datasets


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
    return {**stages, **rows}


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
        key, which = best_by(hparams["stages"][stage]["main"])
        found = Checkpointer(folder).find_checkpoint(**{f"{which}_key": key})
        if found is None:
            raise FileNotFoundError(
                f"{folder}: no checkpoint, which this row starts from; take "
                f"{result_path(stage, hparams)} away, and the stage "
                "is trained again"
            )
        initialise_from_text_translation(hparams["model"], found.path, taken)
        logger.info(f"{', '.join(taken)}: from {found.path}")


def run_row(name, hparams, labels, datasets, run_opts):
    """Train and test one row, from the YAML as the row has it."""
    Path(hparams["save_folder"]).mkdir(parents=True, exist_ok=True)
    if hparams["make_noise"] is not None:
        source = labels["source"]
        pieces = [source.id_to_piece(i) for i in range(len(source))]
        hparams["model"].noise = hparams["make_noise"](
            ["<blank>", *pieces], blank_token=hparams["blank_index"]
        )
    start_from_stages(hparams)
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
    brain.labels, brain.history = labels, TrainingHistory()
    processes = 1
    if torch.distributed.is_initialized():
        processes = torch.distributed.get_world_size()
    updates = len(sampler) * hparams["epoch_counter"].limit // processes
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
    key, which = best_by(hparams["main"])
    brain.evaluate(
        datasets[hparams["report_on"]],
        test_loader_kwargs=loading,
        **{f"{which}_key": key},
    )
    run_on_main(write_result, args=[name, brain, history, weights, hparams])


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
    labels = make_labels(hparams)
    datasets = make_datasets(hparams, labels)
    vocabularies = {
        "source_vocab": len(labels["source"]) + 1,
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
