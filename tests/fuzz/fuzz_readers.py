"""Altered inputs for every reader: 100,000 of them, counted by outcome.

    python tests/fuzz/fuzz_readers.py --inputs 100000 --output fuzz.json

Each input is a good file with a few bytes changed, from a seed: `--target
vector-int8 --only 17` reads one of them again and shows its error. The files
are read in a child that is killed where it takes more than twenty seconds.

Outcomes:

    error   a ValueError, KeyError or OSError (or a warning) that names the file
    right   what is read equals the original (the change was outside of it)
    other   something else is read, from a format without a checksum
    wrong   something else is read although the format has a checksum
    crash   another exception, or the process died
    unnamed an error of the right kind that does not name the file
    hang    no answer in time
"""

import argparse
import collections
import hashlib
import json
import logging
import os
import pickle
import random
import select
import shutil
import signal
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch

OUTCOMES = ("error", "right", "other", "wrong", "crash", "unnamed", "hang")
_BATCH = 400
_MOST_SECONDS = 20.0
_MEMORY = 6 << 30


def digest(*values):
    """Return a hash of tensors by name, and of plain values."""
    found = hashlib.sha256()
    for value in values:
        if hasattr(value, "items") and not isinstance(value, dict):
            value = dict(value)
        if isinstance(value, dict) and any(
            map(torch.is_tensor, value.values())
        ):
            for name, tensor in sorted(value.items()):
                found.update(
                    f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode()
                )
                flat = tensor.detach().contiguous().reshape(-1)
                found.update(flat.view(torch.uint8).numpy().tobytes())
        else:
            found.update(repr(value).encode())
    return found.hexdigest()


def weights(seed=0):
    noise = torch.Generator().manual_seed(seed)
    return {
        "a.weight": torch.randn(5, 4, generator=noise),
        "a.bias": torch.randn(4, generator=noise).half(),
        "n": torch.tensor(7),
    }


class Target:
    """A kind of file: how a good one is made, which are altered, the reading.

    `checked`: the format has a checksum, so no other content may be read.
    """

    checked = True

    def make(self, folder):
        """Write a good one; return the files to alter."""

    def read(self, folder):
        """Return a digest of what is read."""


class State(Target):
    """Weights: `name` decides on the form."""

    def __init__(self, name, altered=None, checked=True, writer=None, **more):
        self.name, self.altered = name, altered or [name]
        self.checked, self.writer, self.more = checked, writer, more

    def make(self, folder):
        from speechbrain_taskarith.vectors import save_state

        if self.writer is not None:
            self.writer(weights(), folder / self.name)
        else:
            save_state(weights(), folder / self.name, **self.more)
        return [folder / name for name in self.altered]

    def read(self, folder):
        from speechbrain_taskarith.vectors import open_state

        state = open_state(folder / self.name)
        state.verify()
        return digest(state)


class Vector(Target):
    def __init__(self, encoding):
        self.encoding = encoding

    def make(self, folder):
        from speechbrain_taskarith.vectors import TaskVector

        base = weights()
        tuned = {
            n: t + 1 if t.is_floating_point() else t for n, t in base.items()
        }
        tuned["a.weight"][::2] = base["a.weight"][::2]
        path = folder / "v.safetensors"
        TaskVector.between(base, tuned).save(path, encoding=self.encoding)
        return [path]

    def read(self, folder):
        from speechbrain_taskarith.vectors import TaskVector

        tau = TaskVector.load(folder / "v.safetensors")
        return digest(tau, tau.base_fingerprint, tau.metadata)


class Lora(Target):
    checked = False

    def __init__(self, altered):
        self.altered = altered

    def make(self, folder):
        import safetensors.torch

        noise = torch.Generator().manual_seed(3)
        key = "base_model.model.a.lora_{}.weight"
        factors = {
            key.format("A"): torch.randn(2, 4, generator=noise),
            key.format("B"): torch.randn(5, 2, generator=noise),
        }
        safetensors.torch.save_file(
            factors, folder / "adapter_model.safetensors"
        )
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "bias": "none"}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        return [folder / self.altered]

    def read(self, folder):
        from speechbrain_taskarith.vectors import TaskVector

        tau = TaskVector.from_lora({"a.weight": torch.zeros(5, 4)}, folder)
        return digest(tau)


