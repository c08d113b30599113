"""Starting a recipe from a merged model: base plus vectors, checked."""

import os
from pathlib import Path

import torch
from speechbrain.utils.checkpoints import (
    DEFAULT_TRANSFER_HOOKS,
    get_default_hook,
    hook_on_loading_state_dict_checkpoint,
    torch_parameter_transfer,
)
from speechbrain.utils.fetching import FetchSource
from speechbrain.utils.logger import get_logger
from speechbrain.utils.parameter_transfer import Pretrainer

from speechbrain_taskarith.vectors.rules.base import check_rule
from speechbrain_taskarith.vectors.states.readers import open_state
from speechbrain_taskarith.vectors.states.speechbrain_folder import (
    find_checkpoint_folder,
)
from speechbrain_taskarith.vectors.task_vector import TaskVector

logger = get_logger(__name__)


class TaskVectorPretrainer(Pretrainer):
    """A `Pretrainer` that loads a base plus any number of task vectors.

    Before anything is loaded, it checks that the vectors were taken from this
    base, and that names and shapes are the module's. Upstream's `Pretrainer`
    only warns of keys that do not fit; here they are an error. Parameters
    stay on their device.

    Arguments
    ---------
    collect_in, loadables, **arguments : object
        As for `Pretrainer`.
    paths : dict or None
        `{name: path}`; besides what `Pretrainer` takes, a `CKPT+` folder or
        a save folder (its newest checkpoint, or by `min_key`/`max_key`).
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
        """As `Pretrainer.collect_files`; finds files in checkpoint folders."""
        self.paths |= {n: self._file_of(n, p) for n, p in self.paths.items()}
        if isinstance(default_source, (str, os.PathLike)):
            if any(Path(default_source).glob("CKPT+*")):
                found = find_checkpoint_folder(default_source, **self._keys)
                default_source = str(found)
        return super().collect_files(default_source, **arguments)

    def _file_of(self, name, path):
        """Return the file that a path means; URLs and hub names as given."""
        if isinstance(path, FetchSource):
            return path
        if not Path(path).is_dir():
            return str(path)
        folder = find_checkpoint_folder(path, **self._keys)
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
            if name in self.vectors:
                state = self._edited(name, paramfiles[name])
            elif name not in hooks and self.strict and _is_plain(obj):
                state = open_state(os.path.realpath(paramfiles[name]))
            else:
                continue
            own[name] = _loader(name, obj, state, paramfiles[name])
        # Everything is checked: only now does anything change.
        self.custom_hooks = hooks | own
        try:
            super()._call_load_hooks(paramfiles)
        finally:
            self.custom_hooks = hooks

    def _edited(self, name, path):
        # `path` is a link with another name; the format follows from the name
        # of the file it points to.
        base = open_state(os.path.realpath(path))
        vectors = [TaskVector.load(file) for file in self.vectors[name]]
        for file, vector in zip(self.vectors[name], vectors):
            if self.any_base or vector.base_fingerprint == base.fingerprint:
                continue
            raise ValueError(
                f"{file}: was taken from another base "
                f"({vector.metadata.get('base', 'path unknown')}) than "
                f"{path}. Give its own base, or any_base: True (SYN2REAL)"
            )
        if not vectors:
            return base
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


def _is_plain(obj):
    """True for modules that upstream loads non-strictly, from a state dict."""
    hook = get_default_hook(obj, DEFAULT_TRANSFER_HOOKS)
    return isinstance(obj, torch.nn.Module) and hook is torch_parameter_transfer


def _loader(name, obj, state, path):
    """Check a state against a module; return what will load it."""
    content = hook_on_loading_state_dict_checkpoint(dict(state))
    own = obj.state_dict()
    problems = [f"{key}: not in the file" for key in own if key not in content]
    problems += [f"{key}: not in {name}" for key in content if key not in own]
    problems += [
        f"{key}: {tuple(content[key].shape)} in the file, "
        f"{tuple(own[key].shape)} in {name}"
        for key in own
        if key in content and own[key].shape != content[key].shape
    ]
    if problems:
        listed = "\n  ".join(problems[:20])
        more = f"\n  and {len(problems) - 20} more" * (len(problems) > 20)
        raise ValueError(
            f"{path} does not fit the loadable {name!r}; nothing was "
            f"loaded:\n  {listed}{more}"
        )

    def load(obj, _):
        obj.load_state_dict(content)

    return load
