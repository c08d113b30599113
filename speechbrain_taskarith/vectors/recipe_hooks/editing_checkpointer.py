"""Editing inside SpeechBrain's checkpointing: for unchanged recipes.

A recipe's YAML names `EditingCheckpointer` in place of `Checkpointer`; the run
then evaluates and saves the edited model.
"""

from pathlib import Path

import torch
from speechbrain.processing.features import InputNormalization
from speechbrain.utils.checkpoints import (
    DEFAULT_LOAD_HOOKS,
    DEFAULT_SAVE_HOOKS,
    get_default_hook,
    torch_recovery,
    torch_save,
)
from speechbrain.utils.distributed import if_main_process
from speechbrain.utils.logger import get_logger

from speechbrain_taskarith.vectors.checks import one_of
from speechbrain_taskarith.vectors.model_card import ModelCard
from speechbrain_taskarith.vectors.recipe_hooks.atomic_checkpointer import (
    AtomicCheckpointer,
)
from speechbrain_taskarith.vectors.rules.base import check_rule
from speechbrain_taskarith.vectors.states.readers import as_state, open_state
from speechbrain_taskarith.vectors.states.speechbrain_folder import (
    FINETUNED,
    META_KEY,
    find_checkpoint_folder,
    plain,
    read_checkpoint_meta,
)
from speechbrain_taskarith.vectors.states.state import short
from speechbrain_taskarith.vectors.states.writers import save_state
from speechbrain_taskarith.vectors.task_vector import TaskVector

logger = get_logger(__name__)


