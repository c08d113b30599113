"""What a merging rule is.

A rule of your own is a subclass of `Rule` with one method, `merge_tensor`;
docs/write_your_own_rule.md shows it. The rules of this package override the
hooks below it too, so that they work on pieces that fit a core's cache, from
several threads. The engine feeds a rule, from memory or from files; the rule
does not know which.
"""

import glob
import inspect
import math
import os
from collections.abc import Mapping

import numpy as np

from speechbrain_taskarith.vectors import checks
from speechbrain_taskarith.vectors.engine.streaming import MemoryVectors, Stream
from speechbrain_taskarith.vectors.engine.workspace import CHUNK
from speechbrain_taskarith.vectors.states.names import (
    check_alike,
    check_tied_groups,
)
from speechbrain_taskarith.vectors.states.readers import as_model, as_state

# Written into a description in place of what a text cannot hold.
IN_MEMORY = "weights in memory"


class Stage:
    """What a rule does to each vector alone, e.g. trimming.

    `carries_nan` and `one_each` are as `Rule`'s.
    """

    carries_nan = False
    one_each: tuple = ()

    def prepare(self, stream):
        """Return the stage to use, after a look at the vectors so far."""
        return self

    def granularity(self, shape):
        """Return how many elements of a tensor must be seen at once."""
        return 1

    def apply(self, index, tau, place, work, out):
        """Return a chunk of vector `index`, edited into `out`.

        `tau` must not be written to; return it where nothing changes.
        """
        raise NotImplementedError

    def describe(self):
        """Return class name and arguments, as `Rule.describe` does."""
        return _describe(self, "stage")


