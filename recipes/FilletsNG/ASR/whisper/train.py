#!/usr/bin/env python3
"""Recipe for fine-tuning Whisper on any manifest, in any of its languages.

A manifest is a CSV file with the columns ID, duration, wav, text and, where
the languages differ, lang (`nl`, `cs`, ...), as the prepare scripts write it.
The weights before and after make a task vector: see README.md.

To run this recipe, do the following:
> python whisper_window.py openai/whisper-base whisper-base-6s --seconds 6
> python train.py hparams/train.yaml --data_folder /path/to/packages \
>     --whisper_hub whisper-base-6s --avoid_if_longer_than 6 --language nl

On other data:
> python train.py hparams/train.yaml --data_folder corpus --prepare null \
>     --data_root corpus --train_csv corpus/train.csv --valid_csv null \
>     --test_csv corpus/test.csv --whisper_hub openai/whisper-base

The next of several domains, held back by a lifelong method:
> python train.py hparams/train.yaml ... --base results/.../save --method ewc \
>     --remember learned_before.csv --memory results/.../memory.safetensors

On several GPUs:
> torchrun --nproc_per_node=2 train.py hparams/train.yaml ...

A run that was killed goes on from its newest checkpoint when started again.
"""

import csv
import sys
from pathlib import Path

import speechbrain as sb
import torch
from common.precision import choose_precision
from common.rows import SPEECH, load_rows
from common.settings import check_settings, content_of, note_settings
from hyperpyyaml import load_hyperpyyaml
from manifest_checks import (
    check_rows,
    keep_short,
    warn_of_shared,
)
from scoring import character_errors, normalize
from speechbrain.dataio.batch import PaddedBatch
from speechbrain.dataio.dataset import DynamicItemDataset
from speechbrain.dataio.sampler import DynamicBatchSampler
from speechbrain.utils.distributed import (
    ddp_barrier,
    if_main_process,
    run_on_main,
)
from speechbrain.utils.logger import get_logger

from speechbrain_taskarith.brains import optimizer_steps
from speechbrain_taskarith.brains.training import WholeUpdates
from speechbrain_taskarith.data import read_audio
from speechbrain_taskarith.metrics import wer
from speechbrain_taskarith.utils.files import atomic_write
from speechbrain_taskarith.utils.progress import is_watched
from speechbrain_taskarith.vectors import open_state
from speechbrain_taskarith.vectors.lifelong.methods import FineTuning

logger = get_logger(__name__)

# What a lifelong method stores, in the output folder.
MEMORY = "memory.safetensors"


