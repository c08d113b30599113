"""A trained translator: stored, loaded in another process, used."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from translator_toy import (
    RATE,
    SOURCE,
    TARGET,
    YAML,
    item,
    loader,
    save,
    trained,
    trained_once,
    wave_of,
)

from speechbrain_taskarith.brains import CharacterLabels
from speechbrain_taskarith.data import (
    cut_at_pauses,
    read_audio,
    write_audio,
)
from speechbrain_taskarith.translation import (
    SpeechTranslator,
    Translation,
    greedy_translation,
    save_translator,
)


@pytest.fixture
def made():
    """A folder with a trained translator, its Brain and recordings."""
    return trained_once()


@pytest.fixture
def copied(made, tmp_path):
    """A copy of the folder, to be spoiled."""
    shutil.copytree(made[0] / "translator", tmp_path / "translator")
    return tmp_path / "translator"


def load(folder, **options):
    return SpeechTranslator.from_hparams(
        source=folder, run_opts={"device": "cpu"}, **options
    )


SCRIPT = """
import json, sys
from speechbrain_taskarith.translation import SpeechTranslator
translator = SpeechTranslator.from_hparams(
    source=sys.argv[1], run_opts={"device": "cpu"}
)
found = [translator.translate_file(path).as_dict() for path in sys.argv[2:]]
print(json.dumps(found))
"""


def test_another_process_translates_as_the_brain_does(made, tmp_path):
    folder, brain, _, wavs = made
    brain.evaluate(loader(*range(5)))
    assert brain.hypotheses == brain.references, "train it longer"
    # From the place it was moved to.
    moved = shutil.move(shutil.copytree(folder, tmp_path / "a"), tmp_path / "b")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, f"{moved}/translator", *wavs],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    found = json.loads(done.stdout)
    assert [one["text"] for one in found] == brain.hypotheses
    assert [one["transcript"] for one in found] == brain.ctc_hypotheses
    assert any(brain.ctc_hypotheses)
    assert [one["seconds"] for one in found] == [0.48, 0.72, 0.48, 0.72, 0.48]


def test_batches_are_as_singles(made):
    folder, *_ = made
    translator = load(folder / "translator")
    waves = [wave_of(number) for number in range(5)]
    singles = [translator.translate_batch(wave[None])[0] for wave in waves]
    padded = torch.nn.utils.rnn.pad_sequence(
        waves, batch_first=True, padding_value=float("nan")
    )
    lens = torch.tensor([len(wave) / padded.shape[1] for wave in waves])
    assert translator.translate_batch(padded, lens) == singles
    assert translator(padded, lens) == singles
    # Also where a translation's own speech says how long it may be.
    translator.search.least_steps, translator.search.max_decode_ratio = 1, 0.58
    singles = [translator.translate_batch(wave[None])[0] for wave in waves]
    assert translator.translate_batch(padded, lens) == singles
    assert {one.cut for one in singles} == {True, False}
    assert not translator.mods.training
    assert not any(p.requires_grad for p in translator.parameters())


def test_what_an_encoding_is_padded_with_is_no_speech(made):
    # A shrink of fixed capacity pads, and so may an encoder.
    folder, *_ = made
    translator = load(folder / "translator")
    encoded = [translator.encode(wave_of(number)) for number in range(3)]
    padded = []
    for one in encoded:
        speech = one.speech
        states = torch.nn.functional.pad(
            speech.encoded, (0, 0, 0, 7), value=9.0
        )
        lens = speech.lens * speech.encoded.shape[1] / states.shape[1]
        speech = speech._replace(encoded=states, lens=lens)
        padded.append(one._replace(speech=speech))
    for search in (translator.search, None):
        translator.search = search
        assert translator.decode(padded) == translator.decode(encoded)


def test_segments_are_the_runs_of_the_head(made):
    folder, brain, _, wavs = made
    translator = load(folder / "translator")
    found = translator.translate_file(wavs[2])
    # Counted by hand, from the Brain's model.
    with torch.no_grad():
        x = brain.hparams.compute_features(item(2)["sig"][None])
        x = brain.modules.normalize(x, torch.ones(1))
        frames = brain.modules.model.eval().acoustic(x, torch.ones(1))
        frames = frames[0] if isinstance(frames, tuple) else frames
        labels = brain.modules.model.ctc_lin(frames)[0].argmax(-1).tolist()
    shift = found.seconds / len(labels)
    runs, start = [], 0
    for frame in range(1, len(labels) + 1):
        if frame == len(labels) or labels[frame] != labels[start]:
            said = SOURCE.decode([[labels[start]]])[0] if labels[start] else ""
            runs.append((start * shift, frame * shift, said))
            start = frame
    assert len(runs) > 1
    assert len(found.segments) == len(runs)
    for segment, (start, end, said) in zip(found.segments, runs):
        assert segment.start == pytest.approx(start, abs=1e-4)
        assert segment.end == pytest.approx(end, abs=1e-4)
        assert segment.transcript == said
    assert found.segments[-1].end == pytest.approx(found.seconds, abs=1e-4)
    said = [segment.transcript for segment in found.segments]
    assert " ".join(filter(None, said)) == found.transcript


def test_a_global_normaliser_and_other_settings_come_back(tmp_path):
    # A plain value, though it has the name of an encoder's folder.
    text = f"{YAML}    pair: {{source: nowhere, target: de}}\n"
    brain, hparams = trained(tmp_path, 2, text, norm_type="global")
    hparams["translator"]["languages"] = {"fr": 1, "de": 8}
    hparams["model"].decoder.seq_lin.bias.data[2] = -9  # it does not end
    folder = save(tmp_path, hparams)
    translator = load(folder)
    other = translator.mods.normalize
    mine = brain.modules.normalize
    assert other.count == mine.count and other.count > 100
    assert torch.equal(other.glob_mean, mine.glob_mean)
    assert torch.equal(other.glob_std, mine.glob_std)
    assert translator.hparams.pair == {"source": "nowhere", "target": "de"}
    assert translator.search.beam_size == 3
    assert translator.search.length_penalty == 1.2
    assert translator.search.model is translator.mods.model.decoder
    wave = wave_of(0)[None]
    brain.modules.eval()
    for language, token in (("fr", 1), ("de", 8)):
        (found,) = translator.translate_batch(wave, target=language)
        with torch.no_grad():
            x = hparams["features"](wave)
            x = hparams["normalize"](x, torch.ones(1))
            speech = hparams["model"].encode_speech(x, torch.ones(1))
            tokens = hparams["search"](
                speech.encoded, speech.lens, torch.tensor([token])
            )[0]
        expected = TARGET.decode([[int(t) for t in tokens[0]]])[0]
        assert found.text == expected and found.target == language
    with pytest.raises(ValueError, match=r"several target .*fr, de"):
        translator.translate_batch(wave)
    with pytest.raises(ValueError, match=r"unknown .*'nl'.* has fr, de"):
        translator.translate_batch(wave, target="nl")
    with pytest.raises(ValueError, match="1 lengths for 2 waveforms"):
        translator.translate_batch(wave.repeat(2, 1), torch.ones(1), "fr")
    both = translator.translate_batch(wave.repeat(2, 1), target=["fr", "de"])
    assert [one.target for one in both] == ["fr", "de"]
    (tmp_path / "translator/normalize.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"normalize\.safetensors"):
        load(folder)


class GreedySearch(torch.nn.Module):
    """A searcher that, as SpeechBrain's greedy ones, does not tell its limit."""

    def __init__(self, decoder, bos_index, eos_index):
        super().__init__()
        self.decoder, self.bos, self.eos = [decoder], bos_index, eos_index

    def forward(self, memory, lens):
        begin = torch.full((len(memory),), self.bos)
        return (
            greedy_translation(
                self.decoder[0], memory, lens, begin, self.eos, 200
            ),
        )


