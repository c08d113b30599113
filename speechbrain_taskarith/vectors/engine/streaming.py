"""Passing vectors through a rule, chunk by chunk.

Vectors may be tensors in memory or files that are read piece by piece
(`inputs`), the chunks may be worked on by several threads, and the result is
the same to the last bit: every chunk is computed alone, and what is gathered
over chunks is gathered in their order. Files need no torch.
"""

import collections
import contextlib
import math
import threading
from concurrent.futures import ThreadPoolExecutor, wait

import numpy as np

from speechbrain_taskarith.utils.progress import progress
from speechbrain_taskarith.vectors.checks import all_finite
from speechbrain_taskarith.vectors.engine.workspace import (
    CHUNK,
    EPS,
    Workspace,
    places,
)
from speechbrain_taskarith.vectors.states.state import memory_identity


class MemoryVectors:
    """Vectors that are tensors in memory, as a source of a `Stream`.

    All are over the same names and shapes; `base` is a State, for rules that
    look at it. `shapes` and `twins` are those of `MergeInputs`.
    """

    def __init__(self, vectors, base=None):
        import torch

        self.number, self.base = len(vectors), base
        first = vectors[0]
        self.shapes, self.twins, self._flat = {}, {}, {}
        self._eps = {}
        seen, alive = {}, []
        device = _device_of(vectors) or torch.device("cpu")
        for name in first.keys():
            tensors = [vector[name] for vector in vectors]
            # A lazy mapping's tensor must not be freed meanwhile: the next
            # one could lie at its address, and would look tied to it.
            alive.append(tensors)
            same = tuple(map(memory_identity, tensors))
            if None not in same and same in seen:
                self.twins[name] = seen[same]
                continue
            seen[same] = name
            self.shapes[name] = tuple(tensors[0].shape)
            for tensor in tensors:
                if not tensor.is_floating_point():
                    raise ValueError(
                        f"{name!r} is of type {tensor.dtype}; a task vector "
                        "holds differences of floating point parameters "
                        "only. Leave it out, or make the vectors with "
                        "TaskVector.between"
                    )
            # As float32: the finer steps of float64 are lost.
            self._eps[name] = [
                max(torch.finfo(tensor.dtype).eps, EPS["F32"])
                for tensor in tensors
            ]
            self._flat[name] = [
                tensor.detach().to(device, torch.float32).reshape(-1)
                for tensor in tensors
            ]
        on_cpu = device.type == "cpu"
        self.xp, self.device = (np, None) if on_cpu else (torch, device)
        if on_cpu:
            for tensors in self._flat.values():
                tensors[:] = [tensor.numpy() for tensor in tensors]

    def rounding(self, index, name):
        """See `MergeInputs.rounding`."""
        return EPS["F32"], self._eps[name][index]

    def vector(self, index, place, work):
        """Return a chunk of one vector; not to be written to."""
        return self._flat[place.name][index][place.start : place.stop]

    def base_chunk(self, place, work):
        """Return a chunk of the base, as float32."""
        return work.read(self.base, place, "base")

    def not_finite_error(self, index, place):
        """Return the error for NaN or infinity in a vector."""
        return ValueError(
            f"task vector {index + 1} of {self.number} holds NaN or infinity "
            f"in {place.name!r}. The training that made it diverged; use an "
            "earlier checkpoint"
        )


class Part:
    """Some of the parameters of a source, as a source of their own."""

    def __init__(self, source, names):
        self._source = source
        self.shapes = {name: source.shapes[name] for name in names}

    def __getattr__(self, name):
        return getattr(self._source, name)


def _device_of(vectors):
    """Return where to compute: on the first accelerator that holds any."""
    found = [tensor.device for tensor in vectors[0].values()]
    found += [next(iter(v.values())).device for v in vectors[1:] if len(v)]
    on_device = [device for device in found if device.type != "cpu"]
    return next(iter(on_device or found), None)


