"""Measures sums of task vectors on manifests; nothing is measured twice."""

import importlib
from dataclasses import dataclass, field
from pathlib import Path

import speechbrain as sb
from common.precision import choose_precision
from hyperpyyaml import load_hyperpyyaml
from ruamel.yaml import YAML
from scoring import recognised_once

HERE = Path(__file__).parent.resolve()
WHISPER = HERE.parents[2] / "FilletsNG" / "ASR" / "whisper"


@dataclass(frozen=True)
class Kind:
    """A kind of model, and the recipe that trains it.

    Arguments
    ---------
    script : str
        Module with `train`, `ASR`, `read_rows` and `make_dataset`.
    hparams : pathlib.Path
        Its hparams file.
    network : str
        Key of the network in it; also its name in the checkpoints.
    hub : str or None
        Key of the public weights in it.
    options : dict
        What every training on a manifest gives to it.
    """

    script: str
    hparams: Path
    network: str
    hub: str | None = None
    options: dict = field(default_factory=dict)

    @property
    def recipe(self):
        """Return the module that trains."""
        return importlib.import_module(self.script)

    def parse(self, more):
        """Read options of its `train.py`; returns run options, overrides."""
        _, run_opts, given = sb.parse_arguments([str(self.hparams), *more])
        return run_opts, YAML(typ="safe").load(given) or {}


#: Whisper of any size, by the recipe of another corpus.
WHISPER_KIND = Kind(
    "whisper_train",
    WHISPER / "hparams" / "train.yaml",
    "whisper",
    "whisper_hub",
    {
        "data_folder": ".",
        "data_root": ".",
        "prepare": None,
        "valid_csv": None,
        "test_csv": None,
        "language": "en",
    },
)


class Measure:
    """Measures states of one network on manifests.

    Arguments
    ---------
    kind : Kind
        The network's kind.
    overrides : dict
        Values that replace those of the hparams file.
    more : list of str
        Further ones and run options, as `train.py` takes them.
    folder : str or pathlib.Path
        Where what was measured is kept: a later run reads it from there.
    """

    def __init__(self, kind, overrides, more, folder):
        run_opts, given = kind.parse(more)
        with open(kind.hparams, encoding="utf-8") as stream:
            self.hparams = load_hyperpyyaml(
                stream, {**kind.options, **given, **overrides}
            )
        self.recipe, self.network = kind.recipe, self.hparams[kind.network]
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        if kind.network == "whisper":
            prompt = self.network.tokenizer.prefix_tokens
            self.hparams["prompt_length"] = len(prompt)
        device = run_opts["device"]
        self.brain = listener(self.recipe.ASR)(
            modules=self.hparams["modules"],
            hparams=self.hparams,
            run_opts={
                "device": device,
                "eval_precision": self._precision(run_opts),
                "noprogressbar": True,
            },
        )
        self._data = {}

    def _precision(self, run_opts):
        """Return that of a test by the recipe's `train.py`."""
        if "eval_precision" in run_opts.overridden_args:
            return run_opts["eval_precision"]
        return choose_precision(self.hparams["train_precision"], run_opts)

    def state(self):
        """Return the weights at hand, as a training would start from them."""
        return {
            name: tensor.detach().cpu().clone()
            for name, tensor in self.network.state_dict().items()
        }

    def check(self, manifests):
        """Refuse manifests that could not be learned or recognised."""
        for manifest in manifests:
            self.recipe.read_rows(str(manifest), self.hparams)

    def dataset(self, manifest):
        """Read a manifest, the shortest utterance first."""
        key = str(manifest)
        if key not in self._data:
            rows = self.recipe.read_rows(key, self.hparams)
            data = self.recipe.make_dataset(rows, self.hparams)
            self._data[key] = data.filtered_sorted(sort_key="duration")
        return self._data[key]

    def __call__(self, name, state, manifest):
        """Recognise a manifest; returns `{references, hypotheses}` by ID.

        `name` says what the state is; `state` is a function that makes it,
        called only where this was not measured before.
        """

        def recognise():
            self.network.load_state_dict(state())
            self.brain.evaluate(
                self.dataset(manifest),
                test_loader_kwargs=self.hparams["test_loader_kwargs"],
            )
            return self.brain.references, self.brain.hypotheses

        return recognised_once(self.folder, name, manifest, recognise)


def listener(asr):
    """Return a recipe's Brain that counts, and writes nothing."""

    class Listener(asr):
        def on_stage_end(self, stage, stage_loss, epoch=None):
            self.score()

    return Listener
