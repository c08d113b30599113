"""Length reduction: CTC shrink and looking back, against loops and SDPA.

And what it is for: a training step of the whole method against plain ones.

Outputs and gradients of all sides are compared before a time counts; times
are taken in turn (A B A B) on the same inputs, memory in fresh processes::

    python benchmarks/length_reduction.py                  # all parts
    python benchmarks/length_reduction.py shrink look --rounds 7
    python benchmarks/length_reduction.py shrink look --device cuda

See `benchmarks/README.md` for what came out.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

from speechbrain_taskarith.translation import (
    AcousticEncoder,
    BlankNoise,
    CTCShrink,
    LookingBack,
    SpeechTranslationModel,
    TextEncoder,
    TranslationDecoder,
    TranslationObjective,
    gradient_consistency,
)
from speechbrain_taskarith.translation.multitask.ctc_loss import ctc_loss
from speechbrain_taskarith.translation.reduction.windowed_attention import (
    windowed_attention,
)

BATCH, WIDTH, VOCAB, RUN = 16, 512, 64, 5
# The second for machines with other jobs.
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
CLOCK = CLOCKS["wall"]


def inputs(frames, device="cpu", batch=BATCH, vocab=VOCAB):
    """Return features, logits with runs of five frames, and lengths."""
    torch.manual_seed(0)
    change = torch.rand(batch, frames) < 1 / RUN
    drawn = torch.randint(vocab, (batch, frames))
    first = torch.where(change, torch.arange(frames), 0).cummax(1).values
    labels = drawn.gather(1, first)
    logits = torch.randn(batch, frames, vocab)
    logits.scatter_(2, labels[..., None], 10.0)
    x = torch.randn(batch, frames, WIDTH)
    return x.to(device), logits.to(device), torch.ones(batch, device=device)


def loop(x, logits, lens):
    """The plain way: utterance after utterance, segment after segment."""
    rows = []
    labels = logits.argmax(-1)
    lengths = (lens * x.shape[1]).round().long().tolist()
    for b, n in enumerate(lengths):
        _, counts = labels[b, :n].unique_consecutive(return_counts=True)
        parts = x[b, :n].split(counts.tolist())
        rows.append(torch.stack([part.mean(0) for part in parts]))
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def by_utterance(x, logits, lens):
    """As one would write it in five lines: no loop over segments.

    `unbind`, since slices of x would each fill a gradient of its whole size.
    """
    rows = []
    labels = logits.max(-1).indices
    lengths = (lens * x.shape[1]).round().long().tolist()
    for frames, best, n in zip(x.unbind(), labels, lengths):
        _, ids, counts = best[:n].unique_consecutive(
            return_inverse=True, return_counts=True
        )
        total = frames.new_zeros(len(counts), x.shape[2])
        rows.append(total.index_add(0, ids, frames[:n]) / counts[:, None])
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def matrices(x, logits, lens):
    """As FBK's CTC compression does: a [T, S] matrix for each utterance."""
    lengths = (lens * x.shape[1]).round().long().tolist()
    labels = [row[:n].tolist() for row, n in zip(logits.argmax(-1), lengths)]
    runs = [[len(list(g)) for _, g in itertools.groupby(r)] for r in labels]
    most = max(map(len, runs))
    weights = x.new_zeros(len(x), x.shape[1], most)
    for b, counts in enumerate(runs):
        start = 0
        for s, count in enumerate(counts):
            weights[b, start : start + count, s] = 1 / count
            start += count
    return (x.transpose(1, 2) @ weights).transpose(1, 2)


def ours(pooling="mean", **settings):
    """Return our shrink as a function of the same inputs."""
    shrink = CTCShrink(pooling=pooling, **settings)
    return lambda x, logits, lens: shrink(x, logits, lens).x


SHRINKS = {
    "ours": ours(),
    "by utterance": by_utterance,
    "loop": loop,
    "matrices": matrices,
}


def floor(x, logits, out, gradient=False):
    """Return a function that reads and writes what any shrink has to."""

    def passes():
        logits.max(-1)
        x.sum()
        torch.zeros_like(out)
        if gradient:
            torch.zeros_like(x)

    return passes


def seconds(functions, rounds, device="cpu"):
    """Time functions in turn; return their times in seconds."""
    times = {name: [] for name in functions}
    for _ in range(rounds + 2):
        for name, function in functions.items():
            times[name].append(_one(function, device))
    # The first two rounds warm up.
    return {name: taken[2:] for name, taken in times.items()}


def _one(function, device):
    if device == "cpu":
        began = CLOCK()
        function()
        return CLOCK() - began
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    function()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3


