"""Every recipe has the form of an upstream recipe."""

import ast
import csv
import re
from pathlib import Path

import pytest
from house import RECIPES, ROOT, files, parse, recipe_folders, shown
from speechbrain.utils.run_opts import RunOptions

TABLES = sorted((ROOT / "tests" / "recipes").glob("*.csv"))
COLUMNS = (
    "Task,Dataset,Script_file,Hparam_file,Data_prep_file,Readme_file,"
    "Result_url,HF_repo,test_debug_flags,test_debug_checks,performance"
).split(",")

# What a recipe's table of results says, by task; others give the WER.
MEASURES = {"ST": "BLEU"}


def rows():
    """Return all rows of all tables of recipes."""
    found = []
    for table in TABLES:
        with open(table, newline="", encoding="utf-8") as stream:
            found += list(csv.DictReader(stream, skipinitialspace=True))
    return found


def test_there_are_recipes():
    assert recipe_folders(), "no recipe: nothing below would be checked"
    assert TABLES


@pytest.mark.parametrize("folder", recipe_folders(), ids=shown)
def test_recipe_folder_is_whole(folder):
    parts = folder.relative_to(RECIPES).parts
    assert len(parts) == 3, "recipes/<Dataset>/<Task>/<method>"
    for name in ("train.py", "README.md", "extra_requirements.txt"):
        assert (folder / name).is_file(), f"{shown(folder)} lacks {name}"
    assert list((folder / "hparams").glob("*.yaml"))
    needs = (folder / "extra_requirements.txt").read_text(encoding="utf-8")
    assert re.search(r"^speechbrain_taskarith\b", needs, re.M), needs
    links = [p for p in folder.glob("*_prepare.py") if p.is_symlink()]
    assert links, f"{shown(folder)}: no link to the preparation script"
    for link in links:
        target = link.resolve()
        assert target.is_file(), f"{shown(link)} leads nowhere"
        assert target.parent == RECIPES / parts[0]
        assert not Path(link.readlink()).is_absolute()


@pytest.mark.parametrize("folder", recipe_folders(), ids=shown)
def test_readme_says_how_to_run_and_what_comes_out(folder):
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert re.search(r"^# ", text, re.M)
    assert "python train.py hparams/" in text
    task = folder.relative_to(RECIPES).parts[1]
    measure = MEASURES.get(task, "WER")
    table = re.search(rf"^\|.*{measure}", text, re.M)
    assert table, f"no table of results in {measure}"
    for name in re.findall(r"hparams/[\w.-]+\.yaml", text):
        assert (folder / name).is_file(), f"README names {name}"


def test_table_columns_are_upstreams():
    for table in TABLES:
        with open(table, newline="", encoding="utf-8") as stream:
            assert next(csv.reader(stream)) == COLUMNS, shown(table)


@pytest.mark.parametrize("row", rows(), ids=lambda row: row["Hparam_file"])
def test_listed_recipe_exists(row):
    for column in ("Script_file", "Hparam_file", "Readme_file"):
        assert (ROOT / row[column]).is_file(), row[column]
    assert (ROOT / row["Data_prep_file"]).is_file(), row["Data_prep_file"]
    assert row["test_debug_flags"].strip(), "upstream runs every recipe"
    assert None not in row and None not in row.values()


@pytest.mark.parametrize("row", rows(), ids=lambda row: row["Hparam_file"])
def test_debug_flags_are_known(row):
    text = (ROOT / row["Hparam_file"]).read_text(encoding="utf-8")
    known = set(re.findall(r"^(\w+):", text, re.M))
    known |= set(RunOptions.__dataclass_fields__)
    given = re.findall(r"--(\w+)", row["test_debug_flags"])
    assert set(given) <= known, set(given) - known
    needed = re.findall(r"^(\w+):.*!PLACEHOLDER", text, re.M)
    assert set(needed) <= set(given), "flags leave no placeholder open"


@pytest.mark.parametrize("row", rows(), ids=lambda row: row["Hparam_file"])
def test_debug_checks_name_what_every_run_leaves(row):
    found = re.fullmatch(r"file_exists=\[(.+)\]", row["test_debug_checks"])
    names = found[1].split(",")
    script = Path(row["Script_file"]).name
    assert {"log.txt", "hyperparams.yaml", "env.log", script} <= set(names)


def test_every_hparams_file_is_listed():
    listed = {row["Hparam_file"] for row in rows()}
    there = {
        shown(path)
        for path in files(".yaml", under=RECIPES)
        if "hparams" in path.parts and "models" not in path.parts
    }
    assert there == listed


@pytest.mark.parametrize(
    "path",
    [p for p in files(".py", under=RECIPES) if p.name.startswith("train")],
    ids=shown,
)
def test_script_starts_as_upstream_scripts_do(path):
    text = path.read_text(encoding="utf-8")
    assert re.match(r'(#!/usr/bin/env python3?\n)?r?"""', text)
    assert "if __name__ ==" in text
    called = {
        getattr(node.func, "attr", getattr(node.func, "id", None))
        for node in _calls(parse(path))
    }
    for name in ("parse_arguments", "load_hyperpyyaml"):
        assert name in called, f"{shown(path)} never calls {name}"
    assert "create_experiment_directory" in called
    assert "run_on_main" in called, "preparation runs on the main process"


def _calls(tree):
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call)]


@pytest.mark.parametrize("path", files(".py", under=RECIPES), ids=shown)
def test_a_brain_of_a_recipe_saves_after_whole_updates(path):
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.ClassDef):
            bases = [ast.unparse(base) for base in node.bases]
            if {"sb.Brain", "sb.core.Brain", "Brain"} & set(bases):
                assert "WholeUpdates" in bases, f"{node.name} in {shown(path)}"
