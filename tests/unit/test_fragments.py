"""The fragments that a YAML takes by name, from any folder."""

import inspect
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch
import yaml
from hyperpyyaml import load_hyperpyyaml

import speechbrain_taskarith
from speechbrain_taskarith import fragment, fragments

SMALL = "d_model: 8, nhead: 2, d_ffn: 8"
EMFORMER = {
    **{"n_mels": 4, "d_model": 8, "num_heads": 2, "ffn_dim": 8},
    **{"num_layers": 1, "predictor_dim": 6, "predictor_layers": 1},
    **{"joint_dim": 8, "vocab_size": 5},
}


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    """Put a fragment of the test in the place of those that are shipped."""

    def ship(text):
        (tmp_path / "toy.yaml").write_text(text)
        monkeypatch.setattr(fragments, "fragments_folder", lambda: tmp_path)

    return ship


def load(text):
    return load_hyperpyyaml(text)


def test_the_name_that_users_rely_on():
    assert list(inspect.signature(fragment).parameters) == ["name", "overrides"]
    assert "fragment" in dir(speechbrain_taskarith)


def test_a_fragment_is_what_include_makes(tmp_path, monkeypatch):
    keys = "{d_model: 8, nhead: 2, pooling: mean, window: 3, dropout: 0.0}"
    main = tmp_path / "main.yaml"
    main.write_text(f"there: !include:models/looking_back.yaml {keys}\n")
    (tmp_path / "models").mkdir()
    path = fragments.fragment_path("models/looking_back")
    (tmp_path / "models" / path.name).write_text(path.read_text())
    torch.manual_seed(0)
    with open(main) as stream:
        there = load_hyperpyyaml(stream)["there"]
    torch.manual_seed(0)
    here = fragment("models/looking_back", **yaml.safe_load(keys))
    assert list(here) == list(there)
    for key, value in there.items():
        if isinstance(value, torch.nn.Module):
            assert str(here[key]) == str(value)
            for one, other in zip(here[key].parameters(), value.parameters()):
                assert torch.equal(one, other)
        else:
            assert here[key] == value and type(here[key]) is type(value)


def test_by_apply_it_is_made_once_and_read_by_a_dot():
    loaded = load(
        "frames: 8\n"
        "model: !new:torch.nn.ModuleList\n"
        "    - [!ref <reduction.looking_back>]\n"
        "reduction: !apply:speechbrain_taskarith.fragment\n"
        "    name: models/looking_back.yaml\n"
        "    d_model: !ref <frames> * 2\n"
        "    nhead: 2\n"
        "again: !ref <reduction.looking_back>\n"
    )
    assert loaded["reduction"]["d_model"] == 16
    assert loaded["again"] is loaded["reduction"]["looking_back"]
    assert loaded["model"][0] is loaded["again"]


def test_objects_keep_their_identity():
    loaded = load(
        "predictor: !new:speechbrain_taskarith.transducer.LSTMPredictor\n"
        "    {vocab_size: 5, embedding_dim: 6, hidden_dim: 6, num_layers: 1}\n"
        "lm: !new:torch.nn.Identity\n"
        "transducer: !apply:speechbrain_taskarith.fragment\n"
        "    name: transducer/emformer_medium\n"
        + "".join(f"    {key}: {value}\n" for key, value in EMFORMER.items())
        + "    predictor: !ref <predictor>\n"
        "    searcher: {lm: !ref <lm>, beam_size: 2}\n"
    )
    found = loaded["transducer"]
    for holder in (found, found.model):
        assert holder["predictor"] is loaded["predictor"]
    assert found.searcher.predictor is loaded["predictor"]
    assert found.searcher.joint is found.joint
    assert found.searcher.label_scores.lm is loaded["lm"]
    assert found.searcher.beam_size == 2 and found["beam_size"] == 4


