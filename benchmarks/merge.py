"""Merging: wall time, CPU time and memory against mergekit.

Models of Whisper-small's shape (241.7 M float32 parameters, 0.97 GB a file)
are made once in a cache folder. Every run is a fresh process, the two sides
take turns on the same files, the page cache is warmed before each, and every
output is compared with an oracle in float64 before its time counts::

    python benchmarks/merge.py --mergekit peer/bin/mergekit-pytorch

See `benchmarks/README.md` for what came out.
"""

import argparse
import hashlib
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from speechbrain_taskarith.vectors.states.safetensors import (
    SafetensorsWriter,
    TensorInfo,
    read_header,
)

BLOCK = 1 << 22
DENSITY = 0.25  # of every size here an integer: no rounding differs
SCALE = 0.4


# ------------------------------------------------------------------ models


def whisper_small():
    """Names and shapes of Whisper-small."""
    width, inner, shapes = 768, 3072, {}

    def linear(name, rows, columns, bias=True):
        shapes[f"{name}.weight"] = (rows, columns)
        if bias:
            shapes[f"{name}.bias"] = (rows,)

    def norm(name):
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (width,)

    def attention(name):
        for part in ("k_proj", "v_proj", "q_proj", "out_proj"):
            linear(f"{name}.{part}", width, width, part != "k_proj")
        norm(f"{name}_layer_norm")

    for side in ("encoder", "decoder"):
        top = f"model.{side}"
        if side == "encoder":
            shapes[f"{top}.conv1.weight"] = (width, 80, 3)
            shapes[f"{top}.conv1.bias"] = (width,)
            shapes[f"{top}.conv2.weight"] = (width, width, 3)
            shapes[f"{top}.conv2.bias"] = (width,)
            shapes[f"{top}.embed_positions.weight"] = (1500, width)
        else:
            shapes[f"{top}.embed_tokens.weight"] = (51865, width)
            shapes[f"{top}.embed_positions.weight"] = (448, width)
        for layer in range(12):
            name = f"{top}.layers.{layer}"
            attention(f"{name}.self_attn")
            if side == "decoder":
                attention(f"{name}.encoder_attn")
            linear(f"{name}.fc1", inner, width)
            linear(f"{name}.fc2", width, inner)
            norm(f"{name}.final_layer_norm")
        norm(f"{top}.layer_norm")
    return shapes


def make_model(path, number, shapes):
    """Write a model: a common base, plus noise of its own if not 0."""
    infos = {name: TensorInfo("F32", shape) for name, shape in shapes.items()}
    with SafetensorsWriter(path, infos, {"format": "pt"}) as out:
        for key, (name, info) in enumerate(infos.items()):
            spread = np.random.default_rng([9, key]).uniform(3e-4, 3e-3)
            for start in range(0, info.numel, BLOCK):
                size = min(BLOCK, info.numel - start)
                values = np.random.default_rng([0, key, start])
                values = values.standard_normal(size, np.float32)
                values *= np.float32(0.02)
                if number:
                    noise = np.random.default_rng([number, key, start])
                    noise = noise.standard_normal(size, np.float32)
                    values += noise * np.float32(spread)
                out.write(name, start, values)


def models(cache, number):
    """Return base and fine-tuned models, made if they are not there."""
    cache.mkdir(parents=True, exist_ok=True)
    paths = [cache / f"model{i}.safetensors" for i in range(number + 1)]
    for index, path in enumerate(paths):
        if not path.exists():
            print(f"making {path}", file=sys.stderr)
            make_model(path, index, whisper_small())
    return paths[0], paths[1:]


# ------------------------------------------------------------------ oracle


def tensors(path):
    """Return `{name: mapped float32 array}` of a safetensors file."""
    return {
        name: np.memmap(path, np.float32, "r", offset, (info.numel,))
        for name, (info, offset) in read_header(path)[0].items()
    }


