"""The task vector: what fine-tuning added to the weights.

`tau = theta_finetuned - theta_base` (Ilharco et al. 2023, arXiv 2212.04089,
section 2), keyed by the checkpoint's own parameter names, with the
fingerprint of the base it was taken from.
"""

import functools
import math
import operator
import os
from collections.abc import Mapping

import torch

from speechbrain_taskarith.utils.patterns import rename as rename_all
from speechbrain_taskarith.utils.patterns import select
from speechbrain_taskarith.vectors.application import (
    differences,
    each,
    edit_in_place,
    edited,
)
from speechbrain_taskarith.vectors.checks import finite, scale_by_name
from speechbrain_taskarith.vectors.engine.vector_header import (
    KEPT_EXTRA,
    bounded,
    parted,
    parted_in,
    renamed_parted,
)
from speechbrain_taskarith.vectors.products import counted, inner
from speechbrain_taskarith.vectors.sharing.stored_vector import StoredVector
from speechbrain_taskarith.vectors.states.names import (
    check_alike,
    check_ancestry,
    check_ties,
    differing_extra,
    editable_names,
    match_names,
)
from speechbrain_taskarith.vectors.states.pairing import (
    under_names_of,
    vector_under_names_of,
)
from speechbrain_taskarith.vectors.states.readers import as_model, as_state
from speechbrain_taskarith.vectors.states.state import short


