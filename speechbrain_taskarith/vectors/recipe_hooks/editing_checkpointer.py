"""Editing inside SpeechBrain's checkpointing: for unchanged recipes.

A recipe's YAML names `EditingCheckpointer` in place of `Checkpointer`; the run
then evaluates and saves the edited model.
"""

import logging
from collections import deque
from functools import partial
from pathlib import Path

import torch
from speechbrain.utils.checkpoints import (
    DEFAULT_LOAD_HOOKS,
    DEFAULT_SAVE_HOOKS,
    get_default_hook,
    torch_save,
)
from speechbrain.utils.distributed import if_main_process

from speechbrain_taskarith.utils.training import running_methods
from speechbrain_taskarith.vectors.checks import one_of
from speechbrain_taskarith.vectors.checks import scale as checked_scale
from speechbrain_taskarith.vectors.recipe_hooks.atomic_checkpointer import (
    AtomicCheckpointer,
)
from speechbrain_taskarith.vectors.recipe_hooks.edits import (
    EditedRecoverable,
    editing_of,
)
from speechbrain_taskarith.vectors.recipe_hooks.normalizers import (
    MODES,
    EditedNormalizer,
    hold,
    normalizers_of,
    read_statistics,
    release,
    statistics_of,
)
from speechbrain_taskarith.vectors.recipe_hooks.run_base import RunBase
from speechbrain_taskarith.vectors.rules.base import check_rule
from speechbrain_taskarith.vectors.sharing.card import ModelCard
from speechbrain_taskarith.vectors.states.speechbrain_folder import (
    FINETUNED,
)

logger = logging.getLogger(__name__)

# What the methods of a Brain work on.
_STAGES = {
    "fit": "finetuned",
    "on_fit_start": "finetuned",
    "evaluate": "edited",
    "on_evaluate_start": "edited",
}


