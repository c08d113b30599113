"""Weights as vectors: read, subtract, merge, edit in sequence, choose a scale.

Names are imported when first used: streaming a merge needs no torch, and a
recipe pays for what it uses.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
