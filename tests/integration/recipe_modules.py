"""The modules of a recipe, which have everyday names."""

import contextlib
import importlib
import sys


@contextlib.contextmanager
def modules_of(folder):
    """Import from a recipe's folder; yields `importlib.import_module`.

    Afterwards nothing of it is left for the tests of another recipe.
    """
    names = {path.stem for path in folder.glob("*.py")}
    before = {n: sys.modules.pop(n) for n in names if n in sys.modules}
    path = list(sys.path)
    sys.path.insert(0, str(folder))
    try:
        yield importlib.import_module
    finally:
        sys.path[:] = path
        for name in names:
            sys.modules.pop(name, None)
        sys.modules.update(before)