def test_a_searcher_that_does_not_tell_its_limit(made):
    translator = load(made[0] / "translator")
    translator.set_search(beam_size=1)
    wanted = translator.translate_file(made[3][0])
    settings = translator.hparams
    translator.search = GreedySearch(
        translator.mods.model.decoder, settings.bos_index, settings.eos_index
    )
    found = translator.translate_file(made[3][0])
    assert found.text == wanted.text and found.text
    assert not found.cut


def test_the_search_can_be_changed(made):
    folder, brain, _, wavs = made
    translator = load(folder / "translator")
    translator.set_search(beam_size=1)
    assert translator.search is None
    assert translator.translate_file(wavs[0]).text == "A B"
    translator.set_search(beam_size=2, length_penalty=0.5)
    assert translator.search.beam_size == 2
    assert translator.search.length_penalty == 0.5
    assert translator.translate_file(wavs[1]).text == "B C D"
    for wrong in (
        {"beam_size": 0},
        {"length_penalty": -1},
        {"beam_size": 1, "length_penalty": 1.0},
    ):
        with pytest.raises(ValueError, match=next(reversed(wrong))):
            translator.set_search(**wrong)


def test_a_text_that_the_ctc_head_did_not_read_is_doubted():
    assert Translation("chien", transcript="dog").doubt is None
    assert Translation("chien").doubt is None  # it has no labels
    assert "read nothing" in Translation("chien", transcript="").doubt


