"""`taskarith translate`: recordings, languages, and what is refused."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cli_support import fails, run, run_json
from translator_toy import RATE, save, trained_once, wave_of

from speechbrain_taskarith.__main__ import main
from speechbrain_taskarith.data import write_audio
from speechbrain_taskarith.translation import SpeechTranslator

MODEL = ("translate", "--model", "translator")
TEXTS = ["A B", "B C D", "C D", "D E A", "E A"]
WAVS = [f"u{number}.wav" for number in range(5)]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Make a copy of translator and recordings the present folder."""
    shutil.copytree(trained_once()[0], tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    write_audio("fast.wav", wave_of(0), 2 * RATE)
    Path("text.wav").write_text("no sound")


def test_in_a_process_of_its_own():
    done = subprocess.run(
        [sys.executable, "-m", "speechbrain_taskarith", *MODEL, *WAVS],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    expected = [f"{wav}: {text}" for wav, text in zip(WAVS, TEXTS)]
    assert done.stdout.splitlines() == expected


def test_batches_beams_and_json(capsys):
    run(*MODEL, "u2.wav")
    assert capsys.readouterr().out == "C D\n"
    ways = (
        ["--batch", "1"],
        ["--batch", "2", "--beam", "1"],
        ["--batch", "100", "--beam", "4", "--length_penalty", "0.6"],
    )
    for words in ways:
        found = run_json(capsys, *MODEL, *WAVS, *words)
        assert [one["text"] for one in found["files"]] == TEXTS, words
    (first, *_) = found["files"]
    assert first["file"] == "u0.wav" and first["seconds"] == 0.48
    assert first["segments"][0]["start"] == 0.0
    assert set(first["segments"][0]) == {"start", "end", "transcript"}
    assert found["skipped"] == 0 and found["real_time_factor"] > 0


def test_bad_recordings_do_not_take_the_others_along(capsys):
    words = [*MODEL, "u0.wav", "text.wav", "fast.wav", "none.wav", "u1.wav"]
    assert main([*words, "--batch", "2"]) == 1
    said = capsys.readouterr()
    assert said.out.splitlines() == ["u0.wav: A B", "u1.wav: B C D"]
    lines = said.err.strip().splitlines()
    assert len(lines) == 4 and "3 of 5 recording(s)" in lines[-1]
    assert "text.wav: unreadable" in lines[0]
    assert "fast.wav: the recording has 16000 Hz" in lines[1]
    assert "--resample" in lines[1] and "=True" not in lines[1]
    assert "none.wav: no such recording" in lines[2]
    # Skipped, and counted.
    found = run_json(capsys, *words, "--skip_bad")
    assert found["skipped"] == 3
    assert [("text" in one) for one in found["files"]] == [1, 0, 0, 0, 1]
    assert "fast.wav" in found["files"][2]["error"]
    # Nothing at all is an error all the same.
    assert main([*MODEL, "none.wav", "--skip-bad"]) == 1
    found = run_json(capsys, *MODEL, "fast.wav", "--resample")
    assert found["files"][0]["seconds"] == pytest.approx(0.24)


@pytest.mark.parametrize("error", [ValueError, RuntimeError])
def test_one_that_cannot_be_decoded_does_not_either(capsys, monkeypatch, error):
    decode = SpeechTranslator.decode

    def failing(self, encoded, target=None):
        if any(one.seconds < 0.4 for one in encoded):
            raise error("label 9: the vocabulary has 8")
        return decode(self, encoded, target)

    monkeypatch.setattr(SpeechTranslator, "decode", failing)
    write_audio("short.wav", wave_of(0, seconds=0.3), RATE)
    words = [*MODEL, "u0.wav", "short.wav", "u1.wav"]
    assert main(words) == 1
    said = capsys.readouterr()
    assert said.out.splitlines() == ["u0.wav: A B", "u1.wav: B C D"]
    assert "short.wav: label 9: the vocabulary has 8" in said.err
    found = run_json(capsys, *words, "--skip-bad")
    assert [("text" in one) for one in found["files"]] == [1, 0, 1]
    assert found["skipped"] == 1


def test_an_empty_translation_is_said_to_be_one(capsys, tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree("translator", tmp_path / "silent")
    path = tmp_path / "silent/model.safetensors"
    state = load_file(path)
    state["model.decoder.seq_lin.bias"][2] = 99.0
    save_file(state, path)
    words = ["translate", "--model", str(tmp_path / "silent"), "u0.wav"]
    capsys.readouterr()
    assert main(words) == 1
    said = capsys.readouterr()
    assert said.out.strip() == ""
    assert "u0.wav: the translation is empty" in said.err


def test_a_translation_without_its_end_is_said_to_be_one(capsys, tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree("translator", tmp_path / "endless")
    path = tmp_path / "endless/model.safetensors"
    state = load_file(path)
    state["model.decoder.seq_lin.bias"][2] = -99.0
    save_file(state, path)
    words = ["translate", "--model", str(tmp_path / "endless"), "u0.wav"]
    for more in ([], ["--beam", "1"]):
        capsys.readouterr()
        assert main([*words, *more]) == 0
        said = capsys.readouterr()
        assert "u0.wav: the translation lacks its end" in said.err
        assert "--cut" not in said.err  # it is one sentence already
    write_audio("eleven.wav", wave_of(1).repeat(99)[: 11 * RATE], RATE)
    assert main([*words[:-1], "eleven.wav"]) == 0
    assert "cut the recording with --cut 10" in capsys.readouterr().err
    assert run_json(capsys, *words)["files"][0]["cut"]
    capsys.readouterr()
    found = run_json(capsys, *MODEL, *WAVS)["files"]
    assert not any(one["cut"] for one in found)
    assert "lacks its end" not in capsys.readouterr().err


def test_long_recordings_are_cut_and_searched_together(capsys):
    pause = torch.zeros(RATE // 4)
    parts = [x for n in (1, 2, 3) for x in (wave_of(n), pause)]
    write_audio("long.wav", torch.cat(parts), RATE)
    words = ["u0.wav", "long.wav", "text.wav", "u1.wav", "--cut", "1"]
    found = [
        run_json(capsys, *MODEL, *words, "--skip-bad", "--batch", batch)
        for batch in ("1", "2", "100")
    ]
    assert found[0]["files"] == found[1]["files"] == found[2]["files"]
    first, long, bad, last = found[0]["files"]
    assert (first["text"], last["text"]) == ("A B", "B C D")
    assert long["seconds"] == pytest.approx(2.67)
    assert long["segments"][-1]["end"] == pytest.approx(2.67, abs=0.01)
    assert "unreadable" in bad["error"]


BAD = {
    "cut": (("--cut", "0.5"), "--cut 0.5: expected seconds"),
    "language": (("--to", "de"), "unknown target language 'de'"),
    "batch": (("--batch", "0"), "--batch 0"),
    "beam": (("--beam", "0"), "--beam 0"),
    "penalty": (("--length-penalty", "-1"), "--length-penalty -1"),
    "both": (("--beam", "1", "--length-penalty", "1"), "--beam 1"),
    "folder": (("--model", "none"), "none: no such folder"),
    "threads": (("--threads", "0"), "--threads 0"),
}


@pytest.mark.parametrize("words, text", BAD.values(), ids=BAD)
def test_one_line_says_what_is_wrong(capsys, words, text):
    assert text in fails(capsys, *MODEL, "u0.wav", *words)


def test_code_in_the_folder_is_refused(capsys, tmp_path):
    shutil.copytree("translator", tmp_path / "bad")
    path = tmp_path / "bad/hyperparams.yaml"
    path.write_text(
        path.read_text() + f"more: !apply:os.mkdir [{tmp_path}/x]\n"
    )
    line = fails(capsys, "translate", "--model", tmp_path / "bad", "u0.wav")
    assert "'!apply:os.mkdir' is refused" in line
    assert not (tmp_path / "x").exists()


def test_the_pages_commands(capsys):
    page = Path(__file__).parents[2] / "docs" / "using_a_translator.md"
    text = page.read_text(encoding="utf-8")
    (block,) = re.findall(
        r"<!-- not run: [^\n]*-->\n```bash\n(.*?)```", text, re.S
    )
    _, _, made, _ = trained_once()
    whole = Path("results/joint/0/models/whole")
    whole.mkdir(parents=True)
    shutil.copy("hyperparams.yaml", whole)
    translator = {**made["translator"], "languages": {"de": 1}}
    save(whole, {**made, "translator": translator})
    shutil.copy("u2.wav", "speech.wav")
    first, second = block.replace("\\\n", " ").splitlines()
    run(*shlex.split(first)[1:])
    assert capsys.readouterr().out == "C D\n"
    *words, pattern = shlex.split(second)[1:]
    found = run_json(capsys, *words, *sorted(map(str, Path().glob(pattern))))
    said = {one["file"]: one.get("text") for one in found["files"]}
    assert [said[wav] for wav in WAVS] == TEXTS
    assert found["skipped"] == 2  # fast.wav and text.wav
    assert {one.get("target") for one in found["files"]} == {"de", None}
