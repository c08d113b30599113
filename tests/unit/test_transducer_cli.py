"""`taskarith transcribe`: a model's folder, streams, and what is refused."""

import json

import pytest
import torch
from cli_support import fails, run, run_json
from hyperpyyaml import load_hyperpyyaml

from speechbrain_taskarith.__main__ import main
from speechbrain_taskarith.data import write_audio
from speechbrain_taskarith.transducer import StreamingTransducer

MODEL = """\
model_folder: !PLACEHOLDER
features: !new:speechbrain_taskarith.transducer.LocalFbank
    n_mels: 20
frontend: !new:speechbrain_taskarith.transducer.TimeReduction
    input_size: 20
    output_size: 16
encoder: !new:speechbrain_taskarith.transducer.Emformer
    input_dim: 16
    num_heads: 4
    ffn_dim: 32
    num_layers: 2
    segment_length: 4
    right_context: 1
    left_context: 8
predictor: !new:speechbrain_taskarith.transducer.LSTMPredictor
    vocab_size: 9
    embedding_dim: 4
    hidden_dim: 5
    num_layers: 1
joint: !new:speechbrain_taskarith.transducer.RNNTJoint
    encoder_dim: 16
    predictor_dim: 5
    joint_dim: 8
    vocab_size: 9
searcher: !new:speechbrain_taskarith.transducer.TransducerGreedySearch
    predictor: !ref <predictor>
    joint: !ref <joint>
    blank_index: 0
normalize: !new:speechbrain.processing.features.InputNormalization
    norm_type: global
transcriber: !new:speechbrain_taskarith.transducer.StreamingTransducer
    features: !ref <features>
    frontend: !ref <frontend>
    encoder: !ref <encoder>
    searcher: !ref <searcher>
    normalize: !ref <normalize>
    detokenize: !new:speechbrain_taskarith.transducer.LabelText
        labels: !ref <model_folder>/labels.txt
        separator: " "
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with a model and recordings, as the present one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model/hyperparams.yaml").write_text(MODEL)
    words = "<blank> zero one two three four five six seven".split()
    (tmp_path / "model/labels.txt").write_text("\n".join(words) + "\n")
    torch.manual_seed(2)
    made = load_hyperpyyaml(MODEL, {"model_folder": "model"})["transcriber"]
    made.searcher.joint.output.weight.data *= 20
    made.normalize(torch.randn(2, 50, 20) * 3 - 5, torch.ones(2), epoch=0)
    torch.save(made.state_dict(), "model/transcriber.ckpt")
    write_audio("a.wav", 0.3 * torch.randn(12000).clamp(-3, 3), 16000)
    write_audio("slow.wav", 0.3 * torch.randn(4000).clamp(-3, 3), 8000)
    made.eval()
    from speechbrain_taskarith.data import read_audio

    return made.transcribe(read_audio("a.wav", 16000))


def test_stream_and_whole_say_the_same(folder, capsys):
    model = ("transcribe", "--model", "model")
    whole = run_json(capsys, *model, "a.wav")
    assert whole["files"][0]["text"] == folder
    assert len(folder.split()) > 2
    stream = run_json(capsys, *model, "--stream", "--chunk", "0.05", "a.wav")
    (found,) = stream["files"]
    assert found["text"] == folder
    assert found["seconds"] == 0.75
    assert len(found["partial"]) > 1
    assert folder.startswith(found["partial"][0]["text"])
    assert stream["latency"]["algorithmic"] == pytest.approx(0.2125)
    run(*model, "--stream", "a.wav", "slow.wav", "--resample")
    said = capsys.readouterr()
    assert said.out.startswith(f"a.wav: {folder}\nslow.wav: ")
    assert "latency 213 ms" in said.out and " s  " in said.err


def test_a_bad_recording_does_not_take_the_others_along(folder, capsys):
    words = ["transcribe", "--model", "model", "a.wav", "a.wav", "slow.wav"]
    for more in ([], ["--stream", "--no-progress"]):
        capsys.readouterr()
        assert main([*words, *more]) == 1
        said = capsys.readouterr()
        assert said.out.startswith(f"a.wav: {folder}\na.wav: {folder}\n")
        (line,) = said.err.strip().splitlines()
        assert line.startswith("taskarith: error: slow.wav: ")
        assert "--resample" in line and "=True" not in line
    assert main([*words, "none.wav", "--json"]) == 1
    said = capsys.readouterr()
    files = json.loads(said.out)["files"]
    assert [sorted(one)[0] for one in files] == ["file", "file"] + 2 * ["error"]
    assert len(said.err.strip().splitlines()) == 2


def test_threads_are_one_unless_told(folder, monkeypatch):
    seen, before = [], torch.get_num_threads()
    run_it = StreamingTransducer.transcribe

    def spy(model, wave):
        seen.append(torch.get_num_threads())
        return run_it(model, wave)

    monkeypatch.setattr(StreamingTransducer, "transcribe", spy)
    words = ("transcribe", "--model", "model", "a.wav")
    run(*words)
    run(*words, "--threads", "2")
    assert seen == [1, 2] and torch.get_num_threads() == before


def test_weights_as_safetensors(folder, capsys, tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "model/transcriber.ckpt"
    save_file(
        torch.load(path, weights_only=True), path.with_suffix(".safetensors")
    )
    path.unlink()
    found = run_json(capsys, "transcribe", "--model", "model", "a.wav")
    assert found["files"][0]["text"] == folder


BAD = {
    "another rate": (
        ("slow.wav",),
        ["slow.wav", "8000 Hz", "16000 Hz", "--resample"],
    ),
    "no recording": (("none.wav",), ["none.wav", "no such recording"]),
    "threads": (("a.wav", "--threads", "0"), ["--threads 0"]),
    "chunk": (("a.wav", "--chunk", "0"), ["--chunk 0"]),
    "endless chunk": (("a.wav", "--chunk", "inf"), ["--chunk inf"]),
}


@pytest.mark.parametrize("words, message", BAD.values(), ids=BAD)
def test_bad_recordings(folder, capsys, words, message):
    line = fails(capsys, "transcribe", "--model", "model", *words)
    assert all(part in line for part in message), line
    assert "data_root" not in line and "=True" not in line


REFUSED = [
    "!apply:os.getcwd []",
    "!name:os.getcwd",
    "!module:os",
    "!include:other.yaml",
    "!new:subprocess.Popen [[ls]]",
    "!new:torch.nn.modules.module.functools.partial [print]",
    "!new:speechbrain.utils.checkpoints.Checkpointer {}",
    "!!python/object/apply:os.getcwd []",
]


@pytest.mark.parametrize("value", REFUSED)
def test_descriptions_that_do_more_are_refused(folder, capsys, value):
    with open("model/hyperparams.yaml", "a") as stream:
        stream.write(f"more: [{{deep: {value} }}]\n")
    line = fails(capsys, "transcribe", "--model", "model", "a.wav")
    assert "hyperparams.yaml" in line and "refused" in line, line


def test_bad_folders(folder, capsys, tmp_path):
    words = ("transcribe", "a.wav", "--model")
    assert "none" in fails(capsys, *words, "none")
    weights = (tmp_path / "model/transcriber.ckpt").read_bytes()
    (tmp_path / "model/transcriber.ckpt").write_bytes(weights[:3000])
    assert "damaged" in fails(capsys, *words, "model")
    other = MODEL.replace("vocab_size: 9", "vocab_size: 12")
    (tmp_path / "model/transcriber.ckpt").write_bytes(weights)
    (tmp_path / "model/hyperparams.yaml").write_text(other)
    assert "do not fit" in fails(capsys, *words, "model")
    (tmp_path / "model/hyperparams.yaml").write_text(
        MODEL.replace("transcriber:", "recogniser:")
    )
    assert "no key 'transcriber'" in fails(capsys, *words, "model")
    (tmp_path / "model/hyperparams.yaml").write_text("transcriber: 3\n")
    assert "expected a" in fails(capsys, *words, "model")
    (tmp_path / "model/transcriber.ckpt").unlink()
    (tmp_path / "model/hyperparams.yaml").write_text(MODEL)
    assert "transcriber.ckpt: no such file" in fails(capsys, *words, "model")
