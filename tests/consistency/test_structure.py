"""No import circle, no crowded package, no file that holds too little.

An import inside a function counts like one at the top, and a name taken from
a room's facade counts as an import of the file that defines it.
"""

import ast
from functools import lru_cache

import pytest
from house import PACKAGE, files, parse, shown
from test_import_arrows import imported_modules

NAME = "speechbrain_taskarith"
MOST_FILES = 9


def module_name(path):
    """Return a file's dotted name; a package's for its `__init__`."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@lru_cache(maxsize=1)
def modules():
    """Return `{dotted name: path}` of the package."""
    return {module_name(p): p for p in files(".py", under=PACKAGE)}


@lru_cache(maxsize=1)
def facades():
    """Return `{package.public name: module that defines it}`."""
    found = {}
    for stub in files(".pyi", under=PACKAGE):
        package = module_name(stub)
        for node in parse(stub).body:
            if isinstance(node, ast.ImportFrom) and node.level == 1:
                for alias in node.names:
                    target = f"{package}.{node.module}"
                    found[f"{package}.{alias.name}"] = target
    # One facade may pass on another's names.
    for name, target in found.items():
        found[name] = found.get(f"{target}.{name.rpartition('.')[2]}", target)
    return found


def defined_in(name):
    """Return the module that an imported dotted name comes from."""
    while name not in modules():
        if name in facades():
            return facades()[name]
        name = name.rpartition(".")[0]
        if not name:
            return None
    return name


@lru_cache(maxsize=1)
def graph():
    """Return `{module: modules it imports}` without the package's `__init__`."""
    found = {}
    for name, path in modules().items():
        targets = map(defined_in, imported_modules(path, parse(path)))
        found[name] = {t for t in targets if t and t not in (name, NAME)}
    return found


def circles(arrows):
    """Return the strongly connected groups of a graph (Tarjan 1972)."""
    index, low, stack, groups = {}, {}, [], []

    def visit(node):
        index[node] = low[node] = len(index)
        stack.append(node)
        for target in sorted(arrows.get(node, ())):
            if target not in index:
                visit(target)
                low[node] = min(low[node], low[target])
            elif target in stack:
                low[node] = min(low[node], index[target])
        if low[node] == index[node]:
            at = stack.index(node)
            groups.append(stack[at:])
            del stack[at:]

    for node in sorted(arrows):
        if node not in index:
            visit(node)
    return [sorted(group) for group in groups if len(group) > 1]


def test_no_import_circle():
    assert circles(graph()) == []


def test_circles_are_found():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == [["b", "c"]]
    assert circles({"a": {"b", "c"}, "b": {"c"}}) == []


def test_a_facade_leads_to_the_file():
    assert defined_in(f"{NAME}.vectors.open_state").endswith("states.readers")
    assert facades(), "no stub was read"


@pytest.mark.parametrize(
    "folder",
    sorted({p.parent for p in files(".py", under=PACKAGE)}),
    ids=shown,
)
def test_no_package_is_crowded(folder):
    inside = [p.name for p in folder.glob("*.py") if p.name != "__init__.py"]
    assert len(inside) <= MOST_FILES, f"{len(inside)} files: {sorted(inside)}"
