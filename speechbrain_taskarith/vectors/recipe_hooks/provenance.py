"""What a module's weights are: known from what was seen to happen to them.

Three things change weights: our own loads, loads from outside
(`load_state_dict`), and optimizers. Each is seen here when it happens.
"""

import contextlib
import weakref
from dataclasses import dataclass, replace

import torch
from speechbrain.utils.checkpoints import average_checkpoints
from torch.optim.optimizer import register_optimizer_step_pre_hook

from speechbrain_taskarith.vectors.states.readers import as_state
from speechbrain_taskarith.vectors.states.state import is_extra, renamed

# Modules below this name are task adapters: parameters that a base lacks.
ADAPTERS = "task_adapters"

# {module: weak reference to the watch that loaded into it last}
_WATCHES = weakref.WeakKeyDictionary()
_HOOKED = weakref.WeakSet()


@dataclass(frozen=True)
class Contents:
    """What a module holds.

    `kind` is `"start"` (as built or pre-trained, nothing loaded yet),
    `"base"`, `"finetuned"` (by an optimizer, from the base on), `"edited"` or
    `"unknown"`. Edited weights know the fine-tuned ones that they were made
    of, by which settings, and their own hashes.
    """

    kind: str
    source: str = ""
    finetuned: object = None
    settings: dict | None = None
    digests: dict | None = None


def is_adapter(name):
    """Tell whether a parameter's (or module's) name lies in an adapter."""
    return ADAPTERS in name.split(".")


def without_adapters(state, but=()):
    """Return a state without what lies in adapters, except the names `but`."""
    parts = [
        {n: part[n] for n in part if n in but or not is_adapter(n)}
        for part in (state.entries, state.extra)
    ]
    if sum(map(len, parts)) == len(state.entries) + len(state.extra):
        return state
    result = renamed(state, parts[0])
    result.extra = parts[1]
    return result


class Watch:
    """Keeps the `Contents` of a module up to date.

    Arguments
    ---------
    module : torch.nn.Module
        The module, not its copies.
    name : str
        What it is called in messages.
    recognise : method
        `recognise(state_dict, prefix)` looks at weights that others load;
        returns their `Contents` or None. It may replace tensors.
    read_digests : method
        Returns the hashes of the weights in memory.
    is_extra : method
        Tells of a parameter's name whether it is none of the edit's.
    may_start : bool
        Whether an optimizer may train what is there before the first load.
    """

    def __init__(
        self, module, name, recognise, read_digests, is_extra, may_start
    ):
        self.name, self._may_start = name, may_start
        self.contents = Contents("start")
        self._recognise = weakref.WeakMethod(recognise)
        self._read_digests = weakref.WeakMethod(read_digests)
        self._is_extra = weakref.WeakMethod(is_extra)
        self._module = weakref.ref(module)
        self._ours = self._inside = False
        if _watch_of(module) is None:
            _WATCHES[module] = weakref.ref(self)
        if module not in _HOOKED:
            _hook(module)

    @contextlib.contextmanager
    def loading(self):
        """Within: our own load, which sets `contents` when it is done."""
        _WATCHES[self._module()] = weakref.ref(self)
        self._ours = True
        self.forget("a load that failed left it half done")
        try:
            yield
        finally:
            self._ours = False

    def forget(self, why):
        """The contents are unknown from now on."""
        self.contents = Contents("unknown", why)

    def check_trainable(self):
        """Raise unless an optimizer may change the weights."""
        kind = self.contents.kind
        if kind in ("base", "finetuned") or (
            kind == "start" and self._may_start
        ):
            return
        what = {
            "start": "weights that were not loaded from the base",
            "edited": f"edited weights ({self.contents.source})",
        }.get(kind, f"unknown weights: {self.contents.source}")
        raise RuntimeError(
            f"an optimizer is about to train {self.name!r}, which holds "
            f"{what}. Fine-tuning runs on the base or on un-edited weights: "
            "recover them first, by Brain.fit or by "
            "checkpointer.recover_if_possible(weights='finetuned'). Nothing "
            "was changed"
        )

    def before_step(self, optimizer):
        """An optimizer, registered or not, is about to make a step."""
        module, kind = self._module(), self.contents.kind
        is_extra = self._is_extra()
        if kind == "finetuned" or module is None or is_extra is None:
            return
        ours = {
            id(parameter)
            for name, parameter in module.named_parameters()
            # A gradient from before the freezing would be applied too.
            if (parameter.requires_grad or parameter.grad is not None)
            and not is_extra(name)
        }
        groups = (group["params"] for group in optimizer.param_groups)
        if any(
            id(parameter) in ours for group in groups for parameter in group
        ):
            self.check_trainable()
            if kind == "base":
                self.contents = replace(self.contents, kind="finetuned")

    def before_load(self, part, state_dict, prefix):
        """Weights come in, for the module (part "") or for a part of it."""
        if self._ours or self._inside or self.contents.kind == "start":
            return
        if part:
            self.forget(f"its part {part!r} was loaded from outside")
            return
        self._inside = True
        recognise = self._recognise()
        found = recognise and recognise(state_dict, prefix)
        if found:
            self.contents = found
        else:
            self.forget("they were loaded from outside")

    def after_load(self):
        """The end of a load of the whole module."""
        if self._inside and self.contents.kind == "edited":
            digests = self._read_digests()()
            self.contents = replace(self.contents, digests=digests)
        self._inside = False


