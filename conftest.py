"""What doctests and tests both need before they are collected."""

import os

from speechbrain.utils.importutils import LazyModule

# Tests never ask a hub, and draw without a screen.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")

# hypothesis asks every loaded module for its `__file__`, and speechbrain's
# lazy modules answer by importing optional packages (k2 and the like), which
# fails where they are missing. An attribute of the class answers first.
LazyModule.__file__ = None
