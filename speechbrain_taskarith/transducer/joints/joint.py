"""Joint networks: the base class that all others share, and RNN-T's own."""

import torch

from speechbrain_taskarith.transducer.loss.input_checks import check_vocabulary
from speechbrain_taskarith.transducer.loss.transitions import accumulate_type


class Joint(torch.nn.Module):
    """A joint network whose parts searches and chunked losses call.

    A subclass has `blank_index` and `scores`. Encoder and predictor outputs
    are projected to [..., joint_dim], once a frame and once a label, then
    combined by `scores`.
    """

    # What the scores become: "softmax" or "hat", see `transitions`.
    normalization = "softmax"
    # Whether the result of `scores` may be overwritten: its last operation
    # does not need it in backward.
    overwritable = False
    # None: only the layers know.
    vocab_size = None

    def project_encoder(self, encoder_out):
        """Project an encoder's output [..., encoder_dim]."""
        return encoder_out

    def project_predictor(self, predictor_out):
        """Project a predictor's output [..., predictor_dim]."""
        return predictor_out

    def scores(self, encoder, predictor):
        """Combine projected outputs to raw scores [..., V].

        Their shapes broadcast (SpeechBrain's joints need the same in front).
        """
        raise NotImplementedError

    def log_probs(self, encoder, predictor):
        """As `scores`, but log-probabilities; what searches use."""
        scores = self.scores(encoder, predictor)
        return scores.log_softmax(-1, dtype=accumulate_type(scores.dtype))

    def internal_lm(self, predictor_out):
        """Score labels from the predictor alone: the internal language model.

        The encoder's part of the joint is set to 0, the blank is left out
        (Variani 2020, arXiv 2003.07705, section 4; for an RNN-T this is an
        estimate, Meng 2021, arXiv 2011.01991). `SpeechBrainJoint` needs
        encoder and predictor of the same width. Of [..., predictor_dim],
        returns log-probabilities [..., V], minus infinity at the blank.

        >>> lm = RNNTJoint(8, 6, 16, 10).internal_lm(torch.rand(2, 3, 6))
        >>> bool(torch.allclose(lm.exp().sum(-1), torch.ones(2, 3)))
        True
        """
        projected = self.project_predictor(predictor_out)
        scores = self.scores(torch.zeros_like(projected), projected)
        return labels_only(scores, self.blank_index)


class RNNTJoint(Joint):
    """Joint network of an RNN-T: `W tanh(W_e x + W_p g + b) + c`.

    Arguments
    ---------
    encoder_dim, predictor_dim, joint_dim : int
        Width of the encoder's and the predictor's output, and inside.
    vocab_size, blank_index : int
        Number of scores V, of labels and blank; the index of the blank.
    activation : type
        Class of the non-linearity.

    Example
    -------
    >>> joint = RNNTJoint(8, 6, 16, 10)
    >>> encoder_out, predictor_out = torch.rand(2, 5, 8), torch.rand(2, 4, 6)
    >>> joint(encoder_out.unsqueeze(2), predictor_out.unsqueeze(1)).shape
    torch.Size([2, 5, 4, 10])
    """

    overwritable = True

    def __init__(
        self,
        encoder_dim,
        predictor_dim,
        joint_dim,
        vocab_size,
        blank_index=0,
        activation=torch.nn.Tanh,
    ):
        super().__init__()
        check_vocabulary(vocab_size, blank_index)
        self.encoder_layer = torch.nn.Linear(encoder_dim, joint_dim)
        self.predictor_layer = torch.nn.Linear(
            predictor_dim, joint_dim, bias=False
        )
        self.activation = activation()
        self.output = torch.nn.Linear(joint_dim, vocab_size)
        self.vocab_size = vocab_size
        self.blank_index = blank_index

    def project_encoder(self, encoder_out):
        """See `Joint.project_encoder`."""
        return self.encoder_layer(encoder_out)

    def project_predictor(self, predictor_out):
        """See `Joint.project_predictor`."""
        return self.predictor_layer(predictor_out)

    def scores(self, encoder, predictor):
        """See `Joint.scores`."""
        return self.output(self.activation(encoder + predictor))

    def forward(self, encoder_out, predictor_out):
        """Score every pair of frame and label position.

        Arguments
        ---------
        encoder_out : torch.Tensor
            [B, T, 1, encoder_dim].
        predictor_out : torch.Tensor
            [B, 1, U + 1, predictor_dim].

        Returns
        -------
        torch.Tensor
            [B, T, U + 1, V], raw scores (of HAT: log-probabilities).
        """
        return self.scores(
            self.project_encoder(encoder_out),
            self.project_predictor(predictor_out),
        )


def blank_mask(scores, blank_index):
    """Return [V], True at the blank, on the device of `scores` [..., V]."""
    return torch.arange(scores.shape[-1], device=scores.device) == blank_index


def labels_only(scores, blank_index):
    """Normalise scores [..., V] over labels; minus infinity at the blank."""
    blank = blank_mask(scores, blank_index)
    scores = scores.masked_fill(blank, float("-inf"))
    return scores.log_softmax(-1, dtype=accumulate_type(scores.dtype))