def _watch_of(module):
    reference = None if module is None else _WATCHES.get(module)
    return None if reference is None else reference()


class _LoadHook:
    """On every part of a module; without effect on copies of it."""

    def __init__(self, root, part):
        # Not by its truth: of what is compiled that may raise an error.
        self._root = None if root is None else weakref.ref(root)
        self._part = part

    def __call__(self, module, state_dict, prefix, *_):
        watch = _watch_of(self._root and self._root())
        if watch is not None:
            watch.before_load(self._part, state_dict, prefix)

    def __reduce__(self):
        return _LoadHook, (None, self._part)


class _LoadedHook(_LoadHook):
    def __call__(self, module, incompatible_keys):
        watch = _watch_of(self._root and self._root())
        if watch is not None:
            watch.after_load()

    def __reduce__(self):
        return _LoadedHook, (None, self._part)


def _hook(root):
    # The hooks stay: taking one away while torch goes through them is an
    # error, and garbage may be collected at any moment.
    if not _HOOKED:
        _register_steps()
    _HOOKED.add(root)
    for part, module in root.named_modules():
        if not is_adapter(part):
            module.register_load_state_dict_pre_hook(_LoadHook(root, part))
    root.register_load_state_dict_post_hook(_LoadedHook(root, ""))


def _before_step(optimizer, args, kwargs):
    for reference in list(_WATCHES.values()):
        if (watch := reference()) is not None:
            watch.before_step(optimizer)


_registered = []


def _register_steps():
    """See the steps of all optimizers; once, and for good, as above."""
    if not _registered:
        _registered.append(register_optimizer_step_pre_hook(_before_step))


# -- means of checkpoints -----------------------------------------------------


def find_origin(content, handed_out, names):
    """Find the checkpoints that a state dict is the mean of.

    Recipes average what `find_checkpoints` gave them by SpeechBrain's
    `average_checkpoints`: the same is done here and compared.

    Arguments
    ---------
    content : dict
        `{name: tensor}`, what is about to be loaded.
    handed_out : sequence of list of Checkpoint
        What `find_checkpoints` gave, the last first.
        What is no tensor is not compared.
    names : sequence of str
        Recoverables that it may be.

    Returns
    -------
    tuple or None
        The name, and the checkpoints: all of one list, or a single one.
    """
    content = _tensors(content)
    groups = [group for group in handed_out if group]
    singles = {c.path: [c] for group in groups for c in group}
    groups += singles.values()
    for name in names:
        for group in groups:
            # Without such a file, or deleted meanwhile: not this one.
            with contextlib.suppress(KeyError, OSError):
                mean = average_checkpoints(group, name, _load_tensors)
                if same_tensors(content, mean):
                    return name, group
    return None


def _load_tensors(path, map_location=None):
    return _tensors(torch.load(path, map_location=map_location))


def _tensors(content):
    found = {n: t for n, t in content.items() if torch.is_tensor(t)}
    return {n: t for n, t in found.items() if not is_extra(n)}


def same_tensors(one, other):
    """Tell whether two state dicts hold the same names and values."""
    if set(one) != set(other):
        return False
    pairs = ((one[name], other[name]) for name in one)
    return all(torch.equal(a.detach().cpu(), b.cpu()) for a, b in pairs)


def mean_state(states):
    """Return the mean of several states.

    As SpeechBrain's averager, but integers and what is no tensor are the
    first's, tied tensors stay tied, half precision is summed in float32.
    """
    first = states[0]
    if len(states) == 1:
        return first
    mean = {}
    for name in first:
        origin = first.aliases.get(name, name)
        if origin in mean:
            mean[name] = mean[origin]
            continue
        tensor = first[name]
        if not tensor.is_floating_point() or is_extra(name):
            mean[name] = tensor.clone()
            continue
        total = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
        total = total.clone()
        for state in states[1:]:
            total += state[name]
        mean[name] = (total / len(states)).to(tensor.dtype)
    return as_state({**mean, **first.extra})
