"""`taskarith syn2real`: every form in, every form out, and what it refuses."""

from pathlib import Path

import pytest
import torch
from cli_support import fails, run, run_json, there, weights
from hugging_face_toy import save_whisper

from speechbrain_taskarith.utils.hub.cards import read_card
from speechbrain_taskarith.vectors import TIES, open_state, save_state, syn2real

NAMES = ("target", "real", "synthetic", "base", "real2", "synthetic2")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with the models of two source domains and a target."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(NAMES):
        torch.save(weights(seed=seed), f"{name}.ckpt")
    return tmp_path


EDITED = ("encoder.layers.0.weight", "encoder.layers.1.weight", "ctc.bias")
TARGET = ("syn2real", "target.ckpt")
SOURCE = ("--source", "real.ckpt", "synthetic.ckpt")
SECOND = ("--source", "real2.ckpt", "synthetic2.ckpt")
SHRUNK = ("--target-scale", "0.6", "--base", "base.ckpt")


def model(name):
    return weights(seed=NAMES.index(name))


def naive(target_scale, scale, pairs):
    """Return the formula's weights in float64, from the definition."""
    target, base, result = model("target"), model("base"), model("target")
    for name, tensor in target.items():
        if tensor.is_floating_point() and not name.endswith("running_var"):
            own = tensor.double() - base[name].double()
            added = sum(
                model(real)[name].double() - model(synthetic)[name].double()
                for real, synthetic in pairs
            )
            result[name] = base[name].double() + target_scale * own
            result[name] += scale * added / len(pairs)
    return result


def check(path, expected):
    found = open_state(path)
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(
            found[name].double(), tensor.double(), atol=1e-6, rtol=0
        )


def test_the_papers_form_needs_no_base(folder):
    run(*TARGET, *SOURCE, "-o", "edited.ckpt")
    check("edited.ckpt", naive(1.0, 0.2, [("real", "synthetic")]))


def test_two_scales_and_two_sources(folder, capsys):
    words = (*TARGET, *SOURCE, *SECOND, *SHRUNK, "--scale", "0.3")
    found = run_json(capsys, *words, "-o", "edited.safetensors")
    pairs = [("real", "synthetic"), ("real2", "synthetic2")]
    check("edited.safetensors", naive(0.6, 0.3, pairs))
    assert (found["scale"], found["target_scale"]) == (0.3, 0.6)
    own = [model("target")[n] - model("base")[n] for n in EDITED]
    norm = torch.cat([delta.flatten() for delta in own]).norm().item()
    assert found["target_norm"] == pytest.approx(norm, rel=1e-5)
    card = read_card("edited.safetensors")
    assert card["rule"] == {
        "rule": "syn2real",
        "scale": 0.3,
        "target_scale": 0.6,
        "sources": "mean",
    }
    named = {
        parent["path"]: parent["fingerprint"] for parent in card["parents"]
    }
    assert named == {
        f"{name}.ckpt": open_state(f"{name}.ckpt").fingerprint for name in NAMES
    }
    assert card["fingerprint"] == open_state("edited.safetensors").fingerprint


def test_the_bytes_are_those_of_the_function(folder):
    rule = ("--rule", "TIES", "density=0.5")
    scales = ("--scale", "encoder.*=0.5", "--target-scale", "ctc.*=0.4")
    base = ("--base", "base.ckpt", "--dtype", "bfloat16")
    words = (*TARGET, *SOURCE, *SECOND, *scales, *base, *rule)
    run(*words, "--exclude", "*.0.*", "--threads", "1", "-o", "edited.ckpt")
    expected = syn2real(
        "target.ckpt",
        [("real.ckpt", "synthetic.ckpt"), ("real2.ckpt", "synthetic2.ckpt")],
        scale={"encoder.*": 0.5},
        target_scale={"ctc.*": 0.4},
        base="base.ckpt",
        rule=TIES(density=0.5),
        exclude="*.0.*",
        dtype="bfloat16",
    )
    found = torch.load("edited.ckpt")
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    assert found["ctc.bias"].dtype == torch.bfloat16


def test_a_speechbrain_folder_takes_its_other_files_along(folder):
    from speechbrain.utils.checkpoints import Checkpointer

    linear = torch.nn.Linear(2, 1)
    Checkpointer("save", {"model": linear}).save_checkpoint(name="one")
    torch.save({"count": 3}, "save/CKPT+one/normalizer.ckpt")
    state = {n: t.clone() for n, t in linear.state_dict().items()}
    torch.save({n: t + 1 for n, t in state.items()}, "r.ckpt")
    torch.save({n: t - 1 for n, t in state.items()}, "b.ckpt")
    run(
        *("syn2real", "save", "--source", "r.ckpt", "save", "--scale", "0.5"),
        *("--target-scale", "0.5", "--base", "b.ckpt", "-o", "new/CKPT+edited"),
    )
    assert torch.load("new/CKPT+edited/normalizer.ckpt") == {"count": 3}
    # b + 0.5 (t - b) + 0.5 (r - t) with b = t - 1, r = t + 1 is t.
    Checkpointer("new", {"model": linear}).recover_if_possible()
    for name, tensor in linear.state_dict().items():
        assert torch.allclose(tensor, state[name], atol=1e-6)


