"""Passing vectors through a rule, chunk by chunk.

What a rule computes is written once, against the operators that NumPy and
torch share; this file feeds it. Vectors may be tensors in memory or files
that are read piece by piece (`merge`), the chunks may be worked on by several
threads, and the result is the same to the last bit: every chunk is computed
alone, and what is gathered over chunks is gathered in their order.

Nothing here imports torch, unless tensors of a GPU are passed in.
"""

import math
import threading
from concurrent.futures import ThreadPoolExecutor, wait

import numpy as np

from speechbrain_taskarith.utils.progress import progress as show_progress
from speechbrain_taskarith.vectors.engine.chunk_reader import read_float32
from speechbrain_taskarith.vectors.engine.kernels import all_finite
from speechbrain_taskarith.vectors.engine.workspace import (
    CHUNK,
    Workspace,
    places,
)


class MemoryVectors:
    """Vectors that are tensors in memory, as flat arrays.

    Arguments
    ---------
    vectors : sequence of mappings
        `{name: float32 tensor}`, all with the same names and shapes.
    base : State or None
        The base's weights, for rules that look at them.

    Attributes
    ----------
    shapes : dict
        `{name: shape}` of what is to be merged; of tied tensors only the
        first.
    twins : dict
        `{name: first name}` of the other tied tensors.
    """

    def __init__(self, vectors, base=None):
        import torch

        self.number, self.base = len(vectors), base
        first = vectors[0]
        self.shapes, self.twins, self._flat = {}, {}, {}
        seen, alive = {}, []
        device = _device_of(vectors) or torch.device("cpu")
        for name in first.keys():
            tensors = [vector[name] for vector in vectors]
            # A lazy mapping's tensor must not be freed meanwhile: the next
            # one could lie at its address, and would look tied to it.
            alive.append(tensors)
            same = tuple(map(_memory, tensors))
            if None not in same and same in seen:
                self.twins[name] = seen[same]
                continue
            seen[same] = name
            self.shapes[name] = tuple(tensors[0].shape)
            self._flat[name] = [
                tensor.detach().to(device, torch.float32).reshape(-1)
                for tensor in tensors
            ]
        on_cpu = device.type == "cpu"
        self.xp, self.device = (np, None) if on_cpu else (torch, device)
        if on_cpu:
            for name, tensors in self._flat.items():
                self._flat[name] = [tensor.numpy() for tensor in tensors]

    def vector(self, index, place, work):
        """Return a run of one vector; not to be written to.

        Arguments
        ---------
        index : int
            Number of the vector.
        place : Place
            Where the run lies.
        work : Workspace
            For buffers.

        Returns
        -------
        array
            float32.
        """
        return self._flat[place.name][index][place.start : place.stop]

    def require_base(self):
        """Raise unless the base is known."""
        if self.base is None:
            raise ValueError(
                "this rule looks at the models' weights: pass the base too, "
                "as in rule(base, vectors) or combine(vectors, base=base)"
            )

    def base_chunk(self, place, work):
        """Return a run of the base.

        Arguments
        ---------
        place : Place
            Where the run lies.
        work : Workspace
            For buffers.

        Returns
        -------
        array
            float32.
        """
        return read_float32(
            self.base, place.name, place.start, place.stop, work, "base"
        )

    def blame(self, index, place):
        """Make the error for NaN or infinity in a vector.

        Arguments
        ---------
        index : int
            Number of the vector.
        place : Place
            Where it was found.

        Returns
        -------
        ValueError
            To be raised by the caller.
        """
        return ValueError(
            f"task vector {index + 1} of {self.number} holds NaN or infinity "
            f"in {place.name!r}. The training that made it diverged; use an "
            "earlier checkpoint"
        )


def _device_of(vectors):
    """Return where to compute: on the first accelerator that holds any."""
    found = [vectors[0][name].device for name in vectors[0].keys()]
    found += [next(iter(v.values())).device for v in vectors[1:] if len(v)]
    on_device = [device for device in found if device.type != "cpu"]
    return next(iter(on_device or found), None)


def _memory(tensor):
    """Tell which memory a tensor shows; None for an empty one."""
    if not tensor.numel():
        return None
    shape, stride = tuple(tensor.shape), tuple(tensor.stride())
    return tensor.device, tensor.data_ptr(), shape, stride


