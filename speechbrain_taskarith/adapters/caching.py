"""Weights computed from parameters, kept as long as these stay the same."""

import torch


class DerivedWeights:
    """Remembers what was computed from parameters that do not change.

    A frozen bank's weights are stacked once, not at every batch. Whether
    the parameters are the same is read off their addresses and version
    counters, which every in-place operation of torch moves.

    Example
    -------
    >>> weight, calls = torch.nn.Parameter(torch.ones(2)), []
    >>> derived = DerivedWeights()
    >>> def double():
    ...     calls.append(1)
    ...     return weight * 2
    >>> with torch.no_grad():
    ...     _ = derived.get("w", [weight], double)
    ...     _ = derived.get("w", [weight], double)
    ...     weight.add_(1)
    ...     derived.get("w", [weight], double), len(calls)
    Parameter containing:
    tensor([2., 2.], requires_grad=True)
    (tensor([4., 4.]), 2)
    """

    def __init__(self):
        self._kept = {}

    def __deepcopy__(self, memo):
        # A copy's parameters have other addresses; it computes its own.
        return type(self)()

    def __getstate__(self):
        return {"_kept": {}}

    def clear(self):
        """Forget everything."""
        self._kept.clear()

    def get(self, key, parameters, compute):
        """Return the derived weights, computed anew where needed.

        Arguments
        ---------
        key : hashable
            What they are called.
        parameters : sequence of torch.Tensor
            All that they depend on.
        compute : callable
            Takes nothing, returns them.

        Returns
        -------
        object
            What `compute` returned: with a graph where gradients have to
            reach the parameters (then nothing is kept), without otherwise.
        """
        # A compiled graph has the computation in it.
        if torch.compiler.is_compiling() or (
            torch.is_grad_enabled() and any(p.requires_grad for p in parameters)
        ):
            return compute()
        versions = [(p.data_ptr(), p._version, p.dtype) for p in parameters]
        if key in self._kept and self._kept[key][0] == versions:
            return self._kept[key][1]
        # Made under inference_mode, they could not be saved for a later
        # backward pass; made under autocast, they would stay in half.
        device = parameters[0].device.type if parameters else "cpu"
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            torch.autocast(device, enabled=False),
        ):
            value = compute()
        self._kept[key] = (versions, value)
        return value
