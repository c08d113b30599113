"""What all ways to combine adapters share: forms, LayerNorm, folding.

One mathematical function, four ways to compute it. `loop` runs adapter after
adapter and is the reference; `stacked` has one product for all of them and
holds [B, T, N, d]; `collapsed` never leaves the bottlenecks and is what
trains; `folded` multiplies frozen weights with one another beforehand.
"""

import contextvars
import functools
import json

import torch
from torch.utils.checkpoint import checkpoint

from speechbrain_taskarith.adapters.bank import AdapterBank, DerivedWeights
from speechbrain_taskarith.adapters.combination.folding import (
    packed,
    takes_onednn,
)
from speechbrain_taskarith.adapters.combination.matching import (
    PASS,
    frame_sums,
    is_distributed,
    least_squares,
)

#: How a combination may be computed; `auto` chooses by the gradients.
FORMS = ("auto", "loop", "stacked", "collapsed", "folded")

#: The entry of a state dict that says which adapters are combined.
COMBINED_NAMES = "combined_names"

#: The entry that says whether LN was matched, where it is to be.
MATCHED = "matched"

# Gain of the LayerNorm before the residual, at the start.
_GAINS = {"one": 1.0, "small": 0.1, "zero": 0.0, "match": 1.0}


def names_as_tensor(names):
    """Return the entry `COMBINED_NAMES` of a state dict.

    Of floats: recipes average checkpoints, and sums of bytes overflow.
    """
    return torch.tensor(list(json.dumps(names).encode()), dtype=torch.float32)


