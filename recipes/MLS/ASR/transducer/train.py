#!/usr/bin/env python3
"""Recipe for transfer learning of streaming transducers (MLS).

The three stages of arXiv 2407.16664, a YAML each: multilingual RNN-T
training, RNN-T training of one language with the encoder taken over, MinWER.

To run this recipe, do the following:
> python train.py hparams/pretrain.yaml --data_folder /path/to/MLS
> python train.py hparams/transfer.yaml --data_folder /path/to/MLS \
>     --encoder_from results/pretrain/<seed>/save --subset 10min
> python train.py hparams/min_wer.yaml --data_folder /path/to/MLS \
>     --start_from results/transfer/<seed> --subset 10min

A run that was killed goes on where it stopped when started again.
"""

import sys
from pathlib import Path

import speechbrain as sb
import torch
from hyperpyyaml import load_hyperpyyaml
from report import write_report
from speechbrain.dataio.dataset import DynamicItemDataset
from speechbrain.dataio.sampler import DynamicBatchSampler
from speechbrain.tokenizers.SentencePiece import SentencePiece
from speechbrain.utils.distributed import get_rank, run_on_main
from speechbrain.utils.logger import get_logger

from speechbrain_taskarith.data import read_audio
from speechbrain_taskarith.metrics import merge_seeds, wer
from speechbrain_taskarith.transducer import (
    SentencePieceText,
    joint_transducer_loss,
    transfer_encoder,
)
from speechbrain_taskarith.utils.seeds import seed_random_numbers

logger = get_logger(__name__)

TITLE = "Transfer learning of streaming transducers on MLS"


class TransducerWithLoss(torch.nn.Module):
    """Encoder, predictor, joint and loss in one forward, as DDP wants it.

    Arguments
    ---------
    model : torch.nn.ModuleDict
        `frontend`, `encoder`, `predictor`, `joint`.
    blank_index : int
        The blank.
    memory_budget : int
        See `joint_transducer_loss`.
    min_wer : MinWERLoss or None
        What to train with in the place of the transducer loss.
    """

    def __init__(self, model, blank_index, memory_budget, min_wer=None):
        super().__init__()
        self.model = model
        self.blank_index = blank_index
        self.memory_budget = memory_budget
        self.min_wer = min_wer

    def forward(self, x, lens, tokens, token_lens, references):
        """Return the loss, the encoder's output and its relative lengths."""
        x, lens = self.model["frontend"](x, lens)
        x = self.model["encoder"](x, lens)
        if self.min_wer is not None and self.training:
            loss = self.min_wer(x, lens, tokens, token_lens, references)
            return loss, x, lens
        predictor_out, _ = self.model["predictor"](
            torch.nn.functional.pad(tokens, (1, 0), value=self.blank_index)
        )
        loss = joint_transducer_loss(
            self.model["joint"],
            x,
            predictor_out,
            tokens,
            lens,
            token_lens,
            self.blank_index,
            memory_budget=self.memory_budget,
        )
        return loss, x, lens


class ASR(sb.Brain):
    """The Brain of all stages."""

    def compute_forward(self, batch, stage):
        """Return the loss, the encoder's output and relative lengths."""
        batch = batch.to(self.device)
        wavs, lens = batch.sig
        x = self.hparams.transducer["features"](wavs)
        epoch = self.hparams.epoch_counter.current
        x = self.modules.normalize(x, lens, epoch=epoch)
        if stage == sb.Stage.TRAIN:
            x, lens = self.hparams.fea_augment(x, lens)
        return self.modules.transducer(x, lens, *batch.tokens, batch.wrd)

    def compute_objectives(self, predictions, batch, stage):
        """Return the loss; outside training decode, too."""
        loss, x, lens = predictions
        if stage != sb.Stage.TRAIN:
            search = self.hparams.transducer["searcher"]
            detokenize = self.hparams.transducer["transcriber"].detokenize
            self.ids += batch.id
            self.references += batch.wrd
            self.languages += batch.accent
            self.hypotheses += [
                detokenize(found[0].tokens) for found in search.decode(x, lens)
            ]
        return loss

    def on_fit_batch_start(self, batch, should_step):
        """Seed every batch: a resumed run draws what it would have drawn."""
        epoch = self.hparams.epoch_counter.current
        seed_random_numbers(self.hparams.seed, epoch, self.step, get_rank())

    def on_fit_batch_end(self, batch, outputs, loss, should_step):
        """Move the learning rate on."""
        if should_step:
            self.hparams.lr_annealing(self.optimizer)

    def on_stage_start(self, stage, epoch=None):
        """Forget the words of the stage before."""
        self.ids, self.references, self.hypotheses = [], [], []
        self.languages = []

    def on_stage_end(self, stage, stage_loss, epoch=None):
        """Count errors, log, and save after validation."""
        stats = {"loss": float(stage_loss)}
        if stage == sb.Stage.TRAIN:
            if self.min_wer is not None:
                stats.update(self.min_wer.statistics())
                self.min_wer.reset()
            self.train_stats = stats
            return
        stats["WER"] = wer(self.references, self.hypotheses, ids=self.ids).wer
        if stage == sb.Stage.VALID:
            self.hparams.train_logger.log_stats(
                {"epoch": epoch, "lr": self.optimizer.param_groups[0]["lr"]},
                train_stats=self.train_stats,
                valid_stats=stats,
            )
            self.checkpointer.save_and_keep_only(
                meta={"WER": stats["WER"], "epoch": epoch}, min_keys=["WER"]
            )
        else:
            self.hparams.train_logger.log_stats(
                {"stage": "test"}, test_stats=stats
            )


