#!/usr/bin/env python3
"""Get a Whisper with a cut window used to it, and to nothing else.

The model with the cut window learns to give the probabilities that the same
model gives with 30 s (its own teacher), on transcripts that are given. So no
transcript and no domain is learned. Any speech will do, synthetic too.

> python tune_window.py openai/whisper-base whisper-base-5s out \
>     english.csv synthetic/nl/manifest.csv synthetic/cs/manifest.csv
"""

import argparse
import random
import sys
from pathlib import Path

import torch
from speechbrain.dataio.batch import PaddedBatch
from train import make_dataset, read_rows
from whisper_window import WindowedWhisper, save_whisper

from speechbrain_taskarith.brains import fast_precision
from speechbrain_taskarith.utils.progress import progress


def read_batches(manifests, student, steps, batch_size, seed):
    """Draw batches of utterances from all manifests alike."""
    sets = []
    for manifest in manifests:
        hparams = {
            "whisper": student,
            "data_root": str(Path(manifest).parent),
            "language": "en",  # where a manifest has no column lang
            "avoid_if_longer_than": student.window,
            "sample_rate": student.sampling_rate,
            "max_tokens": 200,
        }
        sets.append(make_dataset(read_rows(manifest, hparams), hparams))
    draw = random.Random(seed)
    for _ in range(steps):
        chosen = [draw.choice(sets) for _ in range(batch_size)]
        yield PaddedBatch([data[draw.randrange(len(data))] for data in chosen])


def tune_window(
    source, cut, output, manifests, steps=120, batch_size=8, lr=1e-5, seed=0
):
    """Distil `source` into `cut`, whose window is shorter."""
    teacher = WindowedWhisper(source, "hub", language="en").eval()
    student = WindowedWhisper(cut, "hub", language="en").eval()
    parameters = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr, weight_decay=0.0, fused=True)
    # Down to 0: the last steps settle.
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 10, 1 - step / steps)
    )
    precision = fast_precision()
    autocast = torch.autocast(
        "cpu", torch.bfloat16, enabled=precision == "bf16"
    )
    batches = read_batches(manifests, student, steps, batch_size, seed)
    losses = []
    for batch in progress(batches, desc="window", total=steps):
        wavs, _ = batch.sig
        tokens, lens = batch.tokens_bos
        real = torch.arange(tokens.shape[1]) < (
            lens * tokens.shape[1]
        ).round().unsqueeze(1)
        with autocast:
            with torch.no_grad():
                _, wanted, _ = teacher(wavs, tokens)
            _, found, _ = student(wavs, tokens)
        loss = torch.nn.functional.kl_div(
            found[real].log_softmax(-1),
            wanted[real].log_softmax(-1),
            reduction="batchmean",
            log_target=True,
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
    save_whisper(student, cut, output)
    return losses


def main(arguments=None):
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("source", help="the model with its whole window")
    parser.add_argument("cut", help="the same, from whisper_window.py")
    parser.add_argument("output", help="the folder to write")
    parser.add_argument("manifests", nargs="+", help="CSV, $data_root beside")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--lr", type=float, default=1e-5)
    parser.add_argument("--seed", type=int, default=0)
    try:
        losses = tune_window(**vars(parser.parse_args(arguments)))
    except (OSError, ValueError) as error:
        sys.exit(f"tune_window.py: {error}")
    tenth = max(1, len(losses) // 10)
    first, last = losses[:tenth], losses[-tenth:]
    print(
        f"divergence from the whole window: {sum(first) / tenth:.3f} -> "
        f"{sum(last) / tenth:.3f} nats a token"
    )


if __name__ == "__main__":
    main()
