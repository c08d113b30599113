"""Every YAML loads, and every value in it is used."""

import ast
import re
import sys

import pytest
import yaml
from house import HPARAMS, PACKAGE, RECIPES, ROOT, files, parse, shown
from hyperpyyaml import load_hyperpyyaml
from speechbrain.utils.run_opts import RunOptions

RECIPE_FILES = [
    path
    for path in files(".yaml", under=RECIPES)
    if "hparams" in path.parts and "models" not in path.parts
]
FRAGMENTS = files(".yaml", under=HPARAMS)

TOP_KEY = re.compile(r"^([A-Za-z_]\w*):(.*)$", re.M)
REFERENCE = re.compile(r"<([A-Za-z_]\w*)(?:\[[^>]*)?>")
# Read by sb.Brain itself, not by the script.
RUN_OPTIONS = set(RunOptions.__dataclass_fields__)


def placeholders(text):
    """Return the top-level keys that the user has to give."""
    return [k for k, v in TOP_KEY.findall(text) if "!PLACEHOLDER" in v]


def overrides(text, folder):
    """Return what makes a YAML load here, without touching the checkout.

    Public weights are not downloaded: a tiny random model takes their place.
    """
    keys = dict(TOP_KEY.findall(text))
    given = {key: str(folder) for key in placeholders(text)}
    if "output_folder" in keys:
        given["output_folder"] = str(folder / "results")
    for key in ("whisper_hub", "wav2vec2_hub"):
        if key in keys:
            pytest.importorskip("transformers")
            given[key] = str(TINY_MODELS[key](folder / "tiny_model"))
    return given


def tiny_whisper(folder):
    """Save a tiny Whisper; returns its folder."""
    from tiny_whisper import save_tiny_whisper

    return save_tiny_whisper(folder)


def tiny_wav2vec2(folder):
    """Save a tiny wav2vec 2.0 Conformer; returns its folder."""
    from hugging_face_toy import save_encoder

    return save_encoder(folder, "Wav2Vec2Conformer")


# Tests of recipes make them, too.
sys.path += [str(ROOT / "tests" / part) for part in ("integration", "unit")]
TINY_MODELS = {"whisper_hub": tiny_whisper, "wav2vec2_hub": tiny_wav2vec2}


def used_keys(tree):
    """Return what a script reads from hparams and modules."""
    used, patterns = set(), []
    for node in ast.walk(tree):
        if isinstance(node, ast.Subscript):
            if isinstance(node.slice, ast.Constant):
                used.add(node.slice.value)
            elif isinstance(node.slice, ast.JoinedStr):
                patterns.append(_pattern(node.slice))
        elif isinstance(node, ast.Attribute):
            owner = getattr(node.value, "attr", getattr(node.value, "id", ""))
            if owner in ("hparams", "modules"):
                used.add(node.attr)
        elif isinstance(node, ast.Call):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if name in ("getattr", "hasattr", "get", "pop", "_optional"):
                for value in node.args[:2]:
                    if isinstance(value, ast.Constant):
                        used.add(value.value)
    return used, patterns


def readers_of(folder):
    """Return the files that read a recipe's hparams.

    The recipe's train.py and its helpers, what they share with others, and the
    ready Brains where they use one: those read `self.hparams` in the script's
    place. What study.py alone reads is an option of its own.
    """
    # Where train.py is a link, it reads them for a recipe of another corpus.
    if (folder / "train.py").exists():
        folder = (folder / "train.py").resolve().parent
    scripts = [p for p in sorted(folder.glob("*.py")) if not p.is_symlink()]
    scripts = [p for p in scripts if p.name != "study.py"]
    # A link to what several recipes share.
    scripts += sorted((folder / "common").resolve().glob("*.py"))
    texts = [path.read_text(encoding="utf-8") for path in scripts]
    if any("speechbrain_taskarith.brains" in text for text in texts):
        scripts += files(".py", under=PACKAGE / "brains")
    return scripts


def _pattern(joined):
    parts = [
        re.escape(part.value) if isinstance(part, ast.Constant) else r"\w+"
        for part in joined.values
    ]
    return re.compile("".join(parts))


def test_there_are_yaml_files():
    assert RECIPE_FILES and FRAGMENTS, "nothing below would be checked"


@pytest.mark.parametrize("path", RECIPE_FILES + FRAGMENTS, ids=shown)
def test_yaml_loads(path, tmp_path, monkeypatch):
    text = path.read_text(encoding="utf-8")
    # A YAML may name what stands in its recipe's folder.
    monkeypatch.syspath_prepend(str(path.parents[1]))
    monkeypatch.chdir(tmp_path)
    # What stands beside hparams/ and train.py, as a run of train.py has it.
    recipe = path.parents[1]
    for folder in (recipe, (recipe / "train.py").resolve().parent):
        monkeypatch.syspath_prepend(str(folder))
    with open(path, encoding="utf-8") as stream:
        loaded = load_hyperpyyaml(stream, overrides(text, tmp_path))
    assert loaded


