"""The merge engine: from checkpoints to a checkpoint in bounded memory.

The checkpoints are read piece by piece, by several threads, into buffers that
are used again; a rule turns the pieces into a piece of the result, which is
written at once. What is in memory does not depend on the size of the models,
and hardly on their number; for safetensors files torch is not even imported.
"""

import contextlib
import dataclasses
import math
import os
import threading
import time
import types
from pathlib import Path

from speechbrain_taskarith.utils.files import temporary_file
from speechbrain_taskarith.vectors import checks
from speechbrain_taskarith.vectors.engine.inputs import MergeInputs
from speechbrain_taskarith.vectors.engine.output import write_edits
from speechbrain_taskarith.vectors.engine.streaming import Passes, Stream
from speechbrain_taskarith.vectors.engine.workspace import (
    CHUNK,
    DEVICE_CHUNK,
    Place,
    places,
)
from speechbrain_taskarith.vectors.rules.base import check_rule
from speechbrain_taskarith.vectors.rules.description import with_each
from speechbrain_taskarith.vectors.states.readers import (
    check_no_input,
    form_of,
    open_state,
)
from speechbrain_taskarith.vectors.states.safetensors import (
    FLOATING,
    TORCH_NAME,
    SafetensorsWriter,
    tied_text,
)
from speechbrain_taskarith.vectors.states.state import fingerprint_of
from speechbrain_taskarith.vectors.states.writers import (
    check_extra,
    check_metadata,
    check_networks,
    metadata_texts,
    save_state,
)

_SMALLEST_CHUNK = 1 << 12
_MOST_THREADS = 16
# Stands for a fingerprint until it is known; of the same length.
_UNKNOWN = "0" * 64


@dataclasses.dataclass
class MergeReport:
    """What `merge_checkpoints` did.

    Arguments
    ---------
    output : str
        What was written.
    fingerprint : str or None
        Of the output's weights; None without fingerprints.
    base : dict
        `{"path": ..., "fingerprint": ...}`.
    parents : list of dict
        The same for what was merged, with `"kind"`: `"checkpoint"` or
        `"task vector"`.
    rule : dict
        `Rule.describe()`.
    edited, copied : int
        Numbers of tensors edited and copied from the base.
    parameters : int
        Number of elements edited.
    threads, chunk : int
        How it was done.
    seconds : dict
        Wall time of the steps (`"fingerprints"`, `"merge"`, ...), and
        `"total"`.
    bytes_read, bytes_written : int
        Bytes of tensors that went through.
    dtype : str or None
        What floating point tensors were written in; None: the base's types.
    rounding_loss : float
        Share of the edit that rounding to half precision lost, in [0, about
        1]: norm of what was rounded away over norm of the edit. 0 in float32.
    extra_of_base : list of str
        What is no weight (extra states, counters) and differs in what was
        merged: the base's is kept.
    peak_anonymous : int or None
        Largest anonymous memory of the process seen meanwhile, in bytes;
        None where the system does not tell (it is sampled).
    """

    output: str
    fingerprint: str | None
    base: dict
    parents: list
    rule: dict
    edited: int
    copied: int
    parameters: int
    threads: int
    chunk: int
    seconds: dict
    bytes_read: int
    bytes_written: int
    dtype: str | None
    rounding_loss: float
    extra_of_base: list
    peak_anonymous: int | None

    def to_dict(self):
        """As `dataclasses.asdict`: plain types, for JSON."""
        return dataclasses.asdict(self)