def table(title, taken, against=None, share=False):
    """Print medians, spread, and how often `against` takes as long.

    With `share` the other way round: as a share of `against`.
    """
    print(f"\n| {title} | ms | ratio |\n|---|---|---|")
    base = statistics.median(taken[against]) if against else None
    for name, times in taken.items():
        middle = statistics.median(times)
        ratio = ""
        if base:
            ratio = f"{middle / base if share else base / middle:.2f} x"
        print(
            f"| {name} | {1e3 * middle:.3g} ({1e3 * min(times):.3g}-"
            f"{1e3 * max(times):.3g}) | {ratio} |"
        )


def backward(function, x, *rest):
    """Return a step: forward, and the gradient by x."""
    x = x.detach().requires_grad_()
    weight = torch.randn_like(function(x, *rest))
    return lambda: torch.autograd.grad(function(x, *rest), x, weight)


def same(functions, x, *rest):
    """Assert equal outputs and gradients."""
    x = x.detach().requires_grad_()
    found = []
    for function in functions.values():
        out = function(x, *rest)
        found.append((out, *torch.autograd.grad(out.square().sum(), x)))
    for other in found[1:]:
        for a, b in zip(found[0], other):
            torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-3)


def bench_shrink(rounds, device):
    """Shrink: forward, forward and backward, poolings, compiled."""
    for frames in (500, 2000):
        given = inputs(frames, device)
        same(SHRINKS, *given)
        functions = {n: partial(f, *given) for n, f in SHRINKS.items()}
        kinds = {
            "first": ours("first"),
            "weighted": ours("weighted"),
            "capacity": ours(capacity=frames // 2),
        }
        functions.update(
            {f"ours, {n}": partial(f, *given) for n, f in kinds.items()}
        )
        least = partial(floor, *given[:2], ours()(*given))
        functions["reading and writing alone"] = least()
        with torch.no_grad():
            taken = seconds(functions, rounds, device)
        table(f"shrink, forward, T={frames}", taken, "by utterance")
        steps = {n: backward(f, *given) for n, f in SHRINKS.items()}
        steps["reading and writing alone"] = least(gradient=True)
        taken = seconds(steps, rounds, device)
        table(
            f"shrink, forward and backward, T={frames}", taken, "by utterance"
        )


def bench_compile(rounds, device):
    """The fixed-capacity form under torch.compile."""
    given = inputs(2000, device)
    plain = ours(capacity=1000)
    compiled = torch.compile(
        CTCShrink(pooling="mean", capacity=1000), fullgraph=True
    )
    functions = {
        "capacity": lambda: plain(*given),
        "capacity, compiled": lambda: compiled(*given).x,
    }
    torch.testing.assert_close(*(f() for f in functions.values()))
    with torch.no_grad():
        table("shrink, T=2000", seconds(functions, rounds, device), "capacity")


def bench_look(rounds, device):
    """Looking back: attention alone, and the whole layer."""
    for frames in (500, 2000, 4000):
        x, logits, lens = inputs(frames, device)
        shrunk = CTCShrink()(x, logits, lens)
        segments = shrunk.segments
        q = torch.randn(BATCH, 8, shrunk.x.shape[1], 64, device=device)
        kv = torch.randn(BATCH, frames, 2 * WIDTH, device=device)
        mask = torch.ones(BATCH, 1, 1, frames, dtype=torch.bool, device=device)

        def attention(kv, window, q=q, mask=mask, segments=segments):
            k, v = (
                part.unflatten(-1, (8, -1)).transpose(1, 2)
                for part in kv.chunk(2, -1)
            )
            if window is None:
                return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            return windowed_attention(q, k, v, segments, window)

        windows = {"exact": None, "window 0": 0, "window 1": 1, "window 2": 2}
        with torch.no_grad():
            taken = seconds(
                {n: partial(attention, kv, w) for n, w in windows.items()},
                rounds,
                device,
            )
        table(f"attention, forward, T={frames}", taken, "exact")
        steps = {
            n: backward(lambda kv, w=w: attention(kv, w), kv)
            for n, w in windows.items()
        }
        table(
            f"attention, forward and backward, T={frames}",
            seconds(steps, rounds, device),
            "exact",
        )
        layers = {
            n: LookingBack(WIDTH, 8, 2048, dropout=0.0, window=w).to(device)
            for n, w in windows.items()
        }
        steps = {
            n: backward(lambda x, m=m, s=shrunk, ls=lens: m(s, x, ls), x)
            for n, m in layers.items()
        }
        table(
            f"whole layer, forward and backward, T={frames}",
            seconds(steps, rounds, device),
            "exact",
        )


def bench_probe(rounds, device):
    """Cost of the consistency probe at its default interval."""
    layer = torch.nn.TransformerEncoderLayer(WIDTH, 8, 2048, batch_first=True)
    shared = torch.nn.TransformerEncoder(layer, 3).to(device).train()
    x = inputs(200, device, batch=4)[0]

    def losses():
        out = shared(x)
        return {"st": out.square().mean(), "asr": out[..., 0].mean()}

    def step():
        sum(losses().values()).backward()

    def probed():
        found = losses()
        gradient_consistency(found, shared)
        sum(found.values()).backward()

    taken = seconds({"step": step, "step and probe": probed}, rounds, device)
    table("gradient consistency, two tasks", taken)
    plain, with_probe = (statistics.median(t) for t in taken.values())
    share = (with_probe - plain) / (100 * plain)
    print(f"\nshare of training time at interval 100: {100 * share:.2f} %")


class Cached(torch.nn.Module):
    """Features that a frozen encoder has computed before."""

    def forward(self, x, lens):
        return x


def conformer(d_model):
    """Return a small Conformer on 80 filters, 40 ms a frame."""
    from speechbrain.lobes.models.convolution import ConvolutionFrontEnd
    from speechbrain.lobes.models.transformer.TransformerASR import (
        EncoderWrapper,
        TransformerASR,
    )
    from speechbrain.nnet.CNN import Conv1d

    front = ConvolutionFrontEnd(
        input_shape=[None, None, 80],
        num_blocks=2,
        num_layers_per_block=1,
        out_channels=[d_model, d_model],
        kernel_sizes=[5, 5],
        strides=[2, 2],
        residuals=[False, False],
        conv_module=Conv1d,
        dropout=0.0,
    )
    transformer = TransformerASR(
        tgt_vocab=8,
        input_size=d_model,
        d_model=d_model,
        nhead=4,
        num_encoder_layers=3,
        num_decoder_layers=0,
        d_ffn=3 * d_model,
        dropout=0.0,
        encoder_module="conformer",
        attention_type="RoPEMHA",
        kernel_size=15,
        normalize_before=True,
        causal=False,
    )
    return AcousticEncoder(EncoderWrapper(transformer), d_model, frontend=front)


# Acoustic encoder, width, layers of text, source and target vocabulary, input
# frames and features, frames behind the encoder, source and target tokens.
STEPS = {
    "cached features of a frozen encoder": (
        *(lambda d: AcousticEncoder(Cached(), d, d_encoder=384), 192, 3),
        *(3000, 3000, 200, 384, 200, 15, 15),
    ),
    "a Conformer that trains": (
        *(conformer, 96, 2, 34, 500, 300, 80, 75, 30, 14),
    ),
}


def step_functions(setting, whole_objective, plain_objective):
    """Return a training step for each row of the table."""
    acoustic, width, layers, source, target, *sizes = setting
    long, features, frames, words, pieces = sizes

    def build(whole):
        torch.manual_seed(0)
        model = SpeechTranslationModel(
            acoustic(width),
            TextEncoder(width, 4, layers, d_ffn=4 * width, local=whole),
            TranslationDecoder(target, width, 4, layers, d_ffn=4 * width),
            source_vocab=source,
            shrink=CTCShrink() if whole else None,
            looking_back=LookingBack(width, 4) if whole else None,
            noise=BlankNoise(0, seed=1) if whole else None,
            contrast=whole,
        )
        if whole:
            # An untrained head has no runs: those of a trained one.
            labels = torch.randint(source, (BATCH, -(-frames // 7)))
            labels = labels.repeat_interleave(7, 1)[:, :frames]
            sure = F.one_hot(labels, source).float()
            shrink = model.shrink.forward
            model.shrink.forward = lambda x, _, lens, ids: shrink(
                x, sure, lens, ids
            )
        return model

    lens = torch.ones(BATCH)
    given = {
        "x": torch.randn(BATCH, long, features),
        "lens": lens,
        "source": torch.randint(1, source, (BATCH, words)),
        "source_lens": lens,
        "target_bos": torch.randint(3, target, (BATCH, pieces)),
    }
    goals = {
        "source": given["source"],
        "source_lens": lens,
        "target_eos": given["target_bos"],
        "target_lens": lens,
    }

    def step(model, objective, tasks):
        model.zero_grad()
        losses = objective(model(tasks=tasks, **given), **goals)
        sum(losses.values()).backward()

    plain, whole = build(False), build(True)
    split = TranslationObjective(0, contrastive=0.0, ctc_in_st=False)
    rows = {
        "speech translation alone": (plain, split, ("st",)),
        "joint, no shrink, no stop": (plain, split, ("st", "asr", "mt")),
        "whole method": (whole, whole_objective, ("st", "asr", "mt")),
        "whole, asr stopped": (whole, whole_objective, ("st", "mt")),
        "whole, both stopped": (whole, whole_objective, ("st",)),
        "whole, CTC only in asr, both stopped": (
            whole,
            plain_objective,
            ("st",),
        ),
    }
    return {name: partial(step, *row) for name, row in rows.items()}


def bench_step(rounds, device):
    """A training step: forward and backward of all tasks that are active."""
    del device
    for name, setting in STEPS.items():
        functions = step_functions(
            setting,
            TranslationObjective(0),
            TranslationObjective(0, ctc_in_st=False),
        )
        taken = seconds(functions, rounds)
        table(f"step, {name}", taken, "speech translation alone", share=True)


def bench_ctc(rounds, device):
    """The CTC loss on its own labels against torch's on all, with backward."""
    for frames, vocab, words in ((200, 3000, 15), (75, 34, 30)):
        torch.manual_seed(0)
        logits = torch.randn(BATCH, frames, vocab, device=device)
        labels = torch.randint(1, vocab, (BATCH, words), device=device)
        lengths = [
            torch.full((BATCH,), n, device=device) for n in (frames, words)
        ]

        def ours(logits, labels=labels, lengths=lengths):
            return ctc_loss(logits, labels, *lengths, 0)

        def of_torch(logits, labels=labels, lengths=lengths):
            scores = logits.log_softmax(-1).transpose(0, 1)
            return F.ctc_loss(
                scores, labels, *lengths, reduction="none", zero_infinity=True
            )

        functions = {"ours": ours, "torch": of_torch}
        same(functions, logits.double())
        steps = {n: backward(f, logits) for n, f in functions.items()}
        taken = seconds(steps, rounds, device)
        table(f"CTC, T={frames}, V={vocab}, U={words}", taken, "torch")


def _anonymous():
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise OSError("the kernel gives no RssAnon")


def run_memory(name, frames):
    """Print how far anonymous memory rises in a step, sampled by a thread."""
    import threading

    given = inputs(frames)
    step = backward(SHRINKS[name], *given)
    small = inputs(50)
    backward(SHRINKS[name], *small)()
    before, peak, going = _anonymous(), 0, True

    def watch():
        nonlocal peak
        while going:
            peak = max(peak, _anonymous())
            time.sleep(0.0005)

    thread = threading.Thread(target=watch)
    thread.start()
    found = step()
    peak, going = max(peak, _anonymous()), False
    thread.join()
    del found
    print(json.dumps({"peak": peak - before}))


def bench_memory(rounds, device):
    """Extra memory of a shrink with gradient at T=4000."""
    size = BATCH * 4000 * WIDTH * 4 / 2**20
    print(f"\n| shrink, memory, T=4000 (input: {size:.0f} MiB) | MiB |")
    print("|---|---|")
    if device != "cpu":
        given = inputs(4000, device)
        for name, function in SHRINKS.items():
            step = backward(function, *given)
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            step()
            peak = torch.cuda.max_memory_allocated() - before
            print(f"| {name} | {peak / 2**20:.0f} |")
        return
    for name in SHRINKS:
        ran = subprocess.run(
            [sys.executable, __file__, "--measure", name],
            capture_output=True,
            text=True,
            check=True,
            # What is freed goes back at once: holes are no need.
            env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000"},
        )
        peak = json.loads(ran.stdout)["peak"]
        print(f"| {name} | {peak / 2**20:.0f} |")


PARTS = {
    "shrink": bench_shrink,
    "memory": bench_memory,
    "look": bench_look,
    "ctc": bench_ctc,
    "step": bench_step,
    "probe": bench_probe,
    "compile": bench_compile,
}


def main():
    """Run the parts named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{[*PARTS]}")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--measure", choices=SHRINKS, help=argparse.SUPPRESS)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    options = parser.parse_args()
    global CLOCK
    CLOCK = CLOCKS[options.clock]
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    if options.measure:
        run_memory(options.measure, 4000)
        return
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"{sorted(unknown)}: expected {', '.join(PARTS)}")
    print(
        f"torch {torch.__version__}, {options.device}, "
        f"{torch.get_num_threads()} thread(s), B={BATCH}, d={WIDTH}, V={VOCAB}"
        f", {options.clock} time"
    )
    for part in options.parts or PARTS:
        PARTS[part](options.rounds, options.device)


if __name__ == "__main__":
    main()
