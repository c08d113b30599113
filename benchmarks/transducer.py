"""Transducers: loss, MinWER, beam and streaming, against torchaudio.

Every measurement of memory is a fresh process; times are taken in turn
(A B A B) on the same inputs, after outputs have been compared::

    python benchmarks/transducer.py                     # all parts
    python benchmarks/transducer.py loss beam --rounds 7

See `benchmarks/README.md` for what came out.
"""

import argparse
import io
import json
import os
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
from hyperpyyaml import load_hyperpyyaml  # noqa: E402

from speechbrain_taskarith.transducer import (
    Emformer,
    LocalFbank,
    LSTMPredictor,
    RNNTJoint,
    StreamingTransducer,
    TimeReduction,
    TransducerBeamSearch,
    TransducerGreedySearch,
    export_transducer,
    joint_transducer_loss,
    lattice_log_prob,
    sequence_log_prob,
    transducer_loss,
)

# What the published model has: encoder, joint and labels.
WIDTH, JOINT, VOCAB = 512, 1024, 5001
BATCH, TIME, LABELS = 2, 250, 50
# Of the chunked joint: pieces of 520 nodes stay near a CPU's caches.
BUDGET = 2**25


def joint_inputs(seed=0, batch=BATCH):
    """Return a joint and a batch for it."""
    torch.manual_seed(seed)
    joint = RNNTJoint(WIDTH, WIDTH, JOINT, VOCAB)
    x = torch.randn(batch, TIME, WIDTH, requires_grad=True)
    g = torch.randn(batch, LABELS + 1, WIDTH, requires_grad=True)
    y = torch.randint(1, VOCAB, (batch, LABELS))
    return joint, x, g, y, torch.ones(batch)


def full_joint(joint, x, g, y, one):
    """The peer: the whole joint, then torchaudio's loss."""
    logits = joint(x.unsqueeze(2), g.unsqueeze(1))
    return transducer_loss(logits, y, one, one, 0, backend="torchaudio")


def chunked(joint, x, g, y, one):
    """Ours."""
    return joint_transducer_loss(
        joint, x, g, y, one, one, 0, memory_budget=BUDGET
    )


def scored(n_best):
    """MinWER's work: a reference and n hypotheses of every utterance."""
    joint, x, _, y, _ = joint_inputs()
    predictor = LSTMPredictor(VOCAB, WIDTH, WIDTH)
    count = n_best + 1
    rows = torch.arange(BATCH).repeat_interleave(count)
    y, frames = y[rows], torch.full((BATCH,), TIME)
    labels = LABELS - torch.arange(count).repeat(BATCH)

    def step():
        out, _ = predictor(torch.nn.functional.pad(y, (1, 0)))
        return sequence_log_prob(
            joint,
            x,
            out,
            y,
            frames,
            labels,
            encoder_rows=rows,
            memory_budget=BUDGET,
        ).sum()

    return step


def one_step(function):
    """Return a step of the loss, its inputs made before."""
    given = joint_inputs()
    return lambda: function(*given)


STEPS = {
    "full": lambda: one_step(full_joint),
    "chunked": lambda: one_step(chunked),
    "scored_1": lambda: scored(1),
    "scored_4": lambda: scored(4),
}


def memory(step):
    """Return what a step needs at its peak, in bytes above what was there.

    In a process of its own; gradients of inputs and parameters count.
    """
    command = [sys.executable, __file__, "--step", step]
    # What is freed goes back at once: holes of the allocator are no need.
    given_back = {"MALLOC_MMAP_THRESHOLD_": "1000000"}
    found = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, **given_back},
    )
    return json.loads(found.stdout)["peak"]


def _resident(field):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"the kernel gives no {field}")


def run_step(step):
    """Run one step and print the memory it took at its peak."""
    run = STEPS[step]()
    # Forget the peak of start-up (Linux).
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmRSS")
    run().backward()
    print(json.dumps({"peak": _resident("VmHWM") - before}))


