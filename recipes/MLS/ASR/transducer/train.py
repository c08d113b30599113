#!/usr/bin/env python3
"""Recipe for transfer learning of streaming transducers (MLS).

The three stages of arXiv 2407.16664, a YAML each: multilingual RNN-T
training, RNN-T training of one language from the encoder of stage 1, MinWER.

To run this recipe, do the following:
> python train.py hparams/pretrain.yaml --data_folder /path/to/MLS
> python train.py hparams/transfer.yaml --data_folder /path/to/MLS \
>     --encoder_from results/pretrain/<seed>/save --subset 10min
> python train.py hparams/min_wer.yaml --data_folder /path/to/MLS \
>     --start_from results/transfer/<seed> --subset 10min

Start a killed run again by the same command: it resumes.
"""

import sys
from pathlib import Path

import speechbrain as sb
import torch
from common.settings import check_settings, note_settings
from hyperpyyaml import load_hyperpyyaml
from report import write_report
from speechbrain.dataio.dataset import DynamicItemDataset
from speechbrain.dataio.sampler import DynamicBatchSampler
from speechbrain.tokenizers.SentencePiece import SentencePiece
from speechbrain.utils.checkpoints import Checkpointer
from speechbrain.utils.distributed import get_rank, run_on_main
from speechbrain.utils.logger import get_logger

from speechbrain_taskarith.brains.training import WholeUpdates
from speechbrain_taskarith.data import read_audio
from speechbrain_taskarith.metrics import wer
from speechbrain_taskarith.transducer import (
    SentencePieceText,
    joint_transducer_loss,
    transfer_encoder,
)
from speechbrain_taskarith.utils.progress import is_watched
from speechbrain_taskarith.utils.seeds import seed_random_numbers

logger = get_logger(__name__)