def test_values_of_every_kind_arrive_as_they_are(shipped):
    shipped(
        "# Toy.\n"
        "size: 1\nlist: [1]\ntext: a\nscale: 0.5\nnested: {a: 1, b: 2}\n"
        "double: !ref <size> * 2\nfile: !ref <text>/x\nsame: !ref <scale>\n"
        "counted: !new:collections.Counter\n    b: !ref <nested[b]>\n"
    )
    tensor = torch.ones(2)
    found = fragment(
        "toy",
        size=numpy.int64(4),
        list=(tensor, {"a": "!ref <no>"}),
        text="(1, 2)",
        scale={"encoder.*": 0.1},
        nested={"b": 7},
    )
    assert found["double"] == 8 and found["file"] == "(1, 2)/x"
    assert found["list"][0] is tensor and found["list"][1] == {"a": "!ref <no>"}
    assert found["same"] is found["scale"] == {"encoder.*": 0.1}
    assert found["nested"] == {"a": 1, "b": 7} and found["counted"]["b"] == 7
    assert fragment("toy", scale=None)["same"] is None
    assert fragment("toy", scale=float("inf"))["same"] == float("inf")
    assert fragment("toy", text="5")["text"] == "5"
    assert fragment("toy", size=True)["size"] is True
    assert fragment("toy")["scale"] == 0.5, "overrides do not outlive a call"


@pytest.mark.parametrize(
    "name, keys, message",
    [
        ("looking_back", "", "did you mean 'models/looking_back'"),
        ("models/lokingback", "", "did you mean 'models/looking_back'"),
        ("../setup", "", "There are: models/looking_back, "),
        ("models/looking_back", "poling: mean", "did you mean 'pooling'"),
        (
            "models/looking_back",
            "zzzz: 1",
            "looking_back. There are: d_model, nhead",
        ),
        (
            "models/looking_back",
            "shrink.pooling: mean",
            "no key 'shrink.pooling'",
        ),
    ],
)
def test_what_does_not_exist_is_refused_by_name(name, keys, message):
    text = (
        f"a: !apply:speechbrain_taskarith.fragment {{name: {name}, {keys}}}\n"
    )
    with pytest.raises(ValueError, match=message):
        load(text)


def test_misspelt_keys_inside_are_refused(shipped):
    shipped(
        "# Toy.\nnested: {lr: 1}\n"
        "count: !new:collections.Counter\n    a: 1\n"
        "made: !new:torch.nn.Linear {in_features: 1, out_features: 1}\n"
    )
    with pytest.raises(
        ValueError, match="no key 'rl' in fragment toy, nested.*lr"
    ):
        fragment("toy", nested={"rl": 2})
    assert fragment("toy", count={"b": 2})["count"] == {"a": 1, "b": 2}
    with pytest.raises(TypeError, match="counst"):
        fragment("toy", made={"counst": "mean"})
    with pytest.raises(AttributeError, match="no key 'conut'.*'count'"):
        _ = fragment("toy").conut


def test_the_yaml_around_it_is_loaded_as_without_it():
    """A load inside a load: HyperPyYAML's builds of what follows stay whole."""
    before = (
        "before: !apply:speechbrain_taskarith.fragment\n"
        f"    {{name: models/looking_back, {SMALL}}}\n"
    )
    around = (
        "options: {a: {b: [1, 2]}}\n"
        "later:\n"
        "    - kept: !apply:copy.deepcopy [!ref <options>]\n"
        "      same: !ref <options[a]>\n"
    )
    found = load(before + around)
    del found["before"]
    assert found == load(around)
    assert found["later"][0]["kept"] == {"a": {"b": [1, 2]}}


def test_no_key_hides_a_method_of_dict():
    for name in fragments.fragment_names():
        text = fragments.fragment_path(name).read_text()
        keys = set(yaml.compose(text, yaml.BaseLoader).value)
        keys = {key.value for key, _ in keys}
        assert not keys & {"name", *dir(dict)}, name


def test_from_another_folder_without_the_checkout_on_the_path(tmp_path):
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from speechbrain_taskarith import fragment\n"
        f"print(fragment('models/looking_back', {SMALL.replace(': ', '=')})"
        ".pooling)"
    )
    root = str(Path(speechbrain_taskarith.__file__).parents[1])
    ran = subprocess.run(
        [sys.executable, "-c", code, root],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.stdout.strip() == "first", ran.stderr