def test_a_wider_beam_is_the_search_that_was_there(made):
    translator = load(made[0] / "translator")
    search = translator.search
    search.length_penalty, search.least_steps = 0.3, 2
    translator.set_search(beam_size=1)
    # As many tokens as the beam may write.
    assert translator.translate_file(made[3][1]).text == "B C"
    translator.set_search(beam_size=4)
    assert translator.search is search and search.beam_size == 4
    assert (search.length_penalty, search.least_steps) == (0.3, 2)


def test_an_existing_folder_is_replaced_as_a_whole_or_not_at_all(
    made, tmp_path
):
    folder, _, hparams, _ = made
    shutil.copytree(folder, tmp_path / "run")
    target = tmp_path / "run/translator"
    (target / "left.txt").write_text("of an earlier one")
    save(tmp_path / "run", hparams)
    assert not (target / "left.txt").exists()
    before = {p.name: p.read_bytes() for p in target.iterdir()}
    # It fails in the middle: the weights are not what the YAML describes.
    model = hparams["model"]
    model.extra = torch.nn.Linear(1, 1)
    try:
        with pytest.raises(ValueError, match=r"extra\.weight"):
            save(tmp_path / "run", hparams)
    finally:
        del model.extra
    assert {p.name: p.read_bytes() for p in target.iterdir()} == before
    assert not list((tmp_path / "run").glob(".partial*"))
    other = tmp_path / "run/other"
    other.mkdir()
    (other / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="no translator"):
        save_translator(
            other, hparams["translator"], folder / "hyperparams.yaml", TARGET
        )
    assert (other / "thesis.txt").read_text() == "mine"


def test_what_cannot_be_stored_is_named(made, tmp_path):
    folder, _, hparams, _ = made
    run = folder / "hyperparams.yaml"
    section = hparams["translator"]
    for changed, text in (
        ({"hyperparams": tmp_path / "none.yaml"}, "none.yaml"),
        ({"key": "other"}, "no section 'other'"),
        ({"translator": {}}, "no `model`"),
        ({"target_labels": {}}, "dict; expected PieceLabels"),
        ({"target_labels": CharacterLabels("a\n")}, "line break"),
    ):
        arguments = {
            "folder": tmp_path / "translator",
            "translator": section,
            "hyperparams": run,
            "target_labels": TARGET,
            **changed,
        }
        with pytest.raises((ValueError, FileNotFoundError), match=text):
            save_translator(**arguments)
    assert not list(tmp_path.iterdir())


