"""Minimum word error rate (MinWER) training of transducers.

The expected number of word errors over an n-best list (Prabhavalkar 2018,
arXiv 1712.01818; for transducers Guo 2020, arXiv 2007.13802). Decoding only
finds label sequences; their probability is the lattice's sum over all
alignments.
"""

import itertools
from collections import Counter

import torch
from rapidfuzz.distance import Levenshtein
from torch.nn.utils.rnn import pad_sequence

from speechbrain_taskarith.transducer.joints.chunked_loss import (
    sequence_log_prob,
)
from speechbrain_taskarith.transducer.loss.input_checks import (
    check_targets,
    checked_lengths,
)
from speechbrain_taskarith.transducer.predictor import predictor_input
from speechbrain_taskarith.transducer.search.greedy import TransducerSampler
from speechbrain_taskarith.utils.lengths import padding_mask
from speechbrain_taskarith.utils.modes import keep_modes


def min_wer_loss(log_probs, errors, mask=None):
    """Expected word errors over n-best lists, minus their mean.

    `L = mean_b sum_i P_bi (W_bi - mean_j W_bj)` with `P_b` the softmax of an
    utterance's log-probabilities. Subtracting the mean changes no gradient;
    that by `log_probs[b, i]` is `P_bi (W_bi - sum_j P_bj W_bj) / B`.

    Arguments
    ---------
    log_probs : torch.Tensor
        [B, N], log P(y_i | x).
    errors : torch.Tensor
        [B, N], numbers of word errors.
    mask : torch.Tensor or None
        [B, N], bool, True where there is a hypothesis; None: everywhere.
        Other values are ignored, even NaN.

    Returns
    -------
    torch.Tensor
        A scalar, in words.

    Raises
    ------
    ValueError
        Shapes that differ, an utterance without any hypothesis.

    Example
    -------
    >>> log_probs = torch.tensor([[0.5, 0.3, 0.2]]).log().requires_grad_()
    >>> loss = min_wer_loss(log_probs, torch.tensor([[0, 1, 2]]))
    >>> loss.backward()
    >>> log_probs.grad  # P_i (W_i - 0.7)
    tensor([[-0.3500,  0.0900,  0.2600]])
    """
    if mask is None:
        mask = torch.ones_like(log_probs, dtype=torch.bool)
    if not log_probs.shape == errors.shape == mask.shape:
        raise ValueError(
            f"log_probs {tuple(log_probs.shape)}, errors "
            f"{tuple(errors.shape)}, mask {tuple(mask.shape)}: expected one "
            "shape [batch, hypotheses]"
        )
    empty = ~mask.any(1)
    if bool(empty.any()):
        raise ValueError(
            f"row {int(empty.nonzero()[0])} has no hypothesis; an n-best list "
            "needs at least one (the empty sequence is one)"
        )
    # Minus infinity, not 0: a missing hypothesis has probability 0.
    probs = log_probs.masked_fill(~mask, float("-inf")).softmax(1)
    errors = errors.to(probs.dtype).masked_fill(~mask, 0.0)
    mean = errors.sum(1, keepdim=True) / mask.sum(1, keepdim=True)
    return (probs * (errors - mean)).sum(1).mean()


