"""The wheel and the sdist, as `pip install` of a stranger gets them."""

import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# All that a merge of safetensors files needs: no torch, no SpeechBrain, no
# audio, no pandas, no rich.
LEAN = ("lazy_loader", "numpy", "pyyaml", "safetensors", "tqdm")

pytestmark = pytest.mark.slow


def run(*command, cwd):
    """Run a command without this checkout on its path; return its output."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    ran = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert ran.returncode == 0, f"{command}: {ran.stdout}{ran.stderr}"
    return ran.stdout + ran.stderr


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Folder with the wheel and the sdist, built from the checkout."""
    pytest.importorskip("build")
    folder = tmp_path_factory.mktemp("dist")
    # The wheel is made from the sdist: what that lacks, it lacks, too.
    run(sys.executable, "-m", "build", "--outdir", folder, ROOT, cwd=folder)
    return folder


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """Scripts folder of an environment with the wheel and `LEAN` alone."""
    folder = tmp_path_factory.mktemp("empty")
    venv.create(folder, with_pip=True)
    pip = [folder / "bin" / "python", "-m", "pip", "install", "--quiet"]
    run(*pip, *LEAN, cwd=folder)
    run(*pip, "--no-deps", next(built.glob("*.whl")), cwd=folder)
    return folder / "bin"


def test_twine_finds_no_fault(built):
    pytest.importorskip("twine")
    said = run(
        sys.executable,
        "-m",
        "twine",
        "check",
        "--strict",
        *built.iterdir(),
        cwd=built,
    )
    assert said.count("PASSED") == 2


def test_the_wheel_holds_the_package_and_nothing_else(built):
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        names = wheel.namelist()
    tops = {name.split("/")[0].partition("-")[0] for name in names}
    assert tops == {"speechbrain_taskarith"}
    for name in (
        "py.typed",
        "vectors/__init__.pyi",
        "vectors/rules/sparsifying/ties.py",
    ):
        assert f"speechbrain_taskarith/{name}" in names
    assert any(
        name.startswith("speechbrain_taskarith/hparams/")
        and name.endswith(".yaml")
        for name in names
    )


def test_the_sdist_holds_what_its_readme_needs(built):
    with tarfile.open(next(built.glob("*.tar.gz"))) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    for name in (
        *("Makefile", "constraints.txt", "README.md", "LICENSE"),
        *("docs/task_vectors.md", "docs/results.md", "benchmarks/README.md"),
        *("recipes/FSDD/ASR/quickstart.py", "tests/conftest.py"),
        *("CHANGELOG.md", "CONTRIBUTING.md", "CITATION.cff"),
    ):
        assert name in names
    assert not [n for n in names if "__pycache__" in n or n.endswith(".ckpt")]


def test_a_lean_environment_merges(installed, tmp_path):
    code = """
import numpy, safetensors.numpy as st
for number, name in enumerate(("base", "us", "de")):
    drawn = numpy.random.default_rng(number).normal(size=(4, 4))
    st.save_file({"w": drawn.astype("float32")}, f"{name}.safetensors")
"""
    run(installed / "python", "-c", code, cwd=tmp_path)
    assert "merge" in run(installed / "taskarith", "--help", cwd=tmp_path)
    assert "TIES" in run(installed / "taskarith", "rules", cwd=tmp_path)
    run(
        *(installed / "taskarith", "merge", "--base", "base.safetensors"),
        *("--finetuned", "us.safetensors", "de.safetensors"),
        *("--rule", "TIES", "-o", "merged.safetensors"),
        cwd=tmp_path,
    )
    assert (tmp_path / "merged.safetensors").is_file()
    here = run(
        installed / "python",
        "-c",
        "import importlib.util as u;"
        "print([m for m in ('torch', 'pandas', 'rich', 'soundfile',"
        " 'speechbrain') if u.find_spec(m)])",
        cwd=tmp_path,
    )
    assert here.strip() == "[]"


def test_a_lean_environment_lists_and_copies_fragments(installed, tmp_path):
    taskarith = installed / "taskarith"
    assert "models/looking_back" in run(taskarith, "fragments", cwd=tmp_path)
    run(taskarith, "fragments", "--copy", "copies", cwd=tmp_path)
    there = {
        path.relative_to(tmp_path / "copies"): path.read_bytes()
        for path in (tmp_path / "copies").rglob("*.yaml")
    }
    assert there == {
        path.relative_to(ROOT / "hparams"): path.read_bytes()
        for path in (ROOT / "hparams").rglob("*.yaml")
    }


def test_a_yaml_takes_fragments_of_the_wheel_by_name(built, tmp_path):
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    run(
        *(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"),
        *("--target", site, next(built.glob("*.whl"))),
        cwd=tmp_path,
    )
    (elsewhere / "train.yaml").write_text(
        "reduction: !apply:speechbrain_taskarith.fragment\n"
        "    {name: models/looking_back, d_model: 8, nhead: 2, d_ffn: 8}\n"
        "model: !new:torch.nn.ModuleList [[!ref <reduction.looking_back>]]\n"
    )
    (elsewhere / "train.py").write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(site)!r})\n"
        "from hyperpyyaml import load_hyperpyyaml\n"
        "from speechbrain_taskarith import fragments\n"
        "with open('train.yaml') as stream:\n"
        "    model = load_hyperpyyaml(stream)['model']\n"
        "print(fragments.__file__, type(model[0]).__name__)\n"
    )
    said = run(sys.executable, "train.py", cwd=elsewhere)
    where, made = said.split()[-2:]
    assert Path(where).is_relative_to(site) and made == "LookingBack"
