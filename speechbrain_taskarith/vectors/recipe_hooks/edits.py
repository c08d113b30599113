"""One recoverable that is edited: its base, its rule, and what it holds."""

from speechbrain.utils.checkpoints import torch_recovery
from speechbrain.utils.logger import get_logger

from speechbrain_taskarith.vectors.engine.inputs import MergeInputs, check_edit
from speechbrain_taskarith.vectors.engine.output import edit_in_memory
from speechbrain_taskarith.vectors.recipe_hooks.bases import load_base
from speechbrain_taskarith.vectors.recipe_hooks.provenance import (
    Contents,
    Watch,
    find_origin,
    is_adapter,
    mean_state,
    same_tensors,
    without_adapters,
)
from speechbrain_taskarith.vectors.states.names import differing_extra
from speechbrain_taskarith.vectors.states.pairing import module_names
from speechbrain_taskarith.vectors.states.readers import as_state, open_state
from speechbrain_taskarith.vectors.states.speechbrain_folder import (
    FINETUNED,
    META_KEY,
    plain,
    read_checkpoint_meta,
)
from speechbrain_taskarith.vectors.states.state import renamed, short
from speechbrain_taskarith.vectors.states.writers import save_state

logger = get_logger(__name__)


class EditedRecoverable:
    """A module whose checkpoints are `base + scale * rule(finetuned - base)`.

    Arguments
    ---------
    name : str
        The recoverable's.
    module : torch.nn.Module
        The recoverable.
    open_base : callable
        Returns the base as a state under the module's own names.
    rule, scale, include, exclude : object
        As for `EditingCheckpointer`.
    handed_out : callable
        Returns the lists of checkpoints that were given to the recipe.
    may_start : bool
        See `Watch`.
    normalizers : str
        How the run treats them; is kept with the settings.
    """

    # Whether running statistics are edited, see `TaskVector.between`.
    buffers = "base"

    def __init__(
        self,
        name,
        module,
        open_base,
        rule,
        scale=None,
        include=("*",),
        exclude=(),
        *,
        handed_out=tuple,
        may_start=False,
        normalizers="base",
    ):
        self.name, self.module = name, module
        self.rule, self.scale = rule, scale
        self.include, self.exclude = include, exclude
        self._open_base, self._base = open_base, None
        self._handed_out, self._normalizers = handed_out, normalizers
        self._told = False
        # Fingerprints of what was saved last: fine-tuned and edited. And
        # what of it is no weight, and not as fine-tuned.
        self.saved, self.kept_extra = None, []
        self.watch = Watch(
            module,
            name,
            self._recognise,
            self._digests,
            self._is_extra,
            may_start,
        )

    # What is read and written: a module's weights. Others may differ.
    def read(self):
        """Return the contents of memory as a state."""
        return as_state(self.module)

    def open(self, path):
        """Return a file's contents as a state."""
        return open_state(path)

    def put(self, state):
        """Load a state; adapters that it lacks keep their values."""
        load_base(self.module, state)

    def recover(self, path, end_of_epoch):
        """Load a file as SpeechBrain does, also into what wraps a module."""
        names = module_names(self.module, self.module.state_dict())
        if all(name == plain for name, plain in names.items()):
            torch_recovery(self.module, path, end_of_epoch)
        else:
            # Files hold the names of what is wrapped.
            self.put(self.open(path))

    def write(self, state, path):
        """Store a state."""
        save_state(state, path)

    @property
    def base(self):
        """What fine-tuning starts from, as a checked state."""
        if self._base is None:
            base = self._open_base()
            base.verify()
            self._base = base
        return self._base

    @property
    def contents(self):
        """What the module holds, see `Contents`."""
        return self.watch.contents

    def edit(self, finetuned):
        """Return the edited state; what the base lacks stays as trained."""
        base, rule = self.base, self.rule
        own = without_adapters(finetuned, but=base)
        own.verify()
        inputs = MergeInputs(
            base, [own], self.include, self.exclude, self.buffers
        )
        scales = inputs.scales(rule, self.scale)
        edited = edit_in_memory(inputs, rule, scales)
        trained = {n: finetuned[n] for n in finetuned if n not in base}
        return as_state({**finetuned.extra, **edited, **trained})

    def check_edit(self):
        """Raise what `edit` would raise whatever the training makes."""
        check_edit(
            self.base,
            self.rule,
            [self.scale],
            self.include,
            self.exclude,
            self.buffers,
        )

    def settings(self):
        """Return what an edit depends on, in plain types."""
        return plain(
            {
                "rule": self.rule.describe(),
                "scale": self.scale,
                "include": self.include,
                "exclude": self.exclude,
                "normalizers": self._normalizers,
                "base": self.base.label,
                "base_fingerprint": self.base.fingerprint,
            },
            "settings",
        )

    def _settings_after(self, recorded):
        """Return the settings of an edit made after the training."""
        trained = (recorded or {}).get("normalizers", "pooled")
        return {**self.settings(), "normalizers": trained}

    def load_base(self):
        """Start from the base."""
        with self.watch.loading():
            self.put(self.base)
            self.watch.contents = Contents("base", self.base.label)

    def load(self, path, end_of_epoch, weights):
        """Load one recoverable of a checkpoint, `"edited"` or `"finetuned"`."""
        finetuned = finetuned_path(path)
        # Without the second file, it was saved by a plain Checkpointer.
        source = finetuned if finetuned.exists() else path
        recorded = editing_of(read_checkpoint_meta(path.parent)).get(self.name)
        with self.watch.loading():
            if weights == "finetuned":
                self.recover(source, end_of_epoch)
                self.watch.contents = Contents("finetuned", str(source))
                return
            kept = source == finetuned and self._is_up_to_date(recorded)
            if kept:
                self.recover(path, end_of_epoch)
            else:
                logger.info(f"Editing {source} again by the present settings")
                self.put(self.edit(self.open(source)))
            self.watch.contents = Contents(
                "edited",
                str(path),
                # Mapped: it is read when it is saved, also after its folder
                # has been deleted.
                finetuned=self.open(source),
                settings=recorded if kept else self._settings_after(recorded),
                digests=self._digests(),
            )

    def check_same_run(self, path, recorded):
        """Raise if fine-tuning would go on from what another run made.

        `recorded` is what the checkpoint at `path` says of its edits.
        """
        remedy = "or give another checkpoints_dir for another run"
        then, now = recorded.get(self.name), self.settings()
        if then is None:
            raise ValueError(
                f"{path}: {self.name!r} was not edited there, only "
                f"{', '.join(recorded)}; edit the same recoverables, {remedy}"
            )
        if then["base_fingerprint"] not in self.base.fingerprints():
            raise ValueError(
                f"{path}: {self.name!r} was fine-tuned from {then['base']} "
                f"({short(then['base_fingerprint'])}), the base is now "
                f"{now['base']} ({short(now['base_fingerprint'])}). Give the "
                f"first base again, {remedy}"
            )
        # Earlier versions counted on.
        then = {"normalizers": "pooled", **then}
        for key in ("rule", "scale", "include", "exclude", "normalizers"):
            if then.get(key) != now[key]:
                raise ValueError(
                    f"{path}: {self.name!r} was trained with {key}: "
                    f"{then.get(key)}, which is now {now[key]}. Give the first "
                    f"again to go on with the training, {remedy}; only "
                    "evaluation may use other values"
                )

    def check_savable(self):
        """Raise unless it is known of which weights memory is the edit."""
        contents = self.contents
        if contents.kind in ("start", "unknown"):
            what = contents.source or "they were not loaded from the base"
            raise RuntimeError(
                f"the weights of {self.name!r} cannot be saved as an edit: "
                f"{what}. Nothing was written. Load them through the "
                "checkpointer: recover_if_possible(), or "
                "recover_if_possible(weights='finetuned') to fine-tune"
            )
        if contents.kind != "edited":
            return
        now = self._digests()
        changed = [n for n in now if now[n] != contents.digests.get(n)]
        if changed:
            raise RuntimeError(
                f"{self.name!r}: {changed[0]!r} has changed since the edited "
                f"weights were loaded ({contents.source}): they are no longer "
                "the edit of known weights. Nothing was written; recover "
                "before saving, or save before changing them"
            )

    def save(self, path):
        """Write the edited weights and, beside them, the fine-tuned ones."""
        live, contents = self.read(), self.contents
        if contents.kind == "edited":
            edited, finetuned = live, self._carried(live)
        else:
            edited, finetuned = self.edit(live), live
            self._note_untrained(finetuned)
        self.write(edited, path)
        self.write(finetuned, finetuned_path(path))
        self.saved = (finetuned.fingerprint, edited.fingerprint)
        self.kept_extra = differing_extra(edited, finetuned)

    def parents(self):
        """Return what the card of what was saved last says of its parents."""
        base = self.contents.settings or self.settings()
        return [
            {
                "role": f"base of {self.name}",
                "path": base["base"],
                "fingerprint": base["base_fingerprint"],
            },
            {
                "role": f"fine-tuned {self.name}",
                "path": f"{self.name}{FINETUNED}.ckpt",
                "fingerprint": self.saved[0],
            },
        ]

    def entry(self):
        """Return what `CKPT.yaml` says of what was saved last."""
        contents = self.contents
        kept = contents.kind == "edited"
        settings = contents.settings if kept else self.settings()
        return {
            **settings,
            "finetuned_fingerprint": self.saved[0],
            "source": plain(contents.source, "source"),
        }

    def _carried(self, live):
        """Return the fine-tuned weights of those edited, adapters as now."""
        carried = self.contents.finetuned
        adapters = {n: live.entries[n] for n in live if self._is_extra(n)}
        return renamed(carried, {**carried.entries, **adapters})

    def _note_untrained(self, finetuned):
        names = list(self.base)
        untouched = self.contents.kind == "base" and same_tensors(
            {n: finetuned[n] for n in names}, {n: self.base[n] for n in names}
        )
        if untouched and not self._told:
            self._told = True
            logger.warning(
                f"{self.name}: nothing has trained it, its edit is the base "
                "(is it frozen?)"
            )

    def _digests(self):
        state = self.read()
        return {n: state.digest(n) for n in state if not self._is_extra(n)}

    def _is_extra(self, name):
        """Tell whether it lies in an adapter that the base lacks."""
        try:
            return is_adapter(name) and name not in self.base
        except FileNotFoundError:
            return False

    def _is_up_to_date(self, recorded):
        if recorded is None:
            return False
        try:
            now = self.settings()
        except FileNotFoundError:
            # The base is gone, as on another machine: there is nothing else
            # than what was saved.
            return True
        # The base's path may change; its fingerprint is compared.
        return all(
            recorded.get(key) == now[key]
            for key in now
            if key not in ("base", "normalizers")
        )

    def _recognise(self, state_dict, prefix):
        """Return what is loaded from outside, if it is known; see `Watch`.

        The mean of edited weights becomes the edit of the mean of the
        fine-tuned ones, which rules that are not linear tell apart.
        """
        content = {
            key.removeprefix(prefix): tensor
            for key, tensor in state_dict.items()
            if key.startswith(prefix)
        }
        names = (self.name, f"{self.name}{FINETUNED}")
        found = find_origin(content, self._handed_out(), names)
        if found is None:
            return None
        name, checkpoints = found
        source = ", ".join(checkpoint.path.name for checkpoint in checkpoints)
        source = f"mean of {source}" if len(checkpoints) > 1 else source
        if name != self.name:
            return Contents("finetuned", source)
        paths = [checkpoint.paramfiles[name] for checkpoint in checkpoints]
        states = [
            self.open(second if second.exists() else path)
            for path, second in ((p, finetuned_path(p)) for p in paths)
        ]
        finetuned = mean_state(states)
        recorded = editing_of(checkpoints[0].meta).get(self.name)
        if len(checkpoints) == 1 and self._is_up_to_date(recorded):
            return Contents("edited", source, finetuned, recorded)
        edited = self.edit(finetuned)
        for key in edited:
            state_dict[prefix + key] = edited[key]
        settings = self._settings_after(recorded)
        return Contents("edited", source, finetuned, settings)


def finetuned_path(path):
    """Return the file of the weights before the edit."""
    return path.with_name(f"{path.stem}{FINETUNED}{path.suffix}")


def editing_of(meta):
    """Return what a checkpoint's `CKPT.yaml` says of its edits."""
    ours = meta.get(META_KEY)
    return ours.get("editing", {}) if isinstance(ours, dict) else {}
