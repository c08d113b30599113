"""Sequences of edits: is the thousandth edit as cheap as the tenth?

    python benchmarks/sequence.py --peer OLD --edits 10 100 1000

Each run is a fresh process that learns N edits of a small model one after
another, so that the bookkeeping counts and not the arithmetic. Then it opens
the folder again, asks for the state, and takes the last edit back. `OLD` is a
checkout of an earlier version of this package, run in turn on the same
inputs; both must end at the same weights. `--sizes` measures opening and undo
for larger models after five edits.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]

# What one process does; both sides know these names.
RUN = """
import json, sys, time, torch
from speechbrain_taskarith.vectors import SequentialEditor, TaskArithmetic
from speechbrain_taskarith.vectors import as_state
torch.set_num_threads(1)
folder, count, width, layers = sys.argv[1], *map(int, sys.argv[2:5])
noise = torch.Generator().manual_seed(0)
def weights():
    return {f"l{i}": torch.randn(width, width, generator=noise)
            for i in range(layers)}
base, step = weights(), weights()
wall, cpu = time.perf_counter, time.process_time
found, state = {}, base
start, busy = wall(), cpu()
with SequentialEditor(base, TaskArithmetic(0.1), folder) as editor:
    for number in range(count):
        tuned = {n: t + 0.01 * step[n] for n, t in state.items()}
        state = editor.learn(f"d{number}", tuned)
found["learn"], found["learn_cpu"] = wall() - start, cpu() - busy
print_of = as_state(state).fingerprint
start = wall()
editor = SequentialEditor.resume(folder)
assert as_state(editor.state()).fingerprint == print_of
found["open"] = wall() - start
start = wall()
editor.undo(f"d{count - 1}")
found["undo"] = wall() - start
editor.close()
found["fingerprint"] = print_of
print(json.dumps(found))
"""


def measure(side, count, width, layers):
    """Run one side in a fresh process; return what it says."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(side),
        "OMP_NUM_THREADS": "1",
    }
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, "-c", RUN, f"{folder}/edits"]
            + [str(number) for number in (count, width, layers)],
            env=environment,
            capture_output=True,
            text=True,
            cwd=folder,
        )
        if done.returncode:
            raise RuntimeError(done.stderr[-2000:])
        found = json.loads(done.stdout)
        found["MB"] = (
            sum(
                p.stat().st_size for p in Path(folder).rglob("*") if p.is_file()
            )
            / 1e6
        )
        return found


def compare(sides, rounds, count, width, layers):
    """Measure all sides in turn; print a line each."""
    runs = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            runs[name].append(measure(side, count, width, layers))
    prints = {run["fingerprint"] for found in runs.values() for run in found}
    assert len(prints) == 1, "the sides end at different weights"
    for name, found in runs.items():
        middle = {
            key: statistics.median(run[key] for run in found)
            for key in found[0]
            if key != "fingerprint"
        }
        print(
            f"{count:5} edits of {layers * width * width:>10,} numbers, "
            f"{name:7} learn {middle['learn']:8.2f} s "
            f"({1000 * middle['learn_cpu'] / count:6.2f} ms of CPU an edit), "
            f"open {middle['open']:6.3f} s, undo {middle['undo']:6.3f} s, "
            f"{middle['MB']:7.1f} MB",
            flush=True,
        )


def main():
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--peer", type=Path, help="an earlier checkout")
    parser.add_argument("--edits", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument(
        "--sizes", type=int, nargs="*", default=[], help="widths of 8 layers"
    )
    options = parser.parse_args()
    sides = {"now": HERE}
    if options.peer:
        sides["before"] = options.peer.resolve()
    for count in options.edits:
        compare(sides, options.rounds, count, 16, 8)
    for width in options.sizes:
        compare(sides, options.rounds, 5, width, 8)


if __name__ == "__main__":
    main()
