"""Exported recognisers: what onnxruntime finds without torch is the same."""

import importlib.util
import json
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from cli_support import fails, run, run_json, there

from speechbrain_taskarith.data import write_audio
from speechbrain_taskarith.transducer import (
    LabelText,
    SentencePieceText,
    export_transducer,
)
from speechbrain_taskarith.transducer.export import exporting
from speechbrain_taskarith.transducer.export.description import token_lines
from speechbrain_taskarith.transducer.export.verification import Exported
from speechbrain_taskarith.transducer.streaming.folder import load_transcriber

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")
ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "onnx_streaming" / "transcribe.py"
LABELS = "<blank> zero one two three four five six seven".split()

EMFORMER = """
encoder: !new:speechbrain_taskarith.transducer.Emformer
    {{input_dim: {width}, num_heads: 4, ffn_dim: {ffn}, num_layers: {layers},
     segment_length: {segment}, right_context: {ahead},
     left_context: {left}, memory_size: {memory}}}
"""
CONFORMER = """
asr: !new:speechbrain.lobes.models.transformer.TransformerASR.TransformerASR
    {{tgt_vocab: 9, input_size: {width}, d_model: {width}, nhead: 2,
     num_encoder_layers: 2, num_decoder_layers: 0, d_ffn: {ffn},
     attention_type: {attention}, positional_encoding: null,
     kernel_size: {kernel}, encoder_module: conformer,
     normalize_before: true, causal: false}}
encoder: !new:speechbrain_taskarith.transducer.ChunkedEncoder
    {{transformer: !ref <asr>, chunk_size: {chunk}, left_context: {left}}}
"""
LSTM = """
predictor: !new:speechbrain_taskarith.transducer.LSTMPredictor
    {{vocab_size: 9, embedding_dim: 8, hidden_dim: {width}, num_layers: 2,
     blank_index: {blank}}}
"""
# As of SpeechBrain's transducer recipes.
RECIPE = """
predictor: !new:speechbrain_taskarith.transducer.SpeechBrainPredictor
    layers:
      - !new:speechbrain.nnet.embedding.Embedding
        {{num_embeddings: 9, consider_as_one_hot: true, blank_id: {blank}}}
      - !new:speechbrain.nnet.RNN.GRU {{input_size: 8, hidden_size: 12}}
      - !new:speechbrain.nnet.linear.Linear
        {{input_size: 12, n_neurons: {width}, bias: false}}
    blank_index: {blank}
"""
SPEECHBRAIN = """
joint: !new:speechbrain_taskarith.transducer.SpeechBrainJoint
    joint: !new:speechbrain.nnet.transducer.transducer_joint.Transducer_joint
        {{joint: sum, nonlinearity: !name:torch.nn.Tanh }}
    output: !new:torch.nn.Linear [{width}, 9]
    blank_index: {blank}
"""
RNNT = """
joint: !new:speechbrain_taskarith.transducer.RNNTJoint
    {{encoder_dim: {width}, predictor_dim: {width}, joint_dim: {ffn},
     vocab_size: 9, blank_index: {blank}}}
"""
REST = """
model_folder: !PLACEHOLDER
features: !new:speechbrain_taskarith.transducer.LocalFbank
    {{n_mels: 20, n_fft: {n_fft}}}
frontend: !new:speechbrain_taskarith.transducer.TimeReduction
    {{input_size: 20, output_size: {width}, factor: {factor}}}
searcher: !new:speechbrain_taskarith.transducer.TransducerGreedySearch
    {{predictor: !ref <predictor>, joint: !ref <joint>, blank_index: {blank},
     max_symbols: 2}}
normalize: !new:speechbrain.processing.features.InputNormalization
    {{norm_type: global}}
transcriber: !new:speechbrain_taskarith.transducer.StreamingTransducer
    features: !ref <features>
    frontend: !ref <frontend>
    encoder: !ref <encoder>
    searcher: !ref <searcher>
    normalize: !ref <normalize>
    detokenize: !new:speechbrain_taskarith.transducer.LabelText
        {{labels: !ref <model_folder>/labels.txt, separator: " "}}
"""
VALUES = {
    **{"width": 16, "ffn": 32, "layers": 2, "segment": 4, "ahead": 1},
    **{"left": 8, "memory": 2, "chunk": 4, "kernel": 5, "blank": 0},
    **{"n_fft": 400, "factor": 4, "attention": "RelPosMHAXL"},
}
PLAIN = (EMFORMER, LSTM, RNNT)
KINDS = {
    "emformer": (PLAIN, {}),
    "no context": (PLAIN, {"segment": 3, "ahead": 0, "left": 0, "memory": 0}),
    "looks far ahead": (
        (EMFORMER, LSTM, RNNT.replace("RNNTJoint", "HATJoint")),
        {"segment": 2, "ahead": 5, "memory": 0, "n_fft": 512, "blank": 8},
    ),
    "conformer": ((CONFORMER, RECIPE, SPEECHBRAIN), {"left": 2}),
    "long kernel": (
        (CONFORMER, LSTM, RNNT),
        {"left": 1, "chunk": 3, "kernel": 31, "factor": 1},
    ),
    "chunks alone": ((CONFORMER, LSTM, RNNT), {"left": 0, "kernel": 1}),
}


