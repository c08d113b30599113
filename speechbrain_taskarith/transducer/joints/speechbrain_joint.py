"""SpeechBrain's joint network and output layers, with `RNNTJoint`'s methods."""

import torch

from speechbrain_taskarith.transducer.joints.joint import Joint


class SpeechBrainJoint(Joint):
    """`Transducer_joint` and the layers behind it, as one joint network.

    `joint_transducer_loss`, the searches and MinWER then work on models of
    SpeechBrain's transducer recipes as they are.

    Arguments
    ---------
    joint : torch.nn.Module or callable
        Takes [B, T, 1, E] and [B, 1, U + 1, P].
    output : torch.nn.Module or sequence of torch.nn.Module
        The layers behind it, e.g. `transducer_lin`; may be a `HATOutput`
        (scores or log-probabilities: a log_softmax normalises both).
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

    def __init__(self, joint, output=(), blank_index=0):
        super().__init__()
        self.joint = joint
        layers = [output] if isinstance(output, torch.nn.Module) else output
        self.output = torch.nn.ModuleList(layers)
        self.blank_index = blank_index

    def scores(self, encoder, predictor):
        """See `Joint.scores`."""
        # SpeechBrain's joints tell the two apart by four dimensions.
        front = encoder.shape[:-1]
        x = encoder.reshape(1, -1, 1, encoder.shape[-1])
        g = predictor.reshape(1, -1, 1, predictor.shape[-1])
        out = self(x, g)
        return out.reshape(*front, out.shape[-1])

    def forward(self, encoder_out, predictor_out):
        """See `RNNTJoint.forward`."""
        x = self.joint(encoder_out, predictor_out)
        for layer in self.output:
            x = layer(x)
        return x


def as_joint(joint, blank_index):
    """Wrap what is not a `Joint`: `joint(x[B, T, 1, E], g[B, 1, U + 1, P])`.

    A joint that was made with another blank is a ValueError.
    """
    if not isinstance(joint, Joint):
        return SpeechBrainJoint(joint, blank_index=blank_index)
    if joint.blank_index != blank_index:
        raise ValueError(
            f"blank_index {blank_index}, but the joint was made with "
            f"blank_index {joint.blank_index}; give both the same"
        )
    return joint
