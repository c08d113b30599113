"""What the consistency tests read: the checkout's files and the rooms."""

import ast
import fnmatch
import re
import shutil
import subprocess
from functools import lru_cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "speechbrain_taskarith"
RECIPES = ROOT / "recipes"
HPARAMS = ROOT / "hparams"

# Rooms that stand side by side and never import one another.
METHODS = ("vectors", "adapters", "transducer", "translation")
ROOMS = ("brains", "data", "metrics", *METHODS)

# Left out where there is no git to ask: what .gitignore names.
_NEVER = (
    ".git",
    ".venv*",
    "__pycache__",
    "*.egg-info",
    "build",
    "dist",
    ".*_cache",
    ".hypothesis",
    "results",
    ".partial-*",
)


@lru_cache(maxsize=1)
def repository_files():
    """Return the files that are tracked, or would be by `git add .`.

    Where git or its folder is missing (an unpacked archive), the tree is
    walked instead, without what `.gitignore` names.
    """
    if shutil.which("git") and (ROOT / ".git").exists():
        listed = subprocess.run(
            ["git", "ls-files", "-z", "-co", "--exclude-standard"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        if listed.returncode == 0 and listed.stdout:
            paths = [ROOT / name for name in listed.stdout.split("\0") if name]
            return tuple(sorted(p for p in set(paths) if p.is_file()))
    return tuple(sorted(_walk(ROOT)))


def _walk(folder):
    for path in folder.iterdir():
        if any(fnmatch.fnmatch(path.name, pattern) for pattern in _NEVER):
            continue
        if path.is_dir() and not path.is_symlink():
            yield from _walk(path)
        elif path.is_file():
            yield path


def files(*suffixes, under=ROOT):
    """Return the repository's files of some suffixes in a folder, sorted."""
    return [
        path
        for path in repository_files()
        if path.suffix in suffixes and path.is_relative_to(under)
    ]


def shown(path):
    """Return a path as it reads from the checkout's root."""
    return str(Path(path).relative_to(ROOT))


def pages_before(page):
    """Return the pages that a page's examples go on from, the first first.

    A page names the one before it: `<!-- after: task_vectors.md -->`.
    """
    named = re.search(r"^<!-- after: (\S+) -->$", page.read_text("utf-8"), re.M)
    if not named:
        return []
    before = page.parent / named[1]
    return [*pages_before(before), before]


def parse(path):
    """Return a Python file's syntax tree."""
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def recipe_folders():
    """Return every `recipes/<Dataset>/<Task>/<method>` there is."""
    return sorted(
        {path.parent for path in files(".py") if _is_train_script(path)}
    )


def _is_train_script(path):
    inside = path.is_relative_to(RECIPES)
    return inside and path.name.startswith("train") and not path.is_symlink()
