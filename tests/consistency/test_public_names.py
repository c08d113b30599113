"""The names and signatures that users rely on are still there.

They are written down in `api/<room>.pyi`, one stub a room; arguments may be
added with defaults, nothing may be renamed.
"""

import ast
import importlib
import inspect
from pathlib import Path

import pytest
from house import PACKAGE

STUBS = sorted((Path(__file__).parent / "api").glob("*.pyi"))


def stub_entries():
    """Yield `(room, qualified name, node)` of every stub, methods too."""
    for stub in STUBS:
        for node in ast.parse(stub.read_text(encoding="utf-8")).body:
            yield stub.stem, node.name, node
            for member in getattr(node, "body", []):
                if isinstance(member, ast.AnnAssign):
                    yield stub.stem, f"{node.name}.{member.target.id}", member
                elif isinstance(member, ast.FunctionDef):
                    yield stub.stem, f"{node.name}.{member.name}", member


def resolve(room, name):
    """Return an object by its name in a room, as users import it."""
    found = importlib.import_module(f"speechbrain_taskarith.{room}")
    for part in name.split("."):
        found = getattr(found, part)
    return found


ENTRIES = [
    pytest.param(room, name, node, id=f"{room}.{name}")
    for room, name, node in stub_entries()
]


@pytest.mark.parametrize("room, name, node", ENTRIES)
def test_public_name_has_its_signature(room, name, node):
    if isinstance(node, ast.AnnAssign):
        owner, _, attribute = name.rpartition(".")
        assert is_attribute(resolve(room, owner), attribute), name
    elif isinstance(node, ast.ClassDef):
        assert inspect.isclass(resolve(room, name)), name
    else:
        compare(name, node.args, resolve(room, name))


def is_attribute(owner, name):
    """Tell whether instances have an attribute (set in `__init__` too)."""
    if hasattr(owner, name) or name in getattr(owner, "__annotations__", {}):
        return True
    return f"self.{name}" in inspect.getsource(owner.__init__)


def compare(name, expected, found):
    """Assert that a callable takes what its stub says."""
    actual = list(inspect.signature(found).parameters.values())
    free = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    given = {p.name: p for p in actual}
    positional = [a.arg for a in expected.args if a.arg not in ("self", "cls")]
    there = [
        p.name
        for p in actual
        if p.kind == p.POSITIONAL_OR_KEYWORD and p.name not in ("self", "cls")
    ]
    assert there[: len(positional)] == positional, (
        f"{name}: expected the arguments {positional}, found {there}"
    )
    wanted = defaults(expected)
    for argument in [*positional, *(a.arg for a in expected.kwonlyargs)]:
        assert argument in given, f"{name}: no argument {argument}"
        check_default(name, given[argument], wanted)
    known = {a.arg for a in (*expected.args, *expected.kwonlyargs)}
    added = [
        p.name
        for p in actual
        if p.name not in known
        and p.name not in ("self", "cls")
        and p.default is p.empty
        and p.kind not in free
    ]
    # A stub without any argument fixes the name only.
    if positional or expected.kwonlyargs:
        assert not added, f"{name}: new arguments need defaults: {added}"


def defaults(expected):
    """Return `{argument: node of its default}` of a stub."""
    behind = expected.args[len(expected.args) - len(expected.defaults) :]
    table = dict(zip([a.arg for a in behind], expected.defaults))
    for argument, node in zip(expected.kwonlyargs, expected.kw_defaults):
        if node is not None:
            table[argument.arg] = node
    return table


def check_default(name, parameter, wanted):
    node = wanted.get(parameter.name)
    if node is None:
        return
    assert parameter.default is not parameter.empty, (
        f"{name}: {parameter.name} has lost its default"
    )
    value = ast.literal_eval(node)
    if value is not ...:
        assert parameter.default == value, (
            f"{name}: {parameter.name}={parameter.default!r}, it was {value!r}"
        )


@pytest.mark.parametrize("stub", STUBS, ids=lambda path: path.stem)
def test_everything_fixed_is_exported(stub):
    room = importlib.import_module(f"speechbrain_taskarith.{stub.stem}")
    tree = ast.parse(stub.read_text(encoding="utf-8"))
    missing = {node.name for node in tree.body} - set(room.__all__)
    assert not missing, f"{stub.stem}.__all__ lacks {sorted(missing)}"


@pytest.mark.parametrize(
    "room",
    [p.parent.name for p in sorted(PACKAGE.glob("*/__init__.py"))],
)
def test_every_exported_name_resolves(room):
    module = importlib.import_module(f"speechbrain_taskarith.{room}")
    for name in getattr(module, "__all__", ()):
        getattr(module, name)