def test_without_transcripts_there_are_none(made, tmp_path):
    folder, _, hparams, wavs = made
    save_translator(
        tmp_path / "translator",
        hparams["translator"],
        folder / "hyperparams.yaml",
        TARGET,
    )
    found = load(tmp_path / "translator").translate_file(wavs[0])
    assert found.transcript is None and found.text == "A B"
    assert {segment.transcript for segment in found.segments} == {None}


def spoil(path, **changed):
    state = {**load_file(path), **changed}
    save_file({k: v for k, v in state.items() if v is not None}, path)


def cut(path):
    path.write_bytes(path.read_bytes()[:2000])


def edit(old, new):
    def change(path):
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))

    return change


NAME = "model.textual.norm.weight"
BAD = {
    "no weights": ("model.safetensors", Path.unlink, "no such file"),
    "no description": ("hyperparams.yaml", Path.unlink, "no such file"),
    "no vocabulary": ("target.txt", Path.unlink, r"target\.txt"),
    "cut weights": ("model.safetensors", cut, "damaged"),
    "missing tensor": (
        "model.safetensors",
        lambda path: spoil(path, **{NAME: None}),
        NAME,
    ),
    "other shape": (
        "model.safetensors",
        lambda path: spoil(path, **{NAME: torch.zeros(3)}),
        NAME,
    ),
    "other tensor": (
        "model.safetensors",
        lambda path: spoil(path, more=torch.zeros(3)),
        "more",
    ),
    "no YAML": ("hyperparams.yaml", edit("modules:", "modules: ["), "YAML"),
    "no modules": ("hyperparams.yaml", edit("modules:", "parts:"), "modules"),
    "not UTF-8": (
        "hyperparams.yaml",
        lambda path: path.write_bytes(b"\xff\xfe\x00"),
        "UTF-8",
    ),
    "wrong argument": (
        "hyperparams.yaml",
        edit("uniform: 4", "evenly: 4"),
        "evenly",
    ),
    "no text of labels": (
        "hyperparams.yaml",
        edit("target_text:", "text:"),
        "no vocabulary of the target",
    ),
    "no rate": (
        "hyperparams.yaml",
        edit("sample_rate: 8000\nbos", "rate: 8000\nbos"),
        "sample_rate",
    ),
    "a call": (
        "hyperparams.yaml",
        edit("uniform: 4", "uniform: !apply:os.getcwd []"),
        r"line \d+: '!apply:os.getcwd' is refused",
    ),
    "a class of elsewhere": (
        "hyperparams.yaml",
        edit("uniform: 4", "uniform: !new:subprocess.Popen [[ls]]"),
        "Popen' is refused",
    ),
}


@pytest.mark.parametrize("file, change, text", BAD.values(), ids=BAD)
def test_folders_that_cannot_be_used(copied, file, change, text):
    change(copied / file)
    with pytest.raises((ValueError, FileNotFoundError), match=text) as caught:
        load(copied)
    assert "translator" in str(caught.value)


def test_a_vocabulary_too_short_is_named(copied, made):
    (copied / "target.txt").write_text("<blank>\n<s>\n</s>\n")
    with pytest.raises(ValueError, match="it does not belong to this model"):
        load(copied).translate_file(made[3][0])


def test_no_folder_no_network(tmp_path):
    with pytest.raises(FileNotFoundError, match="none: no such folder"):
        load(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="nobody/nothing"):
        load("nobody/nothing")


def test_of_a_hubs_folder_only_what_a_translator_needs_comes(made, hub):
    folder = made[0] / "translator"
    files = [path for path in folder.rglob("*") if path.is_file()]
    hub.repositories["me/translator"] = {
        "model.py": b"raise SystemExit",
        "training_args.bin": b"a pickle",
        **{str(f.relative_to(folder)): f.read_bytes() for f in files},
    }
    found = load("me/translator").translate_file(made[3][0])
    assert found.text == load(folder).translate_file(made[3][0]).text
    assert set(hub.downloaded) == {str(f.relative_to(folder)) for f in files}


