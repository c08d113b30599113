"""Minimum word error rate (MinWER) training of transducers.

The expected number of word errors over an n-best list (Prabhavalkar 2018,
arXiv 1712.01818; for transducers Guo 2020, arXiv 2007.13802). Decoding only
finds label sequences; their probability is the lattice's sum over all
alignments.
"""

import contextlib

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
    >>> from speechbrain_taskarith.transducer import (
    ...     LSTMPredictor,
    ...     RNNTJoint,
    ...     TransducerBeamSearch,
    ... )
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
        labels = checked_lengths(
            target_lens, targets.shape[1], "target", least=0
        )
        device = encoder_out.device
        check_targets(
            targets,
            labels,
            self.searcher.blank_index,
            self.searcher.joint.vocab_size,
        )
        truth = [
            row[:count] for row, count in zip(targets.tolist(), labels.tolist())
        ]
        n_best = self._hypotheses(encoder_out, input_lens, hypotheses)
        errors = self._errors(truth, n_best, references)
        # Whether an utterance has a gradient: its errors differ.
        scored = [len(set(counts)) > 1 for counts in errors]
        sequences, rows = [], []
        for row, n_best_list in enumerate(n_best):
            if scored[row]:
                sequences += n_best_list
                rows += [row] * len(n_best_list)
        if self.rnnt_weight:
            sequences = truth + sequences
            rows = list(range(len(truth))) + rows
        if not sequences:
            self._count(errors, scored, None)
            return encoder_out.sum() * 0.0
        log_probs = self._log_probs(encoder_out, frames, sequences, rows)
        loss = encoder_out.new_zeros(())
        if self.rnnt_weight:
            loss = loss - self.rnnt_weight * log_probs[: len(truth)].mean()
            log_probs = log_probs[len(truth) :]
        tables = _tables(log_probs, errors, scored)
        self._count(errors, scored, tables)
        if tables is not None:
            share = sum(scored) / len(scored)
            loss = loss + share * min_wer_loss(
                *(table.to(device) for table in tables)
            )
        return loss

    def _hypotheses(self, encoder_out, input_lens, given):
        """Return different label sequences of every utterance."""
        if self.source == "offline":
            if given is None or len(given) != len(encoder_out):
                raise ValueError(
                    "source 'offline': expected `hypotheses`, one list of "
                    f"label sequences for each of {len(encoder_out)} "
                    "utterances"
                )
            n_best = [[list(tokens) for tokens in lists] for lists in given]
        else:
            with _evaluation_mode(self.searcher), torch.no_grad():
                search = self.searcher
                if self.source == "sample":
                    search = TransducerSampler(
                        search.predictor,
                        search.joint,
                        search.blank_index,
                        self.n_best,
                        self.max_symbols,
                    )
                decoded = search.decode(
                    encoder_out.detach(), input_lens, n_best=self.n_best
                )
            n_best = [[one.tokens for one in each] for each in decoded]
        for row, lists in enumerate(n_best):
            if not lists:
                raise ValueError(
                    f"row {row}: an empty n-best list; give at least one "
                    "hypothesis ([] is the empty one)"
                )
        return [
            [list(t) for t in dict.fromkeys(map(tuple, lists))][: self.n_best]
            for lists in n_best
        ]

    def _errors(self, truth, n_best, references):
        """Count errors, in words where there is a detokenizer."""
        if references is None:
            references = [self._words(tokens) for tokens in truth]
        else:
            if len(references) != len(truth):
                raise ValueError(
                    f"{len(references)} references for {len(truth)} utterances"
                )
            references = [text.split() for text in references]
        self._reference_words += sum(map(len, references))
        return [
            [Levenshtein.distance(words, self._words(one)) for one in lists]
            for words, lists in zip(references, n_best)
        ]

    def _words(self, tokens):
        if self.detokenize is None:
            return tokens
        return self.detokenize(tokens).split()

    def _log_probs(self, encoder_out, frames, sequences, rows):
        """Return log P of label sequences, with gradient."""
        search, device = self.searcher, encoder_out.device
        lengths = torch.tensor([len(one) for one in sequences], device=device)
        tokens = pad_sequence(
            [torch.tensor(one, dtype=torch.long) for one in sequences],
            batch_first=True,
            padding_value=search.blank_index,
        ).to(device)
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
        self._utterances = self._scored = self._hypothesis_count = 0
        self._reference_words = self._oracle_errors = 0
        self._expected_errors = 0.0

    def _count(self, errors, scored, tables):
        self._utterances += len(errors)
        self._scored += sum(scored)
        self._hypothesis_count += sum(map(len, errors))
        self._oracle_errors += sum(map(min, errors))
        # Where all are equal, that is the expected number too.
        self._expected_errors += sum(
            row[0] for row, differ in zip(errors, scored) if not differ
        )
        if tables is not None:
            log_probs, counts, mask = tables
            log_probs = log_probs.detach().cpu().float()
            probs = log_probs.masked_fill(~mask, float("-inf")).softmax(1)
            self._expected_errors += float((probs * counts).sum())

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
        utterances = max(1, self._utterances)
        words = max(1, self._reference_words)
        return {
            "with_gradient": 100.0 * self._scored / utterances,
            "oracle_wer": 100.0 * self._oracle_errors / words,
            "expected_wer": 100.0 * self._expected_errors / words,
            "hypotheses": self._hypothesis_count / utterances,
        }


def _tables(log_probs, errors, scored):
    """Arrange scored hypotheses as [utterances, N]: log P, errors, mask."""
    errors = [counts for counts, differ in zip(errors, scored) if differ]
    if not errors:
        return None
    lengths = torch.tensor([len(row) for row in errors])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    padded = torch.zeros(mask.shape)
    padded[mask] = torch.tensor([float(e) for row in errors for e in row])
    table = log_probs.new_zeros(mask.shape)
    table = table.masked_scatter(mask.to(log_probs.device), log_probs)
    return table, padded, mask


@contextlib.contextmanager
def _evaluation_mode(module):
    """Set evaluation mode; afterwards each part gets its own mode back."""
    before = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in before:
            part.training = training
