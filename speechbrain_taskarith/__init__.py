"""SpeechBrain plugin: task vectors, adapters, transducers and translation.

Rooms are imported by name, so that what a recipe does not use costs nothing::

    from speechbrain_taskarith.vectors import TaskVector, TIES
"""

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
