"""Many adapters on one layer: time and memory against AdapterHub.

The real modules of the `adapters` package (its bottleneck adapter and its
fusion, called in the order its `compose_fuse` calls them) and our forms get
the same weights and the same input in one process; outputs are compared
before a time counts, and the sides take turns::

    peer/bin/python benchmarks/adapters.py

Without the package the other sides run alone. On a GPU (`--device cuda`) time
is taken by events and memory is `max_memory_allocated`; kernel launches are
counted. See `benchmarks/README.md` for what came out.
"""

import argparse
import functools
import json
import math
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from speechbrain_taskarith.adapters import AdapterBank, AudioAdapterFusion
from speechbrain_taskarith.adapters.combination.folding import product

WIDTH, BATCH, FRAMES = 512, 4, 250
TOLERANCE = 2e-5  # of the output's norm, float32 against the loop in float64
PEER = "AdapterHub"
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
CLOCK = CLOCKS["wall"]


# ------------------------------------------------------------------- sides


def ours(number, bottleneck, device):
    """Return a fusion without LN, which the peer has not, all scrambled."""
    torch.manual_seed(number)
    names = [f"task {i}" for i in range(number)]
    bank = AdapterBank(names, WIDTH, bottleneck)
    fusion = AudioAdapterFusion(bank, ln_init=None)
    with torch.no_grad():
        for module in (bank, fusion):
            for parameter in module.parameters():
                parameter.add_(0.03 * torch.randn_like(parameter))
    bank.to(device), fusion.to(device)
    return fusion


def peers(fusion):
    """Return the peer's function and modules with the same weights."""
    from adapters.configuration import DynamicAdapterFusionConfig, SeqBnConfig
    from adapters.methods.modeling import Adapter, BertFusion

    bank = fusion.bank
    config = SeqBnConfig(
        ln_before=True,
        non_linearity="swish",
        original_ln_before=False,
        original_ln_after=False,
        adapter_residual_before_ln=False,
    )
    modules = torch.nn.ModuleList()
    for name in fusion.names:
        mine = bank[name]
        its = Adapter(name, WIDTH, mine.bottleneck, config)
        norm, down = its.adapter_down[0], its.adapter_down[1]
        norm.load_state_dict(mine.norm.state_dict())
        down.load_state_dict(mine.down.state_dict())
        its.adapter_up.load_state_dict(mine.up.state_dict())
        modules.append(its)
    attention = BertFusion(DynamicAdapterFusionConfig(), WIDTH, 0.0)
    attention.query.load_state_dict(fusion.query.state_dict())
    attention.key.weight.data.copy_(fusion.key.weight)
    attention.value.load_state_dict(fusion.value.state_dict())
    device = fusion.key.weight.device
    modules.to(device), attention.to(device)

    def run(x):
        ups = torch.stack([adapter(x, x)[2] for adapter in modules])
        ups = ups.permute(1, 2, 0, 3)
        return attention(x, ups, ups, x)

    return run, modules, attention


def sides(number, bottleneck, arguments):
    """Return `{name: (function, adapters, combination)}`."""
    fusion = ours(number, bottleneck, arguments.device)
    bank = fusion.bank
    found = {}
    if arguments.peer:
        found[PEER] = peers(fusion)
    found["loop"] = (lambda x: fusion(x, "loop"), bank, fusion)
    if arguments.compile:
        compiled = torch.compile(lambda x: fusion(x, "loop"))
        found["loop, compiled"] = (compiled, bank, fusion)
    found["stacked"] = (lambda x: fusion(x, "stacked"), bank, fusion)
    found["collapsed"] = (lambda x: fusion(x, "collapsed"), bank, fusion)
    again = fusion.for_bank(bank).to(arguments.device)
    again.load_state_dict(fusion.state_dict())
    again.recompute = True
    found["recomputed"] = (again, bank, again)
    found["folded"] = (lambda x: fusion(x, "folded"), bank, fusion)
    found["auto"] = (fusion, bank, fusion)
    return found, fusion


def check(found, fusion, x):
    """Assert that all sides give what the loop gives in float64."""
    with torch.no_grad():
        got = {name: run(x) for name, (run, *_) in found.items()}
        fusion.bank.double(), fusion.double()
        exact = fusion(x.double(), "loop")
        fusion.bank.float(), fusion.float()
    got.pop("recomputed", None)  # the same code, without gradients
    for name, output in got.items():
        error = ((output - exact).norm() / (exact - x).norm()).item()
        assert error < TOLERANCE, f"{name} is off by {error:.1e}"


# --------------------------------------------------------------------- time


def clock(function, device):
    """Return the milliseconds of one call."""
    if device == "cpu":
        start = CLOCK()
        function()
        return 1e3 * (CLOCK() - start)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    function()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def in_turn(functions, arguments, repeat=1):
    """Return `{name: milliseconds of each round}`, sides taking turns."""
    times = {name: [] for name in functions}
    for turn in range(arguments.rounds + 2):
        for name, function in functions.items():
            taken = [clock(function, arguments.device) for _ in range(repeat)]
            if turn >= 2:  # the first ones warm up
                times[name].append(statistics.median(taken))
    return times


