"""Bad input: refused by the utterance's name, or left out and counted."""

import logging

import torch

from speechbrain_taskarith.utils.lengths import (
    Refusals,
    absolute_lengths,
    padding_mask,
)

logger = logging.getLogger(__name__)


def utterance_name(row, ids=None):
    """Name a row of a batch in a message."""
    return (
        f"row {row} of the batch" if ids is None else f"utterance {ids[row]!r}"
    )


def check_lengths(lengths, size, what, ids=None, wait=True):
    """Refuse absolute lengths of 0, beyond `size` steps, or made of NaN.

    With `wait=False` a GPU asserts it itself.
    """
    good = (lengths >= 1) & (lengths <= size)
    wrong = f"{what} have lengths outside of 1 to {size} steps"
    if torch.compiler.is_compiling():
        torch._assert_async(good.all(), wrong)
        return

    def explain():
        row = int((~good).nonzero()[0])
        length = int(lengths[row])
        # NaN becomes the least integer there is.
        shown = "NaN" if length < -(2**62) else length
        return (
            f"{what} of {utterance_name(row, ids)} have a length of "
            f"{shown}, expected 1 to {size} steps (lengths are relative "
            "to the padded tensor, in (0, 1]). Remove the utterance from "
            "the data, or use InputGuard(skip_bad=True) to leave it out"
        )

    refusals = Refusals()
    refusals.add(~good, explain, wrong)
    refusals.settle(wait)


class InputGuard:
    """Check a batch before the model sees it.

    Bad are: a length of 0 or beyond the tensor, NaN or infinity among the
    valid features or samples, an empty transcript or translation.

    Arguments
    ---------
    skip_bad : bool
        False: a bad utterance is an error that names it. True: it is left
        out of the batch, counted in `counts`, and named in the log; an error
        if no good one is left in the batch of a process (use larger batches).

    Example
    -------
    >>> guard = InputGuard(skip_bad=True)
    >>> x = torch.tensor([[1.0, 2.0], [float("nan"), 1.0]])
    >>> guard(["a", "b"], x, torch.ones(2)).tolist()
    [0]
    >>> guard.counts
    {'NaN or infinity among its features': 1}
    >>> InputGuard()(["a", "b"], x, torch.ones(2))
    Traceback (most recent call last):
        ...
    ValueError: utterance 'b': NaN or infinity among its features...
    """

    def __init__(self, skip_bad=False):
        self.skip_bad = skip_bad
        self.counts = {}

    def __call__(
        self, ids, x=None, lens=None, transcripts=None, translations=None
    ):
        """Check a batch.

        Arguments
        ---------
        ids : sequence of str
            Names of the utterances.
        x, lens : torch.Tensor, optional
            Features or samples [B, T, ...], and their relative lengths [B].
        transcripts, translations : sequence of sized, optional
            B of each, as text or tokens; None or empty is bad.

        Returns
        -------
        torch.Tensor or None
            Positions of the good utterances; None if all are good.
        """
        reasons = {} if x is None else self._bad_features(x, lens)
        given = {"transcript": transcripts, "translation": translations}
        for what, texts in given.items():
            for row, text in enumerate(() if texts is None else texts):
                if text is None or len(text) == 0:
                    reasons.setdefault(row, f"it has no {what}")
        if not reasons:
            return None
        self._report(ids, reasons)
        good = [row for row in range(len(ids)) if row not in reasons]
        if not good:
            raise ValueError(
                f"all utterances of a batch are bad: {', '.join(ids)}; check "
                "the data and how they were prepared"
            )
        return torch.tensor(good)

    def _bad_features(self, x, lens):
        size, reasons = x.shape[1], {}
        lengths = absolute_lengths(lens, size)
        outside = padding_mask(lengths, size)
        bad = ~x.flatten(2).isfinite().all(-1) if x.dim() > 2 else ~x.isfinite()
        found = torch.stack([lengths, (bad & ~outside).any(1).long()]).tolist()
        for row, (length, not_finite) in enumerate(zip(*found)):
            if not 1 <= length <= size:
                reasons[row] = "its length is 0, beyond the tensor or NaN"
            elif not_finite:
                reasons[row] = "NaN or infinity among its features"
        return reasons

    def _report(self, ids, reasons):
        for row, reason in reasons.items():
            if not self.skip_bad:
                raise ValueError(
                    f"{utterance_name(row, ids)}: {reason}. Correct or remove "
                    "it; InputGuard(skip_bad=True) leaves such utterances out "
                    "and counts them"
                )
            self.counts[reason] = self.counts.get(reason, 0) + 1
            logger.warning("utterance %r is left out: %s", ids[row], reason)

    def summary(self):
        """Say in a line what was left out, see `counts`.

        `TranslationBrain` clears `counts` with each epoch.

        Example
        -------
        >>> InputGuard().summary()
        'no utterance was left out'
        """
        if not self.counts:
            return "no utterance was left out"
        listed = ", ".join(f"{n} ({why})" for why, n in self.counts.items())
        return f"{sum(self.counts.values())} utterance(s) left out: {listed}"