class Adapter(Target):
    def _encoder(self):
        torch.manual_seed(1)
        layers = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(2))
        return torch.nn.ModuleDict({"layers": layers})

    def _inserted(self):
        from speechbrain_taskarith.adapters import insert_adapters

        return insert_adapters(self._encoder(), ["us"], d_model=4, bottleneck=2)

    def make(self, folder):
        self._inserted().save_adapter("us", folder / "us.safetensors")
        return [folder / "us.safetensors"]

    def read(self, folder):
        handle = self._inserted()
        handle.load_adapter(folder / "us.safetensors", name="us")
        banks = [layer.bank.state_dict() for layer in handle.layers]
        return digest(*banks)


class Edits(Target):
    """A folder of edits; all of it is read."""

    def __init__(self, pattern, old=False):
        self.pattern, self.old = pattern, old

    def make(self, folder):
        from speechbrain_taskarith.vectors import (
            SequentialEditor,
            TaskArithmetic,
        )

        base = weights()
        if self.old:
            base["a.bias"] = base["a.bias"].float()
        with SequentialEditor(base, TaskArithmetic(0.5), folder) as editor:
            for number in range(2):
                tuned = {
                    n: t + number + 1 if t.is_floating_point() else t
                    for n, t in editor.state().items()
                }
                editor.learn(f"d{number}", tuned, note="x")
            if self.old:
                log = editor._files.log
        if self.old:
            from speechbrain_taskarith.vectors.editing import log as module

            shutil.rmtree(folder / "states")
            (folder / module.LOG_NAME).unlink()
            keys = (
                "base",
                "rule",
                "schedule",
                "encoding",
                "include",
                "exclude",
            )
            content = {key: getattr(log, key) for key in keys}
            content |= {"edits": [e.to_dict() for e in log.edits]}
            content |= {"history": log.history, "version": 1}
            content |= {"format": module._FORMAT}
            (folder / module.OLD_LOG_NAME).write_text(
                json.dumps(content, indent=2)
            )
        (folder / ".lock").unlink()
        return sorted(folder.glob(self.pattern))

    def read(self, folder):
        from speechbrain_taskarith.vectors import SequentialEditor

        everything = not self.pattern.startswith("states")
        editor = SequentialEditor.resume(
            folder, read_only=True, verify=everything
        )
        found = [editor.state(), editor.fingerprint]
        if not self.old:
            found += [editor.log, editor.history]
        return digest(*found)


class Checkpoint(Target):
    """A SpeechBrain folder; the weights are what is compared."""

    def __init__(self, altered):
        self.altered = altered

    def make(self, folder):
        from speechbrain_taskarith.vectors import save_checkpoint

        save_checkpoint(
            {"model": weights()}, folder / "CKPT+a", meta={"WER": 4.0}
        )
        return [folder / "CKPT+a" / self.altered]

    def read(self, folder):
        from speechbrain_taskarith.vectors import open_state
        from speechbrain_taskarith.vectors.states.speechbrain_folder import (
            find_checkpoint_folder,
        )

        state = open_state(find_checkpoint_folder(folder))
        state.verify()
        return digest(state)


class Manifest(Target):
    checked = False

    def __init__(self, suffix):
        self.name = f"m.{suffix}"

    def make(self, folder):
        from speechbrain_taskarith.data import Recording, write_manifest

        rows = [
            Recording(f"id{i}", 0.5 + i, f"/a/{i}.wav", "theo", "SEVEN café")
            for i in range(4)
        ]
        write_manifest(folder / self.name, rows)
        return [folder / self.name]

    def read(self, folder):
        from speechbrain_taskarith.data import read_manifest

        return digest(read_manifest(folder / self.name, check="none"))


class MergeFile(Target):
    checked = False

    def make(self, folder):
        (folder / "merge.yaml").write_text(
            "base: a.ckpt\nfinetuned: [b.ckpt, c.safetensors]\n"
            "rule: {name: TIES, density: 0.2}\nscale: 0.5\n"
            "output: d.ckpt\nthreads: 2\n"
        )
        return [folder / "merge.yaml"]

    def read(self, folder):
        from speechbrain_taskarith.commands.weights.merge import (
            read_plan,
            rule_of,
        )

        plan = read_plan(folder / "merge.yaml")
        rule = rule_of(plan, folder / "merge.yaml")
        return digest(repr(plan), rule.describe())