def make_tokenizer(hparams):
    """Train the tokenizer, or take that of the stage before."""
    folder = hparams["tokenizer_folder"]
    pieces = hparams["output_neurons"] - 1  # without the blank
    if hparams["start_from"]:
        # The same labels: the joint network is taken over, too.
        folder = str(Path(hparams["start_from"]) / "tokenizer")
        path = Path(folder) / f"{pieces}_unigram.model"
        if not path.is_file():
            raise FileNotFoundError(
                f"{path}: missing; start_from is the output folder of the "
                "stage before, with as many output_neurons"
            )
    tokenizer = SentencePiece(
        model_dir=folder,
        vocab_size=pieces,
        annotation_train=str(
            Path(hparams["prepared_folder"], "transcripts.csv")
        ),
        annotation_read="wrd",
        model_type="unigram",
    )
    return tokenizer.sp, Path(folder) / f"{pieces}_unigram.model"


def make_datasets(hparams, tokenizer):
    """Make training, validation and test data."""
    datasets = {}
    for split in ("train", "valid", "test"):
        path = Path(hparams["prepared_folder"], f"{split}.csv")
        data = DynamicItemDataset.from_csv(str(path))
        if split != "train":
            data = data.filtered_sorted(sort_key="duration")
        datasets[split] = data
    every = list(datasets.values())

    @sb.utils.data_pipeline.takes("wav")
    @sb.utils.data_pipeline.provides("sig")
    def audio_pipeline(wav):
        return read_audio(wav, hparams["sample_rate"], resample=True)

    @sb.utils.data_pipeline.takes("wrd")
    @sb.utils.data_pipeline.provides("tokens")
    def text_pipeline(wrd):
        # 0 is the blank.
        return torch.tensor(tokenizer.encode_as_ids(wrd)).long() + 1

    sb.dataio.dataset.add_dynamic_item(every, audio_pipeline)
    sb.dataio.dataset.add_dynamic_item(every, text_pipeline)
    keys = ["id", "sig", "tokens", "wrd", "accent"]
    sb.dataio.dataset.set_output_keys(every, keys)
    return datasets


def batches_of_equal_seconds(data, hparams):
    """Return a sampler of batches with about the same seconds of audio."""
    return DynamicBatchSampler(
        data,
        max_batch_length=hparams["max_batch_seconds"],
        num_buckets=hparams["num_buckets"],
        length_func=lambda row: float(row["duration"]),
        shuffle=True,
        seed=hparams["seed"],
    )


def take_over(hparams):
    """Load what this stage starts from: a whole model, an encoder, or both."""
    transducer = hparams["transducer"]
    if hparams["start_from"]:
        hparams["start_checkpointer"].checkpoints_dir = Path(
            hparams["start_from"], "save"
        )
        found = hparams["start_checkpointer"].recover_if_possible(min_key="WER")
        if found is None:
            raise FileNotFoundError(
                f"{hparams['start_from']}: no checkpoint in save/; expected "
                "the output folder of the stage before"
            )
        logger.info(f"started from {found.path}")
    if hparams["encoder_from"]:
        for name in ("frontend", "encoder"):
            report = transfer_encoder(
                hparams["encoder_from"],
                transducer[name],
                prefix=f"{name}.",
            )
            logger.info(f"{name}: {report}")


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
    from mls_prepare import prepare_mls  # noqa: E402

    run_on_main(
        prepare_mls,
        kwargs={
            "data_folder": hparams["data_folder"],
            "save_folder": hparams["prepared_folder"],
            "languages": hparams["languages"],
            "subset": hparams["subset"],
            "skip_prep": hparams["skip_prep"],
        },
    )
    tokenizer, tokenizer_file = make_tokenizer(hparams)
    datasets = make_datasets(hparams, tokenizer)
    transducer = hparams["transducer"]
    detokenize = SentencePieceText(tokenizer_file, offset=1)
    transducer["transcriber"].detokenize = detokenize
    take_over(hparams)

    min_wer = None
    if hparams["make_min_wer"] is not None:
        min_wer = hparams["make_min_wer"](
            transducer["searcher"],
            detokenize=detokenize,
            memory_budget=hparams["memory_budget"],
        )
    brain = ASR(
        modules={
            "transducer": TransducerWithLoss(
                transducer["model"],
                transducer["blank_index"],
                hparams["memory_budget"],
                min_wer,
            ),
            "normalize": transducer["normalize"],
        },
        opt_class=hparams["opt_class"],
        hparams=hparams,
        run_opts=run_opts,
        checkpointer=hparams["checkpointer"],
    )
    brain.min_wer = min_wer
    sampler = batches_of_equal_seconds(datasets["train"], hparams)
    # Told the epoch, it gives a resumed run the batches of that epoch.
    brain.train_sampler = sampler

    brain.fit(
        hparams["epoch_counter"],
        datasets["train"],
        datasets["valid"],
        train_loader_kwargs={
            "batch_sampler": sampler,
            "num_workers": hparams["num_workers"],
        },
        valid_loader_kwargs={"batch_size": hparams["test_batch_size"]},
    )

    # Testing
    brain.evaluate(
        datasets["test"],
        min_key="WER",
        test_loader_kwargs={"batch_size": hparams["test_batch_size"]},
    )
    run_on_main(
        write_report, args=[brain, datasets["train"], tokenizer_file, hparams]
    )
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