def seconds(functions, rounds, clock=time.perf_counter):
    """Time functions in turn; return their times in seconds."""
    times = {name: [] for name in functions}
    for _ in range(rounds + 1):
        for name, function in functions.items():
            began = clock()
            function()
            times[name].append(clock() - began)
    # The first round warms up.
    return {name: taken[1:] for name, taken in times.items()}


def shown(name, taken, scale=1.0):
    """Return a row: median, least, greatest."""
    middle = statistics.median(taken)
    return (
        f"| {name} | {scale * middle:.3g} "
        f"({scale * min(taken):.3g}-{scale * max(taken):.3g}) |"
    )


def bench_loss(rounds):
    """Loss and gradients: time in turn, memory apart."""
    given = joint_inputs()
    leaves = [given[1], given[2], *given[0].parameters()]
    values, grads = {}, {}
    for name, function in (("full", full_joint), ("chunked", chunked)):
        loss = function(*given)
        values[name] = loss.item()
        grads[name] = torch.autograd.grad(loss, leaves)
    for a, b in zip(grads["full"], grads["chunked"]):
        assert (a - b).norm() <= 1e-3 * b.norm(), "gradients differ"
    del grads
    assert abs(values["full"] / values["chunked"] - 1) < 1e-5, values

    def step(function):
        return lambda: torch.autograd.grad(function(*given), leaves)

    taken = seconds(
        {"full": step(full_joint), "chunked": step(chunked)}, rounds
    )
    peak = {name: memory(name) for name in ("full", "chunked")}
    print("\n| loss and gradient | s |\n|---|---|")
    print(shown("full joint, torchaudio", taken["full"]))
    print(shown("chunked, ours", taken["chunked"]))
    ratio = statistics.median(taken["chunked"]) / statistics.median(
        taken["full"]
    )
    print(f"\ntime, ours / full joint: {ratio:.3f}")
    for name, bytes_ in peak.items():
        print(f"memory, {name}: {bytes_ / 2**30:.3f} GiB above the inputs")
    print(f"memory, full joint / ours: {peak['full'] / peak['chunked']:.1f}")


def bench_minwer(rounds):
    """MinWER: memory of four hypotheses against one."""
    one, four = memory("scored_1"), memory("scored_4")
    print(f"\nMinWER, N=1: {one / 2**30:.3f} GiB, N=4: {four / 2**30:.3f} GiB")
    print(f"memory, N=4 / N=1: {four / one:.3f}")


def bench_lattice(rounds):
    """Gradient error and time of the lattice alone."""
    torch.manual_seed(0)
    blank = -3 * torch.rand(8, TIME, LABELS + 1)
    label = -9 * torch.rand(8, TIME, LABELS)
    lengths = torch.full((8,), TIME), torch.full((8,), LABELS)
    grads = []
    for kind in (torch.float32, torch.float64):
        given = [v.to(kind).requires_grad_() for v in (blank, label)]
        total = lattice_log_prob(*given, *lengths).sum()
        grads.append(
            torch.cat(
                [
                    g.flatten().double()
                    for g in torch.autograd.grad(total, given)
                ]
            )
        )
    error = (grads[0] - grads[1]).norm() / grads[1].norm()

    def step():
        given = [v.requires_grad_() for v in (blank, label)]
        torch.autograd.grad(lattice_log_prob(*given, *lengths).sum(), given)

    print("\n| lattice, B=8 T=250 U=50 | ms |\n|---|---|")
    print(shown("forward and backward", seconds({"": step}, rounds)[""], 1e3))
    print(f"\ngradient error of float32 inputs: {float(error):.2e}")


class Peer(torch.nn.Module):
    """Our predictor and joint, as torchaudio's beam search calls them."""

    def __init__(self, predictor, joint):
        super().__init__()
        self.predictor, self.joint = predictor, joint
        # torchaudio wants the blank last.
        self.order = torch.cat((torch.arange(1, VOCAB), torch.zeros(1).long()))

    def predict(self, tokens, lengths, state):
        """Take labels of torchaudio's numbering, blank last."""
        tokens = (tokens + 1) % VOCAB
        if state is not None:
            state = tuple(
                part.transpose(0, 1).contiguous() for part in state[0]
            )
        out, state = self.predictor(tokens, state)
        state = [[part.transpose(0, 1).contiguous() for part in state]]
        return out, lengths, state

    def join(self, x, x_lens, g, g_lens):
        """Score one frame against some hypotheses."""
        # A joint of the same layers; x [1, 1, E], g [K, 1, P].
        scores = self.joint(x.unsqueeze(2), g.unsqueeze(1))
        return scores[..., self.order], x_lens, g_lens


