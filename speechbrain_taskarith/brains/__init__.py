"""Ready Brains and mixins: the other rooms inside `sb.Brain`'s hooks.

Names are imported when first used.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