def kept(values, k):
    """The k largest magnitudes, earlier ones first among equals; and which
    lie exactly on the threshold."""
    size = np.abs(values)
    if k in (0, len(size)):
        return np.full(len(size), k > 0), np.zeros(len(size), bool)
    threshold = np.partition(size, len(size) - k)[len(size) - k]
    mask, equal = size > threshold, size == threshold
    mask[np.flatnonzero(equal)[: k - np.count_nonzero(mask)]] = True
    return mask, equal


def thresholds_of_whole(base, tuned):
    """For global trimming: masks over the whole vector, by name."""
    names = list(base)
    whole = np.concatenate([tuned[name] - base[name] for name in names])
    mask, _ = kept(whole, round(DENSITY * len(whole)))
    bounds = np.cumsum([0] + [len(base[name]) for name in names])
    return {name: mask[a:b] for name, a, b in zip(names, bounds, bounds[1:])}


def assert_equal(rule, base_path, tuned_paths, out_path, any_equal):
    """Compare an output with the formulas in float64, every element.

    `any_equal`: which of several magnitudes that equal the threshold are
    kept is left open (the peer sorts without a rule for that); the number
    of elements that this touches is returned.
    """
    base, out = tensors(base_path), tensors(out_path)
    tuned = [tensors(path) for path in tuned_paths]
    assert out.keys() == base.keys(), "other tensors"
    masks = None
    if rule == "ties-global":
        masks = [thresholds_of_whole(base, model) for model in tuned]
    open_elements = 0
    for name in base:
        start = base[name].astype(np.float64)
        taus, skip = [], np.zeros(len(start), bool)
        for index, model in enumerate(tuned):
            # Differences are taken in float32, by both sides.
            tau = model[name] - base[name]
            if masks is not None:
                mask = masks[index][name]
            elif rule == "ties-tensor":
                mask, equal = kept(tau, round(DENSITY * len(tau)))
                skip |= equal
            else:
                mask = 1
            taus.append(tau.astype(np.float64) * mask)
        size = sum(np.abs(tau) for tau in taus)
        if rule == "task-arithmetic":
            merged = sum(taus)
        else:
            total = sum(taus)
            sign = np.sign(total)
            agree = [np.sign(tau) == sign for tau in taus]
            count = sum(a.astype(np.int64) for a in agree)
            merged = sum(t * a for t, a in zip(taus, agree))
            merged /= np.maximum(count, 1)
            # Sums that cancel up to rounding have no sign to compare.
            skip &= any_equal
            skip |= (size > 0) & (np.abs(total) <= 1e-6 * size)
            open_elements += int(skip.sum())
        expected = start + SCALE * merged
        error = np.abs(out[name] - expected)
        # A few roundings of float32, of the numbers that are added.
        allowed = 3e-7 * (np.abs(start) + size) + 1e-12
        wrong = (error > allowed) & ~skip
        assert not wrong.any(), f"{out_path}: {name}: {wrong.sum()} differ"
    return open_elements


# --------------------------------------------------------------- processes


OURS = f"""
import sys
from speechbrain_taskarith.vectors.merge import merge_checkpoints
from speechbrain_taskarith.vectors.rules import TIES, TaskArithmetic
rule, base, out, threads, fingerprint, *tuned = sys.argv[1:]
rule = {{
    "task-arithmetic": TaskArithmetic({SCALE}),
    "ties-tensor": TIES({DENSITY}, {SCALE}, trim="tensor"),
    "ties-global": TIES({DENSITY}, {SCALE}),
}}[rule]
merge_checkpoints(
    base, tuned, rule, out, show_progress=False,
    threads=int(threads) or None, fingerprint=fingerprint == "1",
)
"""


def ours(rule, base, tuned, out, threads=0, fingerprint=True):
    """Return our command."""
    return [sys.executable, "-c", OURS, rule, str(base), str(out),
            str(threads), str(int(fingerprint)), *map(str, tuned)]  # fmt: skip


