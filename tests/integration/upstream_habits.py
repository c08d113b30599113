"""Small recipes with the habits of SpeechBrain's own, each copied from one.

Their Python stays as it is; a test changes their YAML, as a user would. Run on
one Linear layer, so that a training takes a second.
"""

import io
from pathlib import Path

import speechbrain as sb
import torch
from checks import law, weights
from hyperpyyaml import load_hyperpyyaml
from speechbrain.utils.checkpoints import average_checkpoints

YAML = """
seed: 7
__set_seed: !apply:speechbrain.utils.seed_everything [!ref <seed>]
output_folder: !PLACEHOLDER
save_folder: !ref <output_folder>/save
number_of_epochs: 3
stage_one_epochs: 2
avg_checkpoints: 3
normalize: !new:speechbrain.processing.features.InputNormalization
    norm_type: global
    update_until_epoch: 4
epoch_counter: !new:speechbrain.utils.epoch_loop.EpochCounter
    limit: !ref <number_of_epochs>
encoder: !new:torch.nn.Linear {in_features: 3, out_features: 4}
output: !new:torch.nn.Linear {in_features: 4, out_features: 1}
modules:
    encoder: !ref <encoder>
    output: !ref <output>
    normalize: !ref <normalize>
model: !new:torch.nn.ModuleList
    - [!ref <encoder>, !ref <output>]
opt_class: !name:torch.optim.Adam {lr: 0.05}
SGD: !name:torch.optim.SGD {lr: 0.05, momentum: 0.9}
recoverables:
    model: !ref <model>
    normalizer: !ref <normalize>
    counter: !ref <epoch_counter>
"""

PLAIN = """
checkpointer: !new:speechbrain.utils.checkpoints.Checkpointer
    checkpoints_dir: !ref <save_folder>
    recoverables: !ref <recoverables>
"""

EDITING = """
base: !PLACEHOLDER
normalizers: base
rule: !new:speechbrain_taskarith.vectors.TaskArithmetic {scale: 0.4}
checkpointer: !new:speechbrain_taskarith.vectors.EditingCheckpointer
    checkpoints_dir: !ref <save_folder>
    recoverables: !ref <recoverables>
    edited: model
    base: !ref <base>
    normalizers: !ref <normalizers>
    rule: !ref <rule>
"""

PRETRAINER = """
source: !PLACEHOLDER
pretrainer: !new:speechbrain_taskarith.vectors.TaskVectorPretrainer
    collect_in: !ref <output_folder>/collected
    loadables: {model: !ref <model>, normalizer: !ref <normalize>}
    paths: {model: !ref <source>, normalizer: !ref <source>}
"""


class Recipe(sb.Brain):
    """Saves in validation and tests the best, as most recipes do."""

    def compute_forward(self, batch, stage):
        """Normalise, encode."""
        x = self.modules.normalize(
            batch[0], epoch=self.hparams.epoch_counter.current
        )
        return self.modules.output(torch.tanh(self.modules.encoder(x)))

    def compute_objectives(self, predictions, batch, stage):
        """Squared error."""
        return (predictions.squeeze(-1) - batch[1]).square().mean()

    def on_stage_end(self, stage, stage_loss, epoch=None):
        """Save the epochs."""
        if stage == sb.Stage.VALID:
            self.checkpointer.save_and_keep_only(
                meta={"ACC": -float(stage_loss), "epoch": epoch},
                max_keys=["ACC"],
                num_to_keep=self.hparams.avg_checkpoints,
            )
        if stage == sb.Stage.TEST:
            self.tested = {
                name: tensor.clone()
                for name, tensor in self.hparams.model.state_dict().items()
            }
            self.test_loss = float(stage_loss)


class Averages(Recipe):
    """Tests the mean of checkpoints and keeps it: LibriSpeech/transformer."""

    def on_evaluate_start(self, max_key=None, min_key=None):
        """Load the mean."""
        super().on_evaluate_start()
        ckpts = self.checkpointer.find_checkpoints(
            max_key=max_key, min_key=min_key
        )
        ckpt = average_checkpoints(ckpts, recoverable_name="model")
        self.hparams.model.load_state_dict(ckpt, strict=True)
        self.hparams.model.eval()

    def on_stage_end(self, stage, stage_loss, epoch=None):
        """Keep the mean, delete the rest."""
        super().on_stage_end(stage, stage_loss, epoch)
        if stage == sb.Stage.TEST:
            self.checkpointer.save_and_keep_only(
                meta={"ACC": 1.1, "epoch": epoch},
                max_keys=["ACC"],
                num_to_keep=1,
            )