class TaskVector(StoredVector, Mapping):
    """A difference of weights, with an algebra and a memory of its base.

    Usually made by `TaskVector.between`. A mapping from parameter name to
    float32 tensor; parameters that were left out are not in it.

    Arguments
    ---------
    deltas : dict
        `{name: tensor}`; floating point.
    base_fingerprint : str or None
        Fingerprint of the weights it was taken from; None when it combines
        vectors of several bases (then `apply` asks for `any_base=True`).
    metadata : dict or None
        Where it comes from, plain types; stored with it. A history of more
        than 64 vectors is shortened to those that it began with.

    Example
    -------
    >>> base = {"w": torch.zeros(2), "steps": torch.tensor(3)}
    >>> tuned = {"w": torch.tensor([1.0, -2.0]), "steps": torch.tensor(9)}
    >>> tau = TaskVector.between(base, tuned)
    >>> (0.5 * tau).apply(base)["w"]
    tensor([ 0.5000, -1.0000])
    >>> (tau - tau).norm()
    0.0
    """

    def __init__(self, deltas, base_fingerprint=None, metadata=None):
        # A lazy mapping makes its tensors anew at every look.
        deltas = dict(deltas)
        for name, delta in deltas.items():
            if not torch.is_floating_point(delta):
                raise TypeError(
                    f"{name}: expected floating point, got {delta.dtype}"
                )
        # Tied parameters come as one tensor and stay one.
        own = {id(d): d.detach().float() for d in deltas.values()}
        self._deltas = {name: own[id(d)] for name, d in deltas.items()}
        self.base_fingerprint = base_fingerprint
        self.metadata = bounded(metadata or {})

    @classmethod
    def between(
        cls,
        base,
        finetuned,
        *,
        include=("*",),
        exclude=(),
        strict=True,
        buffers="base",
        rename=None,
        prefix=None,
    ) -> "TaskVector":
        """Subtract: `tau = theta_finetuned - theta_base`.

        Differences are taken in float32 whatever the weights are stored in.
        Integer and boolean tensors are never part of a vector. A Hugging Face
        folder and the checkpoint of SpeechBrain's wrapper may be mixed: the
        vector has the base's names.

        Arguments
        ---------
        base, finetuned : path, torch.nn.Module, mapping or State
            The weights before and after.
        include, exclude : sequence of str
            Anchored shell patterns on parameter names.
        strict : bool
            True: the same names and shapes on both sides, or an error.
            False: what does not fit is left out, with a warning.
        buffers : str
            `"base"` leaves running means and variances out, so that edited
            models keep the base's; `"edit"` takes them in.
        rename : dict or None
            `{pattern: replacement}`, from names of `finetuned` to the base's
            (see `State.rename`). Wrappers and tied names need none.
        prefix : str or None
            What stands in front of the names in `finetuned` and not in the
            base; its other names are left out.

        Returns
        -------
        TaskVector
            On the device of the base's tensors.

        Raises
        ------
        KeyError
            Names on one side only (strict).
        ValueError
            Shapes that differ (strict), NaN or infinity, a pattern that
            matches nothing, a file that is damaged.
        """
        base, finetuned = as_model(base), as_model(finetuned)
        base.verify()
        finetuned.verify()
        fingerprint = finetuned.fingerprint
        if rename or prefix:
            finetuned = finetuned.rename(rename, prefix)
        finetuned = under_names_of(base, finetuned)
        names = editable_names(
            base,
            finetuned,
            include,
            exclude,
            buffers,
            strict=strict,
            advice=", or say strict=False to leave these out",
        )
        deltas = differences(base, finetuned, names)
        metadata = {
            "base": base.label,
            "finetuned": finetuned.label,
            "finetuned_fingerprint": fingerprint,
            **parted(base.aliases, deltas),
        }
        if kept := differing_extra(base, finetuned):
            metadata[KEPT_EXTRA] = kept
        return cls(deltas, base.fingerprint, metadata)

    @classmethod
    def from_lora(cls, base, adapted, *, alpha=None) -> "TaskVector":
        """Turn a LoRA into the vector it stands for: `scaling * B A`.

        Arguments
        ---------
        base : path, torch.nn.Module, mapping or State
            The weights that the LoRA was trained on.
        adapted : torch.nn.Module or path
            SpeechBrain's `LoRA` in an `AdaptedModel`, or a PEFT folder.
        alpha : float or None
            For what does not carry it (a stored SpeechBrain adapter).

        Returns
        -------
        TaskVector
            Only of the weights that the LoRA changes.
        """
        from speechbrain_taskarith.vectors.lora import lora_deltas

        base = as_model(base)
        deltas = lora_deltas(base, adapted, alpha=alpha)
        check_ties(base, deltas)
        label = str(adapted) if not hasattr(adapted, "modules") else "LoRA"
        metadata = {"base": base.label, "lora": label}
        return cls(deltas, base.fingerprint, metadata)

    @classmethod
    def mean(cls, vectors) -> "TaskVector":
        """Return the mean of vectors over the same parameters.

        Arguments
        ---------
        vectors : sequence of TaskVector
            At least one.

        Returns
        -------
        TaskVector
            With the base they share, if they share one.
        """
        vectors = as_vectors(vectors)
        if not vectors:
            raise ValueError("the mean of no task vectors is not defined")
        result = functools.reduce(operator.add, vectors) / len(vectors)
        result.metadata = {
            "operation": "mean",
            "parents": [vector.metadata for vector in vectors],
        }
        return result

    def __getitem__(self, name):
        try:
            return self._deltas[name]
        except KeyError:
            raise KeyError(f"the task vector does not edit {name!r}") from None

    def __iter__(self):
        return iter(self._deltas)

    def __len__(self):
        return len(self._deltas)

    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def __repr__(self):
        return (
            f"TaskVector({len(self)} tensors, norm {self.norm():.4g}, "
            f"base {short(self.base_fingerprint)})"
        )

    def __neg__(self) -> "TaskVector":
        return self._map(lambda d: -d, {"operation": "negative"})

    def __add__(self, other) -> "TaskVector":
        return self._pair(other, torch.add, "sum")

    def __radd__(self, other) -> "TaskVector":
        # sum() starts from the number 0.
        return self if isinstance(other, int) and not other else NotImplemented

    def __sub__(self, other) -> "TaskVector":
        return self._pair(other, torch.sub, "difference")

    def __mul__(self, factor) -> "TaskVector":
        factor = float(finite("factor", factor))
        operation = {"operation": "product", "factor": factor}
        return self._map(lambda d: d * factor, operation)

    __rmul__ = __mul__
    # Lets `numpy.float64(0.4) * tau` come here.
    __array_ufunc__ = None

    def __truediv__(self, divisor):
        divisor = float(finite("divisor", divisor))
        if divisor == 0:
            raise ZeroDivisionError("a task vector cannot be divided by zero")
        operation = {"operation": "quotient", "divisor": divisor}
        return self._map(lambda d: d / divisor, operation)

    def norm(self):
        """Return the Euclidean norm, a float (in float64, as `dot`)."""
        return math.sqrt(self.dot(self))

    def dot(self, other):
        """Return the inner product with another vector, in float64.

        Arguments
        ---------
        other : TaskVector
            Over the same parameters. The path of a stored vector, or a
            mapping from name to tensor, will do.

        Returns
        -------
        float
            The sum of the products of all entries, of tied parameters once.
        """
        other = as_vector(other)
        check_alike([self, other])
        return inner(self, other, counted([self, other], self))

    def cosine(self, other):
        """Return the cosine of the angle to another vector (see `dot`).

        In [-1, 1]; 0 where one of them is zero.
        """
        other = as_vector(other)
        check_alike([self, other])
        names = list(counted([self, other], self))
        lengths = (inner(one, one, names) for one in (self, other))
        length = math.prod(map(math.sqrt, lengths))
        if not length:
            return 0.0
        return max(-1.0, min(1.0, inner(self, other, names) / length))

    def to(self, device):
        """Return the vector on a device, as `torch.Tensor.to` does.

        It shares memory with this one where nothing had to move.
        """
        return self._map(lambda d: d.to(device), None)

    def restrict(self, include=("*",), exclude=()) -> "TaskVector":
        """Return the vector over some of its parameters.

        Patterns as `between` takes them; applying the vector leaves the other
        parameters as they are.
        """
        chosen = select(self, include, exclude)
        deltas = {name: self._deltas[name] for name in chosen}
        aliases = as_state(self).aliases if len(self) else {}
        metadata = {**self.metadata, **parted(aliases, chosen, self.metadata)}
        return TaskVector(deltas, self.base_fingerprint, metadata)

    def scales(self, scale):
        """Return the scale of every parameter, `{name: float}`.

        For a scale as `apply` takes it. ValueError for one that is not finite,
        or for a pattern that matches nothing.
        """
        return scale_by_name(scale, self)

    def apply(self, base, scale=1.0, *, any_base=False, dtype=None):
        """Return edited weights: `theta = theta_base + scale * tau`.

        Computed in float32 and cast back to the base's dtype. Everything
        that the vector does not hold (integer tensors, running statistics,
        excluded parameters) is copied from the base.

        Arguments
        ---------
        base : path, torch.nn.Module, mapping or State
            The weights to edit; they stay as they are.
        scale : float or dict
            One number, or `{pattern: number}` of which the first match
            wins; parameters without a match stay as they are.
        any_base : bool
            False: the base must be the one that the vector was taken from.
            True: any weights of the same names and shapes (SYN2REAL applies
            a source domain's vector to the target's model).
        dtype : str, torch.dtype or None
            Type of all floating point tensors of the result: `"float32"`,
            `"float16"`, `"bfloat16"`, `"float64"`; None: the base's. Half
            precision rounds most of a small edit away.

        Returns
        -------
        dict
            `{name: tensor}`, all names of the base; tied names share a
            tensor.

        Raises
        ------
        ValueError
            Another base, other shapes, a scale that is not finite, an edit
            that the type cannot hold.
        KeyError
            The base lacks parameters of the vector.
        """
        base = as_model(base)
        base.verify()
        tau = self.named_as(base)
        tau.check_fits(base)
        if not any_base:
            origin = self.metadata.get("base", "path unknown")
            check_ancestry(base, self.base_fingerprint, origin=origin)
        return edited(tau, base, tau.scales(scale), dtype)

    def apply_(self, module, scale=1.0):
        """Edit a module in place, on its own device.

        Holds no second model. `apply_(module, -scale)` undoes it up to
        rounding; for exact undo keep the base and use `apply`. Only names
        and shapes are checked (after an edit the module is no longer the
        base), and nothing is changed where they do not fit, or where the
        module's type cannot hold the result.

        Arguments
        ---------
        module : torch.nn.Module
            The module; also one wrapped for data-parallel training.
        scale : float or dict
            See `apply`.
        """
        state = as_state(module)
        tau = self.named_as(state)
        tau.check_fits(state)
        edit_in_place(tau, state, tau.scales(scale))

    def named_as(self, base) -> "TaskVector":
        """Return the vector under a base's names, where wrappers or ties differ.

        Of names that are tied in the base or in the vector's own, an edit of
        one is an edit of all.

        Arguments
        ---------
        base : path, torch.nn.Module, mapping or State
            As SpeechBrain's wrapper, for the vector of a Hugging Face model.

        Returns
        -------
        TaskVector
            Itself, if only its names fit or none do.
        """
        parted = parted_in(self.metadata)
        names = len(self) and vector_under_names_of(
            as_model(base), as_state(self), parted
        )
        if not names:
            return self
        deltas = {name: self[found] for name, found in names.items()}
        return TaskVector(deltas, self.base_fingerprint, self.metadata)

    def rename(self, rename=None, prefix=None) -> "TaskVector":
        """Return the vector under other names, as `State.rename` does.

        Arguments
        ---------
        rename : dict or None
            `{pattern: replacement}`, after the prefix is gone.
        prefix : str or None
            What is taken away in front; names without it are left out.

        Returns
        -------
        TaskVector
            Of the same tensors.
        """
        new = rename_all(self, rename, prefix, "the task vector")
        deltas = {name: self[found] for found, name in new.items()}
        metadata = renamed_parted(self.metadata, rename, prefix)
        return TaskVector(deltas, self.base_fingerprint, metadata)

    def check_fits(self, base):
        """Raise as `apply` unless a `State` holds all parameters, in shape."""
        if len(self):
            vector = as_state(self)
            vector.label = "the task vector"
            match_names(base, vector, partial=True)

    def _map(self, function, operation):
        metadata = self.metadata
        if operation is not None:
            metadata = {**operation, "parents": [self.metadata]}
        deltas = each(function, self)
        return TaskVector(deltas, self.base_fingerprint, metadata)

    def _pair(self, other, function, operation):
        if not isinstance(other, TaskVector):
            return NotImplemented
        check_alike([self, other])
        deltas = each(lambda a, b: function(a, b.to(a.device)), self, other)
        shared = self.base_fingerprint == other.base_fingerprint
        base_fingerprint = self.base_fingerprint if shared else None
        parents = [self.metadata, other.metadata]
        metadata = {"operation": operation, "parents": parents}
        return TaskVector(deltas, base_fingerprint, metadata)


def as_vectors(vectors):
    """Return a list of one task vector or several, see `as_vector`."""
    one = isinstance(vectors, (Mapping, str, os.PathLike))
    if one or not hasattr(vectors, "__iter__"):
        vectors = [vectors]
    return [as_vector(vector) for vector in vectors]


def as_vector(vector):
    """Return a task vector, loaded if it is a path; mappings stay."""
    if isinstance(vector, (str, os.PathLike)):
        return TaskVector.load(vector)
    if not isinstance(vector, Mapping):
        raise TypeError(
            "expected a TaskVector, the path of a stored one, or {name: "
            f"tensor}}, got {type(vector).__name__}; make one with "
            "TaskVector.between(base, finetuned)"
        )
    return vector