def bench_beam(rounds, batches=(1, 4, 8, 16), time_steps=100):
    """Beam search: time per utterance against batch size."""
    from torchaudio.models import RNNTBeamSearch

    torch.manual_seed(0)
    predictor = LSTMPredictor(VOCAB, WIDTH, WIDTH).eval()
    joint = RNNTJoint(WIDTH, WIDTH, JOINT, VOCAB).eval()
    # As decided as a trained model: mostly blanks, a label now and then.
    joint.output.weight.data *= 40
    joint.output.weight.data[0] *= 6
    joint.output.bias.data[0] -= 20
    joint.predictor_layer.weight.data *= 8
    x = torch.randn(max(batches), time_steps, WIDTH)
    peer = RNNTBeamSearch(
        Peer(predictor, joint),
        VOCAB - 1,
        hypo_sort_key=lambda hypothesis: hypothesis[3],
        step_max_tokens=1,
    )
    search = TransducerBeamSearch(predictor, joint, 0, beam_size=4)

    @torch.no_grad()
    def theirs():
        return [peer._search(x[i : i + 1], None, 4)[0] for i in range(2)]

    ours = search.decode(x[:2])
    labels = sum(len(one[0].tokens) for one in ours) / 2
    for one, other in zip(ours, theirs()):
        tokens = [token + 1 for token in other[0][1:]]
        assert one[0].tokens == tokens, "the searches differ"
        assert abs(one[0].score - other[3]) < 1e-2, "the scores differ"
    functions = {
        f"ours, B={b}": lambda b=b: search.decode(x[:b]) for b in batches
    }
    counts = {f"ours, B={b}": b for b in batches}
    functions["torchaudio"], counts["torchaudio"] = theirs, 2
    taken = seconds(functions, rounds)
    print(
        f"\n| beam of 4, {time_steps} frames, {labels:g} labels "
        "| ms an utterance |\n|---|---|"
    )
    per = {name: [t / counts[name] for t in taken[name]] for name in taken}
    for name, values in per.items():
        print(shown(name, values, 1e3))
    peer_ms = statistics.median(per["torchaudio"])
    for b in batches:
        ratio = peer_ms / statistics.median(per[f"ours, B={b}"])
        print(
            f"{'' if b > 1 else chr(10)}torchaudio / ours, B={b}: {ratio:.2f}"
        )


def bench_stream(rounds, seconds_of_audio=8.0):
    """Streaming of the 20-layer Emformer, greedy search, in three types."""
    torch.manual_seed(0)
    joint = RNNTJoint(WIDTH, WIDTH, JOINT, VOCAB)
    joint.output.bias.data[0] += 3.0
    model = StreamingTransducer(
        LocalFbank(n_mels=80),
        Emformer(WIDTH, 8, 2048, 20, 4, 1, 30),
        TransducerGreedySearch(LSTMPredictor(VOCAB, WIDTH, WIDTH), joint, 0),
        detokenize=str,
        frontend=TimeReduction(80, WIDTH),
    ).eval()
    wave = torch.randn(int(16000 * seconds_of_audio))
    models = {
        "float32": model,
        **{name: model.quantize(name) for name in ("int8", "bf16")},
    }
    expected, _ = model.encode(wave[None])
    print("\n| streaming, one thread | real-time factor |\n|---|---|")
    taken = seconds(
        {name: lambda m=m: stream(m, wave) for name, m in models.items()},
        rounds,
        clock=time.process_time,
    )
    for name, each in taken.items():
        print(shown(name, [t / seconds_of_audio for t in each]))
    whole = statistics.median(taken["float32"])
    for name, other in models.items():
        found, _ = other.encode(wave[None])
        error = (found - expected).norm() / expected.norm()
        print(
            f"{name}: {stored(other) / 1e6:.0f} MB, float32 / {name} "
            f"{whole / statistics.median(taken[name]):.2f}, encoder differs "
            f"by {100 * error:.2f} %"
        )