@pytest.mark.parametrize("path", RECIPE_FILES, ids=shown)
def test_every_key_is_used(path):
    text = path.read_text(encoding="utf-8")
    uncommented = re.sub(r"(^|\s)#.*$", "", text, flags=re.M)
    referred = set(REFERENCE.findall(uncommented))
    scripts = readers_of(path.parents[1])
    assert scripts, f"{shown(path)} belongs to no script"
    used, patterns = set(RUN_OPTIONS), []
    for script in scripts:
        names, joined = used_keys(parse(script))
        used |= names
        patterns += joined
    unused = [
        key
        for key, value in TOP_KEY.findall(text)
        if key not in used | referred
        and not value.strip().startswith("!apply")
        and not any(p.fullmatch(key) for p in patterns)
    ]
    assert not unused, f"{shown(path)}: neither used nor referred to: {unused}"


def unnamed_keys(text, script):
    """Return the keys that upstream's own check finds no use of.

    It looks at text alone: a key is used where a `!ref` further down names it,
    or the script says `["key"]`, `hparams.key`, `modules.key` or
    `hparams[f"{...}_key"]`.
    """
    waiting = []
    for line in text.splitlines():
        key = TOP_KEY.match(line)
        if key and not re.search("!!|!apply", line):
            waiting.append(key[1])
        if not line.startswith("#") and "!ref" in line:
            referred = set(REFERENCE.findall(line))
            waiting = [name for name in waiting if name not in referred]
    joined = re.findall(r"""\[f["'](\w*)\{[^}]*\}(\w*)["']\]""", script)
    return [
        key
        for key in waiting
        if key not in RUN_OPTIONS
        and f'["{key}"]' not in script
        and not re.search(rf"(hparams|modules)\.{key}\b", script)
        and not any(re.fullmatch(rf"{a}\w+{b}", key) for a, b in joined)
    ]


@pytest.mark.parametrize("path", RECIPE_FILES, ids=shown)
def test_train_py_names_every_key(path):
    """What a helper or a ready Brain reads, a docstring there names."""
    text = path.read_text(encoding="utf-8")
    script = (path.parents[1] / "train.py").read_text(encoding="utf-8")
    assert not unnamed_keys(text, script), shown(path)


def test_the_reader_of_names_sees_every_form():
    text = (
        "# c: !ref <a>\na: 1\nb: !ref <a>\nc: !apply:x []\nd: !ref <e>\n"
        "e: 1\nf_lr: 1\ng: 1\nh: 1\nprecision: fp32\n"
    )
    script = 'hparams["b"]; self.hparams.d; hparams[f"{x}_lr"]; modules.g\n'
    assert unnamed_keys(text, script) == ["e", "h"]


@pytest.mark.parametrize("path", RECIPE_FILES, ids=shown)
def test_recipe_yaml_starts_as_upstreams_do(path):
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# ####"), "a banner says model and data"
    keys = [key for key, _ in TOP_KEY.findall(text)]
    assert keys[:2] == ["seed", "__set_seed"]
    for key in ("output_folder", "save_folder", "train_log", "data_folder"):
        assert key in keys, f"{shown(path)} lacks {key}"
    assert "data_folder" in placeholders(text)


@pytest.mark.parametrize("path", RECIPE_FILES, ids=shown)
def test_includes_change_only_keys_that_are_there(path):
    """HyperPyYAML takes a misspelt one in silence."""
    root = yaml.compose(path.read_text(encoding="utf-8"), yaml.BaseLoader)
    for _, node in root.value:
        kind, _, name = node.tag.partition(":")
        if kind == "!include":
            text = (path.parent / name).read_text(encoding="utf-8")
            there = yaml.compose(text, yaml.BaseLoader).value
            given = {key.value for key, _ in node.value}
            assert given <= {key.value for key, _ in there}, name


@pytest.mark.parametrize("path", FRAGMENTS, ids=shown)
def test_fragment_says_how_to_use_it(path):
    text = path.read_text(encoding="utf-8")
    header = re.match(r"(#.*\n)+", text)
    assert header, f"{shown(path)} has no header"
    name = path.relative_to(HPARAMS).with_suffix("")
    by_name = "!apply:speechbrain_taskarith.fragment\n"
    assert by_name in header[0] and f"name: {name}\n" in header[0]


def test_the_reader_of_scripts_sees_every_form():
    source = (
        "hparams['one']; self.hparams.two; self.modules.three(x)\n"
        "getattr(self.hparams, 'four'); hparams.get('five')\n"
        "hparams[f'{split}_csv']\n"
    )
    used, patterns = used_keys(ast.parse(source))
    assert {"one", "two", "three", "four", "five"} <= used
    assert patterns[0].fullmatch("valid_csv")
