"""What the merge engine writes."""

import json

from speechbrain_taskarith.vectors.engine.chunk_reader import to_stored
from speechbrain_taskarith.vectors.engine.measuring import Timed
from speechbrain_taskarith.vectors.engine.streaming import Stream
from speechbrain_taskarith.vectors.engine.workspace import places, to_numpy
from speechbrain_taskarith.vectors.states.readers import open_state
from speechbrain_taskarith.vectors.states.safetensors import SafetensorsWriter
from speechbrain_taskarith.vectors.states.writers import save_state

_COPY_BYTES = 1 << 20
# Stands for a fingerprint until it is known; of the same length.
_UNKNOWN = "0" * 64


class Job:
    """One merge, planned.

    Arguments
    ---------
    inputs : MergeInputs
        Base and parents.
    rule : Rule
        How to merge.
    scales : dict
        `{name: float}`.
    plan : object
        Threads and chunk size.
    fingerprint : bool
        Note the fingerprints.
    metadata : dict or None
        Texts to keep with the weights.
    """

    def __init__(self, inputs, rule, scales, plan, fingerprint, metadata):
        self.inputs, self.rule, self.scales = inputs, rule, scales
        self.plan, self.fingerprint = plan, fingerprint
        self.metadata = metadata or {}
        self.bytes_read = self.bytes_written = 0
        told = (lambda state: state.fingerprint) if fingerprint else _none
        self.provenance = {
            "rule": rule.describe(),
            "base": {
                "path": inputs.base.label,
                "fingerprint": told(inputs.base),
            },
            "parents": [
                {
                    "path": parent.label,
                    "kind": parent.kind,
                    "fingerprint": told(parent.state),
                }
                for parent in inputs.parents
            ],
        }

    def run(self, path, steps, hasher, progress):
        """Write the result to a safetensors file.

        Arguments
        ---------
        path : pathlib.Path
            The file.
        steps : dict
            Takes the seconds of each step.
        hasher : Hasher
            Hashes the result.
        progress : bool
            Show progress bars.

        Returns
        -------
        str or None
            The fingerprint; None where none is wanted.
        """
        inputs, plan = self.inputs, self.plan
        infos = {name: inputs.base.info(name) for name in inputs.base}
        header = {"format": "pt", **self.metadata}
        header["merge"] = json.dumps(self.provenance)
        if self.fingerprint:
            header["fingerprint"] = _UNKNOWN
        with SafetensorsWriter(path, infos, header) as out:
            with Timed(steps, "statistics"):
                stream = Stream(
                    inputs,
                    self.rule.stages,
                    plan.chunk,
                    plan.threads,
                    progress,
                )
            with Timed(steps, "merge"):
                stream.merge(self.rule, self._emitter(out))
                self._copy(out, stream.passes)
            self.bytes_read += stream.passes.bytes_read
            self.bytes_written += sum(info.nbytes for info in infos.values())
            found = None
            if self.fingerprint:
                with Timed(steps, "output fingerprint"):
                    # Read back from the page cache: chunks come in any
                    # order, a hash wants them in one.
                    state = open_state(out.temporary)
                    found = hasher.hash([state])[0]
                    out.close(fingerprint=found)
        return found

    def _emitter(self, out):
        inputs, scales = self.inputs, self.scales
        names = {name: [name] for name in inputs.shapes}
        for twin, origin in inputs.twins.items():
            names[origin].append(twin)

        def emit(place, merged, work):
            scale = scales[place.name]
            if scale == 0:
                # Not even the sign of a zero changes.
                self._copy_run(out, place, names[place.name], work)
                return
            xp = work.xp
            base = inputs.base_chunk(place, work)
            result = work.array("result", place.size)
            # Product, then sum, each rounded, as `TaskVector.apply` does.
            xp.multiply(merged, scale, out=result)
            xp.add(base, result, out=result)
            dtype = inputs.base.info(place.name).dtype
            stored = to_stored(to_numpy(result), dtype, work)
            for name in names[place.name]:
                out.write(name, place.start, stored)

        return emit

    def _copy(self, out, passes):
        """Copy what is not edited."""
        base = self.inputs.base
        shapes = {name: base.info(name).shape for name in self.inputs.copied}
        step = _COPY_BYTES // 8
        passes.run(
            lambda place, work: self._copy_run(out, place, [place.name], work),
            places(shapes, step),
        )

    def _copy_run(self, out, place, names, work):
        info = self.inputs.base.info(place.name)
        size = place.size * info.nbytes // info.numel
        raw = work.bytes("copy", size)
        work.bytes_read += size
        self.inputs.base.read_into(place.name, place.start, place.stop, raw)
        for name in names:
            out.write(name, place.start, raw)


def _none(_):
    return None


def convert(written, output, job, inputs):
    """Turn the safetensors file into the form asked for.

    Its tensors are mapped, so that torch writes them from the page cache.

    Arguments
    ---------
    written : pathlib.Path
        The safetensors file.
    output : pathlib.Path
        The final name.
    job : Job
        Knows the provenance.
    inputs : MergeInputs
        Knows which tensors are tied.
    """
    state, aliases = open_state(written), inputs.base.aliases
    tensors = {name: state[name] for name in state}
    content = {name: tensors[aliases.get(name, name)] for name in state}
    like = inputs.base.path
    keep = like is not None and like.is_dir() and not output.suffix
    save_state(
        content,
        output,
        metadata={**job.metadata, "merge": job.provenance},
        **({"like": like} if keep else {}),
    )
