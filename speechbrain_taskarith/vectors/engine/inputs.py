"""What the merge engine reads: a base, and what becomes a vector against it.

All that can be wrong with the inputs is found here, before anything is
written. Nothing here imports torch for safetensors files.
"""

import json
import os
from collections.abc import Mapping

import numpy as np

from speechbrain_taskarith.utils.messages import some
from speechbrain_taskarith.utils.patterns import select
from speechbrain_taskarith.vectors.engine.chunk_reader import read_float32
from speechbrain_taskarith.vectors.states.fingerprint import short
from speechbrain_taskarith.vectors.states.state import (
    State,
    as_state,
    is_running_statistic,
)


class Checkpoint:
    """Fine-tuned weights; the vector is their difference from the base.

    Arguments
    ---------
    state : State
        The weights.
    """

    kind = "checkpoint"

    def __init__(self, state):
        self.state, self.label = state, state.label

    def editable(self, base, buffers):
        """Return the parameters that differ by training, checked.

        Arguments
        ---------
        base : State
            The base.
        buffers : str
            `"base"` or `"edit"`.

        Returns
        -------
        list of str
            In the order of the base.

        Raises
        ------
        KeyError
            Names on one side only.
        ValueError
            Shapes that differ.
        """
        missing = [name for name in base if name not in self.state]
        extra = [name for name in self.state if name not in base]
        if missing or extra:
            sides = [
                f"only {label} holds {some(names)}"
                for label, names in (
                    (base.label, missing),
                    (self.label, extra),
                )
                if names
            ]
            raise KeyError(
                f"the two models differ: {'; '.join(sides)}. Merge models of "
                "one architecture"
            )
        for name in base:
            _check_same_kind(base, self.state, name)
        names = [name for name in base if base.info(name).floating]
        if buffers == "base":
            names = [n for n in names if not is_running_statistic(n)]
        return names

    def chunk(self, inputs, place, work):
        """Return a run of the vector, in a buffer of its own.

        Arguments
        ---------
        inputs : MergeInputs
            Knows the base.
        place : Place
            Where the run lies.
        work : Workspace
            For buffers.

        Returns
        -------
        array
            float32.
        """
        base = inputs.base_chunk(place, work)
        tuned = read_float32(
            self.state, place.name, place.start, place.stop, work, "tuned"
        )
        return work.xp.subtract(tuned, base, out=tuned)


class StoredVector:
    """A task vector as `TaskVector.save` wrote it, one number an element.

    Arguments
    ---------
    state : State
        The file.
    header : dict
        What it says of itself.
    """

    kind = "task vector"

    def __init__(self, state, header):
        self.state, self.label = state, state.label
        self.base_fingerprint = header["base_fingerprint"]

    def editable(self, base, buffers):
        """Return the vector's parameters (see `Checkpoint.editable`)."""
        missing = [name for name in self.state if name not in base]
        if missing:
            raise KeyError(
                f"{base.label} lacks {some(missing)} of the task vector "
                f"{self.label}. Is it another model?"
            )
        for name in self.state:
            _check_same_kind(base, self.state, name)
        return [name for name in base if name in self.state]

    def check_ancestry(self, base):
        """Raise unless the vector was taken from this base.

        Arguments
        ---------
        base : State
            The base of the merge.
        """
        if self.base_fingerprint != base.fingerprint:
            raise ValueError(
                f"{base.label} ({short(base.fingerprint)}) is not the base "
                f"of the task vector {self.label}, which was taken from "
                f"{short(self.base_fingerprint)}. Merge into its own base, "
                "or say any_base=True if another model is meant"
            )

    def chunk(self, inputs, place, work):
        """Return a run of the vector (see `Checkpoint.chunk`)."""
        return read_float32(
            self.state, place.name, place.start, place.stop, work, "tuned"
        )


class LoadedVector(StoredVector):
    """A task vector in memory, or one whose encoding must be undone first.

    Arguments
    ---------
    vector : TaskVector
        The vector.
    label : str
        What to call it in messages.
    """

    def __init__(self, vector, label):
        self.state, self.label = as_state(dict(vector)), label
        self.base_fingerprint = vector.base_fingerprint


def open_parent(source):
    """Open what is to be merged: fine-tuned weights or a task vector.

    Arguments
    ---------
    source : path, torch.nn.Module, mapping, State or TaskVector
        A path may be any checkpoint or a stored task vector.

    Returns
    -------
    Checkpoint, StoredVector or LoadedVector
        Opened.
    """
    if isinstance(source, Mapping) and hasattr(source, "base_fingerprint"):
        return LoadedVector(source, "task vector in memory")
    state = as_state(source)
    text = state.metadata.get("task_vector")
    if text is None:
        return Checkpoint(state)
    try:
        header = json.loads(text)
        forms = {entry["as"] for entry in header["layout"].values()}
    except (ValueError, KeyError, TypeError, AttributeError):
        # The loader of vectors says what is wrong.
        forms, header = {"damaged"}, None
    if forms <= {"lossless", "bf16"}:
        return StoredVector(state, header)
    from speechbrain_taskarith.vectors.task_vector import TaskVector

    return LoadedVector(TaskVector.load(state.path), state.label)


