"""Recognise a recording as a stream, without PyTorch: NumPy and onnxruntime.

    taskarith export results/model -o device
    python examples/onnx_streaming/transcribe.py device speech.wav

A reader in another language does the same with the same files.
"""

import argparse
import json
import sys
import wave
from pathlib import Path

import numpy as np
import onnxruntime


class Recogniser:
    """The files of a folder; several streams may share it."""

    def __init__(self, folder):
        folder = Path(folder)
        text = (folder / "transducer.json").read_text(encoding="utf-8")
        self.about = json.loads(text)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1  # a step is too small for more
        self.sessions = {
            name: onnxruntime.InferenceSession(
                str(folder / f"{name}.onnx"),
                options,
                providers=["CPUExecutionProvider"],
            )
            for name in self.about["models"]
        }
        self.tokens = {}
        if self.about["tokens"]:
            lines = (folder / self.about["tokens"]).read_text(encoding="utf-8")
            for line in lines.split("\n")[:-1]:
                token, _, index = line.rpartition(" ")
                self.tokens[int(index)] = token

    def text(self, tokens):
        """Return the text of labels; of the labels alone if it is not known."""
        if not self.tokens:
            return " ".join(map(str, tokens))
        joined = "".join(self.tokens[token] for token in tokens)
        return joined.replace("\u2581", " ").strip()


class Part:
    """One file, and the states that it hands from call to call."""

    def __init__(self, recogniser, name):
        about = recogniser.about["models"][name]
        self.session = recogniser.sessions[name]
        self.outputs = about["outputs"]
        self.next = {one["name"]: one["output"] for one in about["states"]}
        self.states = {
            one["name"]: np.full(
                # A size with a name is free: one stream.
                [1 if isinstance(size, str) else size for size in one["shape"]],
                one["initial"],
                one["dtype"],
            )
            for one in about["states"]
        }

    def __call__(self, **given):
        """Return the outputs that are no states."""
        names = [*self.outputs, *self.next.values()]
        found = self.session.run(names, {**given, **self.states})
        found = dict(zip(names, found))
        self.states = {name: found[new] for name, new in self.next.items()}
        return [found[name] for name in self.outputs]


class Stream:
    """Samples in, labels out: greedy search."""

    def __init__(self, recogniser):
        about = recogniser.about
        self.features, self.steps = about["features"], about["encoder"]
        self.search = about["search"]
        self.frontend, self.encoder, self.predictor, self.joint = (
            Part(recogniser, name)
            for name in ("frontend", "encoder", "predictor", "joint")
        )
        # Frame 0 is centred on the first sample.
        self.samples = np.zeros(self.features["padding"], np.float32)
        self.total = self.analysed = self.frame = 0
        self.waiting = np.zeros((0, self.features["n_mels"]), np.float32)
        self.tokens, self.frames = [], []
        self._read(self.search["blank_index"])

    def feed(self, samples):
        """Take samples [n] within [-1, 1]; return the labels so far."""
        self.total += len(samples)
        self.samples = np.append(self.samples, samples).astype(np.float32)
        window, hop = self.features["window"], self.features["hop"]
        self._analyse((len(self.samples) - window) // hop + 1)
        while len(self.waiting) >= self.steps["chunk"]:
            self._step()
        return self.tokens

    def finish(self):
        """End the stream; return all labels."""
        if self.total:
            window, hop = self.features["window"], self.features["hop"]
            left = self.total // hop + 1 - self.analysed
            missing = (left - 1) * hop + window - len(self.samples)
            self.samples = np.pad(self.samples, (0, max(0, missing)))
            self._analyse(left)
        while len(self.waiting):
            self._step()
        return self.tokens

    def _analyse(self, frames):
        if frames > 0:
            window, hop = self.features["window"], self.features["hop"]
            ready = self.samples[None, : (frames - 1) * hop + window]
            (new,) = self.frontend(samples=ready)
            self.waiting = np.concatenate((self.waiting, new[0]))
            self.samples = self.samples[frames * hop :]
            self.analysed += frames

    def _step(self):
        chunk = self.waiting[: self.steps["chunk"]]
        missing = self.steps["chunk"] - len(chunk)
        out, length = self.encoder(
            features=np.pad(chunk, ((0, missing), (0, 0)))[None],
            length=np.array([len(chunk)]),
        )
        for frame in out[:, : length[0]].swapaxes(0, 1):
            self._decode(frame)
            self.frame += 1
        self.waiting = self.waiting[self.steps["step"] :]

    def _decode(self, frame):
        for _ in range(self.search["max_symbols"]):
            (scores,) = self.joint(
                encoder_out=frame, predictor_out=self.predicted
            )
            label = int(scores[0].argmax())
            if label == self.search["blank_index"]:
                break
            self.tokens.append(label)
            self.frames.append(self.frame)
            self._read(label)

    def _read(self, label):
        (self.predicted,) = self.predictor(label=np.array([[label]]))


def read_wav(path, sample_rate):
    """Return the samples of a WAV file of 16 bits, one channel."""
    with wave.open(str(path)) as stream:
        found = stream.getframerate(), stream.getnchannels()
        if found != (sample_rate, 1) or stream.getsampwidth() != 2:
            sys.exit(f"{path}: expected 16 bits, {sample_rate} Hz, one channel")
        data = stream.readframes(stream.getnframes())
    return np.frombuffer(data, "<i2").astype(np.float32) / 32768


def main():
    """Print the text of a recording, fed in portions of 100 ms."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", help="what `taskarith export` wrote")
    parser.add_argument("wav")
    options = parser.parse_args()
    recogniser = Recogniser(options.folder)
    rate = recogniser.about["sample_rate"]
    samples, stream = read_wav(options.wav, rate), Stream(recogniser)
    for start in range(0, len(samples), rate // 10):
        stream.feed(samples[start : start + rate // 10])
    print(recogniser.text(stream.finish()))


if __name__ == "__main__":
    main()