def no_grad(run, x):
    def call():
        with torch.no_grad():
            run(x)

    return call


def step(run, x, adapters, combination, trained):
    """Return a call of forward and backward, x needing gradients too."""

    def call():
        adapters.requires_grad_(trained)
        combination.requires_grad_(True)
        adapters.zero_grad(), combination.zero_grad()
        x.grad = None
        run(x).sum().backward()

    return call


def product_rate(device):
    """Return floating point operations a second of large products."""
    x = torch.randn(BATCH * FRAMES, WIDTH, device=device)
    weight = torch.randn(1024, WIDTH, device=device)
    with torch.no_grad():
        best = min(
            clock(functools.partial(function, x, weight), device)
            for _ in range(20)
            for function in (F.linear, product)
        )
    return 2 * x.numel() * len(weight) / (best / 1e3)


# ------------------------------------------------------------------- memory


def held_bytes(run, x):
    """Return the bytes that autograd keeps of one forward pass."""
    kept = {}

    def pack(tensor):
        if not isinstance(tensor, torch.nn.Parameter):
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = (storage.nbytes(), storage)
        return tensor

    # Weights are no activations, nor is what stacks frozen ones.
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        output = run(x)
    del output
    return sum(size for size, _ in kept.values())


def anonymous():
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    return 0


def memory_of(side, number, bottleneck, trained, arguments):
    """Return held and resident bytes of a side; for a fresh process."""
    found, fusion = sides(number, bottleneck, arguments)
    run, adapters, combination = found[side]
    adapters.requires_grad_(trained)
    device = arguments.device
    small = torch.randn(1, 2, WIDTH, device=device, requires_grad=True)
    for _ in range(2):  # threads, caches, stacked weights
        run(small).sum().backward()
    x = torch.randn(BATCH, FRAMES, WIDTH, device=device, requires_grad=True)
    weights = held_bytes(run, small)
    held = held_bytes(run, x) - weights
    if device == "cpu":
        before = anonymous()
        output = run(x)
        resident = anonymous() - before
    else:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        output = run(x)
        output.sum().backward()
        resident = torch.cuda.max_memory_allocated() - before
    del output
    return {"held": held, "resident": resident}


def in_fresh_process(side, number, bottleneck, trained, arguments):
    command = [
        sys.executable, __file__, "--memory-of", side, "--numbers",
        str(number), "--bottlenecks", str(bottleneck), "--device",
        arguments.device,
    ]  # fmt: skip
    command += ["--trained"] if trained else []
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout.splitlines()[-1])


# ----------------------------------------------------------------- the grid


def show(what, number, bottleneck, times, rows, floor=None):
    """Print one block: medians, spread, ratios to the peer.

    A gain is the median of the rounds' ratios: both sides of a ratio were
    measured one after the other.
    """
    medians = {name: statistics.median(t) for name, t in times.items()}
    for name, taken in times.items():
        ratio = ""
        if PEER in medians and name != PEER:
            pairs = [p / t for p, t in zip(times[PEER], taken)]
            ratio = f"{statistics.median(pairs):.1f} x"
        print(
            f"| {what} | {number} | {bottleneck} | {name} | "
            f"{medians[name]:.2f} ({min(taken):.2f}-{max(taken):.2f}) | "
            f"{ratio} |"
        )
        rows.append(
            {
                "what": what,
                "number": number,
                "bottleneck": bottleneck,
                "side": name,
                "milliseconds": taken,
            }
        )
    if floor is not None:
        print(
            f"| {what} | {number} | {bottleneck} | 6dNb at the best product "
            f"rate | {floor:.2f} | |"
        )
    sys.stdout.flush()


def grid(arguments):
    rows, device = [], arguments.device
    rate = product_rate(device)
    print(f"large products: {rate / 1e9:.0f} GFLOP/s\n")
    print("| what | N | b | side | ms: median (least-greatest) | gain |")
    print("|---|---|---|---|---|---|")
    for bottleneck in arguments.bottlenecks:
        for number in arguments.numbers:
            found, fusion = sides(number, bottleneck, arguments)
            x = torch.randn(BATCH, FRAMES, WIDTH, device=device)
            check(found, fusion, x)
            one = fusion.bank[fusion.names[0]]
            calls = {
                name: no_grad(run, x)
                for name, (run, *_) in found.items()
                if name not in ("recomputed", "auto")
            }
            calls["one adapter"] = no_grad(lambda x, a=one: x + a(x), x)
            flops = 6 * WIDTH * number * bottleneck * BATCH * FRAMES
            show(
                "forward",
                number,
                bottleneck,
                in_turn(calls, arguments),
                rows,
                1e3 * flops / rate,
            )
            x.requires_grad_()
            for stage, trained in (("ST-A", False), ("MT-A", True)):
                calls = {
                    name: step(run, x, adapters, combination, trained)
                    for name, (run, adapters, combination) in found.items()
                }
                show(
                    f"forward + backward, {stage}",
                    number,
                    bottleneck,
                    in_turn(calls, arguments),
                    rows,
                )
            chunk = torch.randn(1, 16, WIDTH, device=device)
            fusion.fold()
            calls = {
                "folded": no_grad(lambda x, f=fusion: f(x), chunk),
                "one adapter": no_grad(lambda x, a=one: x + a(x), chunk),
            }
            if arguments.peer:
                calls = {PEER: no_grad(found[PEER][0], chunk), **calls}
            show(
                "chunk of 16 frames",
                number,
                bottleneck,
                in_turn(calls, arguments, repeat=30),
                rows,
            )
            fusion.unfold()
    return rows