class ASR(WholeUpdates, sb.Brain):
    """Whisper: cross-entropy of the next token, greedy search."""

    #: The lifelong method at work.
    method = FineTuning()

    def compute_forward(self, batch, stage):
        """Score the next tokens; outside training also search for words."""
        batch = batch.to(self.device)
        wavs, wav_lens = batch.sig
        tokens_bos, _ = batch.tokens_bos
        encoded, logits, _ = self.modules.whisper(wavs, tokens_bos)
        if stage != sb.Stage.TRAIN:
            self.recognise(encoded.detach(), wav_lens, batch)
        return logits.log_softmax(dim=-1)

    def recognise(self, encoded, wav_lens, batch):
        """Search for the words of a batch, and keep them for `score`."""
        search, whisper = self.hparams.search, self.hparams.whisper
        if whisper.is_multilingual:
            search.set_lang_tokens(batch.lang_token.data.squeeze(1))
        hyps, *_ = search(encoded, wav_lens)
        for key, lang, text, hyp in zip(batch.id, batch.lang, batch.text, hyps):
            hyp = whisper.tokenizer.decode(hyp, skip_special_tokens=True)
            self.references[key] = normalize(text, lang, whisper.tokenizer)
            self.hypotheses[key] = normalize(hyp, lang, whisper.tokenizer)

    def compute_objectives(self, log_probs, batch, stage):
        """Return the transcript's loss; in training with what a method adds."""
        loss = self.transcript_loss(log_probs, batch)
        if stage == sb.Stage.TRAIN:
            penalty = self.penalty(log_probs, batch)
            if penalty is not None:
                loss = loss + penalty
        return loss

    def after_prompt(self, batch):
        """Return where the transcript begins, and its relative lengths."""
        tokens_eos, lens = batch.tokens_eos
        given = self.hparams.prompt_length - 1
        # SpeechBrain's lengths are relative: of what is left, they are less.
        total = tokens_eos.shape[1]
        return given, (lens * total - given) / (total - given)

    def transcript_loss(self, log_probs, batch, **options):
        """Return the loss of the transcript; the prompt is given."""
        tokens_eos, _ = batch.tokens_eos
        given, lens = self.after_prompt(batch)
        return self.hparams.nll_loss(
            log_probs[:, given:], tokens_eos[:, given:], length=lens, **options
        )

    def loss_of(self, batch):
        """Return the negative log-likelihood of a batch of one utterance."""
        log_probs = self.compute_forward(batch, sb.Stage.TRAIN)
        # The sum over the tokens.
        return self.transcript_loss(log_probs, batch, reduction="batchmean")

    def penalty(self, log_probs, batch):
        """Return what the lifelong method adds to the loss, or None."""
        given, lens = self.after_prompt(batch)
        wavs, _ = batch.sig
        tokens_bos, _ = batch.tokens_bos

        def forward(whisper):
            _, logits, _ = whisper(wavs, tokens_bos)
            return logits[:, given:].log_softmax(dim=-1)

        # The bare model: its names carry no `module.`.
        return self.method.penalty(
            self.hparams.whisper, forward, log_probs[:, given:], lens
        )

    def on_fit_batch_end(self, batch, outputs, loss, should_step):
        """Set the next step's learning rate."""
        if should_step:
            self.hparams.lr_annealing(self.optimizer)

    def on_stage_start(self, stage, epoch):
        """Start a list of transcripts."""
        self.references, self.hypotheses = {}, {}

    def on_stage_end(self, stage, stage_loss, epoch):
        """Log and keep what was found."""
        stats = {"loss": stage_loss}
        if stage == sb.Stage.TRAIN:
            self.train_stats = stats
            if self.hparams.valid_csv is None:
                self.keep(epoch, {})
            return
        stats |= self.score()
        if stage == sb.Stage.VALID:
            self.keep(epoch, stats)
        else:
            self.hparams.train_logger.log_stats(
                {"Epoch loaded": self.hparams.epoch_counter.current},
                test_stats=stats,
            )
            if if_main_process():
                self.write_hypotheses(self.hparams.hypotheses_file)

    def score(self):
        """Count the errors of what was found."""
        self.words = wer(self.references, self.hypotheses)
        self.characters = character_errors(self.references, self.hypotheses)
        return {"WER": self.words.wer, "CER": self.characters.wer}

    def keep(self, epoch, stats):
        """Log an epoch, and keep its checkpoint."""
        self.hparams.train_logger.log_stats(
            {"epoch": epoch, "lr": self.optimizer.param_groups[0]["lr"]},
            train_stats=self.train_stats,
            valid_stats=stats or None,
        )
        self.checkpointer.save_and_keep_only(
            meta={"epoch": epoch, **stats},
            num_to_keep=1,
            keep_recent=self.hparams.keep_last,
            min_keys=None if self.hparams.keep_last else ["WER"],
        )

    def write_hypotheses(self, path):
        """Write each utterance as it was scored."""
        errors = {u.id: u.errors for u in self.words.utterances}
        with atomic_write(path, "w") as stream:
            writer = csv.writer(stream, lineterminator="\n")
            writer.writerow(["ID", "errors", "reference", "hypothesis"])
            for key, reference in self.references.items():
                writer.writerow(
                    [key, errors[key], reference, self.hypotheses[key]]
                )


