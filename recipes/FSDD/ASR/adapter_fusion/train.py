#!/usr/bin/env python3
"""Recipe for Audio-AdapterFusion on strings of digits (FSDD), one training.

Trains the base (a small Conformer CTC model), fine-tunes all of it, trains one
accent's adapter in the frozen base, or a combination of adapters that serves
all accents without being told which one is spoken. `row` says what is trained;
`study.py` makes the whole table.

To run this recipe, do the following:
> python train.py hparams/train.yaml --data_folder /path/to/FSDD --row base

One adapter, then a combination of several (learn: the accents to learn from):
> python train.py hparams/train.yaml --data_folder /path/to/FSDD \
>     --row extraction --learn "[greek]" --base_from <output_folder>/save
> python train.py hparams/train.yaml --data_folder /path/to/FSDD \
>     --row fusion_mt --base_from <output_folder>/save \
>     --adapters_from "{us: <file>, german: <file>, greek: <file>, belgian: ...}"

Start a killed run again by the same command: it resumes.
"""

import os
import sys
import time

import speechbrain as sb
import torch
from common.dataio import evaluation_loader, make_dataset
from common.precision import choose_precision
from hyperpyyaml import load_hyperpyyaml
from speechbrain.nnet.adapters import AdaptedModel, LoRA
from speechbrain.utils.distributed import run_on_main
from tasks import Tasks

from speechbrain_taskarith.adapters import AudioAdapterFusion
from speechbrain_taskarith.brains import CTCBrain, optimizer_steps, shard_loader
from speechbrain_taskarith.utils.files import read_json, write_json
from speechbrain_taskarith.utils.progress import is_watched
from speechbrain_taskarith.utils.seeds import seed_random_numbers
from speechbrain_taskarith.vectors import open_state

# st: the combination is trained alone; mt: the adapters as well.
MODES = {"st": "ST-A", "mt": "MT-A"}
ADAPTER_ROWS = ("extraction", "extraction_together", "from_shared")
SHARED = "shared"  # name of the wide adapter that all tasks share


class ASR(CTCBrain):
    """Class that manages the training loop: CTC on words.

    `CTCBrain` reads hparams.compute_features, hparams.fea_augment,
    hparams.ctc_cost and hparams.train_logger.

    `fusion` is the first layer's combination if its attention matters: it is
    collected in tests, and taught in training.
    """

    fusion = None

    def compute_forward(self, batch, stage):
        """Forward computations from the waveforms to log-probabilities."""
        log_probs, lens = super().compute_forward(batch, stage)
        if stage == sb.Stage.TEST and self.fusion is not None:
            attention = self.hparams.adapters.attention(lens)
            self.attention.append((len(lens), attention))
        # The loss is in float32, whatever the precision of training.
        return log_probs.float(), lens

    def compute_objectives(self, predictions, batch, stage):
        """Return the CTC loss, and for a fusion what its attention misses."""
        loss = super().compute_objectives(predictions, batch, stage)
        if stage == sb.Stage.TRAIN and self.fusion is not None:
            adapters = self.hparams.adapters
            loss = loss + adapters.penalty()
            if self.fusion.guided:
                guide = adapters.attention_loss(batch.task, predictions[1])
                loss = loss + self.hparams.guidance * guide
        return loss

    def on_fit_batch_start(self, batch, should_step):
        """Seed each batch: a resumed run draws the same random numbers."""
        super().on_fit_batch_start(batch, should_step)
        seed_random_numbers(
            self.hparams.seed, "training", self.optimizer_step, self.step
        )

    def on_stage_start(self, stage, epoch=None):
        """Start with empty lists of transcripts and attention."""
        super().on_stage_start(stage, epoch)
        self.attention = []


def prepare(hparams):
    """Prepare the recordings on the main process."""
    from fsdd_prepare import prepare_fsdd

    run_on_main(
        prepare_fsdd,
        kwargs={
            "data_folder": hparams["data_folder"],
            "save_folder": hparams["prepared_folder"],
            "skip_prep": hparams["skip_prep"],
        },
    )


