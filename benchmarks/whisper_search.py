"""Recognition with Whisper, against SpeechBrain's search with SpeechBrain's model.

Both sides decode the same states of the encoder; their tokens are compared in
float32 before a time counts; times are taken in turn (A B A B), in bfloat16
where the processor has it. Speech by espeak-ng, one to five seconds::

    python benchmarks/whisper_search.py whisper-base-5s   # of whisper_window.py
    python benchmarks/whisper_search.py whisper-base-5s --device cuda

See `benchmarks/README.md` for what came out.
"""

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "recipes/FilletsNG/ASR/whisper")]

import length_reduction  # noqa: E402
import torch  # noqa: E402
from common.precision import choose_precision  # noqa: E402
from length_reduction import CLOCKS, seconds, table  # noqa: E402
from speechbrain.decoders.seq2seq import (  # noqa: E402
    S2SWhisperGreedySearcher,
)
from speechbrain.integrations.huggingface.whisper import Whisper  # noqa: E402
from whisper_window import WindowedWhisper, WordsSearcher  # noqa: E402

from speechbrain_taskarith.data import EspeakVoice  # noqa: E402

WORDS = "the ship is under a small stone that no fish can lift alone".split()


class Parents(WindowedWhisper):
    """The same model with SpeechBrain's own step of the decoder."""

    forward_decoder = Whisper.forward_decoder


SIDES = {
    "ours": (WindowedWhisper, WordsSearcher),
    "SpeechBrain": (Parents, S2SWhisperGreedySearcher),
}


def speak(language, count, window, rate):
    """Return [count, samples]: longer and longer lines, cut to the window."""
    voice = EspeakVoice(language)
    lines = [voice(" ".join(WORDS[: 2 + n % 12])) for n in range(count)]
    lines = [line[: int(window * rate)] for line in lines]
    return torch.nn.utils.rnn.pad_sequence(lines, batch_first=True)


def bench(args):
    """Search alone, then the encoder and the search."""
    sides = {}
    for name, (model, searcher) in SIDES.items():
        # Not frozen, as in a training: autocast keeps casts of such weights only.
        whisper = model(args.whisper, "hub", language=args.language)
        search = searcher(whisper, min_decode_ratio=0.0, max_decode_ratio=0.25)
        sides[name] = (whisper.to(args.device).eval(), search)
    whisper = sides["ours"][0]
    waves = speak(
        args.language, args.batch, whisper.window, whisper.sampling_rate
    )
    waves = waves.to(args.device)
    lens = torch.ones(len(waves), device=args.device)

    def encode(whisper):
        return whisper.forward_encoder(whisper._get_mel(waves))

    with torch.no_grad():
        states = encode(whisper)
        ours, other = (search(states, lens)[0] for _, search in sides.values())
        assert [list(map(int, hyp)) for hyp in other] == ours
        lengths = sorted(map(len, ours))
        print(f"tokens: {lengths[0]} to {lengths[-1]}, {sum(lengths)} in all")
        precision = choose_precision("auto", {"device": args.device})
        autocast = torch.autocast(
            torch.device(args.device).type,
            torch.bfloat16,
            enabled=precision == "bf16",
        )

        def timed(function):
            def run():
                with autocast:
                    function()

            return run

        searches = {
            name: timed(lambda search=search: search(states, lens))
            for name, (_, search) in sides.items()
        }
        both = {
            name: timed(lambda w=w, search=search: search(encode(w), lens))
            for name, (w, search) in sides.items()
        }
        both["encoder alone"] = timed(lambda: encode(whisper))
        for title, functions in (("search", searches), ("with encoder", both)):
            taken = seconds(functions, args.rounds, args.device)
            table(f"{title}, {args.batch} lines", taken, "SpeechBrain")


def main():
    """Read the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("whisper", help="a folder or a hub name")
    parser.add_argument("--language", default="en", help="that is spoken")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--batch", type=int, default=40)
    args = parser.parse_args()
    length_reduction.CLOCK = CLOCKS[args.clock]
    bench(args)


if __name__ == "__main__":
    main()