def make(path, parts=PLAIN, **values):
    """Write a recogniser's folder, untrained, but with labels coming out."""
    path.mkdir()
    values = {**VALUES, **values}
    text = "".join((*parts, REST)).format(**values)
    (path / "hyperparams.yaml").write_text(text)
    (path / "labels.txt").write_text("\n".join(LABELS) + "\n")
    torch.manual_seed(2)
    from hyperpyyaml import load_hyperpyyaml

    made = load_hyperpyyaml(text, {"model_folder": str(path)})["transcriber"]
    with torch.no_grad():
        layer = made.searcher.joint.output
        layer = layer[0] if isinstance(layer, torch.nn.ModuleList) else layer
        layer.weight *= 20
    made.normalize(torch.randn(2, 50, 20) * 3 - 5, torch.ones(2), epoch=0)
    torch.save(made.state_dict(), path / "transcriber.ckpt")
    return path


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with a recogniser, as the present one."""
    monkeypatch.chdir(tmp_path)
    return make(tmp_path / "model")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a recogniser and its export, made once."""
    path = tmp_path_factory.mktemp("made")
    make(path / "model")
    export_transducer(path / "model", path / "device")
    return path


@pytest.fixture
def here(made, tmp_path, monkeypatch):
    """A copy of it, as the present folder."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def example():
    """The example without torch, as a module."""
    spec = importlib.util.spec_from_file_location("transcribe", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def wave(samples, seed=0):
    made = torch.Generator().manual_seed(seed)
    envelope = torch.rand(samples // 800 + 1, generator=made)
    noise = torch.randn(samples, generator=made).clamp(-3, 3) / 3
    return noise * envelope.repeat_interleave(800)[:samples]


@pytest.mark.slow
@pytest.mark.parametrize("parts, values", KINDS.values(), ids=KINDS)
def test_the_same_labels_without_torch(parts, values, tmp_path, example):
    folder = make(tmp_path / "model", parts, **values)
    report = export_transducer(folder, tmp_path / "device")
    assert report.difference < 1e-4
    assert report.difference == max(report.differences.values())
    assert report.step_seconds < report.step_audio
    model = load_transcriber(folder)
    recogniser = example.Recogniser(tmp_path / "device")
    # Nothing, less than a frame, less than a segment, and more.
    found = 0
    for samples in (0, 1, 199, 640, 2000, 5120, 12345, 24000):
        given = wave(samples, samples)
        for portion in (777, 10**6):
            ours, theirs = model.stream(), example.Stream(recogniser)
            for part in given.split(portion):
                ours.feed(part)
                before = len(theirs.tokens)
                assert len(theirs.feed(part.numpy())) >= before
            final = ours.finish()
            assert theirs.finish() == final.tokens, (samples, portion)
            assert theirs.frames == final.frames
            assert recogniser.text(theirs.tokens) == final.text
            found += len(final.tokens)
    assert found > 20


def test_the_description_is_that_of_the_files(here):
    import onnxruntime

    about = json.loads(Path("device/transducer.json").read_text())
    assert about["search"] == {
        "blank_index": 0,
        "vocabulary": 9,
        "max_symbols": 2,
    }
    assert about["encoder"]["chunk"] == 20 and about["encoder"]["step"] == 16
    model = load_transcriber("model")
    expected = model.normalize.glob_mean.tolist()
    assert about["features"]["mean"] == pytest.approx(expected)
    kinds = {"float32": "tensor(float)", "int64": "tensor(int64)"}
    for name, one in about["models"].items():
        written = Path(f"device/{name}.onnx").read_bytes()
        assert b"site-packages" not in written and b".py" not in written
        session = onnxruntime.InferenceSession(written)
        there = {i.name: (i.shape, i.type) for i in session.get_inputs()}
        told = {
            i["name"]: (len(i["shape"]), kinds[i["dtype"]])
            for i in one["inputs"] + one["states"]
        }
        assert told == {n: (len(s), k) for n, (s, k) in there.items()}
        for each in one["inputs"] + one["states"]:
            for size, real in zip(each["shape"], there[each["name"]][0]):
                assert isinstance(size, str) or size == real
        shapes = {o.name: o.shape for o in session.get_outputs()}
        for each in one["states"]:
            assert shapes[each["output"]] == each["shape"]
        outputs = one["outputs"] + [s["output"] for s in one["states"]]
        assert outputs == [o.name for o in session.get_outputs()]
    lines = Path("device/tokens.txt").read_text().splitlines()
    assert lines[:2] == ["<blk> 0", "\u2581zero 1"] and len(lines) == 9


def test_several_rows_of_predictor_and_joint(here):
    """A beam search has as many as hypotheses."""
    model = load_transcriber("model")
    graphs, _ = exporting._graphs(model)
    exported = Exported(Path("device"), graphs)
    labels = torch.tensor([[1], [4], [0]])
    states = {
        n: np.zeros((2, 3, 16), np.float32) for n in ("state_0", "state_1")
    }
    out = exported.run("predictor", states, labels)
    expected, _ = model.searcher.predictor(labels)
    assert np.allclose(out, expected[:, 0].detach(), atol=1e-5)
    frames = torch.randn(3, 16)
    found = exported.run("joint", {}, frames, out)
    with torch.no_grad():
        joint = model.searcher.joint
        expected = joint(
            frames[:, None, None], torch.tensor(out)[:, None, None]
        )
    assert np.allclose(
        found, expected[:, 0, 0].log_softmax(-1), atol=1e-4, rtol=1e-4
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "parts, dtypes",
    [(PLAIN, ("fp16", "int8")), ((CONFORMER, LSTM, RNNT), ("int8",))],
)
def test_smaller_types(tmp_path, example, parts, dtypes):
    values = {"width": 96, "ffn": 384, "left": 8 if parts == PLAIN else 2}
    folder = make(tmp_path / "model", parts, **values)
    whole = export_transducer(folder, tmp_path / "whole")
    limits = {"fp16": (0.56, 1e-6, 0.02), "int8": (0.4, 1e-4, 0.2)}
    for dtype in dtypes:
        share, least, most = limits[dtype]
        small = export_transducer(folder, tmp_path / dtype, dtype=dtype)
        assert least < small.difference < most
        for name in ("encoder.onnx", "predictor.onnx", "joint.onnx"):
            ratio = small.megabytes[name] / whole.megabytes[name]
            assert ratio < share, (dtype, name)
        stream = example.Stream(example.Recogniser(tmp_path / dtype))
        stream.feed(wave(16000).numpy())
        assert stream.finish()


def test_tokens_are_written_as_sherpa_reads_them():
    letters = LabelText(["", "a", " ", "b"])
    assert token_lines(letters, 4, 0) == ["<blk> 0", "a 1", "\u2581 2", "b 3"]
    pieces = ["<unk>", "\u2581the", "n"]
    text = SentencePieceText.__new__(SentencePieceText)
    text.offset, text.processor = (
        1,
        SimpleNamespace(
            id_to_piece=pieces.__getitem__, get_piece_size=lambda: 3
        ),
    )
    expected = ["<blk> 0", "<unk> 1", "\u2581the 2", "n 3"]
    assert token_lines(text, 4, 0) == expected
    assert token_lines(str, 4, 0) is None


def test_the_example_needs_no_torch(here):
    write_audio("a.wav", wave(20000), 16000)
    code = textwrap.dedent(
        f"""
        import runpy, sys
        sys.argv = ["transcribe.py", "device", "a.wav"]
        runpy.run_path({str(EXAMPLE)!r}, run_name="__main__")
        for name in ("torch", "speechbrain", "speechbrain_taskarith", "onnx"):
            assert name not in sys.modules, name
        """
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    from speechbrain_taskarith.data import read_audio

    stream = load_transcriber("model").stream()
    stream.feed(read_audio("a.wav", 16000))
    assert ran.stdout.strip() == stream.finish().text != ""


@pytest.mark.slow
def test_on_the_command_line(here, capsys):
    run("export", "model", "-o", "device", "--overwrite")
    said = capsys.readouterr()
    assert said.out.startswith("wrote device, fp32, ") and not said.err
    found = run_json(
        capsys, "export", "model", "-o", "device", "--dtype", "int8",
        "--overwrite",
    )  # fmt: skip
    assert found["verb"] == "export" and found["dtype"] == "int8"
    assert set(found["megabytes"]) == {p.name for p in Path("device").iterdir()}
    before = there(".")
    words = ("export", "model", "-o")
    found = run_json(capsys, *words, "new", "--dry-run")
    assert "frontend.onnx" in found["files"] and there(".") == before
    assert "--overwrite" in fails(capsys, *words, "device")
    assert "--dtype 'bf16'" in fails(capsys, *words, "b", "--dtype", "bf16")
    assert "'fp32', 'fp16' or 'int8'" in fails(
        capsys, *words, "b", "--dtype", "bf16"
    )
    assert "expected 'onnx'" in fails(capsys, *words, "b", "--to", "coreml")
    assert "none" in fails(capsys, "export", "none", "-o", "b")
    Path("other").mkdir()
    words = (*words, "other", "--overwrite")
    assert "is no export" in fails(capsys, *words)
    for output in ("model", "."):
        line = fails(capsys, "export", "model", "-o", output, "--overwrite")
        assert "the model itself" in line
    Path("model/transcriber.ckpt").unlink()
    assert "transcriber.ckpt" in fails(capsys, "export", "model", "-o", "b")


@pytest.mark.filterwarnings("ignore:Fbank raises")
def test_what_cannot_be_exported_is_named(tmp_path):
    folder = make(tmp_path / "fbank")
    path = folder / "hyperparams.yaml"
    path.write_text(
        path.read_text().replace(
            "speechbrain_taskarith.transducer.LocalFbank",
            "speechbrain.lobes.features.Fbank",
        )
    )
    with pytest.raises(ValueError, match="features Fbank .*LocalFbank"):
        export_transducer(folder, tmp_path / "out")
    parts = (CONFORMER, LSTM, RNNT)
    folder = make(tmp_path / "endless", parts, left="null")
    with pytest.raises(ValueError, match="ChunkedEncoder with left_context"):
        export_transducer(folder, tmp_path / "out")
    folder = make(tmp_path / "rope", parts, left=1, attention="RoPEMHA")
    with pytest.raises(ValueError, match="ChunkedEncoder .*'RoPEMHA'"):
        export_transducer(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_another_encoder_is_named(folder, monkeypatch):
    class Other(torch.nn.Linear):
        segment_length, right_context = 4, 0

    model = load_transcriber(folder)
    model.encoder = Other(16, 16)
    monkeypatch.setattr(exporting, "load_transcriber", lambda folder: model)
    with pytest.raises(ValueError, match="encoder Other .*Emformer or Chunked"):
        export_transducer(folder, "out")


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_is_named(folder, monkeypatch, package):
    for name in [n for n in sys.modules if n.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(
        sys, "path", [p for p in sys.path if "site-packages" not in p]
    )
    with pytest.raises(ImportError, match=f"'{package}'.*taskarith.export."):
        export_transducer(folder, "out")
    assert not Path("out").exists()


def test_files_that_compute_something_else_get_no_name(here, monkeypatch):
    before = {p.name: p.read_bytes() for p in Path("device").iterdir()}
    run_it = Exported.run
    monkeypatch.setattr(Exported, "run", lambda *given: run_it(*given) * 1.01)
    with pytest.raises(ValueError, match="frontend differs by"):
        export_transducer("model", "device", overwrite=True)
    assert {p.name: p.read_bytes() for p in Path("device").iterdir()} == before
    assert {p.name for p in Path().iterdir()} == {"device", "model"}
    with pytest.raises(ValueError, match="joint differs by nan"):
        exporting._check_differences({"joint": float("nan")}, "int8", "model")


@pytest.mark.slow
def test_killed_in_between_it_has_no_name(folder):
    code = textwrap.dedent(
        """
        import os, signal
        from speechbrain_taskarith.transducer.export import exporting
        exporting.compare = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        exporting.export_transducer("model", "device")
        """
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True
    )
    assert ran.returncode == -signal.SIGKILL, ran.stderr
    left = {p.name for p in Path().iterdir()} - {"model"}
    assert left and all(name.startswith(".partial-") for name in left)
    # The next one sweeps it.
    export_transducer("model", "device")
    assert {p.name for p in Path().iterdir()} == {"device", "model"}
