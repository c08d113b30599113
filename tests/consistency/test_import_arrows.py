"""Which room may import which, and what must stay out of a light start."""

import ast
import subprocess
import sys

import pytest
from house import METHODS, PACKAGE, RECIPES, ROOMS, ROOT, files, parse, shown

NAME = "speechbrain_taskarith"


def imported_modules(path, tree):
    """Yield the full name of everything a file imports, anywhere in it.

    Also inside functions, also relative, also through `import_module` and
    `__import__` with a constant name.
    """
    package = _package_of(path)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:
                parts = package[: len(package) - node.level + 1]
                module = ".".join([*parts, *filter(None, [module])])
            for alias in node.names:
                # `from . import rules` imports the module `rules`.
                yield f"{module}.{alias.name}"
        elif isinstance(node, ast.Call):
            yield from _called_import(node, package)


def _called_import(node, package):
    called = getattr(node.func, "attr", getattr(node.func, "id", None))
    if (
        called not in ("import_module", "__import__", "require")
        or not node.args
    ):
        return
    name = node.args[0]
    if isinstance(name, ast.Constant) and isinstance(name.value, str):
        dots = len(name.value) - len(name.value.lstrip("."))
        parts = package[: len(package) - dots + 1] if dots else ()
        yield ".".join([*parts, name.value.lstrip(".")])


def _package_of(path):
    if not path.is_relative_to(PACKAGE):
        return ()
    return path.relative_to(ROOT).parent.parts


def rooms_imported(path):
    """Return `{room: imported name}` of our rooms that a file imports."""
    found = {}
    for module in imported_modules(path, parse(path)):
        parts = module.split(".")
        if parts[0] == NAME and len(parts) > 1 and parts[1] in ROOMS:
            found[parts[1]] = module
    return found


def _may_import(room):
    """Return the rooms that a room may import, besides itself."""
    if room == "brains":
        return {"data", "metrics", *METHODS}
    if room in METHODS:
        return {"data", "metrics"}
    return {"data", "metrics"} if room in ("data", "metrics") else set()


@pytest.mark.parametrize("path", files(".py", under=PACKAGE), ids=shown)
def test_rooms_import_only_what_they_may(path):
    parts = path.relative_to(PACKAGE).parts
    room = parts[0].removesuffix(".py")
    if room in ("__main__", "commands"):
        allowed = {*METHODS, "data", "metrics"} - {"adapters"}
    elif room == "utils" or len(parts) == 1:
        allowed = set()
    else:
        allowed = _may_import(room) | {room}
    wrong = {r: m for r, m in rooms_imported(path).items() if r not in allowed}
    assert not wrong, (
        f"{shown(path)} imports {sorted(wrong.values())}; {room} may import "
        f"{sorted(allowed) or 'no room'} and utils"
    )


def test_only_recipes_import_brains():
    others = [
        shown(path)
        for path in files(".py")
        if path.is_relative_to(PACKAGE) or "benchmarks" in path.parts
        if not path.is_relative_to(PACKAGE / "brains")
        and not path.is_relative_to(RECIPES)
        if "brains" in rooms_imported(path)
    ]
    assert not others, f"only recipes compose brains, not {others}"


def test_the_reader_of_imports_sees_every_form():
    source = (
        "import speechbrain_taskarith.data.audio\n"
        "from . import rules\n"
        "from ..metrics import wer\n"
        "def later():\n"
        "    from speechbrain_taskarith.brains import CTCBrain\n"
        "    importlib.import_module('..adapters.bank', __package__)\n"
    )
    path = PACKAGE / "vectors" / "imagined.py"
    assert set(imported_modules(path, ast.parse(source))) == {
        f"{NAME}.data.audio",
        f"{NAME}.vectors.rules",
        f"{NAME}.metrics.wer",
        f"{NAME}.brains.CTCBrain",
        f"{NAME}.adapters.bank",
    }


@pytest.mark.parametrize(
    "module",
    [
        "speechbrain_taskarith",
        "speechbrain_taskarith.utils.files",
        "speechbrain_taskarith.utils.patterns",
        "speechbrain_taskarith.utils.progress",
        "speechbrain_taskarith.vectors",
        "speechbrain_taskarith.vectors.states.state",
        "speechbrain_taskarith.vectors.rules",
        "speechbrain_taskarith.vectors.merge",
        "speechbrain_taskarith.__main__",
    ],
)
def test_a_light_start_imports_no_heavy_package(module):
    heavy = ("torch", "torchaudio", "speechbrain", "transformers", "pandas")
    code = (
        f"import sys, {module}\n"
        f"print(*[m for m in {heavy!r} if m in sys.modules])"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip() == "", f"{module} imports {ran.stdout.strip()}"
