"""Translation searches, against SpeechBrain's that decodes prefixes anew.

Hypotheses and scores of both sides are compared before a time counts; times
are taken in turn (A B A B) on the same decoder and the same input::

    python benchmarks/translation_search.py
    python benchmarks/translation_search.py --device cuda --batch 64

See `benchmarks/README.md` for what came out.
"""

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import length_reduction  # noqa: E402
import torch  # noqa: E402
from length_reduction import CLOCKS, seconds, table  # noqa: E402
from speechbrain.decoders.seq2seq import (  # noqa: E402
    S2STransformerBeamSearcher,
)

from speechbrain_taskarith.translation import (
    TranslationBeamSearch,
    TranslationDecoder,
)

BOS, EOS = 1, 2


class WholePrefixes(TranslationBeamSearch):
    """The same search with SpeechBrain's own steps."""

    forward_step = S2STransformerBeamSearcher.forward_step
    permute_mem = S2STransformerBeamSearcher.permute_mem


SIDES = {"ours": TranslationBeamSearch, "SpeechBrain": WholePrefixes}


def bench(args):
    """Search with one hypothesis and with several, over several lengths."""
    torch.manual_seed(0)
    decoder = TranslationDecoder(
        args.vocab, args.width, 4, num_layers=args.layers
    )
    decoder = decoder.to(args.device).eval()
    lens = torch.linspace(0.3, 1.0, args.batch, device=args.device)
    shape = args.batch, args.frames, args.width
    memory = torch.randn(shape, device=args.device)
    for beam_size in (1, 5):
        for steps in (20, 60):
            # No end token until the last step: every side takes them all.
            settings = {
                "beam_size": beam_size,
                "max_decode_ratio": 0.0,
                "min_decode_ratio": (steps - 1) / args.frames,
                "least_steps": steps,
            }
            searches = {
                name: side(decoder, BOS, EOS, **settings)
                for name, side in SIDES.items()
            }
            with torch.no_grad():
                same(searches, memory, lens, steps)
                functions = {
                    name: lambda search=search: search(memory, lens)
                    for name, search in searches.items()
                }
                taken = seconds(functions, args.rounds, args.device)
            table(f"beam of {beam_size}, {steps} tokens", taken, "SpeechBrain")


def same(searches, memory, lens, steps):
    """Assert equal hypotheses and scores, as long as they are to be."""
    ours, other = (search(memory, lens) for search in searches.values())
    assert ours[0] == other[0]
    assert min(map(len, ours[0])) >= steps - 1
    torch.testing.assert_close(ours[2], other[2], atol=1e-4, rtol=1e-4)


def main():
    """Read the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--frames", type=int, default=40)
    parser.add_argument("--width", type=int, default=96)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--vocab", type=int, default=500)
    args = parser.parse_args()
    length_reduction.CLOCK = CLOCKS[args.clock]
    bench(args)


if __name__ == "__main__":
    main()