class Pass:
    """One way through all chunks, by one thread or several.

    Arguments
    ---------
    threads : int
        Number of threads.
    xp, device : module, torch.device or None
        Where the workspaces' arrays live.
    progress : bool
        Whether to show a bar for every pass that has a label.
    """

    def __init__(self, threads=1, xp=np, device=None, progress=False):
        self.threads = max(1, threads)
        self.progress = progress
        self.lock = threading.Lock()
        self._workspaces = [Workspace(xp, device) for _ in range(self.threads)]

    def run(self, function, items, label=None):
        """Call `function(item, workspace)` for every item.

        Arguments
        ---------
        function : callable
            What to do with an item.
        items : sequence
            Taken in order by whichever thread is free; `item.size` is what
            the bar counts.
        label : str or None
            What to write before the bar; None shows no bar.

        Returns
        -------
        list
            The results in the order of the items.
        """
        if label is None or not self.progress:
            return self._run(function, items, None)
        total = sum(item.size for item in items)
        with show_progress(total=total, desc=label, unit="el") as bar:
            return self._run(function, items, bar)

    def _run(self, function, items, bar):
        results, stop = [None] * len(items), []
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

        if self.threads == 1 or len(items) < 2:
            work(self._workspaces[0])
            return results
        with ThreadPoolExecutor(self.threads) as pool:
            futures = [pool.submit(work, w) for w in self._workspaces]
            wait(futures)
            # The first error in the order of the items would need waiting
            # for all; any of them names its place.
            for future in futures:
                future.result()
        return results

    @property
    def workspace(self):
        """A workspace for work between the passes."""
        return self._workspaces[0]

    @property
    def bytes_read(self):
        """Bytes read from files so far."""
        return sum(work.bytes_read for work in self._workspaces)

    def tell(self, majority):
        """Let all workspaces know the sign that prevails.

        Arguments
        ---------
        majority : int
            Above 0: plus; below: minus.
        """
        for work in self._workspaces:
            work.majority = majority


class Stream:
    """Vectors on their way through a rule's stages.

    Arguments
    ---------
    source : MemoryVectors or alike
        Gives runs of the vectors: `number`, `shapes`, `vector`, `blame`,
        `xp`, `device`.
    stages : sequence of Stage
        What is done to each vector alone, in this order.
    chunk : int
        Elements at a time.
    threads : int
        Number of threads.
    progress : bool
        See `Pass`.
    """

    def __init__(
        self, source, stages=(), chunk=CHUNK, threads=1, progress=False
    ):
        self.source, self.chunk = source, chunk
        self.numel = {n: math.prod(s) for n, s in source.shapes.items()}
        self.passes = Pass(threads, source.xp, source.device, progress)
        # Whether the vectors are known to hold neither NaN nor infinity.
        self.finite = False
        self.ready = []
        for stage in stages:
            self.ready.append(stage.prepare(self))

    def granularity(self, shape):
        """Return the smallest run that all stages so far can work on.

        Arguments
        ---------
        shape : tuple of int
            A tensor's shape.

        Returns
        -------
        int
            Number of elements.
        """
        return max(
            (stage.granularity(shape) for stage in self.ready), default=1
        )

    def places(self, granularity=None):
        """Cut the vectors into chunks that all stages so far can work on.

        Arguments
        ---------
        granularity : callable or None
            Of a rule that is to work on them too, see `Rule.granularity`.

        Returns
        -------
        list of Place
            The chunks.
        """

        def coarsest(shape):
            unit = granularity(shape) if granularity is not None else 1
            return max(unit, self.granularity(shape))

        return places(self.source.shapes, self.chunk, coarsest)

    def vector(self, index, place, work, look=True):
        """Return a run of one vector after all stages so far.

        Arguments
        ---------
        index : int
            Number of the vector.
        place : Place
            Where the run lies.
        work : Workspace
            For buffers.
        look : bool
            False does not look for NaN.

        Returns
        -------
        array
            float32.

        Raises
        ------
        ValueError
            NaN or infinity, unless `look` is false or a pass before has
            looked at all vectors already.
        """
        tau = self.source.vector(index, place, work)
        if look and not self.finite and not all_finite(tau):
            raise self.source.blame(index, place)
        for number, stage in enumerate(self.ready):
            out = work.array(f"stage{number % 2}", place.size)
            tau = stage.apply(index, tau, place, work, out)
        return tau

    def vectors(self, place, work):
        """Go through a run of every vector.

        Arguments
        ---------
        place : Place
            Where the run lies.
        work : Workspace
            For buffers.

        Yields
        ------
        array
            float32, valid until the next is asked for.
        """
        for index in range(self.source.number):
            yield self.vector(index, place, work)

    def merge(self, rule, emit):
        """Merge all chunks.

        Arguments
        ---------
        rule : Rule
            What to do with the vectors.
        emit : callable
            Called as `emit(place, merged, workspace)`, from any thread; the
            array is valid until it returns.
        """
        prepared = rule.prepare(self)
        passes, spots = self.passes, self.places(rule.granularity)
        # One look at the result is cheaper than one at every vector.
        carried = rule.carries_nan and not self.ready and not self.finite
        self.finite = self.finite or carried

        def visit(place, work):
            work.unresolved, work.tally = False, 0
            vectors = self.vectors(place, work)
            merged = rule.merge(vectors, place, work, prepared)
            if carried and not all_finite(merged):
                self._look_for_nan(place, work)
            if not work.unresolved:
                emit(place, merged, work)
            return work.unresolved, work.tally

        told = passes.run(visit, spots, "merging")
        open_spots = [p for p, (left, _) in zip(spots, told) if left]
        if open_spots:
            # Entries that cancel exactly take the sign that prevails in the
            # whole vector, which is known only now.
            majority = int(np.sign(sum(tally for _, tally in told)))
            passes.tell(majority)
            passes.run(visit, open_spots)

    def _look_for_nan(self, place, work):
        """Raise for the vector that holds NaN or infinity, if any does:
        large finite numbers may also overflow by being added."""
        for index in range(self.source.number):
            if not all_finite(self.source.vector(index, place, work)):
                raise self.source.blame(index, place)