class Rule:
    """A way to make one task vector out of several, and its scale.

    A subclass of your own gives `merge_tensor` and keeps each argument of its
    `__init__` as an attribute of the same name. All else is optional, for
    speed: `stages`, `whole_tensors`, `granularity`, `bytes_per_element`, and
    `prepare` with `merge`. The engine gives these a tensor's `shape`, the
    `number` of vectors, the `names` of the parameters, or the vectors
    themselves as a `Stream`.

    Arguments
    ---------
    scale : float or dict
        Factor of the merged vector, or `{pattern: factor}`, of which the
        first match wins; parameters without a match stay as they are.

    Attributes
    ----------
    stages : tuple of Stage
        What is done to each vector alone, before they are merged.
    min_vectors, max_vectors : int or None
        How many vectors the rule takes.
    one_each : tuple of str
        Its arguments that, where they are lists, hold a value a vector.
    whole_tensors : bool
        True: the rule sees one whole tensor at a time, in one thread (linear
        algebra has threads of its own). False: any run of elements.
    carries_nan : bool
        True where NaN or infinity in any vector always shows in the result,
        so that the engine need look only there.

    Example
    -------
    >>> import torch
    >>> class Median(Rule):
    ...     def merge_tensor(self, name, deltas, base=None):
    ...         return torch.stack(deltas).median(dim=0).values
    >>> vectors = [{"w": torch.tensor([x, 0.0])} for x in (1.0, 2.0, 9.0)]
    >>> Median().combine(vectors)["w"]
    tensor([2., 0.])
    """

    stages: tuple = ()
    scale = 1.0
    min_vectors, max_vectors = 1, None
    one_each: tuple = ()
    whole_tensors = True
    carries_nan = False

    def __init__(self, scale=1.0):
        self.scale = checks.scale(scale)

    def merge_tensor(self, name, deltas, base=None):
        """Merge one parameter: the one method that a rule must have.

        Arguments
        ---------
        name : str
            The parameter's name; of tied parameters the first.
        deltas : list of torch.Tensor
            The vectors' entries for it, float32, copies in the parameter's
            shape.
        base : torch.Tensor or None
            The base's weights, float32; None where no base was given
            (`combine` without `base=`).

        Returns
        -------
        torch.Tensor
            The merged entries, before the scale, in the same shape.
        """
        raise NotImplementedError(
            f"{type(self).__name__}: expected a method "
            "merge_tensor(self, name, deltas, base=None)"
        )

    def granularity(self, shape):
        """Return how many elements `merge` must see at once (see `Rule`)."""
        return math.prod(shape) if self.whole_tensors else 1

    def bytes_per_element(self, number):
        """Return a thread's bytes of buffers for an element (see `Rule`)."""
        # Whole tensors: copies of the vectors, and what is made of them.
        return 32 + 16 * number if self.whole_tensors else 96

    def prepare(self, stream):
        """Look at the whole vectors, after the stages (see `Rule`).

        What it returns is passed to `merge` as `prepared`.
        """
        return stream.source

    def merge(self, vectors, place, work, prepared):
        """Merge a run of elements, by default with `merge_tensor`.

        Arguments
        ---------
        vectors : iterator of arrays
            float32, each valid until the next is taken; NumPy on the CPU,
            torch on a GPU.
        place : Place
            Where the run lies.
        work : Workspace
            For buffers.
        prepared : object
            What `prepare` returned.

        Returns
        -------
        array
            float32, the merged vector before the scale.
        """
        import torch

        def tensor(array):
            # A copy: buffers are used again, and the method may write.
            return torch.as_tensor(array).reshape(place.shape).clone()

        deltas, base = [tensor(tau) for tau in vectors], None
        if prepared.base is not None:
            base = tensor(prepared.base_chunk(place, work))
        with torch.no_grad():
            merged = self.merge_tensor(place.name, deltas, base)
        what = f"{type(self).__name__}.merge_tensor: {place.name!r} became"
        shape = getattr(merged, "shape", type(merged).__name__)
        if shape != deltas[0].shape:
            expected = f"expected a tensor of shape {place.shape}"
            raise ValueError(f"{what} {shape}; {expected}")
        merged = merged.to(deltas[0]).reshape(-1)
        if not checks.all_finite(merged):
            raise ValueError(f"{what} NaN or infinity, and no vector holds any")
        return merged.numpy() if work.xp is np else merged

    def group(self, name):
        """Return a key of the parameters that this one is merged with.

        The sign that prevails (see `TIES`) is that of the group.
        """
        return None

    def check_number(self, number):
        """Raise unless the rule takes so many vectors (see `Rule`)."""
        low, high = self.min_vectors, self.max_vectors
        if number < low or (high and number > high):
            expected = f"{low} to {high}" if high else f"at least {low}"
            if low == high:
                expected = f"exactly {low}"
            rule = type(self).__name__
            raise ValueError(
                f"{rule} takes {expected} task vectors, got {number}"
            )
        for part in (self, *self.stages):
            for name in part.one_each:
                checks.one_each(name, getattr(part, name), number)

    def scales(self, names):
        """Return `{name: scale}`, a float for every parameter (see `Rule`).

        ValueError for a pattern that matches nothing.
        """
        return checks.scale_by_name(self.scale, names)

    def scales_by_parameter(self):
        """Tell whether the rule has its own `scales`, as `LiNeS` has."""
        return type(self).scales is not Rule.scales

    def scale_for(self, vector):
        """Return a merged vector's scale, as `TaskVector.apply` takes it."""
        if not self.scales_by_parameter():
            return self.scale
        scales = self.scales(list(vector))
        return {glob.escape(name): scale for name, scale in scales.items()}

    def combine(self, vectors, *, base=None):
        """Make one task vector out of several, before the scale.

        Arguments
        ---------
        vectors : sequence of TaskVector
            All over the same parameters; a lone one need not be put into a
            list. Paths of stored vectors, and mappings from name to tensor,
            will do.
        base : path, torch.nn.Module, mapping, State or None
            The base's weights, for the few rules that look at them.

        Returns
        -------
        TaskVector
            With the base they share, if they share one.

        Raises
        ------
        ValueError
            Too few or too many vectors, NaN or infinity, shapes that differ.
        KeyError
            Other parameters in one vector than in another.
        """
        import torch

        from speechbrain_taskarith.vectors.task_vector import (
            TaskVector,
            as_vectors,
        )

        vectors = as_vectors(vectors)
        if base is not None:
            base = as_state(base)
            vectors = [
                vector.named_as(base) if hasattr(vector, "named_as") else vector
                for vector in vectors
            ]
        self.check_number(len(vectors))
        check_alike(vectors)
        source = MemoryVectors(vectors, base)
        check_tied_groups(self, source.twins)
        # A GPU is filled by whole tensors, a cache by little.
        on_cpu = source.device is None
        chunk = CHUNK if on_cpu else 1 << 26
        alone = self.whole_tensors or not on_cpu
        threads = 1 if alone else torch.get_num_threads()
        # Not torch's default type, which a program may have changed.
        merged = {
            name: torch.empty(shape, dtype=torch.float32, device=source.device)
            for name, shape in source.shapes.items()
        }
        flat = {name: tensor.view(-1) for name, tensor in merged.items()}

        def emit(place, values, work):
            target = flat[place.name][place.start : place.stop]
            target.copy_(torch.as_tensor(values))

        Stream(source, self.stages, chunk, threads).merge(self, emit)
        twins = source.twins
        deltas = {name: merged[twins.get(name, name)] for name in vectors[0]}
        fingerprints = {getattr(v, "base_fingerprint", None) for v in vectors}
        shared = fingerprints.pop() if len(fingerprints) == 1 else None
        parents = [getattr(v, "metadata", {}) for v in vectors]
        metadata = {"rule": self.describe(), "parents": parents}
        return TaskVector(deltas, shared, metadata)

    def __call__(self, base, vectors, *, any_base=False, dtype=None):
        """Edit a model: `theta = theta_base + scale * combine(vectors)`.

        Arguments
        ---------
        base : path, torch.nn.Module, mapping or State
            The model.
        vectors : sequence of TaskVector
            What to merge, as for `combine`; the ancestry of plain mappings
            is not checked.
        any_base : bool
            True: the vectors may come from another base than this one.
        dtype
            See `TaskVector.apply`.

        Returns
        -------
        dict
            `{name: tensor}`, complete, in the base's dtypes or in `dtype`.

        Raises
        ------
        ValueError
            Another base than the vectors', and what `combine` raises.
        """
        from speechbrain_taskarith.vectors.task_vector import as_vectors

        base, vectors = as_model(base), as_vectors(vectors)
        merged = self.combine(vectors, base=base)
        traced = [v for v in vectors if hasattr(v, "base_fingerprint")]
        any_base = any_base or not traced
        scale = self.scale_for(merged)
        return merged.apply(base, scale, any_base=any_base, dtype=dtype)

    def describe(self):
        """Write the rule down in plain types.

        Returns
        -------
        dict
            `{"rule": class name, argument: value, ...}`, for logs, model
            cards and `from_description`; a rule of your own also names its
            `"module"`.

        Example
        -------
        >>> from speechbrain_taskarith.vectors import TIES
        >>> TIES(density=0.5, scale=0.6).describe()
        {'rule': 'TIES', 'density': 0.5, 'scale': 0.6, 'trim': 'global',
         'elect': 'mass', 'weights': None}
        """
        description = _describe(self, "rule")
        if not type(self).__module__.startswith(f"{__package__}."):
            # Never built again by name: it might be called as one of ours.
            description["module"] = type(self).__module__
        return description

    def __repr__(self):
        name, *arguments = _describe(self, "rule").items()
        return f"{name[1]}({', '.join(f'{k}={v!r}' for k, v in arguments)})"


