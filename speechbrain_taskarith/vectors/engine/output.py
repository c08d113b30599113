"""Where merged chunks go: `base + scale * merged`, in the stored type.

To a file or into memory, by one pass. Nothing here imports torch but what
writes into its tensors.
"""

import copy
import math

import numpy as np

from speechbrain_taskarith.vectors.checks import all_finite, overflow_error
from speechbrain_taskarith.vectors.engine.streaming import Stream
from speechbrain_taskarith.vectors.engine.workspace import (
    CHUNK,
    DEVICE_CHUNK,
    add_scaled,
    places,
    rounding,
    stored_finite,
    to_numpy,
    to_stored,
)
from speechbrain_taskarith.vectors.states.safetensors import (
    ITEM_SIZE,
    TORCH_NAME,
)

_COPY_CHUNK = 1 << 17


def write_edits(out, stream, rule, scales):
    """Write the edited tensors chunk by chunk, and copy the others.

    `out` knows the dtypes to write (`tensors`) and takes bytes (`write`), as
    `SafetensorsWriter` and `MemoryOutput` do. Returns the share of the edit
    that was lost by rounding.
    """
    inputs, base = stream.source, stream.source.base
    lost, moved = {}, {}  # sums of squares by place: threads change no bit
    names = {name: [name] for name in base}
    for twin, origin in inputs.twins.items():
        names[origin].append(twin)

    def copy(place, work):
        info, dtype = base.info(place.name), out.tensors[place.name].dtype
        if dtype != info.dtype:
            values = work.read(base, place, "copy")
            # A mask may hold infinity; it stays.
            raw = to_stored(values, dtype)
            if all_finite(values) and not stored_finite(values, raw, dtype):
                raise overflow_error(place.name, TORCH_NAME[dtype], 0)
        else:
            raw = work.bytes("copy", place.size * ITEM_SIZE[dtype])
            work.bytes_read += len(raw)
            base.read_into(place.name, place.start, place.stop, raw)
        for name in names[place.name]:
            out.write(name, place.start, raw)

    def emit(place, merged, work):
        scale = scales[place.name]
        if scale == 0:
            # Not even the sign of a zero changes.
            copy(place, work)
            return
        before = inputs.base_chunk(place, work)
        result = work.array("result", place.size)
        add_scaled(work.xp, before, merged, scale, result, result)
        dtype = out.tensors[place.name].dtype
        raw = to_stored(result, dtype)
        if not stored_finite(result, raw, dtype):
            raise overflow_error(place.name, TORCH_NAME[dtype], scale)
        lost[place.index] = rounding(result, raw, dtype)
        if ITEM_SIZE[dtype] == 2:
            step = to_numpy(merged)
            moved[place.index] = scale**2 * float(np.dot(step, step))
        for name in names[place.name]:
            out.write(name, place.start, raw)

    stream.merge(rule, emit)
    shapes = {name: base.info(name).shape for name in inputs.copied}
    stream.passes.run(copy, places(shapes, _COPY_CHUNK))
    length = math.fsum(moved.values())
    return math.sqrt(math.fsum(lost.values()) / length) if length else 0.0


class MemoryOutput:
    """Takes what `write_edits` writes; `result` holds the base's names."""

    def __init__(self, base):
        import torch

        self.tensors = {name: base.info(name) for name in base}
        self.result, self._bytes = {}, {}
        for name, info in self.tensors.items():
            origin = base.aliases.get(name, name)
            if origin != name:
                # It is written with its first name.
                self.result[name] = self.result[origin]
                continue
            dtype = getattr(torch, TORCH_NAME[info.dtype])
            tensor = torch.empty(info.shape, dtype=dtype)
            self.result[name] = tensor
            flat = tensor.view(-1).view(torch.uint8) if info.numel else tensor
            self._bytes[name] = flat.numpy() if info.numel else None

    def write(self, name, start, raw):
        """Take the bytes of a run of elements."""
        if name in self._bytes:
            begin = start * ITEM_SIZE[self.tensors[name].dtype]
            self._bytes[name][begin : begin + len(raw)] = raw


def edit_in_memory(inputs, rule, scales):
    """Return `base + scale * rule(finetuned - base)`, in one pass.

    `inputs` are a `MergeInputs`, `scales` is `{name: float}`. On the CPU the
    result is that of `TaskVector.apply`, bit for bit, without a vector in
    between. It is computed where the first of the fine-tuned models lies,
    and is on the CPU.
    """
    import torch

    tuned = inputs.parents[0].state
    device = tuned[next(iter(tuned))].device
    chunk, threads = CHUNK, torch.get_num_threads()
    if device.type != "cpu":
        inputs.xp, inputs.device = torch, device
        chunk, threads = DEVICE_CHUNK, 1
    elif rule.whole_tensors:
        threads = 1
    out = MemoryOutput(inputs.base)
    stream = Stream(inputs, rule.stages, chunk, threads)
    write_edits(out, stream, rule, scales)
    return out.result | copy.deepcopy(inputs.base.extra)