class MinWERLoss(torch.nn.Module):
    """MinWER, interpolated with the transducer loss.

    `L = L_MinWER + rnnt_weight * L_RNNT`. The searcher decodes without
    gradient and in evaluation mode; then references and hypotheses are scored
    in one call, in training's mode and random state. Utterances whose
    hypotheses all have the same number of errors contribute no gradient: their
    hypotheses are not scored.

    Arguments
    ---------
    searcher : torch.nn.Module
        `TransducerBeamSearch`, whose predictor and joint are trained.
    n_best : int
        Hypotheses of an utterance, N; at most the searcher's beam.
    rnnt_weight : float
        Weight of the transducer loss; 0 leaves it out.
    source : str
        Where hypotheses come from: `"beam"`, `"sample"` (alignments sampled
        from the model) or `"offline"` (given with every call).
    detokenize : callable or None
        Takes a list of label indices, returns text, whose words are separated
        by spaces. E.g. a SentencePiece processor's `decode`. None counts
        errors in labels.
    memory_budget : int
        See `joint_transducer_loss`.
    max_symbols : int
        When sampling: the maximum number of labels at one frame.

    Example
    -------
    >>> from speechbrain_taskarith.transducer import LSTMPredictor, RNNTJoint
    >>> from speechbrain_taskarith.transducer import TransducerBeamSearch
    >>> predictor = LSTMPredictor(10, 4, 6, num_layers=1)
    >>> joint = RNNTJoint(8, 6, 16, 10)
    >>> search = TransducerBeamSearch(predictor, joint, 0, beam_size=4)
    >>> min_wer = MinWERLoss(search, n_best=4)
    >>> encoder_out = torch.rand(2, 7, 8, requires_grad=True)
    >>> targets, whole = torch.randint(1, 10, (2, 3)), torch.ones(2)
    >>> min_wer(encoder_out, whole, targets, whole).backward()
    >>> sorted(min_wer.statistics())
    ['expected_wer', 'hypotheses', 'oracle_wer', 'with_gradient']
    """

    def __init__(
        self,
        searcher,
        n_best=4,
        rnnt_weight=0.1,
        source="beam",
        detokenize=None,
        memory_budget=2**28,
        max_symbols=2,
    ):
        super().__init__()
        if source not in ("beam", "sample", "offline"):
            raise ValueError(
                f"source {source!r}: expected 'beam', 'sample' or 'offline'"
            )
        beam = getattr(searcher, "beam_size", n_best)
        if n_best < 2 or (source == "beam" and n_best > beam):
            raise ValueError(
                f"n_best {n_best}: expected 2 or more, and no more than the "
                f"searcher's beam_size ({beam})"
            )
        self.searcher = searcher
        self.n_best = n_best
        self.rnnt_weight = rnnt_weight
        self.source = source
        self.detokenize = detokenize
        self.memory_budget = memory_budget
        self.max_symbols = max_symbols
        self.reset()

    def forward(
        self,
        encoder_out,
        input_lens,
        targets,
        target_lens,
        references=None,
        hypotheses=None,
    ):
        """Compute the loss of a batch.

        Arguments
        ---------
        encoder_out : torch.Tensor
            [B, T, E], with gradient where the encoder is trained.
        input_lens, targets, target_lens : torch.Tensor
            As of `transducer_loss`.
        references : list of str or None
            Transcripts to count errors against; None takes the detokenised
            targets.
        hypotheses : list of list of list of int or None
            With source `"offline"`: label sequences of every utterance.

        Returns
        -------
        torch.Tensor
            A scalar: words plus `rnnt_weight` times nats, means over the
            batch.

        Raises
        ------
        ValueError
            An empty n-best list; lengths and targets as in `transducer_loss`.
        """
        frames = checked_lengths(input_lens, encoder_out.shape[1], "input")
        labels = checked_lengths(target_lens, targets.shape[1], "target", 0)
        blank, size = self.searcher.blank_index, self.searcher.joint.vocab_size
        check_targets(targets, labels, blank, size)
        truth = [y[:n] for y, n in zip(targets.tolist(), labels.tolist())]
        n_best = self._hypotheses(encoder_out, input_lens, hypotheses)
        errors = self._errors(truth, n_best, references)
        # Whether an utterance has a gradient: its errors differ.
        scored = [len(set(counts)) > 1 for counts in errors]
        pairs = [*enumerate(truth)] if self.rnnt_weight else []
        for row, differ in enumerate(scored):
            pairs += [(row, one) for one in n_best[row] if differ]
        if not pairs:
            self._count(errors, scored)
            return encoder_out.sum() * 0.0
        log_probs = self._log_probs(encoder_out, frames, pairs)
        loss = encoder_out.new_zeros(())
        if self.rnnt_weight:
            loss = loss - self.rnnt_weight * log_probs[: len(truth)].mean()
            log_probs = log_probs[len(truth) :]
        tables = _tables(log_probs, errors, scored) if any(scored) else ()
        self._count(errors, scored, *tables)
        if tables:
            share = sum(scored) / len(scored)
            loss = loss + share * min_wer_loss(*tables)
        return loss

    def _hypotheses(self, encoder_out, input_lens, given):
        """Return different label sequences of every utterance."""
        if self.source == "offline":
            if given is None or len(given) != len(encoder_out):
                raise ValueError(
                    "source 'offline': expected `hypotheses`, one list of "
                    f"label sequences for each of {len(encoder_out)} utterances"
                )
        else:
            search = self.searcher
            if self.source == "sample":
                search = TransducerSampler(
                    search.predictor,
                    search.joint,
                    search.blank_index,
                    self.n_best,
                    self.max_symbols,
                )
            with keep_modes(self.searcher), torch.no_grad():
                self.searcher.eval()
                decoded = search.decode(
                    encoder_out.detach(), input_lens, n_best=self.n_best
                )
            given = [[one.tokens for one in each] for each in decoded]
        n_best = []
        for row, lists in enumerate(given):
            if not lists:
                raise ValueError(
                    f"row {row}: an empty n-best list; give at least one "
                    "hypothesis ([] is the empty one)"
                )
            unique = dict.fromkeys(map(tuple, lists))
            n_best.append([list(one) for one in unique][: self.n_best])
        return n_best

    def _errors(self, truth, n_best, references):
        """Count errors, in words where there is a detokenizer."""
        if references is None:
            references = [self._words(tokens) for tokens in truth]
        elif len(references) != len(truth):
            raise ValueError(
                f"{len(references)} references for {len(truth)} utterances"
            )
        else:
            references = [text.split() for text in references]
        self._totals["words"] += sum(map(len, references))
        return [
            [Levenshtein.distance(words, self._words(one)) for one in lists]
            for words, lists in zip(references, n_best)
        ]

    def _words(self, tokens):
        if self.detokenize is None:
            return tokens
        return self.detokenize(tokens).split()

    def _log_probs(self, encoder_out, frames, pairs):
        """Return log P of pairs (utterance, label sequence), with gradient."""
        search, device = self.searcher, encoder_out.device
        rows, sequences = zip(*pairs)
        lengths = torch.tensor([len(one) for one in sequences], device=device)
        tokens = [torch.tensor(one, dtype=torch.long) for one in sequences]
        tokens = pad_sequence(tokens, True, search.blank_index).to(device)
        inputs = predictor_input(tokens, lengths, search.blank_index)
        predictor_out, _ = search.predictor(inputs)
        return sequence_log_prob(
            search.joint,
            encoder_out,
            predictor_out,
            tokens,
            frames,
            lengths,
            encoder_rows=torch.tensor(rows, device=device),
            memory_budget=self.memory_budget,
        )

    def reset(self):
        """Reset the statistics, e.g. at the end of an epoch."""
        self._totals = Counter()

    def _count(self, errors, scored, log_probs=None, counts=None, mask=None):
        # Where all are equal, that is the expected number too.
        expected = sum(
            row[0] for row, differ in zip(errors, scored) if not differ
        )
        if log_probs is not None:
            log_probs = log_probs.detach().float()
            probs = log_probs.masked_fill(~mask, float("-inf")).softmax(1)
            expected += float((probs * counts).sum())
        self._totals.update(
            utterances=len(errors),
            scored=sum(scored),
            hypotheses=sum(map(len, errors)),
            oracle=sum(map(min, errors)),
            expected=expected,
        )

    def statistics(self):
        """Describe the n-best lists since the last `reset`.

        Returns
        -------
        dict of str: float
            `with_gradient`: share of utterances, in %, whose hypotheses
            differ in errors; `oracle_wer` and `expected_wer`: of the best
            hypothesis and expected over the list, in % of reference words;
            `hypotheses`: mean number of different ones per utterance.
        """
        totals = self._totals
        utterances = max(1, totals["utterances"])
        words = max(1, totals["words"])
        return {
            "with_gradient": 100.0 * totals["scored"] / utterances,
            "oracle_wer": 100.0 * totals["oracle"] / words,
            "expected_wer": 100.0 * totals["expected"] / words,
            "hypotheses": totals["hypotheses"] / utterances,
        }


def _tables(log_probs, errors, scored):
    """Arrange scored hypotheses as [utterances, N]: log P, errors, mask."""
    errors = [torch.tensor(row) for row in itertools.compress(errors, scored)]
    lengths = [len(row) for row in errors]
    mask = ~padding_mask(torch.tensor(lengths), max(lengths))
    errors = pad_sequence(errors, batch_first=True)
    log_probs = pad_sequence(log_probs.split(lengths), batch_first=True)
    return log_probs, errors.to(log_probs.device), mask.to(log_probs.device)
