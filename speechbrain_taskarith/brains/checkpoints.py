"""The checkpointer of our Brains, which lives beside the checkpoint tools.

Authors
 * speechbrain_taskarith contributors 2026
"""

from speechbrain_taskarith.vectors.atomic_checkpointer import (
    AtomicCheckpointer,
)

__all__ = ["AtomicCheckpointer"]