def memory_table(arguments):
    print("\n| memory | N | b | side | held MiB | resident MiB | gain, held |")
    print("|---|---|---|---|---|---|---|")
    for bottleneck in arguments.bottlenecks:
        for number in arguments.numbers:
            for trained in (False, True):
                peer = None
                for side in [PEER] * arguments.peer + [
                    "loop",
                    "stacked",
                    "collapsed",
                    "recomputed",
                    "folded",
                ]:
                    found = in_fresh_process(
                        side, number, bottleneck, trained, arguments
                    )
                    held = found["held"] / 2**20
                    peer = held if side == PEER else peer
                    gain = f"{peer / held:.1f} x" if peer else ""
                    print(
                        f"| {'MT-A' if trained else 'ST-A'} | {number} | "
                        f"{bottleneck} | {side} | {held:.1f} | "
                        f"{found['resident'] / 2**20:.1f} | {gain} |",
                        flush=True,
                    )


def switch_over(arguments):
    """Print where training by the folded form begins to be faster.

    By frames in a batch, in units of those where both forms need as many
    products; above 1 the folded form is faster.
    """
    units = (0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 4.0)
    head = ["collapsed / folded", "N", "b", "even at", *units]
    print("| " + " | ".join(map(str, head)) + " |")
    print("|---" * len(head) + "|")
    for bottleneck in arguments.bottlenecks:
        for number in arguments.numbers:
            fusion = ours(number, bottleneck, arguments.device)
            for stage, trained in (("ST-A", False), ("MT-A", True)):
                fusion.bank.requires_grad_(trained)
                even = fusion._even_frames()
                if not math.isfinite(even):
                    continue
                row = [stage, number, bottleneck, round(even)]
                for unit in units:
                    x = torch.randn(1, round(unit * even), WIDTH)
                    x = x.to(arguments.device).requires_grad_()
                    calls = {
                        form: step(
                            functools.partial(fusion, form=form),
                            x,
                            fusion.bank,
                            fusion,
                            trained,
                        )
                        for form in ("collapsed", "folded")
                    }
                    times = in_turn(calls, arguments).values()
                    pairs = [one / other for one, other in zip(*times)]
                    row.append(f"{statistics.median(pairs):.2f}")
                print("| " + " | ".join(map(str, row)) + " |", flush=True)


def launches(arguments):
    """Print kernel launches of a forward pass, on a GPU."""
    print("\n| launches | N | side | kernels |")
    print("|---|---|---|---|")
    for number in arguments.numbers:
        found, _ = sides(number, 64, arguments)
        x = torch.randn(BATCH, FRAMES, WIDTH, device=arguments.device)
        for name, (run, *_) in found.items():
            call = no_grad(run, x)
            call()
            with torch.profiler.profile() as profile:
                call()
                torch.cuda.synchronize()
            count = sum(
                event.device_type == torch.autograd.DeviceType.CUDA
                for event in profile.events()
            )
            print(f"| forward | {number} | {name} | {count} |")


def has_peer():
    try:
        import adapters.methods.modeling  # noqa: F401
    except ImportError:
        print("no package `adapters`: without the peer", file=sys.stderr)
        return False
    return True


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--numbers", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--bottlenecks", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument(
        "--compile", action="store_true", help="also the compiled loop"
    )
    parser.add_argument("--skip-memory", action="store_true")
    parser.add_argument(
        "--switch-over",
        action="store_true",
        help="only: from how many frames the folded form trains faster",
    )
    parser.add_argument("--json", type=Path, help="write all times here too")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    parser.add_argument(
        "--trained", action="store_true", help=argparse.SUPPRESS
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    global CLOCK
    CLOCK = CLOCKS[arguments.clock]
    # The folder of this script holds a file of the peer's name.
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [p for p in sys.path if os.path.abspath(p or ".") != here]
    arguments.peer = has_peer()
    if arguments.memory_of:
        print(
            json.dumps(
                memory_of(
                    arguments.memory_of,
                    arguments.numbers[0],
                    arguments.bottlenecks[0],
                    arguments.trained,
                    arguments,
                )
            )
        )
        return
    if arguments.switch_over:
        switch_over(arguments)
        return
    rows = grid(arguments)
    if not arguments.skip_memory:
        memory_table(arguments)
    if arguments.device != "cpu":
        launches(arguments)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
