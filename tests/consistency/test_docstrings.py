"""Docstrings say what goes in and what comes out, and show it.

This holds for what users call: the names that a room exports, and the public
methods that their classes define. Other code says what it does in one line,
or its name does.
"""

import ast
import importlib
import inspect
import re
import textwrap

import pytest
from house import PACKAGE, ROOMS, files, parse, shown

# "As `FineTuning.before_task`." or "(see `array`)": documented there.
DELEGATES = re.compile(r"\b(?:[Ss]ee|[Aa]s)\s+`[\w.]+`")


def public_definitions(body, prefix=""):
    """Yield `(qualified name, node, class or None)` of what is public."""
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            if not node.name.startswith("_"):
                yield prefix + node.name, node
        elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield prefix + node.name, node
            yield from public_definitions(node.body, f"{prefix}{node.name}.")
        elif isinstance(node, (ast.If, ast.Try)):
            yield from public_definitions(node.body, prefix)


def section(docstring, title):
    """Return the lines of a docstring's section, or None."""
    found = re.search(
        rf"^[ ]*{title}\n[ ]*-{{3,}}[ ]*$(.*?)(?=^[ ]*[A-Z][a-z]+\n[ ]*---|\Z)",
        docstring,
        re.M | re.S,
    )
    return found[1] if found else None


def documented(block):
    """Return the argument names that an `Arguments` section describes.

    Each stands at the section's own indent as `name : type`, or as
    `name, name` where the text below says all ("See `Rule`").
    """
    lines = [line for line in block.splitlines() if line.strip()]
    indent = min((len(n) - len(n.lstrip()) for n in lines), default=0)
    names = set()
    for line in lines:
        found = re.match(rf" {{{indent}}}(\*{{0,2}}\w[\w*, ]*?)\s*(:|$)", line)
        if found:
            names |= {n.strip().lstrip("*") for n in found[1].split(",")}
    return names


def arguments_of(node):
    """Return a function's argument names, without self and private ones."""
    a = node.args
    every = [*a.posonlyargs, *a.args, *a.kwonlyargs]
    every += [extra for extra in (a.vararg, a.kwarg) if extra]
    names = [argument.arg for argument in every]
    return [n for n in names if n not in ("self", "cls") and n[0] != "_"]


def gives_something(node):
    """Tell whether a function returns (or yields) a value."""
    inner = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ClassDef)
    todo = list(node.body)
    while todo:
        part = todo.pop()
        if isinstance(part, inner):
            continue
        if isinstance(part, (ast.Yield, ast.YieldFrom)):
            return True
        if isinstance(part, ast.Return) and part.value is not None:
            if not isinstance(part.value, ast.Constant) or part.value.value:
                return True
        todo.extend(ast.iter_child_nodes(part))
    return False


def _decorators(node):
    names = [getattr(d, "func", d) for d in node.decorator_list]
    return {getattr(d, "attr", getattr(d, "id", None)) for d in names}


# Hooks that a base class calls, not users: SpeechBrain documents them.
HOOKS = {
    *("compute_forward", "compute_objectives", "on_stage_start"),
    *("on_stage_end", "on_fit_start", "on_fit_batch_end", "on_evaluate_start"),
    *("init_optimizers", "fit_batch", "evaluate_batch", "make_dataloader"),
    *("extra_repr", "state_dict", "load_state_dict"),
}


def faults(source):
    """Yield what is wrong with the docstrings of a definition's source."""
    for name, node in public_definitions(ast.parse(source).body):
        where = f"{node.lineno}: {name}"
        text = ast.get_docstring(node) or ""
        if name.rpartition(".")[2] in HOOKS:
            continue
        if not text:
            yield f"{where} has no docstring"
        elif DELEGATES.search(text) and not isinstance(node, ast.ClassDef):
            continue
        else:
            for fault in _incomplete(node, text):
                yield f"{where} {fault}"


def _incomplete(node, text):
    if isinstance(node, ast.ClassDef):
        expected = _constructor_arguments(node)
    else:
        expected = arguments_of(node)
    if expected:
        block = section(text, "Arguments")
        if block is None:
            yield "has no Arguments section"
        elif missing := [n for n in expected if n not in documented(block)]:
            yield f"does not document {', '.join(missing)}"
    plain = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    is_property = {"property", "cached_property", "setter"} & (
        _decorators(node) if plain else set()
    )
    if plain and not is_property and gives_something(node):
        if not any(section(text, t) for t in ("Returns", "Yields")):
            yield "returns something and has no Returns section"


def _constructor_arguments(node):
    for part in node.body:
        if isinstance(part, ast.FunctionDef) and part.name == "__init__":
            return arguments_of(part)
    is_record = "dataclass" in _decorators(node) or "NamedTuple" in {
        getattr(base, "id", None) for base in node.bases
    }
    if not is_record:
        return []
    return [
        part.target.id
        for part in node.body
        if isinstance(part, ast.AnnAssign)
        and not part.target.id.startswith("_")
    ]


@pytest.mark.parametrize("path", files(".py", under=PACKAGE), ids=shown)
def test_every_file_says_what_it_is_for(path):
    assert ast.get_docstring(parse(path)), shown(path)


def exported():
    """Yield `(room.name, object)` of what the rooms export."""
    for room in ROOMS:
        module = importlib.import_module(f"speechbrain_taskarith.{room}")
        for name in module.__all__:
            yield f"{room}.{name}", getattr(module, name)


@pytest.mark.parametrize(
    "found", [pytest.param(f, id=name) for name, f in exported()]
)
def test_docstrings_of_public_names_are_complete(found):
    if not (inspect.isclass(found) or inspect.isfunction(found)):
        return
    found = inspect.unwrap(found)
    source = textwrap.dedent(inspect.getsource(found))
    where = shown(inspect.getsourcefile(found))
    wrong = [f"{where}: {fault}" for fault in faults(source)]
    assert not wrong, "\n" + "\n".join(wrong)


# What functions return, not what users make: those examples show it.
RESULTS = {
    "data.ManifestError",
    "metrics.PairedBootstrap",
    "vectors.Edit",
    "vectors.MergeReport",
    "vectors.ScaleSearch",
}


def shows_an_example(found):
    """Tell whether an object, or a method of it, has a doctest."""
    texts = [inspect.getdoc(found) or ""]
    if inspect.isclass(found):
        for member in vars(found).values():
            member = getattr(member, "__func__", member)
            if inspect.isfunction(member):
                texts.append(member.__doc__ or "")
    return any(">>>" in text for text in texts)


def test_what_a_room_exports_shows_an_example():
    without = []
    for name, found in exported():
        shown_by_call = inspect.isclass(found) or inspect.isfunction(found)
        if shown_by_call and not shows_an_example(found):
            without.append(name)
    assert set(without) <= RESULTS, sorted(set(without) - RESULTS)


def test_the_checks_find_what_they_look_for():
    bad = (
        '"""Nothing."""\n'
        "def one(a):\n"
        '    """Has no sections."""\n'
        "    return a\n"
        "class Two:\n"
        '    """Two.\n\n    Arguments\n    ---------\n    b : int\n'
        '        B.\n    """\n'
        "    def __init__(self, b, c):\n"
        "        pass\n"
        "    def three(self):\n"
        "        pass\n"
    )
    assert [fault.partition(": ")[2] for fault in faults(bad)] == [
        "one has no Arguments section",
        "one returns something and has no Returns section",
        "Two does not document c",
        "Two.three has no docstring",
    ]