class Unregistered(Recipe):
    """Has optimizers that no checkpointer knows: IWSLT22_lowresource."""

    def init_optimizers(self):
        """Two optimizers, neither is registered."""
        self.optimizers_dict = {
            "encoder": self.opt_class(self.hparams.encoder.parameters()),
            "output": self.opt_class(self.hparams.output.parameters()),
        }


class SwitchesOptimizer(Averages):
    """Recovers a second time when it fits: Fisher-Callhome-Spanish."""

    def on_fit_start(self):
        """Recover again where the second optimizer is in use."""
        super().on_fit_start()
        stage_one = self.hparams.stage_one_epochs
        if self.hparams.epoch_counter.current > stage_one:
            current = self.optimizer
            self.use_sgd()
            if "momentum" not in current.param_groups[0]:
                return
            self.checkpointer.recover_if_possible()

    def on_fit_batch_start(self, batch, should_step):
        """Go over to the second optimizer."""
        stage_one = self.hparams.stage_one_epochs
        if self.hparams.epoch_counter.current > stage_one and not isinstance(
            self.optimizer, torch.optim.SGD
        ):
            self.use_sgd()

    def use_sgd(self):
        """Replace the registered optimizer."""
        self.optimizer = self.hparams.SGD(self.modules.parameters())
        self.optimizers_dict = {"opt_class": self.optimizer}
        self.checkpointer.add_recoverable("optimizer", self.optimizer)


class Whisper(Recipe):
    """Gives `load_collected` a device: CommonVoice/train_with_whisper."""


class RecoversBefore(Recipe):
    """Recovers outside of any method of the Brain: MEDIA."""


def data(seed):
    """Return batches of features and what to predict from them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4, 8, 5, 3, generator=generator) + 2
    batches = [(batch, batch.sum(-1) * 0.3 + seed) for batch in x]
    return torch.utils.data.DataLoader(batches, batch_size=None)


def run(brain_class, yaml, folder, seed=1, run_opts=None, **overrides):
    """Be a recipe's train.py; return its Brain.

    Arguments
    ---------
    brain_class : type
        One of the classes above.
    yaml : str
        Its hparams file.
    folder : pathlib.Path
        Its output folder.
    seed : int
        Of the data; domains differ by it.
    run_opts : dict or RunOptions or None
        As on the command line, e.g. `{"test_only": True}`.
    **overrides : object
        Values of the YAML.
    """
    hparams = load_hyperpyyaml(
        io.StringIO(yaml), {"output_folder": str(folder), **overrides}
    )
    if run_opts is None or isinstance(run_opts, dict):
        quiet = {"device": "cpu", "noprogressbar": True}
        run_opts = {**quiet, **(run_opts or {})}
    brain = brain_class(
        modules=hparams["modules"],
        opt_class=hparams["opt_class"],
        hparams=hparams,
        run_opts=run_opts,
        checkpointer=hparams["checkpointer"],
    )
    if "pretrainer" in hparams:
        hparams["pretrainer"].collect_files()
        hparams["pretrainer"].load_collected(
            *[brain.device] * (brain_class is Whisper)
        )
    if brain_class is RecoversBefore:
        brain.checkpointer.recover_if_possible()
    brain.fit(hparams["epoch_counter"], data(seed), data(seed + 100))
    for test in (200, 300):
        brain.evaluate(data(seed + test), max_key="ACC")
    return brain


def assert_law(folder, base, scale, name="model"):
    """Assert the law for every checkpoint that a folder lists.

    Returns `{checkpoint's name: fine-tuned weights}`.
    """
    found = {}
    for path in sorted(Path(folder).glob("CKPT+*")):
        if (path / "CKPT.yaml").exists():
            law(path, base, name, scale)
            found[path.name] = weights(path / f"{name}.finetuned.ckpt")
    assert found, f"{folder} lists no checkpoint"
    return found
