"""Optional packages: imported where used, with an error that names the extra."""

import importlib


def require(module, extra, purpose):
    """Import an optional package or say how to get it.

    Arguments
    ---------
    module : str
        What to import, e.g. `"matplotlib.pyplot"`.
    extra : str
        The extra of this plugin that installs it, e.g. `"plots"`.
    purpose : str
        What needs it, for the message.

    Returns
    -------
    module
        The imported module.

    Raises
    ------
    ImportError
        Naming the pip command that installs what is missing.

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
