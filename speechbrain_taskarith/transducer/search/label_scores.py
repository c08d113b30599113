"""What language models, outer and internal, add to the scores of labels."""

import torch

from speechbrain_taskarith.transducer.joints.joint import labels_only


class LabelScores(torch.nn.Module):
    """`lm_weight log P_LM - ilm_weight log P_ILM` of every next label.

    Arguments
    ---------
    joint : torch.nn.Module
        For its `internal_lm`.
    blank_index : int
        The blank, which gets 0.
    lm : torch.nn.Module or None
        See `TransducerBeamSearch`.
    lm_weight : float
        Of the outer language model.
    ilm_weight : float
        Of the internal one.
    bos_index : int or None
        What the outer one starts from; None takes the blank.
    """

    def __init__(
        self, joint, blank_index, lm, lm_weight, ilm_weight, bos_index
    ):
        super().__init__()
        self.joint = joint
        self.blank_index = blank_index
        self.lm = lm
        self.lm_weight = lm_weight if lm is not None else 0.0
        self.ilm_weight = ilm_weight
        self.bos_index = blank_index if bos_index is None else bos_index

    def forward(self, predictor_out, labels, lm_state):
        """Score the labels that may come next.

        Arguments
        ---------
        predictor_out : torch.Tensor
            [R, P], as the predictor gives it.
        labels : torch.Tensor or None
            [R], the last label; None at the beginning.
        lm_state : object
            The language model's state before that label.

        Returns
        -------
        extra : torch.Tensor or None
            [R, V]; None where no language model takes part.
        lm_state : object
            The state after that label.

        Raises
        ------
        ValueError
            A language model that returns no state, or scores other labels.
        """
        extra = None
        if self.ilm_weight:
            internal = self.joint.internal_lm(predictor_out)
            extra = -self.ilm_weight * internal
        if self.lm_weight:
            if labels is None:
                labels = torch.full(
                    (len(predictor_out),),
                    self.bos_index,
                    dtype=torch.long,
                    device=predictor_out.device,
                )
            outer, lm_state = self._outer(labels, lm_state)
            outer = self.lm_weight * outer
            if extra is not None and extra.shape != outer.shape:
                raise ValueError(
                    f"the language model scores {outer.shape[-1]} labels, the "
                    f"joint {extra.shape[-1]}; they need one vocabulary"
                )
            extra = outer if extra is None else extra + outer
        if extra is not None:
            extra[:, self.blank_index] = 0.0
        return extra, lm_state

    def _outer(self, labels, lm_state):
        found = self.lm(labels[:, None], lm_state)
        if not isinstance(found, tuple) or len(found) != 2:
            raise ValueError(
                f"{type(self.lm).__name__} returned no state beside its "
                "scores; a search needs both (RNNLM: return_hidden=True)"
            )
        scores, lm_state = found
        scores = scores.reshape(len(labels), -1)
        return labels_only(scores, self.blank_index), lm_state
