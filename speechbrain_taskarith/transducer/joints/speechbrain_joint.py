"""SpeechBrain's joint network and output layers, as one joint of ours."""

import torch

from speechbrain_taskarith.transducer.joints.joint import labels_only
from speechbrain_taskarith.transducer.loss.transitions import accumulate_type


class SpeechBrainJoint(torch.nn.Module):
    """`Transducer_joint` and the layers behind it, with `RNNTJoint`'s methods.

    So that `joint_transducer_loss`, the searches and MinWER work on models of
    SpeechBrain's transducer recipes as they are.

    Arguments
    ---------
    joint : torch.nn.Module or callable
        Takes [B, T, 1, E] and [B, 1, U + 1, P].
    output : torch.nn.Module or sequence of torch.nn.Module
        What comes behind it, e.g. `transducer_lin`; may be a `HATOutput`.
    blank_index : int
        Index of the blank.

    Example
    -------
    >>> from speechbrain.nnet.transducer.transducer_joint import (
    ...     Transducer_joint,
    ... )
    >>> tjoint = Transducer_joint(joint="sum", nonlinearity=torch.nn.Tanh)
    >>> joint = SpeechBrainJoint(tjoint, torch.nn.Linear(8, 10), blank_index=0)
    >>> joint(torch.rand(2, 5, 1, 8), torch.rand(2, 1, 4, 8)).shape
    torch.Size([2, 5, 4, 10])
    >>> joint.internal_lm(torch.rand(2, 8)).shape
    torch.Size([2, 10])
    """

    # Scores or log-probabilities: a log_softmax normalises both.
    normalization = "softmax"
    # Layers from elsewhere may need their result in backward.
    overwritable = False
    # Only the layers know.
    vocab_size = None

    def __init__(self, joint, output=(), blank_index=0):
        super().__init__()
        self.joint = joint
        layers = [output] if isinstance(output, torch.nn.Module) else output
        self.output = torch.nn.ModuleList(layers)
        self.blank_index = blank_index

    def project_encoder(self, encoder_out):
        """Return the encoder's output as it is.

        Arguments
        ---------
        encoder_out : torch.Tensor
            [..., E].

        Returns
        -------
        torch.Tensor
            The same.
        """
        return encoder_out

    def project_predictor(self, predictor_out):
        """Return the predictor's output as it is.

        Arguments
        ---------
        predictor_out : torch.Tensor
            [..., P].

        Returns
        -------
        torch.Tensor
            The same.
        """
        return predictor_out

    def scores(self, encoder, predictor):
        """Score pairs of frames and label positions.

        Arguments
        ---------
        encoder, predictor : torch.Tensor
            [..., E] and [..., P] with the same dimensions in front.

        Returns
        -------
        torch.Tensor
            [..., V].
        """
        # SpeechBrain's joints tell the two apart by four dimensions.
        front = encoder.shape[:-1]
        x = encoder.reshape(1, -1, 1, encoder.shape[-1])
        g = predictor.reshape(1, -1, 1, predictor.shape[-1])
        return self(x, g).reshape(*front, -1)

    def log_probs(self, encoder, predictor):
        """See `RNNTJoint.log_probs`."""
        scores = self.scores(encoder, predictor)
        return scores.log_softmax(-1, dtype=accumulate_type(scores.dtype))

    def forward(self, encoder_out, predictor_out):
        """See `RNNTJoint.forward`."""
        x = self.joint(encoder_out, predictor_out)
        for layer in self.output:
            x = layer(x)
        return x

    def internal_lm(self, predictor_out):
        """See `RNNTJoint.internal_lm`; needs encoder and predictor of the
        same width."""
        nothing = torch.zeros_like(predictor_out)
        scores = self.scores(nothing, predictor_out)
        return labels_only(scores, self.blank_index)