def dataio_prepare(hparams, steps):
    """Prepare the loaders: training, validation, and a test for each task.

    There is none for training if there are no steps. `Tasks` makes strings of
    hparams["n_words"] words: hparams["strings_per_task"] to test on, in batches
    of hparams["test_batch_size"], and to train on those of
    hparams["takes_per_word"] recordings. The base's are as
    hparams["base_data"], hparams["voices"], hparams["takes_per_voice"],
    hparams["speeds"] and hparams["simulator"] say.
    """
    tasks, train_loader = Tasks(hparams), None
    learn = list(hparams["learn"] or tasks.names)
    if steps:
        if hparams["row"] == "base":
            strings = tasks.for_base(steps)
        else:
            strings = tasks.training(learn, steps)
        train_data = make_dataset(
            strings,
            hparams["tokenizer"],
            hparams["sample_rate"],
            keys=("id", "sig", "tokens", "wrd", "task"),
        )
        train_loader = shard_loader(train_data, hparams["batch_size"])
    valid_strings = [s for t in learn for s in tasks.held_out(t, "valid")]
    tests = {
        task: evaluation_loader(
            tasks.held_out(task, hparams["report_on"]), hparams
        )
        for task in hparams["measure"] or tasks.names
    }
    return (
        train_loader,
        evaluation_loader(valid_strings, hparams),
        tests,
    )


def load_start(hparams):
    """Load the weights of the base and of adapters that were trained before."""
    adapters = hparams["adapters"]
    if hparams["base_from"]:
        given = dict(open_state(hparams["base_from"]))
        own = adapter_prefix(hparams["model"], adapters)
        needed = {k for k in hparams["model"].state_dict() if own not in k}
        missing = sorted(needed - set(given))
        if missing:
            raise ValueError(
                f"base_from: {hparams['base_from']} lacks {missing[0]!r} and "
                f"{len(missing) - 1} others; expected the save folder of a "
                "training of this model"
            )
        # Without adapters: those of this run stay as they are.
        hparams["model"].load_state_dict({k: given[k] for k in needed})
    for name, path in hparams["adapters_from"].items():
        adapters.load_adapter(path, name)


def adapter_prefix(model, adapters):
    """Return how names of the adapters' weights begin."""
    (name,) = (n for n, m in model.named_modules() if m is adapters)
    return f"{name}."


def choose_parameters(hparams):
    """Make what the row adds to the model, and unfreeze what it trains.

    Returns what is put in use: an adapter's name, `"combined"`, or None for the
    base alone.
    """
    row, adapters = hparams["row"], hparams["adapters"]
    learn = list(hparams["learn"] or hparams["tasks"])
    # New weights must not depend on where a killed run was started again.
    seed_random_numbers(hparams["seed"], hparams["training_name"])
    # All of it: what is in front of and behind the encoder, too.
    hparams["model"].requires_grad_(False)
    if row in hparams["compositions"]:
        settings = hparams["compositions"][row]
        adapters.set_combination(settings["combination"], names=learn)
        adapters.train_composition(MODES[settings["mode"]])
    elif row in ADAPTER_ROWS:
        adapters.train_extraction(learn[0])
    elif row == "shared_adapter":
        adapters.add_adapter(SHARED, hparams["shared_bottleneck"])
        adapters.train_extraction(SHARED)
    elif row == "lora":
        adapters.remove()
        hparams["modules"]["model"] = hparams["model"] = AdaptedModel(
            hparams["model"],
            adapter_class=LoRA,
            all_linear=True,
            adapter_kwargs={"rank": hparams["lora_rank"]},
        )
    elif row in hparams["training"]:
        hparams["model"].requires_grad_(True)
        adapters.requires_grad_(False)
        adapters.use(None)
    else:
        raise ValueError(
            f"row: {row!r}, expected one of "
            f"{', '.join({**hparams['training'], **hparams['compositions']})}"
        )
    return adapters.in_use


def count_added(hparams):
    """Return how many parameters the row adds to the base, or changes in it."""
    if hparams["row"] in hparams["compositions"]:
        counts, tasks = hparams["adapters"].count_parameters(), hparams["tasks"]
        used = len(hparams["learn"] or tasks)
        return counts["adapters"] * used // len(tasks) + counts["combination"]
    parameters = hparams["model"].parameters()
    return sum(p.numel() for p in parameters if p.requires_grad)


def frozen_weights(model):
    """Return copies of all weights that are not trained."""
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    state = model.state_dict()
    return {n: t.cpu().clone() for n, t in state.items() if n not in trained}