def theirs(mergekit, rule, base, tuned, out, folder):
    """Return mergekit's command, and write its configuration."""
    ties = rule == "ties-tensor"
    config = {
        "merge_method": "ties" if ties else "task_arithmetic",
        "base_model": str(base),
        "models": [
            {
                "model": str(path),
                "parameters": {
                    "weight": 1.0,
                    **({"density": DENSITY} if ties else {}),
                },
            }
            for path in tuned
        ],
        "parameters": {"normalize": ties, "lambda": SCALE},
        "dtype": "float32",
    }
    path = folder / "merge.yaml"
    path.write_text(json.dumps(config))
    return [str(mergekit), str(path), str(out)]


PRIORITY = []
OTHER = "the other checkout"


def measure(command, warm=(), checkout=None):
    """Run a command in a fresh process, with `PRIORITY` before it.

    Returns wall and CPU seconds, and the peak of anonymous memory in bytes.
    """
    for path in warm:
        read_whole(path)
    checkout = checkout or Path(__file__).resolve().parents[1]
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    log = tempfile.TemporaryFile()
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
    peak, ended = [0], threading.Event()

    def watch():
        status = f"/proc/{process.pid}/status"
        while not ended.wait(0.02):
            try:
                with open(status) as stream:
                    text = stream.read()
            except OSError:
                return
            for line in text.splitlines():
                if line.startswith("RssAnon:"):
                    peak[0] = max(peak[0], int(line.split()[1]) * 1024)

    watcher = threading.Thread(target=watch)
    watcher.start()
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    ended.set()
    watcher.join()
    if process.returncode:
        log.seek(0)
        text = log.read().decode(errors="replace")
        raise RuntimeError(f"{command[:3]} failed:\n{text[-3000:]}")
    return wall, usage.ru_utime + usage.ru_stime, peak[0]


def read_whole(path):
    buffer = bytearray(1 << 20)
    with open(path, "rb", buffering=0) as stream:
        while stream.readinto(buffer):
            pass


def output_of(out):
    """Return the file that a side wrote (mergekit writes a folder)."""
    if out.is_dir():
        files = list(out.glob("*.safetensors"))
        assert len(files) == 1, f"{out}: expected one file, got {files}"
        return files[0]
    return out


def remove(out):
    if out.is_dir():
        shutil.rmtree(out)
    else:
        out.unlink(missing_ok=True)


# -------------------------------------------------------------- benchmarks


def bandwidth(path, folder):
    """Return bytes a second: read from the page cache, written and synced."""
    size, reads, writes = path.stat().st_size, [], []
    buffer = bytearray(1 << 20)
    for _ in range(5):
        start = time.perf_counter()
        read_whole(path)
        reads.append(size / (time.perf_counter() - start))
        target = folder / "bandwidth.bin"
        start = time.perf_counter()
        with open(target, "wb", buffering=0) as stream:
            for _ in range(size >> 20):
                stream.write(buffer)
            os.fsync(stream.fileno())
        writes.append(size / (time.perf_counter() - start))
        target.unlink()
    return max(reads), max(writes)


def summary(name, runs):
    """Return median and spread of runs of (wall, CPU, memory)."""
    walls, cpus, memories = zip(*runs)
    return {
        "run": name,
        "rounds": len(runs),
        "wall": statistics.median(walls),
        "wall_min": min(walls),
        "wall_max": max(walls),
        "cpu": statistics.median(cpus),
        "cpu_min": min(cpus),
        "cpu_max": max(cpus),
        "anonymous": max(memories),
    }


def show(row):
    print(
        f"| {row['run']} | {row['rounds']} "
        f"| {row['wall']:.2f} ({row['wall_min']:.2f}-{row['wall_max']:.2f}) "
        f"| {row['cpu']:.2f} ({row['cpu_min']:.2f}-{row['cpu_max']:.2f}) "
        f"| {row['anonymous'] / 2**30:.3f} |",
        flush=True,
    )


