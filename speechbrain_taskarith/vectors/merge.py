"""The merge engine: from checkpoints to a checkpoint in bounded memory.

The checkpoints are read piece by piece, by several threads, into buffers that
are used again; a rule turns the pieces into a piece of the result, which is
written at once. What is in memory does not depend on the size of the models,
and hardly on their number; for safetensors files torch is not even imported.
Threads and chunk size do not change a bit of the result.
"""

import dataclasses
import math
import os
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from speechbrain_taskarith.utils.files import TEMPORARY_PREFIX
from speechbrain_taskarith.vectors.engine.hashing import Hasher
from speechbrain_taskarith.vectors.engine.inputs import MergeInputs
from speechbrain_taskarith.vectors.engine.measuring import MemoryWatch, Timed
from speechbrain_taskarith.vectors.engine.output import Job, convert
from speechbrain_taskarith.vectors.engine.workspace import CHUNK, places
from speechbrain_taskarith.vectors.rules.base import check_rule
from speechbrain_taskarith.vectors.states.readers import TORCH_SUFFIXES

# Elements at a time on a GPU, which wants much work at once.
_DEVICE_CHUNK = 1 << 23
_SMALLEST_CHUNK = 1 << 12
_MOST_THREADS = 16


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
    peak_anonymous: int | None

    def to_dict(self):
        """Return it as plain types, for JSON.

        Returns
        -------
        dict
            Every field by its name.
        """
        return dataclasses.asdict(self)


def merge_checkpoints(
    base,
    finetuned,
    rule,
    output,
    *,
    device="cpu",
    memory_limit=None,
    progress=True,
    threads=None,
    fingerprint=True,
    include=("*",),
    exclude=(),
    buffers="base",
    any_base=False,
    chunk=None,
    metadata=None,
):
    """Merge checkpoints into one: `base + scale * rule(finetuned - base)`.

    Floating point tensors are edited in float32 and stored in the base's
    type; integer tensors and running statistics are copied from the base;
    tied tensors are edited once. The result has the same bytes whatever the
    number of threads and the chunk size.

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
    memory_limit : int or None
        Most bytes of buffers; fewer threads and smaller chunks are used to
        keep to it. None: as is fastest (a few MiB a thread, for rules on
        whole matrices a few times the largest).
    progress : bool
        Show progress bars (on a terminal).
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
        copied from the base.
    buffers : str
        `"base"` copies running means and variances from the base, `"edit"`
        edits them.
    any_base : bool
        True: stored vectors may come from another base.
    chunk : int or None
        Elements at a time; None: what stays in a core's cache.
    metadata : dict or None
        Texts to keep with the weights.

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
        matches nothing, too small a memory limit.
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
    _check_output(output)
    with MemoryWatch() as memory:
        inputs = MergeInputs(base, finetuned, include, exclude, buffers)
        check_rule(rule).check_number(inputs.number)
        scales = _scales(rule, inputs)
        _to_device(inputs, device)
        plan = _plan(inputs, rule, threads, chunk, memory_limit)
        steps, hasher = {}, Hasher(plan.threads, progress)
        with Timed(steps, "fingerprints"):
            if fingerprint:
                hasher.hash([inputs.base, *_stored(inputs)])
                for state in (inputs.base, *_stored(inputs)):
                    state.verify()
            if not any_base:
                _check_ancestry(inputs, fingerprint)
        job = Job(inputs, rule, scales, plan, fingerprint, metadata)
        written = output
        if output.suffix != ".safetensors":
            written = _beside(output)
        try:
            found = job.run(written, steps, hasher, progress)
            if written != output:
                with Timed(steps, "convert"):
                    convert(written, output, job, inputs)
        finally:
            if written != output:
                written.unlink(missing_ok=True)
    steps["total"] = time.perf_counter() - start
    return MergeReport(
        output=str(output),
        fingerprint=found,
        base=job.provenance["base"],
        parents=job.provenance["parents"],
        rule=job.provenance["rule"],
        edited=len(inputs.names),
        copied=len(inputs.copied),
        parameters=sum(math.prod(s) for s in inputs.shapes.values()),
        threads=plan.threads,
        chunk=plan.chunk,
        seconds=steps,
        bytes_read=job.bytes_read + hasher.bytes_read,
        bytes_written=job.bytes_written,
        peak_anonymous=memory.peak,
    )


class _Plan(NamedTuple):
    """How many threads, how many elements at a time."""

    threads: int
    chunk: int


def _plan(inputs, rule, threads, chunk, memory_limit):
    """Choose threads and chunk size within a memory limit."""
    on_cpu = inputs.device is None
    if threads is None:
        threads = min(_cores(), _MOST_THREADS)
        if rule.whole_tensors or not on_cpu:
            threads = 1
    if threads < 1:
        raise ValueError(f"threads={threads}: expected at least 1")
    if chunk is None:
        chunk = CHUNK if on_cpu else _DEVICE_CHUNK
    if chunk < 1:
        raise ValueError(f"chunk={chunk}: expected at least 1")
    if memory_limit is None:
        return _Plan(threads, chunk)

    def need(workers, elements):
        largest = max(
            place.size
            for place in places(inputs.shapes, elements, rule.granularity)
        )
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
    return _Plan(threads, chunk)


def _cores():
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _scales(rule, inputs):
    """Return the scale of every tensor, and check that twins share one."""
    scales = rule.scales(inputs.names)
    for name, origin in inputs.twins.items():
        if scales[name] != scales[origin]:
            raise ValueError(
                f"{name!r} and {origin!r} are one tensor in the base, but "
                "get two scales; let one pattern match both"
            )
    return scales


def _stored(inputs):
    return [parent.state for parent in inputs.parents]


def _check_ancestry(inputs, fingerprint):
    vectors = [p for p in inputs.parents if p.kind == "task vector"]
    if vectors and not fingerprint:
        raise ValueError(
            "fingerprint=False: the base of the task vectors cannot be "
            "checked; say any_base=True if that is meant"
        )
    inputs.check_ancestry()


def _to_device(inputs, device):
    if str(device) == "cpu":
        return
    import torch

    inputs.xp, inputs.device = torch, torch.device(device)


def _check_output(output):
    if output.suffix in (".safetensors", *TORCH_SUFFIXES) or not output.suffix:
        return
    if output.name.startswith("CKPT+") or output.is_dir():
        return
    raise ValueError(
        f"{output}: unknown suffix {output.suffix!r}; expected .safetensors, "
        f"{', '.join(TORCH_SUFFIXES)}, a folder, or a CKPT+ folder"
    )


def _beside(output):
    """Return a temporary file name in the output's folder."""
    output.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(
        prefix=TEMPORARY_PREFIX, suffix=".safetensors", dir=output.parent
    )
    os.close(descriptor)
    return Path(name)