def merge_checkpoints(
    base,
    finetuned,
    rule,
    output,
    *,
    device="cpu",
    memory_limit=None,
    show_progress=True,
    progress=True,
    threads=None,
    fingerprint=True,
    include=("*",),
    exclude=(),
    buffers="base",
    any_base=False,
    chunk=None,
    metadata=None,
    recoverable=None,
    dtype=None,
    weights=None,
    densities=None,
) -> "MergeReport":
    """Merge checkpoints into one: `base + scale * rule(finetuned - base)`.

    Floating point tensors are edited in float32 and stored in the base's
    type; integer tensors and running statistics are copied from the base;
    tied tensors are edited once. Threads and chunk size change no byte.

    Arguments
    ---------
    base : path, torch.nn.Module, mapping or State
        The model that the others were fine-tuned from.
    finetuned : sequence of paths, modules, mappings, States, TaskVectors
        What to merge: fine-tuned checkpoints in any form that `open_state`
        reads, or stored task vectors.
    rule : Rule
        How.
    output : str or pathlib.Path
        Where to; the form follows from the name as in `save_state`. Only
        `.safetensors` is written without importing torch.
    device : str
        `"cpu"`, or a torch device to compute on.
    memory_limit : int, str or None
        Most bytes of buffers, also as text (`"300MB"`, `"1GiB"`); fewer
        threads and smaller chunks are used to keep to it. None: as is
        fastest (a few MiB a thread, for rules on whole matrices a few times
        the largest).
    show_progress : bool
        Show progress bars: on a terminal, or where `TASKARITH_PROGRESS=1` is
        set; piped output stays quiet.
    progress : bool
        The older name of `show_progress`: False shows none, too.
    threads : int or None
        None: one for each core, at most 16; 1 for rules on whole matrices,
        whose linear algebra has threads of its own.
    fingerprint : bool
        True: check the inputs against the fingerprints they carry, and note
        those of all parents and of the result. False: neither, which saves
        the time to hash all bytes; a task vector's base is then not checked
        (say `any_base=True` too).
    include, exclude : sequence of str
        Anchored shell patterns: which parameters to edit; the others are
        copied from the base and need not be the same in all inputs.
    buffers : str
        `"base"` copies running means and variances from the base, `"edit"`
        edits them.
    any_base : bool
        True: stored vectors may come from another base.
    chunk : int or None
        Elements at a time; None: what stays in a core's cache.
    metadata : dict or None
        Plain values to keep with the weights, see `save_state`.
    recoverable : str or None
        Of inputs that are SpeechBrain folders, whose weights (see
        `open_state`; `"all"`: of all networks); also their name in an
        output that is one.
    dtype : str, torch.dtype or None
        Type of all floating point tensors of the output: `"float32"`,
        `"float16"`, `"bfloat16"`, `"float64"`; None: the base's. Half
        precision rounds most of a small edit away: see
        `MergeReport.rounding_loss`.
    weights, densities : sequence of float or None
        One for each of `finetuned`: they become the rule's arguments
        `weights` and `density` (`drop`, as `1 - density`). A rule without
        these is refused.

    Returns
    -------
    MergeReport
        What was done; the provenance is in the output's metadata too, under
        `"merge"`.

    Raises
    ------
    KeyError
        Parameters on one side only.
    ValueError
        Shapes that differ, NaN or infinity in an input, a damaged file, a
        vector of another base, a wrong number of inputs, a pattern that
        matches nothing, too small a memory limit, an output that is an
        input, an edit that the output's type cannot hold.
    OSError
        The output cannot be written (a full disk).

    In every case nothing is left behind, and what stood under `output` is
    unchanged.

    Example
    -------
    >>> import torch
    >>> from speechbrain_taskarith.vectors import TaskArithmetic, open_state
    >>> base = {"w": torch.zeros(2)}
    >>> tuned = [{"w": torch.ones(2)}, {"w": torch.tensor([0.0, 4.0])}]
    >>> path = str(getfixture("tmpdir") / "merged.safetensors")
    >>> report = merge_checkpoints(base, tuned, TaskArithmetic(0.5), path)
    >>> open_state(path)["w"], report.edited
    (tensor([0.5000, 2.5000]), 1)
    """
    start = time.perf_counter()
    output = Path(output)
    form, seconds = form_of(output), {}
    dtype = None if dtype is None else checks.floating(dtype)
    show_progress = show_progress and progress
    metadata = check_metadata(metadata, output, form, also=("merge",))
    rule = with_each(check_rule(rule), weights=weights, densities=densities)
    with watch_memory() as memory:
        inputs = MergeInputs(
            base, finetuned, include, exclude, buffers, recoverable
        )
        scales = inputs.scales(rule)
        read = [inputs.base, *(parent.state for parent in inputs.parents)]
        check_no_input(output, [s.path for s in read if s.path is not None])
        check_extra(inputs.base, output, form)
        check_networks(inputs.base, output)
        if str(device) != "cpu":
            import torch

            inputs.xp, inputs.device = torch, torch.device(device)
        threads, chunk = _plan(inputs, rule, threads, chunk, memory_limit)
        hashing = Passes(threads, show_progress=show_progress)
        parents = [parent.state for parent in inputs.parents]
        states = [inputs.base, *(state.source or state for state in parents)]
        hashed = 0
        with _timed(seconds, "fingerprints"):
            if fingerprint:
                hashed += _fingerprint(states, hashing)
                for state in states:
                    state.verify()
            if not any_base:
                inputs.check_ancestry(fingerprint)
        prints = [s.fingerprint if fingerprint else None for s in states]
        provenance = {
            "rule": rule.describe(),
            "base": {"path": inputs.base.label, "fingerprint": prints[0]},
            "parents": [
                {"path": p.label, "kind": p.kind, "fingerprint": found}
                for p, found in zip(inputs.parents, prints[1:])
            ],
        }
        metadata["merge"] = provenance
        header = {"format": "pt", **metadata_texts(metadata)}
        header |= tied_text(inputs.base.aliases, inputs.base)
        if fingerprint:
            header["fingerprint"] = _UNKNOWN
        infos = _output_infos(inputs.base, dtype)
        merged, found = output, None
        if form != "safetensors":
            file, merged = temporary_file(output.with_suffix(".safetensors"))
            os.close(file)
        try:
            with SafetensorsWriter(merged, infos, header) as out:
                with _timed(seconds, "statistics"):
                    stream = Stream(
                        inputs, rule.stages, chunk, threads, show_progress
                    )
                with _timed(seconds, "merge"):
                    rounding_loss = write_edits(out, stream, rule, scales)
                if fingerprint:
                    with _timed(seconds, "output fingerprint"):
                        # Read back from the page cache: chunks come in any
                        # order, a hash wants them in one.
                        state = open_state(out.temporary, as_stored=True)
                        hashed += _fingerprint([state], hashing)
                        found = state.fingerprint
                        out.close(fingerprint=found)
            if merged != output:
                with _timed(seconds, "convert"):
                    _convert(merged, output, inputs, metadata, recoverable)
        finally:
            if merged != output:
                merged.unlink(missing_ok=True)
    seconds["total"] = time.perf_counter() - start
    return MergeReport(
        output=str(output),
        fingerprint=found,
        **provenance,
        edited=len(inputs.names),
        copied=len(inputs.copied),
        parameters=sum(math.prod(s) for s in inputs.shapes.values()),
        threads=threads,
        chunk=chunk,
        seconds=seconds,
        bytes_read=hashed + sum(w.bytes_read for w in stream.passes.workspaces),
        bytes_written=sum(info.nbytes for info in infos.values()),
        dtype=dtype,
        rounding_loss=rounding_loss,
        extra_of_base=inputs.differing_extra(),
        peak_anonymous=memory.peak,
    )


