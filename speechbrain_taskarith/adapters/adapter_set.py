"""Which adapters an encoder has, what combines them, which are in use."""

import logging

import torch

from speechbrain_taskarith.adapters.bank import COMBINED
from speechbrain_taskarith.adapters.combination.averaging import (
    AdapterMean,
    AdapterWeightedMean,
)
from speechbrain_taskarith.adapters.combination.base import Combination
from speechbrain_taskarith.adapters.combination.fusion import AudioAdapterFusion
from speechbrain_taskarith.adapters.freezing import hold_statistics
from speechbrain_taskarith.adapters.insertion import CHILD, Attachment
from speechbrain_taskarith.adapters.layer import LayerAdapters, Route
from speechbrain_taskarith.adapters.pass_through import PassThrough

logger = logging.getLogger(__name__)

#: What a combination is called, for short.
KINDS = {
    "mean": AdapterMean,
    "weighted_mean": AdapterWeightedMean,
    "fusion": AudioAdapterFusion,
}


class AdapterSet(PassThrough):
    """The adapters of an encoder: members, and what is in use.

    The part of `AdapterHandle` that neither trains nor saves.

    Arguments
    ---------
    encoder : torch.nn.Module
        Is frozen here.
    layers : list of tuple
        `(name, module)`, from `find_layers`.
    banks : list of AdapterBank
        One a layer.
    combination : None, str, Combination or callable
        See `insert_adapters`.
    """

    def __init__(self, encoder, layers, banks, combination=None):
        super().__init__()
        self._layer_names = [name for name, _ in layers]
        self._encoder = (encoder,)
        self._route = Route(banks[0])
        makers = [_maker(combination)(bank) for bank in banks]
        self.layers = torch.nn.ModuleList(
            LayerAdapters(bank, made, self._route)
            for bank, made in zip(banks, makers)
        )
        for made, bank in zip(makers, banks):
            _move_like(made, bank)
        # From here on nothing fails, so that no half of it is left behind.
        self._flags = [(p, p.requires_grad) for p in encoder.parameters()]
        for parameter in encoder.parameters():
            parameter.requires_grad_(False)
        self._attachments = [
            Attachment(name, layer, adapters)
            for (name, layer), adapters in zip(layers, self.layers)
        ]
        encoder.add_module(CHILD, self)
        self._register_load_state_dict_pre_hook(
            _keep_when_absent, with_module=True
        )
        self.requires_grad_(False)
        self.train(encoder.training)

    # -------------------------------------------------------------- members

    @property
    def encoder(self):
        """The encoder that the adapters are in."""
        return self._encoder[0]

    @property
    def layer_names(self):
        """The names of the layers that have adapters, in order."""
        return list(self._layer_names)

    @property
    def names(self):
        """The adapters' names, in order."""
        return list(self.layers[0].bank.names)

    @property
    def combined_names(self):
        """The names that the combination combines, None without one."""
        made = self.layers[0].combination
        return None if made is None else list(made.names)

    def add_adapter(self, name, bottleneck=None):
        """Add a fresh adapter behind every layer.

        No other adapter changes, nor does a combination, which goes on
        with the adapters that it has.

        Arguments
        ---------
        name : str
            A new name.
        bottleneck : int or None
            Its width, None for that of the first ones.
        """
        for layer in self.layers:
            layer.bank.add(name, bottleneck).requires_grad_(False)

    def remove_adapter(self, name):
        """Take one adapter out of every layer.

        Arguments
        ---------
        name : str
            Neither the last one nor one that is combined.

        Raises
        ------
        ValueError
            It is.
        """
        self.layers[0].bank.require(name)
        if name in (self.combined_names or ()):
            raise ValueError(
                f"the combination combines {name!r}; set_combination(kind, "
                "names=...) without it first"
            )
        for layer in self.layers:
            layer.bank.remove(name)
        # Positions have moved.
        if self._route.choice == name or isinstance(
            self._route.choice, torch.Tensor
        ):
            self.use(None)

    def set_combination(self, combination, names=None):
        """Give the encoder another, freshly started combination.

        Arguments
        ---------
        combination : None, str, Combination or callable
            See `insert_adapters`.
        names : sequence of str or None
            Which adapters it combines, None for all; leaving one out is how
            a task is tried that no adapter has seen.
        """
        make = _maker(combination, names)
        self.install([make(layer.bank) for layer in self.layers])

    def install(self, made):
        """Put combinations that are made already behind the layers.

        Arguments
        ---------
        made : list of Combination or None
            One a layer.
        """
        if self._route.choice == COMBINED and made[0] is None:
            self.use(None)
        for layer, new in zip(self.layers, made):
            _move_like(new, layer.bank)
            if new is not None:
                new.requires_grad_(False).train(self.training)
            layer.combination = new

    # ------------------------------------------------------------------ use

    def use(self, choice):
        """Choose what the encoder's next batches go through.

        Arguments
        ---------
        choice : None, str, sequence or torch.Tensor
            None: the base, bit for bit. A name: that adapter.
            `"combined"`: the combination. For each utterance of the next
            batches its own: B names (None for the base) or [B] positions in
            `names` (-1 for the base), in one pass.

        Returns
        -------
        context manager
            Goes back to the choice before, where used by `with`.

        Raises
        ------
        ValueError
            An unknown name or position; the choice stays what it was.
        """
        before = self._route.choice
        self._route.choose(choice, self.layers[0].combination is not None)
        return _Back(self._route, before)

    @property
    def in_use(self):
        """What was chosen last: None, text, or a tensor of positions."""
        return self._route.choice

    # ----------------------------------------------------------------- mode

    def train(self, mode=True):
        """Take the mode; the base's running statistics stay still.

        Dropout in the base follows the encoder's mode, as in fine-tuning.

        Arguments
        ---------
        mode : bool
            True for training.

        Returns
        -------
        AdapterHandle
            Itself.
        """
        super().train(mode)
        # Called by `encoder.train()` for its last child: this one.
        hold_statistics(self.encoder)
        return self

    # ------------------------------------------------------------------ end

    def remove(self):
        """Leave the encoder as it was before `insert_adapters`.

        Its parameters are trained or frozen as they were then. The handle
        keeps the adapters, but is of no more use.
        """
        for attachment in self._attachments:
            attachment.detach()
        self._attachments = []
        self.encoder._modules.pop(CHILD, None)
        for parameter, flag in reversed(self._flags):
            parameter.requires_grad_(flag)
        self._flags = []
        self.encoder.train(self.encoder.training)


