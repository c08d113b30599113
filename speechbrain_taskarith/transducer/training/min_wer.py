"""Minimum word error rate (MinWER) training of transducers.

The expected number of word errors, restricted to an n-best list or estimated
from samples (Prabhavalkar 2018, arXiv 1712.01818, equations 6 and 8; for
transducers Guo 2020, arXiv 2007.13802). Decoding only finds label sequences;
their probability is the lattice's sum over all alignments.
"""

import warnings
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
from speechbrain_taskarith.transducer.training.expected_errors import (
    expected_errors,
    min_wer_loss,
    padded,
    sampled_loss,
    tables,
)
from speechbrain_taskarith.utils.lengths import Refusals
from speechbrain_taskarith.utils.recoverable import JSONRecoverable
from speechbrain_taskarith.utils.training import keep_modes


class MinWERLoss(JSONRecoverable, torch.nn.Module):
    """MinWER, interpolated with the transducer loss.

    `L = L_MinWER + rnnt_weight * L_RNNT`. The searcher decodes without
    gradient and in evaluation mode; then references and hypotheses are scored
    in one call, in training's mode and random state. Utterances whose
    hypotheses all have the same number of errors contribute no gradient: their
    hypotheses are not scored.

    With n-best lists the expectation is restricted to the list, as published:
    the part of the probability that lies outside is left out, and the gradient
    is another than that of the expected errors where that part is large. With
    samples, each weighing as often as it was drawn, it is an unbiased estimate
    of that gradient.

    As a recoverable of SpeechBrain's `Checkpointer` it keeps what `statistics`
    counts, and no weights: a resumed epoch goes on counting.

    Arguments
    ---------
    searcher : torch.nn.Module
        `TransducerBeamSearch`, whose predictor and joint are trained.
    n_best : int
        Hypotheses of an utterance, or samples, N; at most the searcher's beam
        for `"beam"`.
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
        When sampling: the maximum number of labels at one frame. A sample that
        reaches it is cut, the estimate then is biased, and a warning says so
        (a model without training draws endless labels: train with the
        transducer loss first).

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
        max_symbols=100,
    ):
        super().__init__()
        if source not in ("beam", "sample", "offline"):
            raise ValueError(
                f"source {source!r}: expected 'beam', 'sample' or 'offline'"
            )
        # A greedy search has one hypothesis, and no beam.
        most = getattr(searcher, "n_best", n_best)
        beam = getattr(searcher, "beam_size", most)
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
            batch. The words are those expected minus the list's mean; of
            samples, their mean.

        Raises
        ------
        ValueError
            An empty batch or n-best list, a hypothesis with a blank or an
            unknown label; lengths and targets as in `transducer_loss`.
        """
        refusals, blank_index = Refusals(), self.searcher.blank_index
        frames = checked_lengths(
            input_lens, encoder_out.shape[:2], "input", refusals=refusals
        )
        labels = checked_lengths(
            target_lens, targets.shape, "target", 0, refusals
        )
        size = self._vocab_size(encoder_out)
        check_targets(targets, labels, blank_index, size, refusals=refusals)
        truth = [y[:n] for y, n in zip(targets.tolist(), labels.tolist())]
        given = self._hypotheses(encoder_out, input_lens, hypotheses, size)
        # Different ones, and how often each is there.
        counts = [Counter(map(tuple, lists)) for lists in given]
        n_best = [list(map(list, each))[: self.n_best] for each in counts]
        errors = self._errors(truth, n_best, references)
        # Whether an utterance has a gradient: its errors differ.
        scored = [len(set(row)) > 1 for row in errors]
        pairs = [*enumerate(truth)] if self.rnnt_weight else []
        for row, differ in enumerate(scored):
            pairs += [(row, one) for one in n_best[row] if differ]
        if pairs:
            log_probs = self._log_probs(encoder_out, frames, pairs)
            loss = encoder_out.new_zeros(())
        else:
            loss = _no_gradient(encoder_out, self.searcher)
        if self.rnnt_weight:
            loss = loss - self.rnnt_weight * log_probs[: len(truth)].mean()
            log_probs = log_probs[len(truth) :]
        share = sum(scored) / len(scored)
        lists = tables(log_probs, errors, scored) if any(scored) else None
        if self.source == "sample":
            draws = [list(each.values()) for each in counts]
            means = [
                sum(w * n for w, n in zip(*row)) / sum(row[1])
                for row in zip(errors, draws)
            ]
            self._count(errors, scored, sum(means))
            loss = loss + sum(means) / len(means)
            if lists:
                draws = padded(draws, scored).to(log_probs.device)
                loss = loss + share * sampled_loss(*lists[:2], draws)
            return loss
        self._count(errors, scored, expected_errors(errors, scored, lists))
        if lists:
            loss = loss + share * min_wer_loss(*lists)
        return loss

    @torch.no_grad()
    def _vocab_size(self, encoder_out):
        """Return the number of scores, which some joints do not tell."""
        search = self.searcher
        if search.joint.vocab_size is not None or not len(encoder_out):
            return search.joint.vocab_size
        with keep_modes(search):
            search.eval()
            out, _ = search.read_blank(1, encoder_out.device)
            return search.joint.scores(
                search.joint.project_encoder(encoder_out[:1, 0]),
                search.joint.project_predictor(out),
            ).shape[-1]

    def _hypotheses(self, encoder_out, input_lens, given, vocab_size):
        """Return label sequences of every utterance."""
        if self.source == "offline":
            self._check_given(given, len(encoder_out), vocab_size)
            return given
        search = self.searcher
        with keep_modes(search), torch.no_grad():
            search.eval()
            x = encoder_out.detach()
            if self.source == "beam":
                found = search.decode(x, input_lens, n_best=self.n_best)
            else:
                found = TransducerSampler(
                    search.predictor,
                    search.joint,
                    search.blank_index,
                    self.n_best,
                    self.max_symbols,
                ).draw(x, input_lens)
                self._warn_of_cuts(found)
        return [[one.tokens for one in each] for each in found]

    def _check_given(self, given, batch, vocab_size):
        if given is None or len(given) != batch:
            raise ValueError(
                f"source 'offline': expected `hypotheses`, one list of "
                f"label sequences for each of {batch} utterances"
            )
        blank = self.searcher.blank_index
        for row, lists in enumerate(given):
            if not lists:
                raise ValueError(
                    f"row {row}: an empty n-best list; give at least one "
                    "hypothesis ([] is the empty one)"
                )
            for index, tokens in enumerate(lists):
                for label in tokens:
                    if label != blank and 0 <= label < vocab_size:
                        continue
                    why = (
                        "is the blank, which is no label"
                        if label == blank
                        else f"is outside of the vocabulary of {vocab_size}"
                    )
                    raise ValueError(
                        f"hypothesis {index} of utterance {row}: {label} {why}"
                    )

    def _warn_of_cuts(self, found):
        cut = [
            max(Counter(one.frames).values(), default=0) >= self.max_symbols
            for each in found
            for one in each
        ]
        if any(cut):
            warnings.warn(
                f"MinWER: {sum(cut)} of {len(cut)} samples reached max_symbols "
                f"({self.max_symbols}) labels at one frame and were cut: the "
                "gradient is biased. Train with the transducer loss first, or "
                "raise max_symbols",
                stacklevel=3,
            )

    def _errors(self, truth, n_best, references):
        """Count errors, in words where there is a detokenizer."""
        if references is None:
            references = [self._words(tokens) for tokens in truth]
        elif self.detokenize is None:
            raise ValueError(
                "references are text, and hypotheses are labels: give "
                "MinWERLoss a detokenize, or no references"
            )
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

    def state(self):
        """See `JSONRecoverable.state`: what `statistics` counts."""
        return dict(self._totals)

    def restore(self, state):
        """See `JSONRecoverable.restore`."""
        self._totals = Counter(state)

    def _count(self, errors, scored, expected):
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
            hypothesis and expected over the list or the samples, in % of
            reference words;
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


def _no_gradient(encoder_out, searcher):
    """Return 0, with a gradient of 0 by all that is trained.

    DDP waits for every parameter. Sums of nothing: 0 * NaN would be NaN.
    """
    trained = [*searcher.predictor.parameters(), *searcher.joint.parameters()]
    return sum(x.flatten()[:0].sum() for x in (encoder_out, *trained))
