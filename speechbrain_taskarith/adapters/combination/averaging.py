"""Averages of adapters: all the same, or with learned weights."""

import torch

from speechbrain_taskarith.adapters.combination.base import Combination
from speechbrain_taskarith.adapters.combination.folding import (
    FoldedAverage,
    product,
)


class _Average(Combination):
    """o = sum_n w_n a_n, with the same weights at every frame."""

    per_adapter = ()

    def _as_loop(self, x):
        outputs = [self.bank[name](x) for name in self.names]
        return sum(w * a for w, a in zip(self.weights(), outputs))

    def _as_stacked(self, x):
        each = self.bank.each(x, self.names)
        return torch.einsum("...nw,n->...w", each, self.weights())

    def _as_collapsed(self, x):
        stack, weights = self.bank.stacked(self.names), self.weights()
        hidden = self.bank.hidden(x, stack)
        # Weighting the hidden entries, and not `up`, spares the weights'
        # gradient a matrix product over all frames.
        gain = weights.repeat_interleave(stack.width)
        combined = torch.matmul(hidden * gain, stack.up)
        return combined + torch.matmul(weights, stack.beta)

    def _as_folded(self, x):
        bank, folded = self.bank, self.folded()
        hidden = product(bank.normalise(x), folded.down, folded.shift)
        return product(bank.activation(hidden), folded.up, folded.bias)

    def _fold(self):
        stack, weights = self.bank.stacked(self.names), self.weights()
        up = stack.up * weights.repeat_interleave(stack.width).unsqueeze(-1)
        return FoldedAverage(
            stack.down,
            stack.shift,
            up.t().contiguous(),
            torch.matmul(weights, stack.beta),
        )


class AdapterMean(_Average):
    """The mean of the adapters' outputs, `o = 1/N sum_n a_n` ("Avg").

    Nothing to train in `ST-A` unless it has an LN. Exactly one adapter of
    width `N b`.

    Arguments
    ---------
    bank : AdapterBank or None
        Whose adapters; None makes a template for `insert_adapters`.
    names, ln_init, form, recompute
        See `Combination`.

    Example
    -------
    >>> from speechbrain_taskarith.adapters import AdapterBank
    >>> bank = AdapterBank(["news", "calls"], d_model=8, bottleneck=2)
    >>> x = torch.randn(3, 5, 8)
    >>> torch.equal(AdapterMean(bank)(x), x)  # fresh adapters add nothing
    True
    """

    def weights(self):
        """Return 1/N for each adapter, as `Combination.weights`."""
        return torch.full(
            (len(self.names),),
            1.0 / len(self.names),
            dtype=self.bank.dtype,
            device=self.bank.device,
        )


class AdapterWeightedMean(_Average):
    """One learned weight for each adapter and layer ("WAvg").

    `o = sum_n w_n a_n`. Exactly one adapter of width `N b`.

    Arguments
    ---------
    bank : AdapterBank or None
        Whose adapters; None makes a template for `insert_adapters`.
    normalize : bool
        True: `w = softmax(logits)`, which start at 0. False: free weights,
        which start at 1/N.
    names, ln_init, form, recompute
        See `Combination`.

    Example
    -------
    >>> from speechbrain_taskarith.adapters import AdapterBank
    >>> bank = AdapterBank(["news", "calls"], d_model=8, bottleneck=2)
    >>> AdapterWeightedMean(bank).weights().tolist()
    [0.5, 0.5]
    """

    per_adapter = ("logits",)

    def __init__(
        self,
        bank=None,
        normalize=True,
        *,
        names=None,
        ln_init=None,
        form="auto",
        recompute=False,
    ):
        super().__init__(
            bank,
            names=names,
            ln_init=ln_init,
            form=form,
            recompute=recompute,
        )
        self.normalize = normalize
        if bank is not None:
            start = 0.0 if normalize else 1.0 / len(self.names)
            start = torch.full((len(self.names),), start)
            self.logits = torch.nn.Parameter(start)

    def settings(self):
        """As `Combination.settings`."""
        return {"normalize": self.normalize, **super().settings()}

    def weights(self):
        """Return the learned weights, as `Combination.weights`."""
        return self.logits.softmax(0) if self.normalize else self.logits