def check_frozen(model, frozen):
    """Raise an error if a frozen weight has changed."""
    state = model.state_dict()
    for name, tensor in frozen.items():
        if not torch.equal(state[name].cpu(), tensor):
            raise RuntimeError(f"{name} was frozen and has changed")


def measure_tasks(brain, tests):
    """Test on every task.

    Returns `{task: WER}` and, of a fusion, `{task: [layers][adapters]}`: the
    mean attention.
    """
    wer, attention = {}, {}
    for task, loader in tests.items():
        brain.evaluate(loader)
        wer[task] = brain.report.wer
        if brain.attention:
            total = sum(count for count, _ in brain.attention)
            mean = sum(count * a for count, a in brain.attention) / total
            attention[task] = mean.tolist()
    return wer, attention


def train(argv):
    """Train and test the model of a command line; study.py calls it as well."""
    # CLI
    hparams_file, run_opts, overrides = sb.parse_arguments(argv)
    with open(hparams_file, encoding="utf-8") as fin:
        hparams = load_hyperpyyaml(fin, overrides)
    hparams.setdefault("noprogressbar", not is_watched())

    sb.create_experiment_directory(
        experiment_directory=hparams["output_folder"],
        hyperparams_to_save=hparams_file,
        overrides=overrides,
        save_env_desc=hparams["save_env_desc"],
    )

    # Data preparation
    prepare(hparams)
    row, output = hparams["row"], hparams["output_folder"]
    # A plain mean of adapters has no settings: there is nothing to train.
    settings = hparams["training"].get(row, {"steps": 0, "lr": 0.0})
    steps, lr = settings["steps"], settings["lr"]
    if row == "base" and hparams["base_from"]:
        steps = 0  # another run's base, to be measured
    train_loader, valid_loader, tests = dataio_prepare(hparams, steps)

    # The model: what it starts from, and what is trained
    adapters = hparams["adapters"]
    adapters.freeze(hparams["normalize"])
    load_start(hparams)
    in_use = choose_parameters(hparams)
    frozen = frozen_weights(hparams["model"])
    trainable = any(p.requires_grad for p in hparams["model"].parameters())
    if trainable and row not in hparams["training"]:
        raise ValueError(f"training: no steps and lr for row {row!r}")
    # What the command line says goes first: --precision fp32
    hparams["precision"] = choose_precision(
        hparams["train_precision"], run_opts
    )

    if train_loader is not None:
        for name, recoverable in (
            ("model", hparams["model"]),
            ("dataloader-TRAIN", train_loader),
        ):
            hparams["checkpointer"].add_recoverable(name, recoverable)

    asr_brain = ASR(
        modules=hparams["modules"],
        opt_class=lambda parameters: hparams["opt_class"](parameters, lr=lr),
        hparams=hparams,
        run_opts=run_opts,
        checkpointer=hparams["checkpointer"],
    )
    if in_use == "combined":
        combination = adapters.layers[0].combination
        if isinstance(combination, AudioAdapterFusion):
            asr_brain.fusion = combination

    # Training
    seconds, about = 0.0, os.path.join(output, "training.json")
    if train_loader is not None:
        steps = optimizer_steps(
            asr_brain, train_loader, hparams["number_of_epochs"]
        )
        asr_brain.hparams.lr_annealing = hparams["make_lr_annealing"](
            initial_value=lr,
            num_warmup_steps=round(hparams["warmup_share"] * steps),
            num_training_steps=steps,
        )
        asr_brain.checkpointer.add_recoverable(
            "lr_annealing", asr_brain.hparams.lr_annealing
        )
        start = time.perf_counter()
        asr_brain.fit(hparams["epoch_counter"], train_loader, valid_loader)
        seconds = time.perf_counter() - start
    # It stays as it is if the model is tested again on other data.
    if not os.path.exists(about):
        write_json(about, {"trained": count_added(hparams), "seconds": seconds})

    # Testing
    wer, attention = measure_tasks(asr_brain, tests)
    if in_use is not None:
        check_frozen(hparams["model"], frozen)
    if in_use == "combined":
        adapters.save_combination(
            os.path.join(output, "combination.safetensors")
        )
    elif in_use is not None:
        adapters.save_adapter(
            in_use, os.path.join(output, "adapter.safetensors")
        )
    write_json(
        os.path.join(output, f"{hparams['report_on']}.json"),
        {"wer": wer, "attention": attention, **read_json(about)},
    )


if __name__ == "__main__":
    train(sys.argv[1:])