class Json(Target):
    checked = False

    def make(self, folder):
        from speechbrain_taskarith.utils.files import write_json

        write_json(folder / "x.json", {"a": [1, 2.5, "é", None], "b": {}})
        return [folder / "x.json"]

    def read(self, folder):
        from speechbrain_taskarith.utils.files import read_json

        return digest(read_json(folder / "x.json"))


def foreign(content, path):
    import safetensors.torch

    safetensors.torch.save_file(content, path)


def old_torch(content, path):
    torch.save(content, path, _use_new_zipfile_serialization=False)


TARGETS = {
    "safetensors": State("w.safetensors"),
    "safetensors-foreign": State("w.safetensors", checked=False, writer=foreign),
    "torch": State("w.ckpt"),
    "torch-old": State("w.pt", checked=False, writer=old_torch),
    **{
        f"vector-{encoding}": Vector(encoding)
        for encoding in ("lossless", "bf16", "int8", "sparse", "sparse-bf16",
                         "sparse-int8")
    },
    "adapter": Adapter(),
    "lora-weights": Lora("adapter_model.safetensors"),
    "lora-config": Lora("adapter_config.json"),
    "edits-log": Edits("edits.jsonl"),
    "edits-last": Edits("edits.last"),
    "edits-old-log": Edits("edits.json", old=True),
    "edits-base": Edits("base.safetensors"),
    "edits-vector": Edits("vectors/*"),
    "edits-copy": Edits("states/*"),
    "speechbrain-yaml": Checkpoint("CKPT.yaml"),
    "speechbrain-model": Checkpoint("model.ckpt"),
    "hugging-face-index": State(
        "hf", ["hf/model.safetensors.index.json"], shard_size=40
    ),
    "hugging-face-shard": State(
        "hf", ["hf/model-00001-of-00002.safetensors"], shard_size=40
    ),
    "manifest-csv": Manifest("csv"),
    "manifest-json": Manifest("json"),
    "merge-yaml": MergeFile(),
    "json": Json(),
}  # fmt: skip


