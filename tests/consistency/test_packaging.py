"""What is installed is what stands in the checkout, and nothing else."""

import configparser
import importlib
import re

import pytest
from house import HPARAMS, PACKAGE, ROOT, files

import speechbrain_taskarith


@pytest.fixture(scope="module")
def setup():
    """The content of setup.cfg."""
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    return parser


def lines(text):
    """Return the lines of a multi-line value."""
    return [line.strip() for line in text.splitlines() if line.strip()]


def test_packages_are_the_folders(setup):
    folders = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for path in files(".py", under=PACKAGE)
    }
    fragments = {"speechbrain_taskarith.hparams"} if HPARAMS.is_dir() else set()
    listed = set(lines(setup["options"]["packages"]))
    assert listed == folders | fragments


def test_every_package_folder_has_an_init():
    folders = {path.parent for path in files(".py", under=PACKAGE)}
    assert [
        f for f in sorted(folders) if not (f / "__init__.py").exists()
    ] == []


def test_console_scripts_resolve(setup):
    scripts = lines(setup["options.entry_points"]["console_scripts"])
    for script in scripts:
        module, _, function = script.partition("=")[2].strip().partition(":")
        assert callable(getattr(importlib.import_module(module), function))


def test_every_extra_named_in_an_error_exists(setup):
    extras = set(setup["options.extras_require"])
    for path in files(".py", ".md"):
        named = re.findall(
            r"speechbrain_taskarith\[([\w, -]+)\]", path.read_text("utf-8")
        )
        for extra in ",".join(named).replace(" ", "").split(","):
            assert not extra or extra in extras, f"{path}: no extra {extra!r}"


def test_pins_lie_in_the_ranges(setup):
    """constraints.txt pins the pair that setup.cfg allows."""
    from packaging.requirements import Requirement

    ranges = {}
    for line in lines(setup["options"]["install_requires"]):
        requirement = Requirement(line)
        ranges[requirement.name] = requirement.specifier
    pins = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    pins = [line for line in pins if line and not line.startswith("#")]
    assert pins
    for line in pins:
        name, _, version = line.partition("==")
        assert version in ranges[name], f"{line} is outside of {ranges[name]}"


def test_version_is_a_release():
    assert re.fullmatch(r"\d+\.\d+\.\d+", speechbrain_taskarith.__version__)