class EditingCheckpointer(AtomicCheckpointer):
    """A `Checkpointer` that keeps `base + scale * rule(fine-tuned - base)`.

    One step of sequential editing (Kulshreshtha et al. 2024, arXiv 2406.17935)
    by a recipe's YAML alone: fine-tuning starts from `base` and runs on
    un-edited weights; what is evaluated, and what others load, is edited.

    In each checkpoint `<edited>.ckpt` holds the edited weights, so stock
    tools (`Checkpointer`, `Pretrainer`, checkpoint averaging) see nothing
    else, and `<edited>.finetuned.ckpt` those before the edit. It always
    holds that the first is the edit of the second, and that the second was
    made by an optimizer that started from the base (or is the base, or a mean
    of such).

    - *`Brain.fit`* starts from the base, or goes on from the fine-tuned
      weights of the newest checkpoint, whether the recipe registers its
      optimizers or not.
    - *`Brain.evaluate`*, and everything else that recovers, gets the edited
      weights. Rule or scale may be changed in the YAML after training: the
      edit is then repeated from the fine-tuned weights.
    - *Averages.* A recipe that loads the mean of the checkpoints which
      `find_checkpoints` gave it gets the edit of the mean of their fine-tuned
      weights. Edited weights that are saved (as recipes do at the end of a
      test) are saved as they are, with the fine-tuned ones they were made of.
    - *What is unknown is refused.* The class follows what the weights in
      memory are, through loads and optimizer steps. An optimizer that would
      train edited weights is refused at its first step, and saving weights
      that came from elsewhere or were changed is refused.
    - Scores in validation during training are those of the fine-tuned
      weights: they choose when to stop fine-tuning, as in the paper.
    - Running statistics and integer buffers in the edited weights are the
      base's; see `reestimate_statistics`. Adapters (`insert_adapters`) in an
      edited module stay as trained.
    - Label encoders and tokenizers in the save folders of base and run, and
      encoders among the recoverables, must number their tokens alike.

    Saving is atomic (`AtomicCheckpointer`): a run that is killed at any
    moment leaves whole checkpoints only. One process at a time, and one
    checkpointer in it, may write to a folder.

    Arguments
    ---------
    checkpoints_dir, recoverables, **arguments : object
        As for `Checkpointer`.
    edited : str or list of str
        The recoverables that are edited; plain modules.
    base : str, pathlib.Path or dict
        What fine-tuning starts from: a `CKPT+` folder, a save folder (its
        newest checkpoint, or by `base_min_key`/`base_max_key`), any file
        that holds weights, a Hugging Face folder or hub name (see
        `open_base`); `{recoverable: base}` for several. `"start"`: the
        weights as they are when training starts, as built or pre-trained;
        they are kept once, in the folder `start` beside the checkpoints.
    rule : Rule
        The merging rule, for the one vector.
    scale : float, dict or None
        Share of the vector; None takes the rule's.
    include, exclude : str or sequence of str
        Patterns of the parameters that are edited; the others stay the
        base's.
    normalizers : str
        For recoverables that are an `InputNormalization`. `"base"`: they keep
        the base's statistics, in training too. `"pooled"`: they go on
        counting from the base's. `"scaled"`: they go on counting, and
        `base + scale * (fine-tuned - base)` of the statistics is kept, with
        `<name>.finetuned.ckpt` beside it. Where the base has no statistics,
        the run's own are counted and kept as they are.
    from_base : sequence of str or None
        Other recoverables to load from the base's folder at the start; None
        takes those that are an `InputNormalization`.
    base_min_key, base_max_key : str or None
        Score that chooses among the checkpoints of the base's save folder.

    Raises
    ------
    ValueError
        At the start, before anything is loaded: a base or tokens that do not
        fit, another base, rule or scale than the run began with, a rule that
        does not take one vector, a pattern that matches nothing.
    RuntimeError
        Weights that are not known to come from the base; another checkpointer
        that writes to the folder.

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
    >>> checkpointer.recover_if_possible(weights="finetuned")
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
        normalizers="base",
        from_base=None,
        base_min_key=None,
        base_max_key=None,
        **arguments,
    ):
        self._parts, self._held = {}, {}
        self._handed_out = deque(maxlen=4)
        self.edited = [edited] if isinstance(edited, str) else list(edited)
        self.rule = check_rule(rule, vectors=1)
        self.scale = None if scale is None else checked_scale(scale)
        self.include, self.exclude = include, exclude
        self.normalizers = one_of("normalizers", normalizers, MODES)
        keys = {"min_key": base_min_key, "max_key": base_max_key}
        self._base = RunBase(
            base, self.edited, from_base, keys, lambda: self.checkpoints_dir
        )
        self._weights, self._fitting = "edited", False
        if normalizers == "scaled":
            self._one_scale()
        super().__init__(checkpoints_dir, recoverables, **arguments)
        for name in self.edited:
            if name in self.recoverables:
                self._adopt_module(name)

    def add_recoverable(self, name, obj, *args, **kwargs):
        """As `Checkpointer.add_recoverable`; an optimizer announces fitting."""
        super().add_recoverable(name, obj, *args, **kwargs)
        # For loops without a Brain.
        if isinstance(obj, torch.optim.Optimizer):
            self._fitting = True

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
        Without a Brain, None takes the fine-tuned ones if an optimizer has
        just been registered and no key is given. Returns None when there was
        no checkpoint: to fit, the base was loaded then.
        """
        if weights is None:
            by_key = importance_key or max_key or min_key
            fitting = self._fitting and not by_key
            weights = _stage() or ("finetuned" if fitting else "edited")
        one_of("weights", weights, ("edited", "finetuned"))
        self._fitting = False
        keys = (importance_key, max_key, min_key, ckpt_predicate)
        chosen = self.find_checkpoint(*keys)
        if weights == "finetuned":
            self._own_folder()
        if chosen is not None:
            self.load_checkpoint(chosen, weights=weights)
            return chosen
        kinds = {part.contents.kind for part in self._parts.values()}
        trained = bool(kinds) and kinds <= {"base", "finetuned"}
        if weights == "finetuned" and not trained:
            self.load_base()
        elif trained:
            logger.warning(
                "No checkpoint was found: the weights in memory, fine-tuned "
                "and not edited, are used"
            )
        else:
            logger.info("Would load a checkpoint here, but none found yet.")
        return None

    def load_checkpoint(self, checkpoint, weights=None):
        """As `Checkpointer`; `weights` is `"edited"` or `"finetuned"`.

        None: as the class says.
        """
        weights = weights or _stage() or "edited"
        one_of("weights", weights, ("edited", "finetuned"))
        self._prepare()
        if weights == "finetuned":
            self._base.check_tokens(self.recoverables)
            self._check_same_run(checkpoint)
            self._check_edits()
        self._weights = weights
        self._held.clear()
        super().load_checkpoint(checkpoint)
        if weights == "finetuned":
            self._hold_normalizers()

    def load_base(self):
        """Load the base into the edited recoverables, strictly."""
        if self._base.is_start:
            begun = bool(self.list_checkpoints())
            self._base.keep_start(self.recoverables, begun)
        self._prepare()
        self._base.check_tokens(self.recoverables)
        files = self._base.files(self.recoverables)
        # All of it is opened and checked before anything is loaded.
        self._check_edits()
        for part in self._parts.values():
            logger.info(
                f"Fine-tuning of {part.name} starts from {part.base.label}"
            )
        for part in self._parts.values():
            part.load_base()
        for name in files.keys() - self._parts.keys():
            obj = self.recoverables[name]
            hook = self.custom_load_hooks.get(name) or get_default_hook(
                obj, DEFAULT_LOAD_HOOKS
            )
            hook(obj, files[name], True)
        self._hold_normalizers()

    def base(self, name):
        """Return what a recoverable is fine-tuned from, see `open_base`."""
        self._prepare()
        return self._parts[name].base

    def find_checkpoints(self, *args, **kwargs):
        """As `Checkpointer.find_checkpoints`."""
        found = super().find_checkpoints(*args, **kwargs)
        # What a recipe may average and load next.
        self._handed_out.appendleft(list(found))
        return found

    # -- the recoverables that are edited --------------------------------------

    def _prepare(self):
        """Look at the recoverables, which may be added at any time."""
        for name in self.edited:
            if name not in self.recoverables:
                raise KeyError(
                    f"edited: there is no recoverable {name!r}; there are "
                    f"{', '.join(self.recoverables)}"
                )
            self._adopt_module(name)
        if self.normalizers != "scaled":
            return
        for name, obj in normalizers_of(self.recoverables).items():
            if self._base.has_statistics(name):
                self._adopt(
                    name, obj, EditedNormalizer, scale=self._one_scale()
                )
            elif name in self._parts:
                del self._parts[name]
                del self.custom_save_hooks[name], self.custom_load_hooks[name]

    def _adopt_module(self, name):
        obj = self.recoverables[name]
        if (
            not isinstance(obj, torch.nn.Module)
            or get_default_hook(obj, DEFAULT_SAVE_HOOKS) is not torch_save
        ):
            raise ValueError(
                f"edited recoverable {name!r} is a {type(obj).__name__} that "
                "does not save a plain state dict; name a plain "
                "torch.nn.Module (for adapters see TaskVector.from_lora)"
            )
        self._adopt(
            name,
            obj,
            EditedRecoverable,
            rule=self.rule,
            scale=self.scale,
            include=self.include,
            exclude=self.exclude,
        )

    def _adopt(self, name, obj, kind, **arguments):
        """Put our hooks in place of the recoverable's own."""
        hooks = (self.custom_save_hooks, self.custom_load_hooks)
        for hook in (hooks[0].get(name), hooks[1].get(name)):
            if hook is not None and not isinstance(hook, _Hook):
                raise ValueError(
                    f"edited recoverable {name!r} has custom hooks; an edited "
                    "one is saved and loaded as a plain state dict"
                )
        if name in self._parts and self._parts[name].module is obj:
            return
        self._parts[name] = kind(
            name,
            obj,
            partial(self._open_base, name),
            handed_out=lambda: self._handed_out,
            may_start=self._base.is_start,
            normalizers=self.normalizers,
            **arguments,
        )
        self.custom_save_hooks[name] = _Hook(self._save_part, name)
        self.custom_load_hooks[name] = _Hook(self._load_part, name)

    def _save_part(self, name, obj, path):
        if if_main_process():
            self._parts[name].save(Path(path))

    def _load_part(self, name, obj, path, end_of_epoch):
        self._parts[name].load(Path(path), end_of_epoch, self._weights)

    def _check_same_run(self, checkpoint):
        """Raise if fine-tuning would go on from what another run made."""
        recorded = editing_of(checkpoint.meta)
        if not recorded:
            logger.warning(
                f"{checkpoint.path} was saved without editing: its weights "
                f"are taken for fine-tuned from {self._base.source}"
            )
            return
        for part in self._parts.values():
            part.check_same_run(checkpoint.path, recorded)

    def _check_edits(self):
        """Raise now what the edits would raise after the training."""
        for part in self._parts.values():
            part.check_edit()

    def _open_base(self, name):
        part = self._parts[name]
        if isinstance(part, EditedNormalizer):
            return read_statistics(self._base.beside(name))
        return self._base.open(name, part.module)

    def _hold_normalizers(self):
        for name, obj in normalizers_of(self.recoverables).items():
            release(obj)
            if not self._base.has_statistics(name):
                logger.warning(
                    f"{name}: the base {self._base.source} has no statistics "
                    "of it; those of this run's data are counted and kept"
                )
            elif self.normalizers == "base":
                hold(obj)
                self._held[name] = statistics_of(obj).fingerprint

    # -- saving ----------------------------------------------------------------

    def _lose_folder(self, why):
        for part in self._parts.values():
            if part.contents.kind != "start":
                part.watch.forget(why)

    def _start_saving(self):
        # A run that saves does not recover any more.
        self._fitting = False
        self._prepare()
        for part in self._parts.values():
            part.check_savable()
        for name, fingerprint in self._held.items():
            if (
                statistics_of(self.recoverables[name]).fingerprint
                != fingerprint
            ):
                raise RuntimeError(
                    f"{name}: its statistics have changed though they were to "
                    "stay the base's. Nothing was written; choose "
                    "normalizers: pooled or scaled"
                )
        self._own_folder()

    def _complete(self, folder, saved):
        parts = self._parts.values()
        ModelCard(
            title="Edited checkpoint",
            fingerprint=", ".join(part.saved[1] for part in parts),
            parents=[parent for part in parts for parent in part.parents()],
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
                *(
                    f"Kept from the base: {name} of {part.name}."
                    for part in parts
                    for name in part.kept_extra
                ),
            ],
        ).save(folder)
        return {"editing": {part.name: part.entry() for part in parts}}

    def _one_scale(self):
        scale = self.scale
        if scale is None and not self.rule.scales_by_parameter():
            scale = self.rule.scale
        if not isinstance(scale, (int, float)):
            raise ValueError(
                "normalizers='scaled': the scale must be one number, not "
                f"{scale!r}; choose normalizers: base or pooled"
            )
        return float(scale)


class _Hook(partial):
    """Tells our hooks from a recipe's."""


def _stage():
    """Return what the nearest method of a Brain works on, or None.

    Recipes override hooks and forget to register optimizers, but
    everything that they train or test runs inside these methods.
    """
    return next((_STAGES[name] for name, _ in running_methods(_STAGES)), None)