class Passes:
    """Goes through chunks by one thread or several, each with a workspace."""

    def __init__(self, threads=1, xp=np, device=None, show_progress=False):
        self.threads = max(1, threads)
        self.show_progress = show_progress
        self.lock = threading.Lock()
        self.workspaces = [Workspace(xp, device) for _ in range(self.threads)]
        # For work between the passes.
        self.workspace = self.workspaces[0]

    def run(self, function, items, label=None):
        """Return `function(item, workspace)` for all items, in their order.

        Items are taken in order by whichever thread is free. With a label, a
        bar counts their `size`.
        """
        results, stop, bar = [None] * len(items), [], None
        numbers = iter(range(len(items)))

        def work(workspace):
            while not stop:
                with self.lock:
                    number = next(numbers, None)
                if number is None:
                    return
                try:
                    # Overflow shows as infinity, which is looked for.
                    with np.errstate(over="ignore", invalid="ignore"):
                        results[number] = function(items[number], workspace)
                except BaseException:
                    stop.append(True)
                    raise
                if bar is not None:
                    with self.lock:
                        bar.update(items[number].size)

        with contextlib.ExitStack() as stack:
            if label is not None and self.show_progress:
                total = sum(item.size for item in items)
                bar = progress(total=total, desc=label, unit="el")
                stack.enter_context(bar)
            if self.threads == 1 or len(items) < 2:
                work(self.workspace)
                return results
            pool = stack.enter_context(ThreadPoolExecutor(self.threads))
            futures = [pool.submit(work, w) for w in self.workspaces]
            try:
                wait(futures)
            except BaseException:
                # An interrupt: else the threads would go on to the last item.
                stop.append(True)
                raise
            # The first error in the order of the items would need waiting
            # for all; any of them names its place.
            for future in futures:
                future.result()
        return results


class Stream:
    """Vectors on their way through a rule's stages.

    The source (`MemoryVectors`, `inputs.MergeInputs`) gives chunks of the
    vectors; `stages` are done to each vector alone, in this order.
    """

    def __init__(
        self,
        source,
        stages=(),
        chunk=CHUNK,
        threads=1,
        show_progress=False,
        passes=None,
    ):
        self.source, self.chunk = source, chunk
        self.numel = {n: math.prod(s) for n, s in source.shapes.items()}
        if passes is None:
            passes = Passes(threads, source.xp, source.device, show_progress)
        self.passes = passes
        # Whether the vectors are known to hold neither NaN nor infinity.
        self.finite = False
        self.ready = []
        for stage in stages:
            self.ready.append(stage.prepare(self))

    def part(self, names, stages):
        """Return a stream of some of the parameters, with other stages."""
        source = Part(self.source, names)
        return Stream(source, stages, self.chunk, passes=self.passes)

    def granularity(self, shape):
        """Return the smallest run that all stages so far can work on."""
        return max([1, *(stage.granularity(shape) for stage in self.ready)])

    def places(self, granularity=lambda shape: 1):
        """Return the chunks that all stages so far, and a rule, can work on."""

        def unit(shape):
            return max(granularity(shape), self.granularity(shape))

        return places(self.source.shapes, self.chunk, unit)

    def vector(self, index, place, work, look=True):
        """Return a chunk of one vector after all stages so far, as float32.

        NaN and infinity are an error, unless `look` is false or a pass before
        has looked at all vectors already.
        """
        tau = self.source.vector(index, place, work)
        if look and not self.finite and not all_finite(tau):
            raise self.source.not_finite_error(index, place)
        for number, stage in enumerate(self.ready):
            out = work.array(f"stage{number % 2}", place.size)
            tau = stage.apply(index, tau, place, work, out)
        return tau

    def vectors(self, place, work):
        """Yield a chunk of every vector, valid until the next is asked for."""
        for index in range(self.source.number):
            yield self.vector(index, place, work)

    def merge(self, rule, emit):
        """Merge all chunks.

        `emit(place, merged, workspace)` is called from any thread; the array
        is valid until it returns.
        """
        prepared, passes = rule.prepare(self), self.passes
        chunks = self.places(rule.granularity)
        # One look at the result is cheaper than one at every vector.
        carried = rule.carries_nan and not self.finite
        carried = carried and all(stage.carries_nan for stage in self.ready)
        self.finite = self.finite or carried

        majorities = {}

        def visit(place, work):
            work.unresolved, work.tally = False, 0
            work.majority = majorities.get(rule.group(place.name))
            vectors = self.vectors(place, work)
            merged = rule.merge(vectors, place, work, prepared)
            if carried and not all_finite(merged):
                self._look_for_nan(place, work)
            if not work.unresolved:
                emit(place, merged, work)
            return work.unresolved, work.tally

        results = passes.run(visit, chunks, "merging")
        unresolved = [p for p, (left, _) in zip(chunks, results) if left]
        if unresolved:
            # Entries that cancel exactly take the sign that prevails in the
            # whole vector (of their group), which is known only now.
            tallies = collections.Counter()
            for place, (_, tally) in zip(chunks, results):
                tallies[rule.group(place.name)] += tally
            for group, tally in tallies.items():
                majorities[group] = int(np.sign(tally))
            passes.run(visit, unresolved)

    def _look_for_nan(self, place, work):
        # None need hold any: large numbers may also overflow by being added.
        for index in range(self.source.number):
            if not all_finite(self.source.vector(index, place, work)):
                raise self.source.not_finite_error(index, place)
