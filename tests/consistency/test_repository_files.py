"""What must never be in the repository, and how long a file may be."""

import re
import subprocess
import sys

import pytest
import yaml
from house import ROOT, files, repository_files, shown

# Tests and benchmarks may go on longer: what they hold is a list.
LONGEST = {"speechbrain_taskarith": 500, "recipes": 500, "": 900}

BINARY = {
    *(".wav", ".flac", ".mp3", ".ogg", ".opus", ".sph"),
    *(".ckpt", ".pt", ".pth", ".bin", ".safetensors", ".npy", ".npz"),
    *(".zip", ".gz", ".tar", ".whl", ".pkl", ".so"),
}

# Written so that this file does not contain what it forbids.
MACHINE_PATH = re.compile(
    r"(?<![\w.~$}/])/(?:" + "work|opt|root|home|tmp|mnt|scratch|Users" + r")/\w"
)
OTHERS = {
    "a merge marker": re.compile(r"^(<{7}|>{7}|={7}) ?", re.M),
    "a package index": re.compile(r"(--index|extra-index|trusted-host)\b"),
    "a key": re.compile(
        r"(BEGIN [A-Z ]*PRIVATE KEY|gh[pous]_\w{20}|hf_\w{30})"
    ),
    "a debugger": re.compile(r"\b(breakpoint\(\)|pdb\.set_trace)"),
}


def _texts():
    for path in repository_files():
        if path.suffix in BINARY or path.suffix == ".png":
            continue
        yield pytest.param(path, id=shown(path))


@pytest.mark.parametrize("path", list(_texts()))
def test_file_is_clean_text(path):
    text = path.read_text(encoding="utf-8")
    found = [line for line in text.splitlines() if MACHINE_PATH.search(line)]
    assert not found, f"paths of one machine: {found}"
    for what, pattern in OTHERS.items():
        if path.name == "test_repository_files.py":
            continue
        assert not pattern.search(text), f"{shown(path)} contains {what}"
    assert "\r" not in text, "lines end in \\n"
    assert not text or text.endswith("\n"), "the last line ends, too"


def test_no_audio_weights_or_archives():
    found = [shown(p) for p in repository_files() if p.suffix in BINARY]
    assert not found, f"data does not belong here: {found}"


def test_no_large_file():
    large = [
        f"{shown(p)}: {p.stat().st_size}"
        for p in repository_files()
        if p.stat().st_size > 300_000
    ]
    assert not large, large


def test_no_file_is_too_long():
    long = {}
    for path in files(".py"):
        count = len(path.read_text(encoding="utf-8").splitlines())
        top = shown(path).split("/")[0]
        if count > LONGEST.get(top, LONGEST[""]):
            long[shown(path)] = count
    assert not long, f"one idea a file: too many lines: {long}"


def test_the_path_check_sees_what_it_should():
    slash = "/"
    for bad in ("cd {}work{}x", "'{}tmp{}a.ckpt'", "open({}root{}x)"):
        assert MACHINE_PATH.search(bad.format(slash, slash)), bad
    for good in ("results/work/x", "$TMP/tmp/x", "/proc/self", "/usr/bin/env"):
        assert not MACHINE_PATH.search(good), good


@pytest.mark.parametrize(
    "path", files(".yml", under=ROOT / ".github"), ids=shown
)
def test_github_reads_its_files(path):
    """The schemas of GitHub's workflow and form files, shipped by a package."""
    assert isinstance(yaml.safe_load(path.read_text("utf-8")), dict)
    if path.parent.name == "workflows":
        pytest.importorskip("check_jsonschema")
        command = [sys.executable, "-m", "check_jsonschema"]
        command += ["--builtin-schema", "vendor.github-workflows", str(path)]
        ran = subprocess.run(command, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stdout + ran.stderr


def test_what_ci_makes_is_in_the_makefile():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([\w-]+):", makefile, re.M))
    scripts = [*files(".yml", under=ROOT / ".github"), ROOT / ".ci" / "run"]
    for path in scripts:
        made = re.findall(
            r"\bmake (?:--[\w-]+ )?([\w-]+)", path.read_text("utf-8")
        )
        assert set(made) <= targets, shown(path)


def test_the_citation_names_the_papers():
    content = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    papers = {
        paper["url"].rpartition("/")[2] for paper in content["references"]
    }
    assert papers == {
        *("2406.02925", "2406.17935", "2310.13015", "2407.16664"),
        "2311.03810",
    }
    for paper in content["references"]:
        assert all(
            set(a) == {"family-names", "given-names"} for a in paper["authors"]
        )