def read_rows(path, hparams):
    """Read a manifest, without what is too long; check the rest."""
    rows = load_rows(path, hparams["data_root"], SPEECH)
    rows = keep_short(path, rows, hparams["avoid_if_longer_than"])
    check_rows(path, rows, hparams["whisper"], hparams["language"])
    for row in rows.values():
        row["lang"] = row.get("lang") or hparams["language"]
    return rows


def make_dataset(rows, hparams):
    """Make a data set of a manifest's rows."""
    whisper = hparams["whisper"]
    tokenizer = whisper.tokenizer
    data = DynamicItemDataset(rows)

    @sb.utils.data_pipeline.takes("wav")
    @sb.utils.data_pipeline.provides("sig")
    def audio_pipeline(wav):
        return read_audio(wav, hparams["sample_rate"], resample=True)

    @sb.utils.data_pipeline.takes("text", "lang")
    @sb.utils.data_pipeline.provides("tokens_bos", "tokens_eos", "lang_token")
    def text_pipeline(text, lang):
        prompt = list(tokenizer.prefix_tokens)
        language = prompt[min(1, len(prompt) - 1)]
        if whisper.is_multilingual:
            language = tokenizer.convert_tokens_to_ids(f"<|{lang}|>")
            prompt[1] = language
        tokens = tokenizer.encode(" " + text.strip(), add_special_tokens=False)[
            : hparams["max_tokens"]
        ]
        tokens = torch.tensor([*prompt, *tokens, tokenizer.eos_token_id])
        yield tokens[:-1]
        yield tokens[1:]
        yield torch.tensor([language])

    data.add_dynamic_item(audio_pipeline)
    data.add_dynamic_item(text_pipeline)
    data.set_output_keys(
        ["id", "sig", "tokens_bos", "tokens_eos", "lang", "lang_token", "text"]
    )
    return data


def choose_method(hparams):
    """Return the lifelong method that the command line names."""
    name, methods = hparams["method"], hparams["methods"]
    if name is None:
        if hparams["remember"] or hparams["memory"]:
            raise ValueError(
                "--remember and --memory are for a lifelong method: give "
                f"--method, one of {', '.join(methods)}"
            )
        return FineTuning()
    if name not in methods:
        raise ValueError(
            f"--method {name}: unknown; expected one of {', '.join(methods)}"
        )
    method = methods[name]
    stores = type(method).consolidate is not FineTuning.consolidate
    if stores and hparams["remember"] is None:
        raise ValueError(
            f"--method {name}: give --remember, a manifest of the lines "
            "learned last, by which it knows what to keep"
        )
    return method


def remember(method, brain, hparams):
    """Let the method store what it needs of the lines learned last."""
    if hparams["remember"] is None:
        return
    path = Path(hparams["output_folder"]) / MEMORY
    if not path.exists():
        if hparams["memory"]:
            method.load(hparams["memory"])
        data = make_dataset(read_rows(hparams["remember"], hparams), hparams)
        method.consolidate(
            hparams["whisper"],
            range(len(data)),
            lambda number: brain.loss_of(PaddedBatch([data[number]])),
        )
        ddp_barrier()  # all have looked before it is there
        run_on_main(method.save, args=[path])
    method.load(path)


def start_method(method, brain, hparams):
    """Let the method see the weights that training starts from."""
    whisper = hparams["whisper"]
    remember(method, brain, hparams)
    method.before_task(whisper, 2)
    # A method sets it for all: what the YAML has frozen stays so.
    frozen = [p for p in whisper.parameters() if not p.requires_grad]
    method.freeze(whisper)
    for parameter in frozen:
        parameter.requires_grad_(False)
    brain.method = method


def dataio_prepare(hparams):
    """Make the data sets and the loaders' options: train, valid, test."""
    rows = {
        split: read_rows(hparams[f"{split}_csv"], hparams)
        for split in ("train", "valid", "test")
        if hparams[f"{split}_csv"] is not None
    }
    warn_of_shared(rows)
    data = {
        split: make_dataset(found, hparams) for split, found in rows.items()
    }
    for split in ("valid", "test"):
        if split in data:
            data[split] = data[split].filtered_sorted(sort_key="duration")
    options = dict(hparams["train_loader_kwargs"])
    if hparams["dynamic_batching"]:
        sampler = DynamicBatchSampler(
            data["train"],
            **hparams["dynamic_batch_sampler"],
            length_func=lambda row: row["duration"],
        )
        options = {
            "batch_sampler": sampler,
            "num_workers": hparams["num_workers"],
        }
    return data, options


