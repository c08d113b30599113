"""What all ways to combine adapters share: forms, LayerNorm, folding.

One mathematical function, four ways to compute it. `loop` runs adapter after
adapter and is the reference; `stacked` has one product for all of them and
holds [B, T, N, d]; `collapsed` never leaves the bottlenecks and is what
trains; `folded` multiplies frozen weights with one another beforehand.
"""

import torch
from torch.utils.checkpoint import checkpoint

from speechbrain_taskarith.adapters.caching import DerivedWeights
from speechbrain_taskarith.adapters.combination.folding import packed

#: How a combination may be computed; `auto` chooses by the gradients.
FORMS = ("auto", "loop", "stacked", "collapsed", "folded")

# Gain of the LayerNorm before the residual, at the start.
_GAINS = {"one": 1.0, "small": 0.1, "zero": 0.0}


class Combination(torch.nn.Module):
    """Adds a combination of a bank's adapters to the residual stream.

    `x + o`, or with `ln_init` `x + LN(o)`, where `o` is what the adapters
    give together. The bank is not a submodule: what belongs to the
    combination alone is what `ST-A` trains and what is saved with it.

    Arguments
    ---------
    bank : AdapterBank or None
        Whose adapters; None makes a template for `insert_adapters`.
    names : sequence of str or None
        Which of them, in this order; None for all that there are now.
        Adapters that come later are not combined.
    ln_init : str or None
        Gain of the LN before the residual at the start: `"one"`, `"small"`
        (0.1) or `"zero"` (starts as the base); None has no LN.
    form : str
        One of `auto`, `loop`, `stacked`, `collapsed`, `folded`. `auto`
        takes `collapsed` where parameters get gradients and `folded`
        elsewhere.
    recompute : bool
        True holds nothing but the input for the backward pass and computes
        the rest again then: least memory, a third more time.

    Raises
    ------
    ValueError
        Another form or start, or names that the bank lacks.
    """

    def __init__(
        self,
        bank=None,
        *,
        names=None,
        ln_init=None,
        form="auto",
        recompute=False,
    ):
        super().__init__()
        if form not in FORMS:
            raise ValueError(
                f"form is {form!r}, expected one of {', '.join(FORMS)}"
            )
        if ln_init is not None and ln_init not in _GAINS:
            raise ValueError(
                f"ln_init is {ln_init!r}, expected one of "
                f"{', '.join(_GAINS)} or None"
            )
        self.form, self.ln_init = form, ln_init
        self.recompute = recompute
        self.last_weights = None
        self._folded = None
        self._derived = DerivedWeights()
        # In a tuple, so that torch does not make it a submodule.
        self._bank = (bank,)
        self.norm = None
        if bank is not None:
            names = list(bank.names if names is None else names)
            bank.require(*names)
            if not names or len(set(names)) < len(names):
                raise ValueError(
                    f"combining {names}: expected one or more different "
                    "adapters"
                )
            if ln_init is not None:
                self.norm = torch.nn.LayerNorm(bank.d_model)
                torch.nn.init.constant_(self.norm.weight, _GAINS[ln_init])
        self.names = names

    @property
    def bank(self):
        """The bank whose adapters are combined."""
        return self._bank[0]

    def settings(self):
        """Return the keyword arguments that make another one like this.

        Returns
        -------
        dict
            Plain values, without bank and names.
        """
        return {
            "ln_init": self.ln_init,
            "form": self.form,
            "recompute": self.recompute,
        }

    def for_bank(self, bank, names=None):
        """Return a fresh combination of this kind for another bank.

        Arguments
        ---------
        bank : AdapterBank
            Whose adapters.
        names : sequence of str or None
            Which; None for this one's, or all where it is a template.

        Returns
        -------
        Combination
            With parameters of its own, freshly started.
        """
        names = self.names if names is None else names
        return type(self)(bank, names=names, **self.settings())

    # --------------------------------------------------------- computation

    def forward(self, x, form=None):
        """Return the layer's output with the adapters' share added.

        Arguments
        ---------
        x : torch.Tensor
            [B, T, d] (or any [..., d]), the layer's output.
        form : str or None
            As in the constructor, for this call.

        Returns
        -------
        torch.Tensor
            [B, T, d], `x + o` or `x + LN(o)`.
        """
        combined = self.combine(x, form)
        if self.norm is not None:
            combined = self.norm(combined)
        return x + combined

    def combine(self, x, form=None):
        """Return what the adapters give together: o, without LN.

        Arguments
        ---------
        x : torch.Tensor
            [..., d]
        form : str or None
            As in the constructor, for this call.

        Returns
        -------
        torch.Tensor
            [..., d]
        """
        form = form or self.form
        if form == "auto":
            form = self._automatic()
        if form not in FORMS:
            raise ValueError(
                f"form is {form!r}, expected one of {', '.join(FORMS)}"
            )
        compute = getattr(self, f"_as_{form}")
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(compute, x, use_reentrant=False)
        return compute(x)

    def _automatic(self):
        if self._folded is not None:
            return "folded"
        if torch.compiler.is_compiling():
            return "collapsed"
        trained = torch.is_grad_enabled() and any(
            p.requires_grad for p in self.sources()
        )
        return "collapsed" if trained else "folded"

    def sources(self):
        """Return all parameters that the result depends on, but LN's.

        Returns
        -------
        list of torch.nn.Parameter
            The combined adapters' and the combination's own.
        """
        own = [p for n, p in self.named_parameters() if n[:5] != "norm."]
        adapters = [p for n in self.names for p in self.bank[n].parameters()]
        return own + adapters

    # ------------------------------------------------------------- folding

    def fold(self):
        """Multiply frozen weights out, once, for inference.

        What follows uses the product and does not look at the parameters,
        until `unfold`.
        """
        self.unfold()
        with torch.no_grad():
            plain = self._derived.get("fold", self.sources(), self._fold)
            self._folded = packed(plain)

    def unfold(self):
        """Go back to the parameters themselves."""
        self._folded = None
        self._derived.clear()

    def __getstate__(self):
        # Copies and pickles compute theirs from the parameters.
        return {**super().__getstate__(), "_folded": None, "last_weights": None}

    def _folded_weights(self):
        if self._folded is not None:
            return self._folded
        return self._derived.get("fold", self.sources(), self._fold)

    def _apply(self, fn, recurse=True):
        self.unfold()
        self.last_weights = None
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args, **kwargs):
        self.unfold()
        super()._load_from_state_dict(*args, **kwargs)

    def _as_loop(self, x):
        raise NotImplementedError

    def _as_stacked(self, x):
        raise NotImplementedError

    def _as_collapsed(self, x):
        raise NotImplementedError

    def _as_folded(self, x):
        raise NotImplementedError

    def _fold(self):
        raise NotImplementedError

    def penalty(self):
        """Return what the training loss is to be added, a scalar.

        Returns
        -------
        torch.Tensor or float
            0.0 where the combination has nothing to hold back.
        """
        return 0.0

    def extra_repr(self):
        """Return names, form and start, for the module tree.

        Returns
        -------
        str
            One line.
        """
        return f"names={self.names}, form={self.form}, ln_init={self.ln_init}"
