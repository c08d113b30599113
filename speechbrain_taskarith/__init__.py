"""SpeechBrain plugin: task vectors, adapters, transducers and translation.

Rooms are imported by name, so that what a recipe does not use costs nothing::

    from speechbrain_taskarith.vectors import TaskVector, TIES
"""

__version__ = "0.1.0"
