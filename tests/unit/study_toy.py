"""What the tests of `common.study` run in place of a recipe's train.py."""

import os
import time
from pathlib import Path

import torch


def train(argv):
    """Write weights that follow from the options; wait, fail as they say."""
    options = dict(
        word[2:].split("=", 1) for word in argv if word.startswith("--seed")
    )
    given = dict(word[2:].split("=", 1) for word in argv if "=" in word)
    output = Path(given["output_folder"])
    with open(output / "runs.txt", "a") as stream:
        stream.write(f"{os.getpid()} {torch.get_num_threads()}\n")
    print("the training's own words")
    if "wait_for" in given:
        deadline = time.monotonic() + 60
        while not Path(given["wait_for"]).exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
    if given.get("fail") == "true" and not Path(given["repaired"]).exists():
        raise RuntimeError("out of memory")
    torch.manual_seed(int(options.get("seed", 0)))
    weights = torch.rand(8)
    if "base" in given:
        weights = weights + torch.load(Path(given["base"]) / "weights.pt")
    torch.save(weights, output / "weights.pt")
