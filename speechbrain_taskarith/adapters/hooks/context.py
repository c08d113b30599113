"""What the calling context has chosen, for compiled graphs as well.

`torch.compile` cannot read a context variable. It can read an attribute of a
module, and looks at every call whether it still is what a graph was made for:
`around` and `in_backward` are such attributes, and computed.
"""

import contextvars

import torch

#: The choices of the `with` blocks around: (name of the route, its `Chosen`,
#: the next), or None.
AROUND: contextvars.ContextVar = contextvars.ContextVar(
    "adapters in use", default=None
)


def __getattr__(name):
    if name == "around":
        return AROUND.get()
    if name == "in_backward":  # autograd runs a backward pass in this thread
        return torch._C._current_graph_task_id() != -1
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