def settings_of(hparams):
    """Say what is learned, and from where, for `check_settings`.

    Another training in the same folder would go on with this one's checkpoint.
    """
    settings = {key: hparams[key] for key in ("language", "method")}
    for key in ("whisper_hub", "base"):
        path = hparams[key]
        settings[key] = path and open_state(path).fingerprint
    path = hparams["train_csv"]
    if Path(path).is_file():  # or `prepare` is still to write it
        settings |= content_of({"train_csv": path})
    return settings


def train(argv):
    """Train one model as the command line says; the studies call it, too."""
    # CLI
    hparams_file, run_opts, overrides = sb.parse_arguments(argv)
    sb.utils.distributed.ddp_init_group(run_opts)
    # The prepare script stands beside hparams/, also where this file is a link.
    sys.path.append(str(Path(hparams_file).resolve().parents[1]))
    with open(hparams_file, encoding="utf-8") as fin:
        hparams = load_hyperpyyaml(fin, overrides)
    hparams.setdefault("noprogressbar", not is_watched())

    settings = settings_of(hparams)
    check_settings(hparams["output_folder"], settings)
    sb.create_experiment_directory(
        experiment_directory=hparams["output_folder"],
        hyperparams_to_save=hparams_file,
        overrides=overrides,
        save_env_desc=hparams["save_env_desc"],
    )
    if hparams["prepare"] is not None:
        run_on_main(
            hparams["prepare"],
            kwargs={
                "data_folder": hparams["data_folder"],
                "save_folder": hparams["prepared_folder"],
                "skip_prep": hparams["skip_prep"],
            },
        )
    hparams["prompt_length"] = len(hparams["whisper"].tokenizer.prefix_tokens)
    method = choose_method(hparams)
    data, train_options = dataio_prepare(hparams)

    # Another start than the public weights, e.g. an edited model
    if hparams["base"]:
        hparams["whisper"].load_weights(open_state(hparams["base"]))

    precision = choose_precision(hparams["train_precision"], run_opts)
    # What the command line says goes first: --precision fp32
    hparams |= {"precision": precision, "eval_precision": precision}

    brain = ASR(
        modules=hparams["modules"],
        opt_class=hparams["opt_class"],
        hparams=hparams,
        run_opts=run_opts,
        checkpointer=hparams["checkpointer"],
    )
    start_method(method, brain, hparams)
    # The Brain tells it the epoch, for which it makes other batches.
    brain.train_sampler = train_options.get("batch_sampler")
    train_loader = brain.make_dataloader(
        data["train"], sb.Stage.TRAIN, **train_options
    )
    steps = optimizer_steps(brain, train_loader, hparams["number_of_epochs"])
    brain.hparams.lr_annealing = brain.hparams.lr_annealing(
        initial_value=hparams["lr"],
        num_warmup_steps=round(hparams["warmup_share"] * steps),
        num_training_steps=steps,
    )
    brain.checkpointer.add_recoverable(
        "lr_annealing", brain.hparams.lr_annealing
    )
    # All processes have checked by now, and the lines are prepared.
    settings |= content_of({"train_csv": hparams["train_csv"]})
    run_on_main(note_settings, args=[hparams["output_folder"], settings])
    brain.fit(
        hparams["epoch_counter"],
        train_loader,
        data.get("valid"),
        valid_loader_kwargs=hparams["test_loader_kwargs"],
    )
    if "test" in data:
        brain.evaluate(
            data["test"],
            min_key=None if hparams["keep_last"] else "WER",
            test_loader_kwargs=hparams["test_loader_kwargs"],
        )
    return brain


if __name__ == "__main__":
    train(sys.argv[1:])