def compare(rule, number, arguments, folder):
    """Both sides in turn, outputs checked; return rows and ratios."""
    base, tuned = models(arguments.cache, number)
    warm, rows, runs = [base, *tuned], [], {}
    sides = {
        "ours": lambda out: ours(rule, base, tuned, out),
        "ours, no fingerprints": lambda out: ours(
            rule, base, tuned, out, fingerprint=False
        ),
    }
    if arguments.mergekit and rule != "ties-global":
        sides["mergekit"] = lambda out: theirs(
            arguments.mergekit, rule, base, tuned, out, folder
        )
    if arguments.against:
        for side in ("ours", "ours, no fingerprints"):
            sides[side.replace("ours", OTHER)] = sides[side]
    for turn in range(arguments.rounds):
        for side, command in sides.items():
            if side == "mergekit" and turn >= arguments.peer_rounds:
                continue
            out = folder / f"{side.split(',')[0]}.safetensors"
            if side == "mergekit":
                out = folder / "mergekit"
            remove(out)
            checkout = arguments.against if side.startswith(OTHER) else None
            run = measure(command(out), warm, checkout)
            runs.setdefault(side, []).append(run)
            if turn == 0:
                left = assert_equal(
                    rule, base, tuned, output_of(out), side == "mergekit"
                )
                print(
                    f"{side}, {rule}, N={number}: equal to the oracle"
                    + (f" ({left} elements undecided)" if left else ""),
                    file=sys.stderr,
                )
            remove(out)
    for side, measured in runs.items():
        rows.append(summary(f"{side}: {rule}, N={number}", measured))
    return rows


def passes_of(rule, number):
    """Bytes that a merge must at least move, as (read, written) files."""
    reads = number + 1
    return (reads if rule == "task-arithmetic" else 2 * reads), 1


def same_bytes(arguments, folder):
    """Whether 1, 2, 3 threads give the same file."""
    base, tuned = models(arguments.cache, 4)
    found = set()
    for threads in (1, 2, 3):
        out = folder / "threads.safetensors"
        measure(ours("ties-global", base, tuned, out, threads))
        with open(out, "rb") as stream:
            found.add(hashlib.file_digest(stream, "sha256").hexdigest())
        remove(out)
    assert len(found) == 1, "bytes depend on the number of threads"