def check_rule(rule, argument="rule", vectors=None):
    """Return the rule, or raise the error of all that take one.

    `vectors` is how many it will be given, if that is known.
    """
    if not isinstance(rule, Rule):
        got = rule.__name__ if isinstance(rule, type) else type(rule).__name__
        raise TypeError(
            f"{argument}: expected a Rule, e.g. TIES(), got {got}; subclass "
            "vectors.Rule for your own"
        )
    if vectors is not None:
        rule.check_number(vectors)
    return rule


def each_weight(rule, number):
    """Return the rule's weight of every vector, 1 where it has none."""
    weights = 1.0 if rule.weights is None else rule.weights
    return checks.one_each("weights", weights, number)


def _describe(thing, key):
    """Return `{key: class name, argument: value, ...}` in plain types."""
    description = {key: type(thing).__name__}
    for name in inspect.signature(type(thing)).parameters:
        if not hasattr(thing, name):
            raise AttributeError(
                f"{type(thing).__name__}: keep the argument {name!r} of "
                f"__init__ as self.{name}, so that the {key} can be described"
            )
        description[name] = _plain(getattr(thing, name))
    return description


def _plain(value):
    if isinstance(value, (Rule, Stage)):
        return value.describe()
    if getattr(value, "shape", None) == ():
        value = value.item()  # a number of NumPy or torch
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        kinds = (int, float, Rule)
        if all(
            isinstance(v, kinds) or getattr(v, "shape", None) == ()
            for v in value.values()
        ):
            return {key: _plain(item) for key, item in value.items()}
        return IN_MEMORY
    return str(value) if isinstance(value, os.PathLike) else repr(value)