def altered(content, rng):
    """Return bytes with one to three changes."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        size, act = len(data), rng.randrange(11)
        at = rng.randrange(size) if size else 0
        length = rng.choice((1, 2, 4, 8, 16, 64))
        if rng.random() < 0.4:
            # Headers are where a change means most.
            at = min(at, rng.randrange(1, 200))
        if act < 3 and size:
            data[at] ^= 1 << rng.randrange(8)
        elif act == 3 and size:
            data[at] = rng.randrange(256)
        elif act == 4:
            del data[at:]
        elif act == 5:
            del data[at : at + length]
        elif act == 6:
            data[at:at] = rng.randbytes(length)
        elif act == 7:
            data[at:at] = data[at : at + length]
        elif act == 8:
            data[at : at + length] = bytes(len(data[at : at + length]))
        elif act == 9:
            other = rng.randrange(size) if size else 0
            one, two = data[at : at + 4], data[other : other + 4]
            if len(one) == len(two):
                data[at : at + 4], data[other : other + 4] = two, one
        else:
            digits = [i for i, c in enumerate(data) if chr(c).isdigit()]
            if digits:
                data[rng.choice(digits)] = rng.choice(b"0123456789-e")
    return bytes(data)


told = []


class Listener(logging.Handler):
    """Keeps the warnings that are logged."""

    def emit(self, record):
        """Keep one."""
        told.append(record.getMessage())


def one(target, number, folder, files, contents, good):
    """Read one altered input; return its outcome and what was said."""
    rng = random.Random(f"{number}")
    index = rng.randrange(len(files))
    path, content = files[index], altered(contents[index], rng)
    if content == contents[index]:
        return "right", "unchanged"
    path.write_bytes(content)
    told.clear()
    try:
        found = target.read(folder)
        if any(path.name in text for text in told):
            return "error", f"a warning: {told[0]}"
    except (ValueError, KeyError, OSError) as error:
        said = f"{type(error).__name__}: {error}"
        # A folder's reader may name the folder.
        named = str(path) in said or path.name in said or str(folder) in said
        return ("error" if named else "unnamed"), said
    except Exception as error:
        return "crash", f"{type(error).__name__}: {error}"
    finally:
        if path.is_dir():
            shutil.rmtree(path)
        path.write_bytes(contents[index])
    if found == good:
        return "right", ""
    return ("wrong" if target.checked else "other"), ""


def batch(target, numbers, folder, report):
    """Read inputs one after another; report each."""
    import resource

    # On top of what the process that it was forked from holds already.
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + _MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    warnings.simplefilter("ignore")
    logging.getLogger().addHandler(Listener(logging.WARNING))
    files = target.make(folder)
    assert files, "nothing to alter"
    contents = [path.read_bytes() for path in files]
    good = target.read(folder)
    for number in numbers:
        report((number, *one(target, number, folder, files, contents, good)))


def in_child(target, numbers, parent):
    """Read a batch in a child; yield results. It may end early."""
    folder = Path(tempfile.mkdtemp(dir=parent))
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        code = 1
        try:
            os.close(reader)
            sys.stderr = open(os.devnull, "w")

            def report(result):
                data = pickle.dumps(result)
                os.write(writer, len(data).to_bytes(4, "little") + data)

            batch(target, numbers, folder, report)
            code = 0
        except BaseException as error:
            print("the harness failed:", repr(error), flush=True)
        finally:
            os._exit(code)
    os.close(writer)
    done, status = b"", "hang"
    try:
        while select.select([reader], [], [], _MOST_SECONDS)[0]:
            part = os.read(reader, 1 << 16)
            if not part:
                status = "crash"
                break
            done += part
            while len(done) > 4:
                end = 4 + int.from_bytes(done[:4], "little")
                if len(done) < end:
                    break
                yield pickle.loads(done[4:end])
                done = done[end:]
        else:
            os.kill(pid, signal.SIGKILL)
    finally:
        os.close(reader)
        os.waitpid(pid, 0)
        shutil.rmtree(folder, ignore_errors=True)
    yield None, status, f"the process {status}ed"


def fuzz(inputs, names=None, start=0, parent=None, most_shown=5):
    """Read altered inputs of all targets.

    Returns `{target: {outcome: count}}` and examples of what went wrong.
    """
    names = list(names or TARGETS)
    torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
    for name in names:
        # Imports everything once, before the children do.
        folder = Path(tempfile.mkdtemp(dir=parent))
        TARGETS[name].make(folder)
        TARGETS[name].read(folder)
        shutil.rmtree(folder)
    counts = {name: collections.Counter() for name in names}
    examples = []
    share = -(-inputs // len(names))
    for begin in range(start, start + share, _BATCH):
        for name in names:
            numbers = list(range(begin, min(begin + _BATCH, start + share)))
            while numbers:
                for number, outcome, said in in_child(
                    TARGETS[name], numbers, parent
                ):
                    if number is None:
                        # Ended: what was not reported is to blame.
                        if numbers:
                            number = numbers.pop(0)
                        else:
                            continue
                    else:
                        numbers.remove(number)
                    counts[name][outcome] += 1
                    bad = outcome not in ("error", "right", "other")
                    shown = sum(
                        (e["target"], e["outcome"]) == (name, outcome)
                        for e in examples
                    )
                    if bad and shown < most_shown:
                        examples.append(
                            {"target": name, "number": number,
                             "outcome": outcome, "said": said[:300]}
                        )  # fmt: skip
        yield counts, examples


def main():
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--start", type=int, default=0)
    parser.add_argument("--target", nargs="+", choices=TARGETS)
    parser.add_argument("--only", type=int)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    parent = "/dev/shm" if os.path.isdir("/dev/shm") else None
    if options.only is not None:
        folder = Path(tempfile.mkdtemp(dir=parent))
        batch(TARGETS[options.target[0]], [options.only], folder, print)
        shutil.rmtree(folder)
        return
    begin = time.time()
    for counts, examples in fuzz(
        options.inputs, options.target, options.start, parent
    ):
        total = sum(counts.values(), collections.Counter())
        content = {
            "seconds": round(time.time() - begin, 1),
            "inputs": sum(total.values()),
            "total": {o: total[o] for o in OUTCOMES},
            "targets": {n: dict(c) for n, c in counts.items()},
            "examples": examples,
        }
        if options.output:
            options.output.write_text(json.dumps(content, indent=1))
    for name, found in content["targets"].items():
        print(f"{name:22}", *(f"{o} {found.get(o, 0)}" for o in OUTCOMES))
    print(
        content["inputs"], "inputs,", content["seconds"], "s", content["total"]
    )
    for example in examples:
        print(example)


if __name__ == "__main__":
    main()