class Combination(torch.nn.Module):
    """Adds a combination of a bank's adapters to the residual stream.

    `x + o`, or with `ln_init` `x + LN(o)`, where `o` is what the adapters
    give together. The bank is not a submodule: what belongs to the
    combination alone is what `ST-A` trains and what is saved with it.

    A subclass computes o in `_as_loop(x)`. To be faster, it may compute it
    in `_as_stacked(x)`, `_as_collapsed(x)` and `_as_folded(x)` as well, the
    last from `self.folded()`, which `_fold()` makes. Parameters that have an
    entry for each adapter it names in `per_adapter`, so that a checkpoint of
    another order loads; where that is None, another order is refused.

    Arguments
    ---------
    bank : AdapterBank or None
        Whose adapters; None makes a template for `insert_adapters`.
    names : sequence of str or None
        Which of them, in this order; None for all that there are now.
        Adapters that come later are not combined.
    ln_init : str or None
        Gain of the LN before the residual at the start: `"one"`, `"small"`
        (0.1) or `"zero"` (starts as the base); None has no LN. `"match"`
        has none until the first batch in training, which then sets gain and
        bias: for each channel by least squares of o on its normalised self,
        so that training starts nearly where it does without LN. Padding does
        not count where a layer gets a `src_key_padding_mask`, or the batch
        of the running Brain has `sig`. Several processes add up their
        frames. In an encoder they do so when it is called next, and have no
        LN until then; of a combination alone all have to call the first.
    form : str
        One of `auto`, `loop`, `stacked`, `collapsed`, `folded`. `auto`
        takes `folded` where no parameter gets a gradient, and in training
        where a batch has enough frames; `collapsed` elsewhere.
    recompute : bool
        True holds nothing but the input for the backward pass and computes
        the rest again then: least memory, a third more time.

    Raises
    ------
    ValueError
        Another form or start, or names that the bank lacks.
    """

    bank: AdapterBank
    per_adapter: tuple[str, ...] | None = None

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
        self.forget_pass()
        self._folded = None
        self._derived = DerivedWeights()
        #: Whether LN waits to be matched, and `frame_sums` of this process.
        self.is_unmatched, self.sums = False, None
        # Not by setattr, which would make it a submodule.
        self.__dict__["bank"] = bank
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
            if ln_init == "match":
                self.is_unmatched = True
                # A float: recipes average checkpoints.
                self.register_buffer(MATCHED, torch.zeros(()))
        self.names = names

    def settings(self):
        """Return the keyword arguments that make another one like this."""
        return {
            "ln_init": self.ln_init,
            "form": self.form,
            "recompute": self.recompute,
        }

    def for_bank(self, bank, names=None):
        """Return a freshly started combination of this kind for a bank.

        It combines `names`, or those of this one where that is None, or all
        where this one is a template.
        """
        names = self.names if names is None else names
        return type(self)(bank, names=names, **self.settings())

    def weights(self):
        """Return the weights [N] of all frames, None where frames differ."""
        return None

    def penalty(self, weight=0.01):
        """Return what this combination adds to the training loss."""
        del weight
        return 0.0

    def penalty_gradient(self, weight=0.01):
        """Return `[(parameter, derivative of the penalty), ...]`."""
        del weight
        return []

    # --------------------------------------------------------- computation

    def forward(self, x, form=None):
        """Return `x + o` or `x + LN(o)` for a layer's output x [..., d]."""
        combined = self.combine(x, form)
        if self.is_matching():
            self._match(combined)
        if self.norm is not None and not self.is_unmatched:
            combined = self.norm(combined)
        elif self.is_matching():
            # LN waits for other processes, and DDP for a gradient of it.
            unused = self.norm.weight.sum() + self.norm.bias.sum()
            combined = combined + 0.0 * unused
        return x + combined

    def is_matching(self):
        """Tell whether a pass now is one that LN can be matched in."""
        return (
            self.is_unmatched
            and self.training
            and torch.is_grad_enabled()
            and self.norm.weight.requires_grad
        )

    @torch.compiler.disable  # once, and the host reads numbers
    def _match(self, combined):
        here = PASS.get()
        with torch.no_grad():
            valid = None if here is None else here.valid
            sums = frame_sums(combined, self.norm.eps, valid)
            if here is not None and here.is_deferred:
                self.sums = sums if self.sums is None else self.sums + sums
                return
            if is_distributed():
                torch.distributed.all_reduce(sums)
            self.match(sums)

    def match(self, sums):
        """Match LN by the sums [6, d] of all frames, see `frame_sums`."""
        self.sums, found = None, least_squares(sums)
        if not torch.isfinite(found).all():  # of no frames, or of bad ones
            return
        with torch.no_grad():
            # In place: an optimizer has them.
            self.norm.weight.copy_(found[0])
            self.norm.bias.copy_(found[1])
            self.matched.fill_(1.0)
        self.is_unmatched = False

    def combine(self, x, form=None):
        """Return what the adapters give together: o, without LN."""
        form = form or self.form
        if form not in FORMS:
            raise ValueError(
                f"form is {form!r}, expected one of {', '.join(FORMS)}"
            )
        if form == "auto":
            trained = torch.compiler.is_compiling() or (
                torch.is_grad_enabled()
                and any(p.requires_grad for p in self.sources())
            )
            collapsed = (
                trained and self._folded is None and not self._fold_pays(x)
            )
            form = "collapsed" if collapsed else "folded"
        compute = getattr(self, f"_as_{form}")
        if self.recompute and torch.is_grad_enabled():
            if not torch.compiler.is_compiling():
                # The backward pass has another one.
                here = contextvars.copy_context()
                compute = functools.partial(here.run, compute)
            return checkpoint(compute, x, use_reentrant=False)
        return compute(x)

    def _as_loop(self, x):
        raise NotImplementedError(f"{type(self).__name__} computes nothing")

    def _as_stacked(self, x):
        return self._as_loop(x)

    def _as_collapsed(self, x):
        return self._as_loop(x)

    def _as_folded(self, x):
        return self._as_loop(x)

    def _fold_pays(self, x):
        """Tell whether it is faster to multiply out at every training step."""
        del x
        return False

    def _fold(self):
        """Return the multiplied weights, None where there are none."""
        return None

    def sources(self):
        """Return all parameters that o depends on."""
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
            plain = self.folded()
            if plain is not None:
                self._folded = plain, packed(plain)

    def unfold(self):
        """Go back to the parameters themselves."""
        self._folded = None
        self._derived.clear()

    def forget_pass(self):
        """Forget the attention of the last batch."""
        # Weights [..., N], where there are some: without their graph, and
        # with it for `AdapterHandle.attention_loss`.
        self.last_weights = self.live_weights = None
        # Which frames of that batch are no padding, None where not known.
        self.last_valid = None

    def folded(self):
        """Return the multiplied weights, made anew if parameters changed."""
        if self._folded is not None:
            plain, fast = self._folded
            return fast if takes_onednn() else plain
        return self._derived.derive("fold", self.sources(), self._fold)

    def __getstate__(self):
        # Copies and pickles compute theirs from the parameters; a tensor
        # with a graph cannot be copied.
        gone = ("_folded", "last_weights", "live_weights", "last_valid", "sums")
        return {**self.__dict__, **dict.fromkeys(gone)}

    def _apply(self, fn, recurse=True):
        self.unfold()
        self.forget_pass()
        self.sums = None
        return super()._apply(fn, recurse)

    def train(self, mode=True):
        """As `torch.nn.Module.train`; training unfolds."""
        if mode:
            self.unfold()
        self._derived.clear()
        return super().train(mode)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.names and any(True for _ in self.parameters()):
            destination[prefix + COMBINED_NAMES] = names_as_tensor(self.names)

    def _load_from_state_dict(self, state_dict, prefix, *others):
        self.unfold()
        state, errors = dict(state_dict), others[-1]
        # Checkpoints of earlier versions have no names.
        written = state.pop(prefix + COMBINED_NAMES, None)
        if written is not None:
            codes = written.detach().cpu().double().round().tolist()
            names = json.loads(bytes(map(int, codes)))
            ordered = names == self.names or self.per_adapter is not None
            if not ordered or set(names) != set(self.names):
                errors.append(
                    f"{prefix.rstrip('.')}: the checkpoint combines "
                    f"{', '.join(names)}, this one {', '.join(self.names)}; "
                    "handle.set_combination(..., names=[...]) with those of "
                    "the checkpoint first"
                )
                return
            order = [names.index(name) for name in self.names]
            for name in self.per_adapter or ():
                if prefix + name in state:
                    state[prefix + name] = state[prefix + name][order]
        key = prefix + MATCHED
        if MATCHED in self._buffers and f"{prefix}norm.weight" in state:
            # One of another start needs no match. Of a mean of checkpoints,
            # half of them have to be.
            written = state.setdefault(key, torch.ones_like(self.matched))
            self.is_unmatched = not written >= 0.5
        elif state.get(key, 0) >= 0.5:
            del state[key]
        super()._load_from_state_dict(state, prefix, *others)

    def extra_repr(self):
        """Show what sets this combination apart in the module tree."""
        return f"names={self.names}, form={self.form}, ln_init={self.ln_init}"
