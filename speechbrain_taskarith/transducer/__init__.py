"""Streaming transducers: loss, HAT, MinWER, Emformer, search, transfer.

Names are imported when first used, so that a recipe pays for what it uses.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