class MergeInputs:
    """Base and parents, as a source of chunks (see `streaming.Stream`).

    Arguments
    ---------
    base : path, torch.nn.Module, mapping or State
        The base.
    finetuned : sequence
        What `open_parent` takes.
    include, exclude : sequence of str
        Patterns of the parameters to edit.
    buffers : str
        `"base"`: running statistics are the base's; `"edit"`: edited.

    Attributes
    ----------
    shapes : dict
        `{name: shape}` of what is edited, of tied tensors only the first.
    twins : dict
        `{name: first name}` of the other tied tensors that are edited.
    copied : list of str
        What is copied from the base.
    """

    xp, device = np, None

    def __init__(
        self, base, finetuned, include=("*",), exclude=(), buffers="base"
    ):
        if isinstance(finetuned, (str, os.PathLike, Mapping, State)):
            finetuned = [finetuned]
        if buffers not in ("base", "edit"):
            raise ValueError(f"buffers={buffers!r}: expected 'base' or 'edit'")
        self.base = as_state(base)
        self.parents = [open_parent(source) for source in finetuned]
        self.number = len(self.parents)
        if not self.parents:
            raise ValueError("nothing to merge: no fine-tuned model was given")
        names = self._editable(buffers)
        chosen = set(select(names, include, exclude))
        self.names = [name for name in names if name in chosen]
        if not self.names:
            raise ValueError(
                f"{self.base.label}: no floating point parameter is left to "
                "edit"
            )
        self._tie()
        self.copied = [n for n in self.base if n not in set(self.names)]

    def _editable(self, buffers):
        """Return the parameters that all parents have."""
        found = [p.editable(self.base, buffers) for p in self.parents]
        for parent, names in zip(self.parents, found):
            odd = sorted(set(names) ^ set(found[0]))
            if odd:
                raise KeyError(
                    f"{self.parents[0].label} and {parent.label} edit "
                    f"different parameters: only one of them has {some(odd)}"
                )
        return found[0]

    def _tie(self):
        """Keep tied tensors together."""
        self.shapes, self.twins, first = {}, {}, {}
        chosen = set(self.names)
        for name, origin in self.base.aliases.items():
            if (name in chosen) != (origin in chosen):
                raise ValueError(
                    f"{name!r} and {origin!r} are one tensor in "
                    f"{self.base.label}; edit both or exclude both"
                )
        for name in self.names:
            origin = first.setdefault(self.base.aliases.get(name, name), name)
            if origin == name:
                self.shapes[name] = self.base.info(name).shape
                continue
            self.twins[name] = origin
            for parent in self.parents:
                aliases = parent.state.aliases
                if name not in aliases or aliases[name] != aliases.get(origin):
                    _require_equal(parent, name, origin)

    def check_ancestry(self):
        """Raise for a task vector that was taken from another base."""
        for parent in self.parents:
            if parent.kind == "task vector":
                parent.check_ancestry(self.base)

    def vector(self, index, place, work):
        """Return a run of one vector (see `MemoryVectors.vector`)."""
        return self.parents[index].chunk(self, place, work)

    def base_chunk(self, place, work):
        """Return a run of the base (see `MemoryVectors.base_chunk`).

        It is read once for a place.
        """
        if work.place is not place:
            work.base = read_float32(
                self.base, place.name, place.start, place.stop, work, "base"
            )
            work.place = place
        return work.base

    def require_base(self):
        """Nothing to do: there always is a base."""

    def blame(self, index, place):
        """Make the error for NaN or infinity (see `MemoryVectors.blame`)."""
        from speechbrain_taskarith.vectors.engine.workspace import Workspace

        parent, work = self.parents[index], Workspace()
        run = (place.name, place.start, place.stop)
        base = read_float32(self.base, *run, work, "base")
        bad, values = self.base, base
        if np.isfinite(base).all():
            bad = parent
            values = read_float32(parent.state, *run, work, "tuned")
        wrong = np.flatnonzero(~np.isfinite(values))
        if not len(wrong):
            what = "differs from the base by more than float32 can hold"
        else:
            element = place.start + int(wrong[0])
            what = f"holds NaN or infinity (first at element {element})"
        return ValueError(
            f"{bad.label}: {place.name!r} {what}. The training that made it "
            "diverged: use an earlier checkpoint; or exclude this parameter "
            "if it is meant to be so"
        )


def _check_same_kind(base, state, name):
    """Raise unless a tensor has the same shape, and is of a floating point
    type, on both sides or on neither."""
    one, other = base.info(name), state.info(name)
    if one.shape != other.shape:
        raise ValueError(
            f"{state.label}: {name!r} has shape {other.shape}, in "
            f"{base.label} {one.shape}. For a grown vocabulary align the rows "
            "by token first (align_vocabulary)"
        )
    if one.floating != other.floating:
        raise ValueError(
            f"{state.label}: {name!r} is of type {other.dtype}, in "
            f"{base.label} of {one.dtype}; integers and floating point "
            "numbers cannot be compared. Save both in one type"
        )


def _require_equal(parent, name, origin):
    """Raise unless two tensors that the base ties are equal in a parent."""
    info = parent.state.info(name)
    one, other = np.empty((2, info.nbytes), np.uint8)
    same = info == parent.state.info(origin)
    if same:
        parent.state.read_into(name, 0, info.numel, one)
        parent.state.read_into(origin, 0, info.numel, other)
    if not same or not np.array_equal(one, other):
        raise ValueError(
            f"{name!r} and {origin!r} are one tensor in the base and two "
            f"different ones in {parent.label}; exclude one of them"
        )