def test_a_hugging_face_folder_becomes_one_with_a_card(folder):
    Path("hub").mkdir()
    Path("hub/config.json").write_text('{"model_type": "none"}')
    save_state(model("target"), "hub/model.safetensors")
    run("syn2real", "hub", *SOURCE, *SHRUNK, "--scale", "0.3", "-o", "edited")
    check("edited", naive(0.6, 0.3, [("real", "synthetic")]))
    assert Path("edited/config.json").read_text() == '{"model_type": "none"}'
    assert "towards real speech" in Path("edited/README.md").read_text()


def test_whisper_folders_load_with_what_was_written(folder):
    """Also where a source is the checkpoint of SpeechBrain's wrapper."""
    transformers = pytest.importorskip("transformers")
    models = {}
    # Their weights follow from the length of the name.
    for name in ("target", "real", "synthetic", "start"):
        save_whisper(name, task="ForConditionalGeneration")
        load = transformers.WhisperForConditionalGeneration.from_pretrained
        models[name] = load(name).state_dict()
    wrapped = {
        name: tensor
        for name, tensor in models["real"].items()
        if name.startswith("model.")
    }
    torch.save(wrapped, "real.ckpt")
    run(
        *("syn2real", "target", "--source", "real.ckpt", "synthetic"),
        *("--scale", "0.3", "--target-scale", "0.5", "--base", "start"),
        *("-o", "edited"),
    )
    edited = load("edited").state_dict()
    assert list(edited) == list(models["target"])
    for name, tensor in edited.items():
        t, r, s, b = (m[name].double() for m in models.values())
        expected = b + 0.5 * (t - b) + 0.3 * (r - s)
        torch.testing.assert_close(
            tensor.double(), expected, atol=1e-6, rtol=1e-6
        )
    tokens, output = "model.decoder.embed_tokens.weight", "proj_out.weight"
    assert edited[tokens].data_ptr() == edited[output].data_ptr()
    transformers.WhisperFeatureExtractor.from_pretrained("edited")
    card = Path("edited/README.md").read_text()
    assert "library_name: transformers" in card and "source, real" in card


def test_names_and_nested_weights_of_the_others(folder):
    for name in ("real", "synthetic", "base"):
        renamed = {f"asr.{n}": t for n, t in model(name).items()}
        torch.save({"ema": renamed}, f"{name}.ckpt")
    run(
        *(*TARGET, *SOURCE, *SHRUNK, "--scale", "0.3", "-o", "edited.ckpt"),
        *("--key", "ema", "--prefix", "asr."),
    )
    check("edited.ckpt", naive(0.6, 0.3, [("real", "synthetic")]))


def test_a_dry_run_says_what_it_would_do_and_writes_nothing(folder, capsys):
    before = there(folder)
    words = (*TARGET, *SOURCE, "--target-scale", "encoder.*=0.5", "--dry-run")
    words += ("--base", "base.ckpt", "-o", "new.ckpt")
    found = run_json(capsys, *words)
    assert found["dry_run"] is True and found["changed"] == 3
    assert found["patterns"] == {
        "target_scale": {"encoder.*": list(EDITED[:2])}
    }
    run(*words)
    said = capsys.readouterr().out
    assert "would write new.ckpt" in said and "target norm" in said
    assert there(folder) == before


@pytest.mark.parametrize(
    "words, said",
    [
        ((*SOURCE, "--target-scale", "0.5"), "give --base"),
        ((*SOURCE, "--target-scale", "x=y"), "--target-scale: expected a num"),
        ((*SOURCE, *SHRUNK[:3], "target.ckpt"), "the target's own weights"),
        (
            (*SOURCE, "--target-scale", "d.*=0.5", *SHRUNK[2:]),
            "'d.*' matches no",
        ),
        ((*SOURCE, "--rule", "TIES", "scale=0.4"), "--scale"),
        ((*SOURCE, "--include", "decoder.*"), "'decoder.*' matches no"),
        (("--source", "real.ckpt", "missing.ckpt"), "missing.ckpt: no such"),
        (("--source", "real.ckpt", "other.ckpt"), "encoder.layers.0.weight"),
        ((*SOURCE, *SHRUNK[:3], "other.ckpt"), "base and the target are not"),
        (("--source", "tau.safetensors", "base.ckpt"), "where a model is exp"),
    ],
    ids=lambda value: " ".join(value[-2:]) if isinstance(value, tuple) else "",
)
def test_what_is_refused(folder, capsys, words, said):
    save_state({"w": torch.ones(2)}, "other.ckpt")
    run("vector", "base.ckpt", "real.ckpt", "-o", "tau.safetensors")
    assert said in fails(capsys, *TARGET, *words, "-o", "new.ckpt")


def test_an_input_is_never_the_output(folder, capsys):
    for name in ("target", "real", "synthetic", "base"):
        words = (*TARGET, *SOURCE, *SHRUNK, "-o", f"{name}.ckpt", "--overwrite")
        assert "an input" in fails(capsys, *words)