class TransducerWithLoss(torch.nn.Module):
    """Model and loss in one `forward`: under DDP the joint has to run inside.

    Arguments
    ---------
    model : torch.nn.ModuleDict
        `frontend`, `encoder`, `predictor`, `joint`.
    blank_index : int
        Index of the blank.
    memory_budget : int
        In bytes, see `joint_transducer_loss`.
    min_wer : MinWERLoss or None
        Replaces the transducer loss in training.
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


class ASR(WholeUpdates, sb.Brain):
    """Class that manages the training loop of all stages."""

    def compute_forward(self, batch, stage):
        """Forward computations from the waveforms to the loss."""
        batch = batch.to(self.device)
        wavs, lens = batch.sig
        x = self.hparams.transducer["features"](wavs)
        epoch = self.hparams.epoch_counter.current
        x = self.modules.normalize(x, lens, epoch=epoch)
        if stage == sb.Stage.TRAIN:
            x, lens = self.hparams.fea_augment(x, lens)
        return self.modules.transducer(x, lens, *batch.tokens, batch.wrd)

    def compute_objectives(self, predictions, batch, stage):
        """Return the loss; outside training also decode."""
        loss, x, lens = predictions
        if stage != sb.Stage.TRAIN:
            search = self.hparams.transducer["searcher"]
            detokenize = self.hparams.transducer["transcriber"].detokenize
            self.ids += batch.id
            self.references += batch.wrd
            self.languages += batch.accent
            self.hypotheses += [
                detokenize(n_best[0].tokens)
                for n_best in search.decode(x, lens)
            ]
        return loss

    def on_fit_batch_start(self, batch, should_step):
        """Seed each batch: a resumed run draws the same random numbers."""
        epoch = self.hparams.epoch_counter.current
        seed_random_numbers(self.hparams.seed, epoch, self.step, get_rank())

    def on_fit_batch_end(self, batch, outputs, loss, should_step):
        """Update the learning rate."""
        if should_step:
            self.hparams.lr_annealing(self.optimizer)

    def on_stage_start(self, stage, epoch=None):
        """Start with empty lists of transcripts."""
        self.ids, self.references, self.hypotheses = [], [], []
        self.languages = []

    def on_stage_end(self, stage, stage_loss, epoch=None):
        """Compute the WER, log, and save a checkpoint after validation."""
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
    """Train the tokenizer, or load the one of the stage before.

    Returns the SentencePiece processor and the path of its file.
    """
    folder = hparams["tokenizer_folder"]
    pieces = hparams["output_neurons"] - 1  # without the blank
    if hparams["start_from"]:
        # The joint network is loaded too, so the labels have to be the same.
        folder = str(Path(hparams["start_from"]) / "tokenizer")
        path = Path(folder) / f"{pieces}_unigram.model"
        if not path.is_file():
            raise FileNotFoundError(
                f"{path}: no such file; start_from has to be the output "
                "folder of the stage before, with the same output_neurons"
            )
    try:
        tokenizer = SentencePiece(
            model_dir=folder,
            vocab_size=pieces,
            annotation_train=str(
                Path(hparams["prepared_folder"], "transcripts.csv")
            ),
            annotation_read="wrd",
            model_type="unigram",
        )
    except RuntimeError as error:
        raise ValueError(
            f"--output_neurons {pieces + 1}: SentencePiece says {error}"
        ) from error
    return tokenizer.sp, Path(folder) / f"{pieces}_unigram.model"


def dataio_prepare(hparams, tokenizer):
    """Prepare the datasets and the sampler of the training batches."""
    datasets = {}
    for split in ("train", "valid", "test"):
        path = Path(hparams["prepared_folder"], f"{split}.csv")
        data = DynamicItemDataset.from_csv(str(path))
        if split != "train":
            data = data.filtered_sorted(sort_key="duration")
        datasets[split] = data
    all_datasets = list(datasets.values())

    @sb.utils.data_pipeline.takes("wav")
    @sb.utils.data_pipeline.provides("sig")
    def audio_pipeline(wav):
        return read_audio(wav, hparams["sample_rate"], resample=True)

    @sb.utils.data_pipeline.takes("wrd")
    @sb.utils.data_pipeline.provides("tokens")
    def text_pipeline(wrd):
        # 0 is the blank.
        return torch.tensor(tokenizer.encode_as_ids(wrd)).long() + 1

    sb.dataio.dataset.add_dynamic_item(all_datasets, audio_pipeline)
    sb.dataio.dataset.add_dynamic_item(all_datasets, text_pipeline)
    sb.dataio.dataset.set_output_keys(
        all_datasets, ["id", "sig", "tokens", "wrd", "accent"]
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


def best_in(path):
    """Return the checkpoint of least WER in a save folder, as is tested.

    A path of another kind is returned as it is.
    """
    if not Path(path).is_dir():
        return path
    found = Checkpointer(path).find_checkpoint(min_key="WER")
    return path if found is None else found.path


def load_start(hparams):
    """Load the weights to start from: a whole model, an encoder, or both."""
    transducer = hparams["transducer"]
    if hparams["start_from"]:
        hparams["start_checkpointer"].checkpoints_dir = Path(
            hparams["start_from"], "save"
        )
        found = hparams["start_checkpointer"].recover_if_possible(min_key="WER")
        if found is None:
            raise FileNotFoundError(
                f"{hparams['start_from']}: no checkpoint in save/; start_from "
                "has to be the output folder of the stage before"
            )
        logger.info(f"started from {found.path}")
    if hparams["encoder_from"]:
        source = best_in(hparams["encoder_from"])
        for name in ("frontend", "encoder"):
            report = transfer_encoder(
                source,
                transducer[name],
                prefix=f"{name}.",
            )
            logger.info(f"{name}: {report}")


if __name__ == "__main__":
    # CLI
    hparams_file, run_opts, overrides = sb.parse_arguments(sys.argv[1:])
    sb.utils.distributed.ddp_init_group(run_opts)
    with open(hparams_file, encoding="utf-8") as fin:
        hparams = load_hyperpyyaml(fin, overrides)
    hparams.setdefault("noprogressbar", not is_watched())

    # Another training in this folder would go on with its checkpoints.
    settings = {
        key: hparams[key]
        for key in ("row", "languages", "start_from", "encoder_from")
    }
    check_settings(hparams["output_folder"], settings)
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
    datasets, train_sampler = dataio_prepare(hparams, tokenizer)

    # The model, and what it starts from
    transducer = hparams["transducer"]
    detokenize = SentencePieceText(tokenizer_file, offset=1)
    transducer["transcriber"].detokenize = detokenize
    load_start(hparams)
    min_wer = None
    if hparams["make_min_wer"] is not None:
        min_wer = hparams["make_min_wer"](
            transducer["searcher"],
            detokenize=detokenize,
            memory_budget=hparams["memory_budget"],
        )
        hparams["checkpointer"].add_recoverable(
            "min_wer", min_wer, optional_load=True
        )

    asr_brain = ASR(
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
    asr_brain.min_wer = min_wer
    # The Brain tells it the epoch: a resumed run gets that epoch's batches.
    asr_brain.train_sampler = train_sampler

    # Training
    run_on_main(note_settings, args=[hparams["output_folder"], settings])
    asr_brain.fit(
        hparams["epoch_counter"],
        datasets["train"],
        datasets["valid"],
        train_loader_kwargs={
            "batch_sampler": train_sampler,
            "num_workers": hparams["num_workers"],
        },
        valid_loader_kwargs={"batch_size": hparams["test_batch_size"]},
    )

    # Testing
    asr_brain.evaluate(
        datasets["test"],
        min_key="WER",
        test_loader_kwargs={"batch_size": hparams["test_batch_size"]},
    )
    run_on_main(
        write_report,
        args=[
            asr_brain,
            hparams["row"],
            datasets["train"],
            tokenizer_file,
            hparams,
        ],
    )
    # Without it a process that ends first may take the others down.
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