def stream(model, wave):
    """Recognise a recording in portions of 160 ms."""
    one = model.stream()
    for samples in wave.split(2560):
        one.feed(samples)
    return one.finish()


# The same model as a folder: what is exported.
FOLDER = f"""
predictor: !new:speechbrain_taskarith.transducer.LSTMPredictor
    [{VOCAB}, {WIDTH}, {WIDTH}]
joint: !new:speechbrain_taskarith.transducer.RNNTJoint
    [{WIDTH}, {WIDTH}, {JOINT}, {VOCAB}]
transcriber: !new:speechbrain_taskarith.transducer.StreamingTransducer
    features: !new:speechbrain_taskarith.transducer.LocalFbank {{n_mels: 80}}
    encoder: !new:speechbrain_taskarith.transducer.Emformer
        [{WIDTH}, 8, 2048, 20, 4, 1, 30]
    searcher: !new:speechbrain_taskarith.transducer.TransducerGreedySearch
        [!ref <predictor>, !ref <joint>, 0]
    detokenize: !name:torch.nn.Identity
    frontend: !new:speechbrain_taskarith.transducer.TimeReduction
        [80, {WIDTH}]
"""


def bench_onnx(rounds, seconds_of_audio=8.0):
    """The same stream from exported files, in onnxruntime alone."""
    name = Path(__file__).parents[1] / "examples/onnx_streaming/transcribe.py"
    reader = runpy.run_path(str(name))
    wave = torch.randn(int(16000 * seconds_of_audio))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        (path / "hyperparams.yaml").write_text(FOLDER)
        torch.manual_seed(0)
        model = load_hyperpyyaml(FOLDER)["transcriber"].eval()
        model.searcher.joint.output.bias.data[0] += 3.0
        torch.save(model.state_dict(), path / "transcriber.ckpt")
        exported = {}
        for dtype in ("fp32", "fp16", "int8"):
            report = export_transducer(folder, path / dtype, dtype=dtype)
            sizes = sum(report.megabytes.values())
            print(
                f"{dtype}: {sizes:.0f} MB, differs by {report.difference:.2g}"
            )
            exported[dtype] = reader["Recogniser"](path / dtype)

    def onnx(recogniser):
        one = reader["Stream"](recogniser)
        for samples in wave.numpy().reshape(-1, 2560):
            one.feed(samples)
        return one.finish()

    assert onnx(exported["fp32"]) == stream(model, wave).tokens
    models = {"float32": model, "int8": model.quantize("int8")}
    functions = {
        **{
            f"PyTorch, {n}": lambda m=m: stream(m, wave)
            for n, m in models.items()
        },
        **{f"ONNX, {n}": lambda r=r: onnx(r) for n, r in exported.items()},
    }
    taken = seconds(functions, rounds, clock=time.process_time)
    print("\n| streaming, one thread | real-time factor |\n|---|---|")
    for name, each in taken.items():
        print(shown(name, [t / seconds_of_audio for t in each]))


def stored(model):
    """Return the bytes of the weights, packed ones too."""
    written = io.BytesIO()
    torch.save(model.state_dict(), written)
    return written.tell()


PARTS = {
    "lattice": bench_lattice,
    "loss": bench_loss,
    "minwer": bench_minwer,
    "beam": bench_beam,
    "stream": bench_stream,
    "onnx": bench_onnx,
}


def main():
    """Run the parts named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{[*PARTS]}")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    if options.step:
        run_step(options.step)
        return
    print(f"torch {torch.__version__}, {torch.get_num_threads()} thread(s)")
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"{sorted(unknown)}: expected {', '.join(PARTS)}")
    for part in options.parts or PARTS:
        PARTS[part](options.rounds)


if __name__ == "__main__":
    main()
