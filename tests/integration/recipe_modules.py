"""The modules of a recipe, which have everyday names."""

import contextlib
import importlib
import sys


@contextlib.contextmanager
def modules_of(folder):
    """Import from a recipe's folder; yields `importlib.import_module`.

    Afterwards nothing of it is left for the tests of another recipe.
    """
    modules = {path.stem for path in folder.glob("*.py")}
    packages = {path.parent.name for path in folder.glob("*/__init__.py")}

    def forget():
        found = [
            n for n in sys.modules if n.split(".")[0] in modules | packages
        ]
        return {name: sys.modules.pop(name) for name in found}

    before = forget()
    path = list(sys.path)
    sys.path.insert(0, str(folder))
    try:
        yield importlib.import_module
    finally:
        sys.path[:] = path
        forget()
        sys.modules.update(before)
