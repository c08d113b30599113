"""How many files and functions of the plugin a request crosses.

Two requests are traced with `sys.setprofile`: `taskarith merge merge.yaml` on
three tiny safetensors files, and `insert_adapters` with one training step of
each stage on a SpeechBrain Conformer of two layers. Comprehensions, lambdas, and
bodies of modules and classes do not count.

    python benchmarks/crossings.py            # this checkout
    PYTHONPATH=<other checkout> python benchmarks/crossings.py
"""

import inspect
import os
import sys
import tempfile
import threading
from pathlib import Path

import torch

import speechbrain_taskarith

ROOT = Path(speechbrain_taskarith.__file__).resolve().parent


class Trace:
    """Collects the plugin's functions while it is entered."""

    def __enter__(self):
        self.functions, self.depth = set(), 0
        threading.setprofile(self._event)
        sys.setprofile(self._event)
        return self

    def __exit__(self, *error):
        sys.setprofile(None)
        threading.setprofile(None)

    def _event(self, frame, event, argument):
        code = frame.f_code
        if event != "call" or code.co_name.startswith("<"):
            return
        if not code.co_flags & inspect.CO_OPTIMIZED:
            return  # the body of a class, run by a lazy import
        if not code.co_filename.startswith(str(ROOT)):
            return
        # The command line's own entry and parsers count as well.
        name = getattr(code, "co_qualname", code.co_name)  # from Python 3.11
        self.functions.add((code.co_filename, name))
        depth = 0
        while frame is not None:
            depth += frame.f_code.co_filename.startswith(str(ROOT))
            frame = frame.f_back
        self.depth = max(self.depth, depth)

    def report(self, request):
        """Print one line."""
        files = {name for name, _ in self.functions}
        print(
            f"{request}: {len(files)} files, {len(self.functions)} functions,"
            f" depth {self.depth}"
        )
        if os.environ.get("LIST"):
            for name, function in sorted(self.functions):
                print("   ", Path(name).relative_to(ROOT), function)


def merge():
    """Trace a TIES merge of three tiny models by the command line."""
    from safetensors.torch import save_file

    from speechbrain_taskarith.__main__ import main

    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        for number, name in enumerate(("base", "one", "two", "three")):
            torch.manual_seed(number)
            weights = {"a.weight": torch.randn(8, 8), "a.bias": torch.randn(8)}
            save_file(weights, folder / f"{name}.safetensors")
        plan = folder / "merge.yaml"
        plan.write_text(
            "base: base.safetensors\n"
            "finetuned: [one.safetensors, two.safetensors, three.safetensors]\n"
            "rule: TIES\noutput: merged.safetensors\n"
        )
        here = os.getcwd()
        os.chdir(folder)
        try:
            with Trace() as trace:
                status = main(["merge", "merge.yaml"])
        finally:
            os.chdir(here)
        assert status == 0
    trace.report("taskarith merge merge.yaml")


def adapters():
    """Trace adapters from insertion to one step of either stage."""
    from speechbrain.lobes.models.transformer.TransformerASR import (
        TransformerASR,
    )

    model = TransformerASR(
        tgt_vocab=10,
        input_size=16,
        d_model=32,
        nhead=2,
        num_encoder_layers=2,
        num_decoder_layers=0,
        d_ffn=32,
        encoder_module="conformer",
        attention_type="RelPosMHAXL",
        normalize_before=True,
        causal=False,
    )
    frames, lens = torch.randn(2, 20, 16), torch.tensor([1.0, 0.6])
    # Imported before the trace: module bodies do not count anyway.
    from speechbrain_taskarith.adapters import insert_adapters

    with Trace() as trace:
        handle = insert_adapters(model, ["us", "de"], combination="fusion")
        for stage in (
            lambda: handle.train_extraction("us"),
            lambda: handle.train_composition("ST-A"),
        ):
            optimizer = torch.optim.SGD(stage(), 0.1)
            model.encode(frames, lens).square().mean().backward()
            optimizer.step()
    trace.report("insert_adapters to a training step")


if __name__ == "__main__":
    merge()
    adapters()
