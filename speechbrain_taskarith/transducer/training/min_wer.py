"""Minimum word error rate training of transducers.

The expected number of word errors over an n-best list (Prabhavalkar 2018,
arXiv 1712.01818; for transducers Guo 2020, arXiv 2007.13802). A hypothesis
counts with its probability summed over all alignments: decoding finds label
sequences only, the lattice scores them.
"""

import torch
from rapidfuzz.distance import Levenshtein

from speechbrain_taskarith.transducer.joints.joint import sequence_log_prob
from speechbrain_taskarith.transducer.loss.lengths import (
    check_targets,
    checked_lengths,
)
from speechbrain_taskarith.transducer.search.greedy import TransducerSampler
from speechbrain_taskarith.transducer.search.predictor import predictor_input
from speechbrain_taskarith.transducer.training.n_best import (
    evaluation_mode,
    n_best_tensors,
)

SOURCES = ("beam", "sample", "offline")


def min_wer_loss(log_probs, errors, mask=None):
    """Expected word errors over n-best lists, less their mean.

    `L = mean_b sum_i P_bi (W_bi - mean_j W_bj)` with `P_b` the softmax of an
    utterance's log-probabilities. Taking the mean away changes no gradient;
    that by `log_probs[b, i]` is `P_bi (W_bi - sum_j P_bj W_bj) / B`.

    Arguments
    ---------
    log_probs : torch.Tensor
        [B, N], log P(y_i | x).
    errors : torch.Tensor
        [B, N], numbers of word errors.
    mask : torch.Tensor or None
        [B, N], bool, True where there is a hypothesis; None: everywhere.
        What is masked may be anything, also NaN.

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
            "needs one at least (the empty sequence is one)"
        )
    # Minus infinity, not 0: a hypothesis that is not there has probability 0.
    probs = log_probs.masked_fill(~mask, float("-inf")).softmax(1)
    errors = errors.to(probs.dtype).masked_fill(~mask, 0.0)
    mean = errors.sum(1, keepdim=True) / mask.sum(1, keepdim=True)
    return (probs * (errors - mean)).sum(1).mean()


class MinWERLoss(torch.nn.Module):
    """MinWER, interpolated with the transducer loss.

    `L = L_MinWER + rnnt_weight * L_RNNT`. The searcher decodes without
    gradient and in evaluation mode; then references and hypotheses are scored
    in one call, in the mode and with the random state that training has.
    Utterances whose hypotheses all have the same number of errors carry no
    gradient: their hypotheses are not scored.

    Arguments
    ---------
    searcher : torch.nn.Module
        `TransducerBeamSearch`, whose predictor and joint are trained.
    n_best : int
        Hypotheses of an utterance, N; at most the searcher's beam.
    rnnt_weight : float
        Weight of the transducer loss; 0 leaves it out.
    source : str
        Where hypotheses come from: `"beam"`, `"sample"` (alignments drawn
        from the model) or `"offline"` (given with every call).
    detokenize : callable or None
        Takes a list of label indices, returns text; words are what stands
        between spaces. E.g. a SentencePiece processor's `decode`. None counts
        errors in labels.
    memory_budget : int
        See `joint_transducer_loss`.
    max_symbols : int
        Of sampling: labels at one frame, at most.

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
        if source not in SOURCES:
            raise ValueError(
                f"source {source!r}: expected one of "
                f"{', '.join(map(repr, SOURCES))}"
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
        input_lens : torch.Tensor
            [B], relative lengths in (0, 1].
        targets : torch.Tensor
            [B, U], label indices.
        target_lens : torch.Tensor
            [B], relative lengths in [0, 1].
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
            An empty n-best list, targets as in `transducer_loss`.
        """
        frames = checked_lengths(input_lens, encoder_out.shape[1], "input")
        labels = checked_lengths(
            target_lens, targets.shape[1], "target", least=0
        )
        device = encoder_out.device
        vocab_size = self.searcher.joint.vocab_size or 2**31
        check_targets(targets, labels, self.searcher.blank_index, vocab_size)
        truth = [
            row[:count] for row, count in zip(targets.tolist(), labels.tolist())
        ]
        found = self._hypotheses(encoder_out, input_lens, hypotheses)
        errors = self._errors(truth, found, references)
        scored = [len(set(counts)) > 1 for counts in errors]
        sequences, rows = [], []
        for row, (lists, needed) in enumerate(zip(found, scored)):
            chosen = lists if needed else []
            sequences += chosen
            rows += [row] * len(chosen)
        if self.rnnt_weight:
            sequences = truth + sequences
            rows = list(range(len(truth))) + rows
        if not sequences:
            self._count(errors, scored, None)
            return encoder_out.sum() * 0.0
        log_probs = self._score(encoder_out, frames, sequences, rows)
        loss = encoder_out.new_zeros(())
        if self.rnnt_weight:
            loss = loss - self.rnnt_weight * log_probs[: len(truth)].mean()
            log_probs = log_probs[len(truth) :]
        by_row = self._by_row(log_probs, errors, scored)
        self._count(errors, scored, by_row)
        if by_row is not None:
            share = sum(scored) / len(scored)
            loss = loss + share * min_wer_loss(
                *(part.to(device) for part in by_row)
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
            found = [[list(tokens) for tokens in lists] for lists in given]
        else:
            with evaluation_mode(self.searcher), torch.no_grad():
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
            found = [[one.tokens for one in each] for each in decoded]
        for row, lists in enumerate(found):
            if not lists:
                raise ValueError(
                    f"row {row}: an empty n-best list; give one hypothesis "
                    "at least ([] is the empty one)"
                )
        return [
            [list(t) for t in dict.fromkeys(map(tuple, lists))][: self.n_best]
            for lists in found
        ]

    def _errors(self, truth, found, references):
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
            for words, lists in zip(references, found)
        ]

    def _words(self, tokens):
        if self.detokenize is None:
            return tokens
        return self.detokenize(tokens).split()

    def _score(self, encoder_out, frames, sequences, rows):
        """Return log P of label sequences, with gradient."""
        search, device = self.searcher, encoder_out.device
        tokens, lengths = n_best_tensors(sequences, search.blank_index, device)
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

    def _by_row(self, log_probs, errors, scored):
        """Arrange what was scored as [utterances, N]."""
        errors = [counts for counts, needed in zip(errors, scored) if needed]
        if not errors:
            return None
        counts = torch.tensor([len(row) for row in errors])
        mask = torch.arange(int(counts.max())) < counts[:, None]
        padded = torch.zeros(mask.shape)
        padded[mask] = torch.tensor([float(e) for row in errors for e in row])
        where = mask.to(log_probs.device)
        table = log_probs.new_zeros(mask.shape).masked_scatter(where, log_probs)
        return table, padded, mask

    def reset(self):
        """Forget the statistics, e.g. at the end of an epoch."""
        self._utterances = self._scored = self._found = 0
        self._reference_words = self._oracle = 0
        self._expected = 0.0

    def _count(self, errors, scored, by_row):
        self._utterances += len(errors)
        self._scored += sum(scored)
        self._found += sum(map(len, errors))
        self._oracle += sum(map(min, errors))
        # Where all are equal, that is the expected number too.
        self._expected += sum(
            row[0] for row, needed in zip(errors, scored) if not needed
        )
        if by_row is not None:
            log_probs, counts, mask = by_row
            log_probs = log_probs.detach().cpu().float()
            probs = log_probs.masked_fill(~mask, float("-inf")).softmax(1)
            self._expected += float((probs * counts).sum())

    def statistics(self):
        """Return what the n-best lists were like since the last `reset`.

        Returns
        -------
        dict of str: float
            `with_gradient`: share of utterances, in %, whose hypotheses
            differ in errors; `oracle_wer` and `expected_wer`: of the best
            hypothesis and over the list, in % of reference words;
            `hypotheses`: how many different ones an utterance had.
        """
        utterances = max(1, self._utterances)
        words = max(1, self._reference_words)
        return {
            "with_gradient": 100.0 * self._scored / utterances,
            "oracle_wer": 100.0 * self._oracle / words,
            "expected_wer": 100.0 * self._expected / words,
            "hypotheses": self._found / utterances,
        }
