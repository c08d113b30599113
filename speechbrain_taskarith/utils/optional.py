"""Optional packages, imported where they are used."""

import importlib


def require(module, extra, purpose):
    """Import an optional package, or raise an ImportError with the remedy.

    `extra` is the extra of this plugin that installs it, e.g. `"plots"`;
    `purpose` is what needs it.

    Example
    -------
    >>> require("json", "plots", "reading").loads("[1]")
    [1]
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        # A package that is there but itself lacks something is another
        # fault, which this message would only hide.
        if error.name is None or not module.startswith(error.name):
            raise
        raise ImportError(
            f"{purpose} needs the package {module.split('.')[0]!r}: "
            f"pip install 'speechbrain_taskarith[{extra}]'"
        ) from error
