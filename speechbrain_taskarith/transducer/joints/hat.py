"""Hybrid autoregressive transducer (HAT): the blank apart from the labels.

Variani et al. 2020, arXiv 2003.07705. As the blank has its own probability,
the labels' softmax is a language model inside the network. Its score can be
subtracted when an outer language model is added.
"""

import torch
from torch.nn.functional import logsigmoid

from speechbrain_taskarith.transducer.joints.joint import RNNTJoint, blank_mask
from speechbrain_taskarith.transducer.loss.input_checks import check_vocabulary
from speechbrain_taskarith.transducer.loss.transitions import accumulate_type


def hat_log_probs(scores, blank_index):
    """Normalise scores [..., V] as HAT does (equations 8 and 9).

    `P(blank) = sigmoid(z_blank)`, `P(y) = (1 - P(blank)) softmax(z)_y` with
    the softmax over labels only. float32 for lower precisions.
    """
    scores = scores.to(accumulate_type(scores.dtype))
    blank = blank_mask(scores, blank_index)
    z = scores[..., blank_index : blank_index + 1]
    labels = scores.masked_fill(blank, float("-inf")).log_softmax(-1)
    return torch.where(blank, logsigmoid(z), labels + logsigmoid(-z))


class HATJoint(RNNTJoint):
    """Joint network of a hybrid autoregressive transducer.

    Arguments
    ---------
    encoder_dim, predictor_dim, joint_dim, vocab_size, blank_index, activation
        As of `RNNTJoint`.

    Example
    -------
    >>> joint = HATJoint(8, 6, 16, 10, blank_index=0)
    >>> log_probs = joint(torch.rand(2, 5, 1, 8), torch.rand(2, 1, 4, 6))
    >>> bool(torch.allclose(log_probs.exp().sum(-1), torch.ones(2, 5, 4)))
    True
    """

    normalization = "hat"

    def __init__(
        self,
        encoder_dim,
        predictor_dim,
        joint_dim,
        vocab_size,
        blank_index,
        activation=torch.nn.Tanh,
    ):
        super().__init__(
            encoder_dim,
            predictor_dim,
            joint_dim,
            vocab_size,
            blank_index,
            activation,
        )

    def log_probs(self, encoder, predictor):
        """See `Joint.log_probs`."""
        return hat_log_probs(self.scores(encoder, predictor), self.blank_index)

    def forward(self, encoder_out, predictor_out):
        """See `RNNTJoint.forward`; the result is normalised."""
        scores = super().forward(encoder_out, predictor_out)
        return hat_log_probs(scores, self.blank_index)


class HATOutput(torch.nn.Module):
    """Last layer that turns a SpeechBrain transducer recipe into HAT.

    It replaces the recipe's `transducer_lin`. Joint and train.py stay as they
    are: its output is normalised, and a log_softmax does not change that. The
    layer has a bias, which SpeechBrain's has not. Weights of an RNN-T's output
    layer are refused: its blank competes with the labels, so that no weights
    of this layer say the same.

    Arguments
    ---------
    input_size : int
        Width of the joint.
    vocab_size, blank_index : int
        Number of scores, of labels and blank; the index of the blank.

    Example
    -------
    >>> layer = HATOutput(input_size=16, vocab_size=10, blank_index=0)
    >>> log_probs = layer(torch.rand(2, 5, 4, 16))
    >>> bool(torch.allclose(log_probs, log_probs.log_softmax(-1), atol=1e-5))
    True
    """

    def __init__(self, input_size, vocab_size, blank_index):
        super().__init__()
        check_vocabulary(vocab_size, blank_index)
        self.linear = torch.nn.Linear(input_size, vocab_size)
        self.vocab_size = vocab_size
        self.blank_index = blank_index

    def forward(self, x):
        """Turn [..., input_size] to [..., V], as `HATJoint.log_probs` does."""
        return hat_log_probs(self.linear(x), self.blank_index)

    def _load_from_state_dict(self, state_dict, prefix, *rest):
        # SpeechBrain's Pretrainer would only warn, and train on noise.
        if f"{prefix}w.weight" in state_dict:
            rest[-1].append(
                f"{prefix}w.weight is the output layer of an RNN-T, whose "
                "scores mean something else than those of a HAT. Keep "
                "speechbrain.nnet.linear.Linear to go on with this file; to "
                "train a HAT from its encoder, take that alone: "
                "speechbrain_taskarith.transducer.transfer_encoder"
            )
        super()._load_from_state_dict(state_dict, prefix, *rest)