class _Back:
    """Goes back to an earlier choice at the end of a `with`."""

    def __init__(self, route, before):
        self._route, self._before = route, before

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self._route.choice = self._before
        self._route._tensors = {}


def _maker(combination, names=None):
    """Return a function that makes a combination for a bank."""
    if combination is None:
        return lambda bank: None
    if isinstance(combination, str):
        if combination not in KINDS:
            raise ValueError(
                f"combination is {combination!r}, expected one of "
                f"{', '.join(KINDS)}, an instance, or None"
            )
        combination = KINDS[combination]()
    if isinstance(combination, Combination):
        return lambda bank: combination.for_bank(bank, names)
    if not callable(combination):
        raise ValueError(
            f"combination is {combination!r}, expected one of "
            f"{', '.join(KINDS)}, an instance, or None"
        )
    if names is None:
        return combination
    return lambda bank: combination(bank, names=names)


def _move_like(made, bank):
    if made is not None:
        like = next(bank.parameters())
        made.to(like.device, like.dtype)


def _keep_when_absent(handle, state, prefix, *others):
    """Let a checkpoint of the base alone load into the encoder."""
    if prefix and not any(key.startswith(prefix) for key in state):
        logger.info("no adapters in this checkpoint: they stay as they are")
        state.update(handle.state_dict(prefix=prefix))
