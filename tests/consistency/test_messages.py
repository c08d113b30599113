"""Messages speak of what a user knows: no private name, no inner class."""

import ast
import re
from functools import lru_cache

from house import PACKAGE, files, parse, shown

PRIVATE = re.compile(r"(?<![\w`'\"./*{-])_[a-z]\w+")


def public_names():
    """Return the names that the rooms export."""
    found = set()
    for stub in files(".pyi", under=PACKAGE):
        text = stub.read_text(encoding="utf-8")
        found |= set(re.findall(r"(\w+) as \1", text))
    return found


@lru_cache(maxsize=1)
def inner_classes():
    """Return the names of classes that no room exports."""
    found = {
        node.name
        for path in files(".py", under=PACKAGE)
        for node in ast.walk(parse(path))
        if isinstance(node, ast.ClassDef)
    }
    # One word may be an English one: `Edit`, `Source`.
    found = {name for name in found if len(re.findall("[A-Z]", name)) > 1}
    return found - public_names()


def texts(tree):
    """Yield `(line, text)` of a file's texts that are no docstrings."""
    documented = (
        ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef
    )  # fmt: skip
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, documented)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            if id(node) not in docstrings and " " in node.value:
                yield node.lineno, node.value


def internals(tree, inner):
    """Return the texts that name something of the inside."""
    return [
        f"line {line}: {text[:70]!r}"
        for line, text in texts(tree)
        if PRIVATE.search(text) or set(re.findall(r"\w+", text)) & inner
    ]


def test_messages_name_nothing_of_the_inside():
    found = {
        shown(path): internals(parse(path), inner_classes())
        for path in files(".py", under=PACKAGE)
    }
    assert {path: lines for path, lines in found.items() if lines} == {}


def test_the_check_finds_what_it_looks_for():
    code = '"""A _docstring."""\nraise ValueError("call _fold of InnerPart")\n'
    assert len(internals(ast.parse(code), {"InnerPart"})) == 1
    assert internals(ast.parse('x = "the InnerPart"'), {"InnerPart"})
    assert internals(ast.parse('x = "a any_base b"'), {"InnerPart"}) == []