def scale_step(arguments):
    """Editing in place, in passes over memory: a copy is two."""
    import torch

    from speechbrain_taskarith.vectors import TaskVector

    torch.set_num_threads(1)
    shapes = whisper_small()
    module = torch.nn.Module()
    deltas, source = {}, {}
    for name, shape in shapes.items():
        key = name.replace(".", "_")
        module.register_parameter(
            key, torch.nn.Parameter(torch.zeros(shape), requires_grad=False)
        )
        deltas[key] = torch.full(shape, 1e-3)
        source[key] = torch.ones(shape)
    vector = TaskVector(deltas)
    parameters = dict(module.named_parameters())
    edits, copies = [], []
    for turn in range(arguments.rounds + 1):
        start = time.perf_counter()
        vector.apply_(module, 0.25)
        middle = time.perf_counter()
        for key, parameter in parameters.items():
            parameter.copy_(source[key])
        if turn:  # the first touches the memory
            edits.append(middle - start)
            copies.append(time.perf_counter() - middle)
    edit, copy = statistics.median(edits), statistics.median(copies)
    return edit, copy, 2 * edit / copy


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--mergekit", type=Path, help="mergekit-pytorch")
    parser.add_argument(
        "--against", type=Path, help="another checkout of this repository"
    )
    parser.add_argument(
        "--cache",
        type=Path,
        default=Path(tempfile.gettempdir()) / "taskarith-merge-benchmark",
        help="where the models are made and kept (0.97 GB each)",
    )
    parser.add_argument("--numbers", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--peer-rounds", type=int, default=3)
    parser.add_argument(
        "--rules",
        nargs="+",
        default=["task-arithmetic", "ties-tensor", "ties-global"],
    )
    parser.add_argument("--skip-extras", action="store_true")
    parser.add_argument("--json", type=Path, help="write all rows here too")
    parser.add_argument(
        "--nice", help="run both sides by `nice -n NICE`, on a shared machine"
    )
    arguments = parser.parse_args()
    if arguments.nice:
        PRIORITY.extend(["nice", "-n", arguments.nice])
    base, _ = models(arguments.cache, max(arguments.numbers))
    rows, ratios, floors = [], [], []
    with tempfile.TemporaryDirectory(dir=arguments.cache) as name:
        folder = Path(name)
        read, write = bandwidth(base, folder)
        size = base.stat().st_size
        print("| run | rounds | wall s | CPU s | anonymous GiB |")
        print("|---|---|---|---|---|")
        for rule in arguments.rules:
            for number in arguments.numbers:
                found = compare(rule, number, arguments, folder)
                for row in found:
                    show(row)
                rows += found
                by_side = {row["run"].split(":")[0]: row for row in found}
                for side in ("ours", "ours, no fingerprints"):
                    other = by_side.get(side.replace("ours", OTHER))
                    if other is not None:
                        row = by_side[side]
                        ratios.append(
                            f"{row['run']}, other / ours: "
                            f"{other['wall'] / row['wall']:.3f}x wall, "
                            f"{other['cpu'] / row['cpu']:.3f}x CPU"
                        )
                peer = by_side.get("mergekit")
                for row in found:
                    if peer is not None and row is not peer:
                        ratios.append(
                            f"{row['run']}: {peer['wall'] / row['wall']:.1f}x "
                            f"wall, {peer['cpu'] / row['cpu']:.1f}x CPU"
                        )
                reads, writes = passes_of(rule, number)
                floor = reads * size / read + writes * size / write
                floors.append(f"{rule}, N={number}: {floor:.2f} s")
        if not arguments.skip_extras:
            extras(arguments, folder, rows)
    print("\nratios (mergekit / ours)")
    print("\n".join(ratios) or "none: no --mergekit")
    print(
        f"\nfloors, one thread: {read / 1e9:.1f} GB/s read from the page "
        f"cache, {write / 1e9:.1f} GB/s written and synced"
    )
    print("\n".join(floors))
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2))


def extras(arguments, folder, rows):
    """Memory for sixteen, start-up, threads, the step in place."""
    base, tuned = models(arguments.cache, max(arguments.numbers))
    sixteen = [tuned[index % len(tuned)] for index in range(16)]
    for rule in ("task-arithmetic", "ties-global"):
        out = folder / "sixteen.safetensors"
        run = measure(ours(rule, base, sixteen, out))
        rows.append(summary(f"ours: {rule}, N=16", [run]))
        show(rows[-1])
        remove(out)
    start = [
        sys.executable, "-c",
        "import speechbrain_taskarith.vectors.merge, "
        "speechbrain_taskarith.vectors.rules",
    ]  # fmt: skip
    starts = {"ours": start}
    if arguments.mergekit:
        starts["mergekit"] = [str(arguments.mergekit), "--help"]
    for side, command in starts.items():
        runs = [measure(command) for _ in range(3)]
        rows.append(summary(f"{side}: start-up alone", runs))
        show(rows[-1])
    same_bytes(arguments, folder)
    print("\n1, 2 and 3 threads: the same bytes")
    edit, copy, passes = scale_step(arguments)
    print(
        f"scale step in place: {edit:.3f} s, copy {copy:.3f} s (two passes): "
        f"{passes:.2f} passes over memory"
    )
    assert math.isfinite(passes)


if __name__ == "__main__":
    main()
