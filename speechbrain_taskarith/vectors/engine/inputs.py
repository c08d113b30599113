"""What the merge engine reads: a base, and what becomes a vector against it.

All that can be wrong with the inputs is found here, before anything is
written. Nothing here imports torch for safetensors files.
"""

import os
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from speechbrain_taskarith.utils.patterns import as_tuple, fitting, select
from speechbrain_taskarith.vectors.checks import scale_by_name
from speechbrain_taskarith.vectors.engine.vector_header import (
    kept_extra_in,
    parted_in,
    read_vector_header,
)
from speechbrain_taskarith.vectors.engine.workspace import EPS
from speechbrain_taskarith.vectors.states.names import (
    check_alike,
    check_ancestry,
    check_readable,
    check_tied_groups,
    check_tied_values,
    check_ties,
    differing_extra,
    editable_names,
    not_finite_error,
)
from speechbrain_taskarith.vectors.states.pairing import (
    under_names_of,
)
from speechbrain_taskarith.vectors.states.readers import as_model, as_state
from speechbrain_taskarith.vectors.states.state import State


class Parent(NamedTuple):
    """What is merged: fine-tuned weights, or a task vector."""

    state: State
    label: str
    kind: str  # "checkpoint" or "task vector"
    base_fingerprint: str | None = None
    parted: frozenset = frozenset()  # see `vector_header.parted`
    extra: tuple = ()  # see `vector_header.kept_extra_in`


def open_parent(source, recoverable=None):
    """Open fine-tuned weights in any form, or a task vector, stored or not."""
    if isinstance(source, Mapping) and not isinstance(source, State):
        # It holds tensors: torch is there already.
        from speechbrain_taskarith.vectors.task_vector import TaskVector

        if isinstance(source, TaskVector):
            label, state = "task vector in memory", as_state(source)
            state.label = label
            parted = parted_in(source.metadata)
            found = source.base_fingerprint
            extra = kept_extra_in(source.metadata)
            return Parent(state, label, "task vector", found, parted, extra)
    state = as_state(source, recoverable=recoverable)
    header = read_vector_header(state)
    if header is None:
        return Parent(state, state.label, "checkpoint")
    layout, fingerprint, history = header
    label = state.label
    # Others are no tensors that can be read piece by piece.
    if not {e["as"] for e in layout.values()} <= {"lossless", "bf16"}:
        from speechbrain_taskarith.vectors.encodings import read_vector

        deltas, *_ = read_vector(state.path)
        path, state = state.path, as_state(deltas)
        state.path, state.label = path, label
    more = parted_in(history), kept_extra_in(history)
    return Parent(state, label, "task vector", fingerprint, *more)


def check_edit(
    base, rule, scales=(None,), include=("*",), exclude=(), buffers="base"
):
    """Raise what any edit of a base by one vector would raise.

    `scales` are those of the edits, see `MergeInputs.scales`.
    """
    inputs = MergeInputs(base, [base], include, exclude, buffers)
    for scale in scales:
        inputs.scales(rule, scale)


class MergeInputs:
    """Base and parents, as a source of a `streaming.Stream`.

    The arguments are those of `merge_checkpoints`. `names` are edited, in the
    base's order, the others `copied`; of tied tensors that are edited only
    the first is in `shapes` (`{name: shape}`), the others are in `twins`
    (`{name: first name}`).
    """

    xp, device = np, None

    def __init__(
        self,
        base,
        finetuned,
        include=("*",),
        exclude=(),
        buffers="base",
        recoverable=None,
    ):
        if isinstance(finetuned, (str, os.PathLike, Mapping)):
            finetuned = [finetuned]
        self.base = as_model(base, recoverable=recoverable)
        check_readable(self.base)
        self.parents = []
        for source in finetuned:
            parent = open_parent(source, recoverable)
            partial = parent.kind == "task vector"
            state = under_names_of(
                self.base, parent.state, partial=partial, parted=parent.parted
            )
            self.parents.append(parent._replace(state=state))
        self.number = len(self.parents)
        if not self.parents:
            raise ValueError("nothing to merge: no fine-tuned model was given")
        everything = {*self.base}.union(
            *((*p.state, *p.state.unreadable) for p in self.parents)
        )
        select(everything, include, exclude)
        layouts = []
        for parent in self.parents:
            state, partial = parent.state, parent.kind == "task vector"
            # A pattern may be meant for one of several models.
            here = {*self.base, *state, *state.unreadable}
            chosen = (
                [p for p in as_tuple(patterns) if fitting(here, p)]
                for patterns in (include, exclude)
            )
            names = editable_names(
                self.base, state, *chosen, buffers, partial=partial
            )
            layouts.append({name: state.info(name) for name in names})
        check_alike(layouts, [parent.label for parent in self.parents])
        self.names = list(layouts[0])
        self.copied = [n for n in self.base if n not in layouts[0]]
        check_ties(self.base, layouts[0])
        self.shapes, self.twins = {}, {}
        for name in self.names:
            origin = self.base.aliases.get(name, name)
            if origin == name:
                self.shapes[name] = self.base.info(name).shape
                continue
            self.twins[name] = origin
            for parent in self.parents:
                check_tied_values(self.base, parent.state, name)

    def scales(self, rule, scale=None):
        """Return `{name: scale}`, checked: of `scale`, or else the rule's."""
        rule.check_number(self.number)
        check_tied_groups(rule, self.twins)
        scales = (
            rule.scales(self.names)
            if scale is None
            else scale_by_name(scale, self.names)
        )
        check_ties(self.base, scales, scales)
        return scales

    def check_ancestry(self, fingerprints=True):
        """Raise for a task vector that was taken from another base."""
        vectors = [p for p in self.parents if p.kind == "task vector"]
        if vectors and not fingerprints:
            raise ValueError(
                "fingerprint=False: the task vectors' base cannot be checked; "
                "say any_base=True if that is meant"
            )
        for parent in vectors:
            label = f"the task vector {parent.label}"
            check_ancestry(self.base, parent.base_fingerprint, label)

    def differing_extra(self):
        """Return what is no weight and not alike everywhere: the base's stays."""
        found = {}
        for parent in self.parents:
            names = parent.extra
            if parent.kind == "checkpoint":
                names = differing_extra(self.base, parent.state)
            found |= dict.fromkeys(names)
        return list(found)

    def rounding(self, index, name):
        """Return the relative steps of the weights and of a vector's entries.

        The base is exact: training began with its numbers.
        """
        parent = self.parents[index]
        own = EPS[parent.state.info(name).dtype]
        if parent.kind == "task vector":
            return EPS["F32"], own
        return own, EPS["F32"]

    def vector(self, index, place, work):
        """Return a chunk of one vector, in a buffer of its own."""
        parent = self.parents[index]
        if parent.kind == "task vector":
            return work.read(parent.state, place, "tuned")
        base = self.base_chunk(place, work)
        tuned = work.read(parent.state, place, "tuned")
        return work.xp.subtract(tuned, base, out=tuned)

    def base_chunk(self, place, work):
        """Return a chunk of the base; it is read once for a place."""
        if work.place is not place:
            work.base = work.read(self.base, place, "base")
            work.place = place
        return work.base

    def not_finite_error(self, index, place):
        """Return the error for NaN or infinity in a vector."""
        state = self.parents[index].state
        return not_finite_error(self.base, state, place.name)