@pytest.mark.parametrize("beam", [1, 3])
def test_where_the_longest_translation_ends(made, beam, caplog):
    """Two words and the end token are three steps."""
    for steps in (1, 2, 3, 4):
        translator = load(made[0] / "translator")
        translator.set_search(beam_size=beam)
        if beam == 1:
            translator.hparams.greedy_tokens = steps
        else:
            translator.search.least_steps = steps
        found = translator.translate_file(made[3][0])
        assert found.cut == (steps < 3), steps
        assert (found.text == "A B") == (steps > 1)
    assert caplog.text.count("u0.wav: the translation lacks its end") == 2


def test_a_long_recording_is_cut_at_its_pauses(made, tmp_path):
    translator = load(made[0] / "translator")
    waves = [wave_of(number) for number in (1, 2, 3)]
    pause = torch.zeros(RATE // 4)
    long = torch.cat([x for wave in waves for x in (wave, pause)])
    write_audio(tmp_path / "long.wav", long, RATE)
    found = translator.translate_file(tmp_path / "long.wav", longest=1.0)
    cuts = cut_at_pauses(read_audio(tmp_path / "long.wav", RATE), RATE, 1.0)
    assert len(cuts) > 2
    parts = []
    for number, (start, end) in enumerate(cuts):
        path = tmp_path / f"{number}.wav"
        write_audio(path, long[start:end], RATE)
        parts.append(translator.translate_file(path, longest=1.0))
    assert found.text == " ".join(part.text for part in parts)
    read = [part.transcript for part in parts]
    assert found.transcript == " ".join(filter(None, read))
    assert found.seconds == pytest.approx(len(long) / RATE)
    expected = [
        (start / RATE + segment.start, start / RATE + segment.end)
        for (start, _), part in zip(cuts, parts)
        for segment in part.segments
    ]
    times = [(one.start, one.end) for one in found.segments]
    assert len(times) >= len(cuts)
    for mine, other in zip(times, expected, strict=True):
        assert mine == pytest.approx(other, abs=1e-3)
    # One that is short enough is not touched.
    one, same = (
        translator.translate_file(made[3][0], longest=s) for s in (None, 1.0)
    )
    assert one == same


def test_recordings_that_cannot_be_used(made, tmp_path, caplog):
    translator = load(made[0] / "translator")
    write_audio(tmp_path / "fast.wav", wave_of(0), 2 * RATE)
    with pytest.raises(ValueError, match=r"fast\.wav.*16000 Hz.*8000 Hz"):
        translator.translate_file(tmp_path / "fast.wav")
    found = translator.translate_file(tmp_path / "fast.wav", resample=True)
    assert found.seconds == pytest.approx(0.24)
    (tmp_path / "text.wav").write_text("no sound")
    with pytest.raises(ValueError, match=r"text\.wav: unreadable"):
        translator.translate_file(tmp_path / "text.wav")
    with pytest.raises(FileNotFoundError, match=r"none\.wav"):
        translator.translate_file(tmp_path / "none.wav")
    wave = wave_of(0)
    for wrong, text in (
        (torch.zeros(1, 0), "at least one"),
        (torch.full((1, 500), torch.nan), "row 0.*NaN"),
        (wave, r"expected \[batch, samples\]"),
        (torch.ones(1, 900, dtype=torch.int16), "floating point"),
    ):
        with pytest.raises(ValueError, match=text):
            translator.translate_batch(wrong)
    assert translator.decode([]) == []
    # One sample, and a model that ends at once.
    write_audio(tmp_path / "short.wav", wave[:1], RATE)
    translator.mods.model.decoder.seq_lin.bias[2] = 99
    caplog.clear()
    with pytest.raises(ValueError, match=r"short\.wav.*0\.0001 s.*too short"):
        translator.translate_file(tmp_path / "short.wav")
    write_audio(tmp_path / "short.wav", wave[:500], RATE)
    found = translator.translate_file(tmp_path / "short.wav")
    assert found.text == "" and "short.wav: the translation is" in caplog.text
