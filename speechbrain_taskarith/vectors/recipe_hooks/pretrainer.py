"""Starting a recipe from a merged model: base plus vectors, checked."""

import os
from pathlib import Path

import torch
from speechbrain.utils.checkpoints import (
    DEFAULT_TRANSFER_HOOKS,
    get_default_hook,
    torch_parameter_transfer,
)
from speechbrain.utils.fetching import FetchSource
from speechbrain.utils.logger import get_logger
from speechbrain.utils.parameter_transfer import Pretrainer

from speechbrain_taskarith.utils.files import temporary_path
from speechbrain_taskarith.utils.hub.download import is_hub_name, local_path
from speechbrain_taskarith.vectors.recipe_hooks.bases import (
    is_checkpoint,
    load_base,
    open_base,
)
from speechbrain_taskarith.vectors.rules.base import check_rule
from speechbrain_taskarith.vectors.states.speechbrain_folder import (
    find_checkpoint_folder,
)
from speechbrain_taskarith.vectors.states.torch_files import TORCH_SUFFIXES
from speechbrain_taskarith.vectors.task_vector import TaskVector

logger = get_logger(__name__)


class TaskVectorPretrainer(Pretrainer):
    """A `Pretrainer` that loads a base plus any number of task vectors.

    Before anything is loaded, it checks that the vectors were taken from this
    base, and that names and shapes are the module's. Upstream's `Pretrainer`
    only warns of keys that do not fit; here they are an error. Inserted
    adapters, which a base lacks, keep their values. Parameters stay on their
    device.

    Arguments
    ---------
    collect_in, loadables, **arguments : object
        As for `Pretrainer`.
    paths : dict or None
        `{name: path}`; besides what `Pretrainer` takes, a `CKPT+` folder, a
        save folder (its newest checkpoint, or by `min_key`/`max_key`), or a
        Hugging Face folder or hub name for SpeechBrain's wrapper of it.
    vectors : dict or None
        `{name: path or [path, ...]}` of stored task vectors. Loadables
        without vectors are loaded as they are.
    rule : Rule or None
        The merging rule. None: one vector is added as it is.
    scale : float, dict or None
        Share of the combined vector; None takes the rule's.
    any_base : bool
        True allows vectors of other bases, as SYN2REAL needs: a source
        domain's vector on the target's model.
    strict : bool
        False loads modules without vectors as upstream does.
    min_key, max_key : str or None
        Score that chooses among the checkpoints of a save folder.

    Example
    -------
    >>> from speechbrain_taskarith.vectors import TaskVector, save_state
    >>> folder = getfixture("tmpdir")
    >>> base = {"weight": torch.ones(1, 1)}
    >>> _ = save_state(base, folder / "us.ckpt")
    >>> tau = TaskVector.between(base, {"weight": torch.full((1, 1), 3.0)})
    >>> _ = tau.save(folder / "german.safetensors")
    >>> model = torch.nn.Linear(1, 1, bias=False)
    >>> pretrainer = TaskVectorPretrainer(
    ...     loadables={"model": model},
    ...     paths={"model": str(folder / "us.ckpt")},
    ...     vectors={"model": str(folder / "german.safetensors")},
    ...     scale=0.5,
    ... )
    >>> _ = pretrainer.collect_files()
    >>> pretrainer.load_collected()
    >>> model.weight.item()
    2.0
    """

    def __init__(
        self,
        collect_in=None,
        loadables=None,
        paths=None,
        *,
        vectors=None,
        rule=None,
        scale=None,
        any_base=False,
        strict=True,
        min_key=None,
        max_key=None,
        **arguments,
    ):
        self._local = {}
        self._keys = {"min_key": min_key, "max_key": max_key}
        super().__init__(collect_in, loadables, paths, **arguments)
        self.vectors = {
            name: [given] if isinstance(given, (str, os.PathLike)) else given
            for name, given in (vectors or {}).items()
        }
        if unknown := [n for n in self.vectors if n not in self.loadables]:
            raise ValueError(
                f"vectors: no loadables called {unknown}; there are "
                f"{list(self.loadables)}"
            )
        self.rule = None if rule is None else check_rule(rule)
        self.scale = scale
        self.any_base, self.strict = any_base, strict

    def collect_files(self, default_source=None, **arguments):
        """As `Pretrainer.collect_files`; takes every form of a base."""
        wanted = [n for n in self.loadables if self.is_loadable(n)]
        paths = {n: p for n, p in self.paths.items() if n in wanted}
        found = {n: self._found(n, p) for n, p in paths.items()}
        self.paths |= {n: path for n, path in found.items() if path is not None}
        local = {n: Path(self.paths[n]) for n in paths if found[n] is not None}
        folders = {n: str(p) for n, p in local.items() if p.is_dir()}
        if isinstance(default_source, (str, os.PathLike)):
            if is_checkpoint(default_source):
                chosen = find_checkpoint_folder(default_source, **self._keys)
                default_source = str(chosen)
        loadables = self.loadables
        self.loadables = {
            n: o for n, o in loadables.items() if n not in folders
        }
        try:
            collected = super().collect_files(default_source, **arguments)
        finally:
            self.loadables = loadables
        self.is_local.extend(folders)
        if self.collect_in is not None:
            # By these, other processes find what the main one collected.
            for name, folder in folders.items():
                link = self.collect_in / f"{name}.ckpt"
                # In one step: all processes of a run may do this at once.
                new = temporary_path(link)
                new.symlink_to(Path(folder).absolute())
                os.replace(new, link)
        # A link in collect_in has lost the suffix that tells the format.
        self._local = local
        return collected | {n: Path(p) for n, p in folders.items()}

    def load_collected(self, device=None):
        """As `Pretrainer.load_collected`; parameters stay on their device.

        Arguments
        ---------
        device : object
            Not used: some recipes of SpeechBrain pass one.
        """
        super().load_collected()

    def _found(self, name, path):
        """Return where a path leads; None for a URL or a file on the hub."""
        if isinstance(path, FetchSource):
            return None
        # `org/name/file.ckpt` is a file on the hub.
        elsewhere = Path(path).suffix or "://" in str(path)
        if elsewhere and not (_exists(path) or is_hub_name(path)):
            return None
        place = local_path(path)
        if not is_checkpoint(place):
            return str(place)
        folder = find_checkpoint_folder(place, **self._keys)
        file = folder / f"{name}.ckpt"
        if not file.exists():
            raise FileNotFoundError(
                f"{folder}: holds no {name}.ckpt for the loadable {name!r}; "
                "name the file itself in paths"
            )
        return str(file)

    def _call_load_hooks(self, paramfiles):
        hooks, own = self.custom_hooks, {}
        for name, obj in self.loadables.items():
            if not self.is_loadable(name):
                continue
            path = self._local.get(name, Path(paramfiles[name]))
            plain = name not in hooks and _is_plain(obj)
            if name in self.vectors:
                own[name] = _loader(self._edited(name, obj, path))
            elif plain and (self.strict or path.is_dir()):
                own[name] = _loader(self._base(name, obj, path))
            elif path.is_dir():
                raise ValueError(
                    f"paths: {path} is a folder of weights; the loadable "
                    f"{name!r} is no plain module, so name its own file"
                )
        # Everything is checked: only now does anything change.
        self.custom_hooks = hooks | own
        try:
            super()._call_load_hooks(paramfiles)
        finally:
            self.custom_hooks = hooks

    def _base(self, name, obj, path):
        path = path.resolve() if path.is_dir() else _with_suffix(path)
        return open_base(path, obj, name=name)

    def _edited(self, name, obj, path):
        base = self._base(name, obj, path)
        vectors = [TaskVector.load(file) for file in self.vectors[name]]
        for file, vector in zip(self.vectors[name], vectors):
            if self.any_base or vector.base_fingerprint in base.fingerprints():
                continue
            raise ValueError(
                f"{file}: was taken from another base "
                f"({vector.metadata.get('base', 'path unknown')}) than "
                f"{path}. Give its own base, or any_base: True (SYN2REAL)"
            )
        if not vectors:
            return base
        vectors = [vector.named_as(base) for vector in vectors]
        vector, scale = vectors[0], self.scale
        if self.rule is not None:
            vector = self.rule.combine(vectors, base=base)
        elif len(vectors) > 1:
            raise ValueError(
                f"vectors: {len(vectors)} for {name!r}; say by which rule to "
                "merge them (rule=...)"
            )
        if scale is None:
            scale = self.rule.scale_for(vector) if self.rule else 1.0
        logger.info(
            f"{name}: {path} plus {len(vectors)} task vector(s), scale {scale}"
        )
        return vector.apply(base, scale, any_base=True)


def _exists(path):
    return not isinstance(path, FetchSource) and Path(path).exists()


def _with_suffix(path):
    """Follow links while their names tell the format.

    Hugging Face's cache links `model.safetensors` to a file without suffix.
    """
    while path.is_symlink():
        target = path.parent / os.readlink(path)
        if target.suffix not in (".safetensors", *TORCH_SUFFIXES):
            break
        path = target
    return path


def _is_plain(obj):
    """True for modules that upstream loads non-strictly, from a state dict."""
    hook = get_default_hook(obj, DEFAULT_TRANSFER_HOOKS)
    return isinstance(obj, torch.nn.Module) and hook is torch_parameter_transfer


def _loader(state):
    """Return a hook that loads weights which fit."""
    return lambda obj, _: load_base(obj, state)