class EditingCheckpointer(AtomicCheckpointer):
    """A `Checkpointer` that keeps `base + scale * rule(fine-tuned - base)`.

    One step of sequential editing (Kulshreshtha et al. 2024, arXiv 2406.17935)
    by a recipe's YAML alone: fine-tuning starts from `base` and runs on
    un-edited weights; what is evaluated, and what others load, is edited.

    In each checkpoint `<edited>.ckpt` holds the edited weights, so stock
    tools (`Checkpointer`, `Pretrainer`, checkpoint averaging) see nothing
    else, and `<edited>.finetuned.ckpt` those before the edit.

    - *Fitting* goes on from the fine-tuned weights, so a resumed run never
      edits twice; where there is no checkpoint yet, the base is loaded, with
      its input normalisers. A run is taken to fit between the registration
      of an optimizer (`Brain.init_optimizers`) and the recovery that
      follows (`Brain.on_fit_start`); say `recover_if_possible(weights=
      "finetuned")` in a loop that registers none.
    - *Everything else* that loads a checkpoint (`Brain.evaluate`) gets the
      edited weights. Rule or scale may be changed in the YAML after
      training: the edit is then repeated from the fine-tuned weights.
    - Scores in validation during training are those of the fine-tuned
      weights: they choose when to stop fine-tuning, as in the paper.
    - Running statistics and integer buffers in the edited weights are the
      base's; see `reestimate_statistics`.

    Saving is atomic (`AtomicCheckpointer`): a run that is killed at any
    moment leaves whole checkpoints only.

    Arguments
    ---------
    checkpoints_dir, recoverables, **arguments : object
        As for `Checkpointer`.
    edited : str or list of str
        The recoverables that are edited; plain modules.
    base : str, pathlib.Path or dict
        What fine-tuning starts from: a `CKPT+` folder, a save folder (its
        newest checkpoint, or by `base_min_key`/`base_max_key`), or any file
        that holds weights; `{recoverable: path}` for several.
    rule : Rule
        The merging rule, for the one vector.
    scale : float, dict or None
        Share of the vector; None takes the rule's.
    include, exclude : str or sequence of str
        Patterns of the parameters that are edited; the others stay the
        base's.
    from_base : sequence of str or None
        Other recoverables to load from the base's folder at the start; None
        takes those that are an `InputNormalization`, which then go on
        counting from the base's statistics.
    base_min_key, base_max_key : str or None
        Score that chooses among the checkpoints of the base's save folder.

    Example
    -------
    >>> from speechbrain_taskarith.vectors import TaskArithmetic, save_state
    >>> folder = getfixture("tmpdir")
    >>> model = torch.nn.Linear(1, 1, bias=False)
    >>> base = save_state({"weight": torch.ones(1, 1)}, folder / "us.ckpt")
    >>> checkpointer = EditingCheckpointer(
    ...     folder / "save",
    ...     {"model": model},
    ...     edited="model",
    ...     base=base,
    ...     rule=TaskArithmetic(scale=0.5),
    ... )
    >>> # As Brain.fit does:
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> checkpointer.add_recoverable("optimizer", optimizer)
    >>> checkpointer.recover_if_possible()
    >>> model.weight.item()
    1.0
    >>> _ = torch.nn.init.constant_(model.weight, 3.0)
    >>> checkpointer.save_and_keep_only(meta={"WER": 5.0})
    >>> # As Brain.evaluate does:
    >>> _ = checkpointer.recover_if_possible(min_key="WER")
    >>> model.weight.item()
    2.0
    """

    def __init__(
        self,
        checkpoints_dir,
        recoverables=None,
        *,
        edited="model",
        base,
        rule,
        scale=None,
        include=("*",),
        exclude=(),
        from_base=None,
        base_min_key=None,
        base_max_key=None,
        **arguments,
    ):
        super().__init__(checkpoints_dir, recoverables, **arguments)
        self.edited = [edited] if isinstance(edited, str) else list(edited)
        self.rule, self.scale = check_rule(rule), scale
        self.include, self.exclude = include, exclude
        self.from_base = from_base
        self._base_path = base
        self._base_keys = {"min_key": base_min_key, "max_key": base_max_key}
        self._bases = {}
        self._weights = "edited"
        self._fitting = False
        self._saved = {}
        for name in self.edited:
            self._install_hooks(name)

    def add_recoverable(self, name, obj, *args, **kwargs):
        """As `Checkpointer.add_recoverable`; an optimizer announces fitting."""
        super().add_recoverable(name, obj, *args, **kwargs)
        if isinstance(obj, torch.optim.Optimizer):
            self._fitting = True
        # Checkpointer.__init__ comes here before `edited` is known.
        if name in getattr(self, "edited", ()):
            self._install_hooks(name)

    def recover_if_possible(
        self,
        importance_key=None,
        max_key=None,
        min_key=None,
        ckpt_predicate=None,
        weights=None,
    ):
        """As `Checkpointer.recover_if_possible`.

        `weights` is `"finetuned"`, `"edited"`, or None: as the class says.
        Returns None when there was no checkpoint: to fit, the base was
        loaded then.
        """
        if weights is None:
            weights = "finetuned" if self._fitting else "edited"
        self._fitting = False
        keys = (importance_key, max_key, min_key, ckpt_predicate)
        chosen = self.find_checkpoint(*keys)
        if chosen is not None:
            self.load_checkpoint(chosen, weights=weights)
        elif weights == "finetuned":
            self.load_base()
        else:
            logger.info("Would load a checkpoint here, but none found yet.")
        return chosen

    def load_checkpoint(self, checkpoint, weights="edited"):
        """As `Checkpointer`; `weights` is `"edited"` or `"finetuned"`."""
        if one_of("weights", weights, ("edited", "finetuned")) == "finetuned":
            self._check_same_base(checkpoint)
        self._weights = weights
        super().load_checkpoint(checkpoint)

    def load_base(self):
        """Load the base into the edited recoverables, strictly."""
        for name in self.edited:
            logger.info(f"Fine-tuning of {name} starts from {self.base(name)}")
            self._load_state(self.recoverables[name], self.base(name), name)
        folder = self._base_folder()
        for name, obj in self.recoverables.items():
            if self.from_base is None:
                wanted = isinstance(obj, InputNormalization)
            else:
                wanted = name in self.from_base
            if name in self.edited or not wanted:
                continue
            path = folder and folder / f"{name}.ckpt"
            if path is None or not path.exists():
                if self.from_base is not None:
                    raise FileNotFoundError(
                        f"from_base: {self._base_path} holds no {name}.ckpt"
                    )
                logger.warning(
                    f"{name} is not beside the base {self._base_path}: its "
                    "statistics start from zero, not from the base's"
                )
                continue
            hook = self.custom_load_hooks.get(name) or get_default_hook(
                obj, DEFAULT_LOAD_HOOKS
            )
            hook(obj, path, True)

    def base(self, name):
        """Return what a recoverable is fine-tuned from, see `open_state`."""
        if name not in self._bases:
            path = self._base_path
            path = path[name] if isinstance(path, dict) else path
            if folder := self._checkpoint_of(path):
                base = open_state(folder, recoverable=name)
            else:
                base = open_state(path)
            base.verify()
            self._bases[name] = base
        return self._bases[name]

    def _start_saving(self):
        # A run that saves does not recover any more.
        self._fitting = False

    def _install_hooks(self, name):
        """Put our hooks in place of the recoverable's own."""
        hooks = {**self.custom_load_hooks, **self.custom_save_hooks}
        if name in hooks and not hasattr(hooks[name], "editing"):
            raise ValueError(
                f"edited recoverable {name!r} has custom hooks; an edited one "
                "is saved and loaded as a plain state dict"
            )
        obj = self.recoverables.get(name)
        if obj is None:
            return
        if (
            not isinstance(obj, torch.nn.Module)
            or get_default_hook(obj, DEFAULT_SAVE_HOOKS) is not torch_save
        ):
            raise ValueError(
                f"edited recoverable {name!r} is a {type(obj).__name__} that "
                "does not save a plain state dict; name a plain "
                "torch.nn.Module (for adapters see TaskVector.from_lora)"
            )

        def save(obj, path):
            if if_main_process():
                self._save_edited(name, obj, Path(path))

        def load(obj, path, end_of_epoch):
            self._load_edited(name, obj, Path(path), end_of_epoch)

        save.editing = True
        self.custom_save_hooks[name] = save
        self.custom_load_hooks[name] = load

    def _save_edited(self, name, obj, path):
        finetuned = as_state(obj)
        edited = as_state(self._edit(name, finetuned))
        save_state(edited, path)
        save_state(finetuned, _finetuned_path(path))
        self._saved[name] = (finetuned.fingerprint, edited.fingerprint)

    def _load_edited(self, name, obj, path, end_of_epoch):
        finetuned = _finetuned_path(path)
        # Without the second file, it was saved by a plain Checkpointer.
        source = finetuned if finetuned.exists() else path
        if self._weights == "finetuned":
            torch_recovery(obj, source, end_of_epoch)
        elif source == finetuned and self._is_up_to_date(name, path.parent):
            torch_recovery(obj, path, end_of_epoch)
        else:
            logger.info(f"Editing {source} again by the present settings")
            self._load_state(obj, self._edit(name, open_state(source)), name)

    def _edit(self, name, finetuned):
        base = self.base(name)
        vector = TaskVector.between(
            base, finetuned, include=self.include, exclude=self.exclude
        )
        vector = self.rule.combine([vector], base=base)
        if (scale := self.scale) is None:
            scale = self.rule.scale_for(vector)
        return vector.apply(base, scale, any_base=True)

    def _settings(self, name):
        """Return what an edit depends on, in plain types."""
        return plain(
            {
                "rule": self.rule.describe(),
                "scale": self.scale,
                "include": self.include,
                "exclude": self.exclude,
                "base": self.base(name).label,
                "base_fingerprint": self.base(name).fingerprint,
            },
            "settings",
        )

    def _is_up_to_date(self, name, folder):
        recorded = _editing_of(read_checkpoint_meta(folder)).get(name)
        try:
            now = self._settings(name)
        except FileNotFoundError:
            # The base is gone, as on another machine: there is nothing else
            # than what was saved.
            return True
        # The base's path may change; its fingerprint is compared.
        return recorded is not None and recorded | {"base": now["base"]} == now

    def _check_same_base(self, checkpoint):
        for name in self.edited:
            recorded = _editing_of(checkpoint.meta).get(name)
            if recorded is None:
                continue
            base, expected = self.base(name), recorded["base_fingerprint"]
            if base.fingerprint != expected:
                raise ValueError(
                    f"{checkpoint.path}: {name!r} was fine-tuned from "
                    f"{recorded['base']} ({short(expected)}), the base is now "
                    f"{base.label} ({short(base.fingerprint)}). Give the first "
                    "base again, or another checkpoints_dir"
                )

    @staticmethod
    def _load_state(obj, state, label):
        # Strict, and onto whatever device the module is on.
        try:
            obj.load_state_dict({name: state[name] for name in state})
        except RuntimeError as error:
            where = getattr(state, "label", "the edited state")
            raise ValueError(
                f"{label}: {where} does not fit the model: {error}"
            ) from None

    def _checkpoint_of(self, path):
        """Return the `CKPT+` folder that a path names, or None."""
        path = Path(path)
        if (path / "CKPT.yaml").exists() or any(path.glob("CKPT+*")):
            return find_checkpoint_folder(path, **self._base_keys)
        if not path.exists():
            raise FileNotFoundError(
                f"{path}: no such file or folder; it is the base to "
                "fine-tune from"
            )
        return None

    def _base_folder(self):
        if isinstance(self._base_path, dict):
            return None
        folder = self._checkpoint_of(self._base_path)
        beside = Path(self._base_path).parent
        if folder is None and (beside / "CKPT.yaml").exists():
            return beside
        return folder

    def _complete(self, folder, saved):
        parents = []
        for name in self.edited:
            parents += [
                ModelCard.parent(f"base of {name}", self.base(name)),
                {
                    "role": f"fine-tuned {name}",
                    "path": f"{name}{FINETUNED}.ckpt",
                    "fingerprint": self._saved[name][0],
                },
            ]
        ModelCard(
            title="Edited checkpoint",
            fingerprint=", ".join(self._saved[n][1] for n in self.edited),
            parents=parents,
            rule=self.rule,
            scale=self.scale,
            wer=[
                {"score": key, "value": value}
                for key, value in saved.meta.items()
                if isinstance(value, float) and key != "unixtime"
            ],
            notes=[
                "Scores were measured during fine-tuning, before the edit.",
                f"Weights before the edit: {FINETUNED.lstrip('.')} files.",
            ],
        ).save(folder)
        return {"editing": {name: self._settings(name) for name in self.edited}}


def _finetuned_path(path):
    return path.with_name(f"{path.stem}{FINETUNED}{path.suffix}")


def _editing_of(meta):
    ours = meta.get(META_KEY)
    return ours.get("editing", {}) if isinstance(ours, dict) else {}
