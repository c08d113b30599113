"""What a joint must fulfil so that its scores may be computed twice."""

import contextlib
import weakref

import torch
from torch.nn.modules import module as torch_module
from torch.nn.parallel import DistributedDataParallel

# Nodes that a joint is tried with: two draws of dropout masks would differ.
_ROWS = 8
# Joints that gave the same scores twice, and the mode they were in.
_STEADY = weakref.WeakKeyDictionary()


def refuse_dropout(joint):
    """Refuse a joint with a module of active dropout, by its name."""
    for name, module in joint.named_modules():
        active = module.training and getattr(module, "p", 0)
        if isinstance(module, torch.nn.modules.dropout._DropoutNd) and active:
            raise ValueError(
                f"the joint network has dropout ({name}, p={module.p}): its "
                "scores are computed twice and would differ. Apply dropout to "
                "the outputs of encoder and predictor instead"
            )


def overwritable(joint):
    """Tell whether nobody else sees the tensor that `joint.scores` returns."""
    watched = any(
        getattr(module, name) for module in joint.modules() for name in _HOOKS
    )
    return not watched and not any(
        getattr(torch_module, f"_global{name}", None) for name in _HOOKS
    )


_HOOKS = ("_forward_hooks", "_backward_hooks", "_backward_pre_hooks")


def autocast_options(device):
    """Return the present autocast, as options of one that keeps no casts.

    A cast that was made without gradient, and kept, would be used with one.
    """
    kind = device.type
    return {
        "device_type": kind,
        "dtype": torch.get_autocast_dtype(kind),
        "enabled": torch.is_autocast_enabled(kind),
        "cache_enabled": False,
    }


def try_joint(joint, encoder, predictor):
    """Compute some scores of projected outputs [..., J], to learn about them.

    Returns the number of scores V, and the tensors that need a gradient: the
    joint's parameters, and those that a function reads from elsewhere.
    Refuses a joint that gives other scores at the second time.
    """
    x, g = (part.detach().flatten(0, -2) for part in (encoder, predictor))
    count = min(_ROWS, len(x), len(g))
    x, g = x[:count], g[:count]
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.autocast(**autocast_options(encoder.device)))
        for part in joint.modules():
            if isinstance(part, DistributedDataParallel):
                # It would wait for the backward pass of this one.
                stack.enter_context(part.no_sync())
        if not torch.is_grad_enabled():
            return joint.scores(x, g).shape[-1], []
        began = torch.zeros((), requires_grad=True).clone().grad_fn
        scores = joint.scores(x, g)
        # Once a mode: to look at the result makes a GPU wait.
        if _STEADY.get(joint) != joint.training:
            with torch.no_grad():
                _check_steady(scores, joint.scores(x, g))
            _STEADY[joint] = joint.training
    found = {
        id(parameter): parameter
        for parameter in joint.parameters()
        if parameter.requires_grad
    }
    for leaf in _leaves(scores, began._sequence_nr()):
        found.setdefault(id(leaf), leaf)
    return scores.shape[-1], list(found.values())


def _check_steady(scores, again):
    same = torch.allclose(
        scores.float(), again.float(), 1e-3, 1e-4, equal_nan=True
    )
    if not same:
        raise ValueError(
            "the joint network gives other scores when it is called again with "
            "the same input (a functional dropout, RReLU?): its scores are "
            "computed twice. Apply dropout to the outputs of encoder and "
            "predictor instead"
        )


def _leaves(scores, began):
    """Yield what gradients of the scores go to, out of autograd's graph."""
    todo, seen = [scores.grad_fn], set()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if type(node).__name__ == "AccumulateGrad":
            yield node.variable
        elif node._sequence_nr() < began:
            raise ValueError(
                "the joint network reads a tensor with a gradient that was "
                f"computed before ({node.name()}): it would get none, as "
                "scores are computed anew in backward. Compute it inside the "
                "joint, from parameters"
            )
        else:
            todo += [parent for parent, _ in node.next_functions]
