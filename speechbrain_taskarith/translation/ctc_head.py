"""The recipe's CTC head, used for shrinking: is it trained and loaded?"""

import logging

import torch

logger = logging.getLogger(__name__)


class CTCHeadWatch:
    """A CTC head that belongs to a recipe, and what the recipe does with it.

    A recipe may leave it out of its losses (`ctc_weight: 0`) or out of its
    checkpoints (the list `model`); shrinking then follows a random head. No
    module, so that the head is trained and saved once, by the recipe.
    """

    def __init__(self, head, has_gradient):
        self.head, self.has_gradient = head, has_gradient
        self.own = self.calls = 0
        self.before = None
        self.warned = set()
        self.loaded = self.transformer_loaded = False
        head.register_forward_hook(self._count)
        head.register_load_state_dict_pre_hook(self._note_own_load)

    def __call__(self, frames):
        """Return logits [B, T, V] of frames [B, T, d]."""
        if self.transformer_loaded and not self.loaded:
            self._warn(
                "load",
                "A checkpoint was loaded into the ShrinkingTransformer, and "
                "none into the CTC head that it shrinks by. Is ctc_lin in the "
                "list `model`, which the checkpointer saves?",
            )
        self.transformer_loaded = self.loaded = False
        self.own += 1
        return self.head(frames)

    def parameters(self):
        """Yield the head's parameters."""
        return self.head.parameters()

    def note_load(self):
        """Note that the Transformer beside the head was loaded."""
        self.transformer_loaded = True

    def check_training(self):
        """Look, before a step of training, at what was done since the last."""
        others = self.calls - self.own
        unused, self.before = others == self.before, others
        if not unused:
            return
        if self.has_gradient and _processes() > 1:
            raise RuntimeError(
                "train_weights: True gives the CTC head a gradient, but the "
                "recipe does not call it (ctc_weight: 0, or after a warm-up), "
                "and then DDP does not average that gradient: processes would "
                "drift apart. Set train_weights: False, or give CTC a weight"
            )
        self._warn(
            "loss",
            "The recipe did not call ctc_lin in the last step of training, so "
            "CTC has no loss, and shrinking follows a head that is not "
            "trained. Give CTC a weight in the recipe's YAML (ctc_weight; "
            "for TransformerST asr_weight, too).",
        )

    def _count(self, *_):
        self.calls += 1

    def _note_own_load(self, *_):
        self.loaded = True

    def _warn(self, kind, message):
        if kind not in self.warned:
            self.warned.add(kind)
            logger.warning(message)


def _processes():
    distributed = torch.distributed
    ready = distributed.is_available() and distributed.is_initialized()
    return distributed.get_world_size() if ready else 1