def _plan(inputs, rule, threads, chunk, memory_limit):
    """Choose threads and elements at a time within a memory limit."""
    on_cpu = inputs.device is None
    if threads is None:
        cores = os.cpu_count() or 1
        if hasattr(os, "sched_getaffinity"):
            cores = len(os.sched_getaffinity(0))
        alone = rule.whole_tensors or not on_cpu
        threads = 1 if alone else min(cores, _MOST_THREADS)
    if chunk is None:
        chunk = CHUNK if on_cpu else DEVICE_CHUNK
    threads = checks.threads(threads)
    chunk = checks.whole("chunk", checks.in_range("chunk", chunk, 1, math.inf))
    if memory_limit is None:
        return threads, chunk
    memory_limit = checks.bytes_of("memory_limit", memory_limit)

    def unit(shape):
        parts = (rule, *rule.stages)
        return max(part.granularity(shape) for part in parts)

    def need(workers, elements):
        chunks = places(inputs.shapes, elements, unit)
        largest = max((place.size for place in chunks), default=0)
        return workers * largest * rule.bytes_per_element(inputs.number)

    while need(threads, chunk) > memory_limit and threads > 1:
        threads -= 1
    while need(threads, chunk) > memory_limit and chunk > _SMALLEST_CHUNK:
        chunk = max(chunk // 2, _SMALLEST_CHUNK)
    if need(threads, chunk) > memory_limit:
        raise ValueError(
            f"memory_limit={memory_limit}: {type(rule).__name__} with "
            f"{inputs.number} inputs needs buffers of at least "
            f"{need(threads, chunk)} bytes"
        )
    return threads, chunk


def _fingerprint(states, passes):
    """Give states their fingerprints by several threads; return the bytes."""
    states = [s for s in dict.fromkeys(states) if "fingerprint" not in vars(s)]
    tensors = []
    for number, state in enumerate(states):
        for name in state:
            info = state.info(name)
            tensors.append(Place(number, name, info.shape, 0, info.numel))
    # The largest first, so that no thread is left alone with it.
    tensors.sort(key=lambda place: -place.size)
    digests = passes.run(
        lambda place, work: states[place.index].digest(place.name),
        tensors,
        "fingerprints",
    )
    leaves = [{} for _ in states]
    for place, digest in zip(tensors, digests):
        leaves[place.index][place.name] = digest
    for state, found in zip(states, leaves):
        vars(state)["fingerprint"] = fingerprint_of(found)
    return sum(state.info(name).nbytes for state in states for name in state)


def _output_infos(base, dtype):
    """Return what is written: the base's tensors, in another type if asked."""
    infos = {name: base.info(name) for name in base}
    if dtype is not None:
        code = next(code for code in FLOATING if TORCH_NAME[code] == dtype)
        for name, info in infos.items():
            if info.floating:
                infos[name] = info._replace(dtype=code)
    return infos


def _convert(merged, output, inputs, metadata, recoverable):
    """Turn the safetensors file into the form asked for.

    Its tensors are mapped, so that torch writes them from the page cache.
    """
    state, aliases = open_state(merged, as_stored=True), inputs.base.aliases
    tensors = {name: state[name] for name in state}
    content = {name: tensors[aliases.get(name, name)] for name in state}
    content |= inputs.base.extra
    like = inputs.base.path
    if like is not None and not like.is_dir():
        like = None
    recoverable = ",".join(inputs.base.networks) or recoverable
    how = {"metadata": metadata, "like": like, "recoverable": recoverable}
    save_state(content, output, **how)


@contextlib.contextmanager
def _timed(seconds, step):
    start = time.perf_counter()
    yield
    seconds[step] = time.perf_counter() - start


@contextlib.contextmanager
def watch_memory(interval=0.02):
    """Sample the process's anonymous memory; `.peak` is in bytes or None."""
    found, stop = types.SimpleNamespace(peak=None), threading.Event()

    def sample():
        with contextlib.suppress(OSError):
            while True:
                with open("/proc/self/status", "rb") as stream:
                    for line in stream:
                        if line.startswith(b"RssAnon:"):
                            now = int(line.split()[1]) * 1024
                            found.peak = max(found.peak or 0, now)
                if stop.wait(interval):
                    return

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        stop.set()
        thread.join()
