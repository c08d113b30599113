"""Steering the adapters of an encoder: use, train, save, fold, take out."""

import logging

from speechbrain_taskarith.adapters import files as adapter_files
from speechbrain_taskarith.adapters.adapter_set import KINDS, AdapterSet
from speechbrain_taskarith.adapters.attention import (
    adapter_attention,
    guidance_loss,
)
from speechbrain_taskarith.adapters.bank import COMBINED
from speechbrain_taskarith.adapters.freezing import StayFrozen, hold_statistics
from speechbrain_taskarith.adapters.insertion import CHILD

logger = logging.getLogger(__name__)

_STAY = "task_adapters_stay_frozen"


class AdapterHandle(AdapterSet):
    """All adapters of an encoder, and which of them are in use.

    Made by `insert_adapters`. It is a child of the encoder: an optimizer or
    DDP that has the encoder has the adapters, and a checkpoint of the
    encoder holds them (one without them loads, too). As a recoverable of
    its own it saves the adapters alone.

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

    Example
    -------
    >>> import torch
    >>> from speechbrain_taskarith.adapters import insert_adapters
    >>> encoder = torch.nn.TransformerEncoder(
    ...     torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2
    ... )
    >>> x = torch.randn(3, 5, 8)
    >>> adapters = insert_adapters(
    ...     encoder, ["us", "german"], bottleneck=4, combination="fusion"
    ... )
    >>> optimizer = torch.optim.Adam(adapters.train_extraction("us"))
    >>> _ = encoder(x)                     # ... train; then the other one
    >>> optimizer = torch.optim.Adam(adapters.train_composition("ST-A"))
    >>> _ = encoder(x)                     # ... train
    >>> _ = adapters.use(["us", "german", None])   # one for each utterance
    >>> _ = encoder(x)
    >>> with adapters.use(None):
    ...     _ = encoder(x)                 # the base, bit for bit
    """

    def __init__(self, encoder, layers, banks, combination=None):
        super().__init__(encoder, layers, banks, combination)
        self._frozen_modules = []

    # ---------------------------------------------------------------- train

    def freeze(self, *modules):
        """Freeze modules beside the encoder, running statistics as well.

        Arguments
        ---------
        *modules : torch.nn.Module
            E.g. an `InputNormalization` in front, or the output layer.
        """
        for module in modules:
            self._flags += [(p, p.requires_grad) for p in module.parameters()]
            module.requires_grad_(False)
            if not hasattr(module, _STAY):
                module.add_module(_STAY, StayFrozen(module))
                self._frozen_modules.append(module)
            hold_statistics(module)

    def train_extraction(self, name):
        """Set up the first stage: one adapter is trained, and in use.

        Arguments
        ---------
        name : str or sequence of str
            Of several, the adapters are all trained and none is put in use:
            say by `use([...])` for every batch whose utterances are whose.

        Returns
        -------
        list of torch.nn.Parameter
            What is trained now; all else in encoder and handle is frozen.
        """
        names = [name] if isinstance(name, str) else list(name)
        self.layers[0].bank.require(*names)
        self._train_only(
            p
            for layer in self.layers
            for n in names
            for p in layer.bank[n].parameters()
        )
        self.use(name if isinstance(name, str) else None)
        return self.trained_parameters()

    def train_composition(self, mode="ST-A"):
        """Set up the second stage: the combination is trained, and in use.

        Arguments
        ---------
        mode : str
            `"ST-A"` leaves the adapters as they are, to the byte; `"MT-A"`
            trains those that are combined as well.

        Returns
        -------
        list of torch.nn.Parameter
            What is trained now; empty for a mean without LN in `ST-A`.

        Raises
        ------
        ValueError
            No combination, or another mode.
        """
        if mode not in ("ST-A", "MT-A"):
            raise ValueError(f"mode is {mode!r}, expected 'ST-A' or 'MT-A'")
        self.use(COMBINED)
        untrained = [
            name
            for name in self.combined_names
            if all(layer.bank[name].is_untrained() for layer in self.layers)
        ]
        if untrained:
            logger.warning(
                "combining adapters that were never trained: %s",
                ", ".join(untrained),
            )
        own = [p for m in self.layers for p in m.combination.parameters()]
        if mode == "MT-A":
            own += [
                p
                for layer in self.layers
                for name in self.combined_names
                for p in layer.bank[name].parameters()
            ]
        self._train_only(own)
        return self.trained_parameters()

    def train_nothing(self):
        """Freeze everything in encoder and handle; what is in use stays."""
        self._train_only(())

    def _train_only(self, parameters):
        self.unfold()
        for parameter in self.encoder.parameters():
            parameter.requires_grad_(False)
            parameter.grad = None
        for parameter in parameters:
            parameter.requires_grad_(True)

    def trained_parameters(self):
        """Return the parameters that are trained now.

        Returns
        -------
        list of torch.nn.Parameter
            For an optimizer, or for clipping.
        """
        return [p for p in self.parameters() if p.requires_grad]

    def count_parameters(self):
        """Count parameters, for the table of results.

        Returns
        -------
        dict
            `base`, `adapters`, `combination`, `trained` (numbers), and
            `share`, the trained ones in % of the base.
        """
        inside = {id(p) for p in self.parameters()}
        base = sum(
            p.numel() for p in self.encoder.parameters() if id(p) not in inside
        )
        counts = {
            "base": base,
            "adapters": sum(
                p.numel() for m in self.layers for p in m.bank.parameters()
            ),
            "combination": sum(
                p.numel()
                for m in self.layers
                if m.combination is not None
                for p in m.combination.parameters()
            ),
            "trained": sum(p.numel() for p in self.trained_parameters()),
        }
        return {**counts, "share": 100.0 * counts["trained"] / max(base, 1)}

    def penalty(self):
        """Return the sum of the combinations' penalties.

        `0.01 sum_layers ||I - W_V||^2` for the fusion, to be added to a
        training loss; 0.0 for the others.

        Returns
        -------
        torch.Tensor or float
            A scalar.
        """
        made = [layer.combination for layer in self.layers]
        return sum(m.penalty() for m in made if m is not None)

    # -------------------------------------------------------------- folding

    def fold(self):
        """Multiply out the frozen combination of every layer, once.

        For inference: afterwards the parameters are not looked at. Training,
        moving and loading unfold by themselves.
        """
        self._require_combination("fold")
        for layer in self.layers:
            layer.combination.fold()

    def unfold(self):
        """Go back to the combinations' parameters."""
        for layer in self.layers:
            if layer.combination is not None:
                layer.combination.unfold()

    def attention(self, lens=None):
        """Return the mean weight of each adapter in the last batch.

        Arguments
        ---------
        lens : torch.Tensor or None
            [B], relative lengths in (0, 1]; frames behind them do not
            count. None counts all.

        Returns
        -------
        torch.Tensor
            [layers, N], rows sum to 1 (but free weights' do not), in the
            order of `combined_names`.

        Raises
        ------
        ValueError
            No combination, no batch yet, or lengths of another batch.
        """
        self._require_combination("attention")
        return adapter_attention(self.layers, self.layer_names, lens)

    def attention_loss(self, tasks, lens=None):
        """Return how far attention is from the utterances' own adapters.

        `- mean_layers mean_t log s_task(t)` of the last batch, to be added
        to a training loss with a small weight: the tasks of training data
        are known, those of test data need not be. Wants fusions made with
        `guided=True`.

        Arguments
        ---------
        tasks : sequence of str
            B names of combined adapters.
        lens : torch.Tensor or None
            [B], relative lengths in (0, 1]; frames behind them do not
            count. None counts all.

        Returns
        -------
        torch.Tensor
            A scalar with a gradient.

        Raises
        ------
        ValueError
            No combination, no batch yet, an adapter that is not combined,
            or another number of tasks than of utterances.

        Example
        -------
        >>> import torch
        >>> from speechbrain_taskarith.adapters import (
        ...     AudioAdapterFusion,
        ...     insert_adapters,
        ... )
        >>> encoder = torch.nn.TransformerEncoder(
        ...     torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2
        ... )
        >>> adapters = insert_adapters(
        ...     encoder,
        ...     ["us", "german"],
        ...     bottleneck=4,
        ...     combination=AudioAdapterFusion(guided=True),
        ... )
        >>> parameters = adapters.train_composition("ST-A")
        >>> _ = encoder(torch.randn(3, 5, 8))
        >>> adapters.attention_loss(["us", "us", "german"]).backward()
        """
        self._require_combination("attention_loss")
        return guidance_loss(
            self.layers, self.layer_names, self.combined_names, tasks, lens
        )

    def _require_combination(self, what):
        if self.layers[0].combination is None:
            raise ValueError(
                f"{what} needs a combination: give one to insert_adapters "
                "or handle.set_combination('fusion')"
            )

    # ---------------------------------------------------------------- files

    def base_fingerprint(self):
        """Return what tells the base's weights from others.

        Returns
        -------
        str
            64 hexadecimal digits, over names, types, shapes and bytes of
            the encoder's state without the adapters.
        """
        return adapter_files.fingerprint(self.encoder, CHILD + ".")

    def save_adapter(self, name, path):
        """Write one adapter to a file of its own, atomically.

        Arguments
        ---------
        name : str
            Which.
        path : str or pathlib.Path
            `.safetensors`

        Raises
        ------
        ValueError
            An unknown name, or NaN in the adapter.
        """
        adapter_files.save_adapter(self, name, path)

    def load_adapter(self, path, name=None, *, name_map=None, any_base=False):
        """Take an adapter from a file, adding it where the name is new.

        Arguments
        ---------
        path : str or pathlib.Path
            `.safetensors`
        name : str or None
            What it is to be called; None for the name in the file. An
            adapter of that name is replaced.
        name_map : dict or None
            For files of others: `{our name: theirs}` for `down.weight`,
            `down.bias`, `up.weight`, `up.bias`, `norm.weight`, `norm.bias`;
            `{layer}` in theirs stands for the number of the layer. A name
            that is None takes a fresh adapter's value.
        any_base : bool
            True takes an adapter that was trained on another base.

        Raises
        ------
        ValueError
            A damaged file, another base, other widths or layers, names that
            the file lacks, NaN; nothing is changed then.
        """
        adapter_files.load_adapter(self, path, name, name_map, any_base)

    def save_combination(self, path):
        """Write the combination with the names that it combines.

        Arguments
        ---------
        path : str or pathlib.Path
            `.safetensors`
        """
        self._require_combination("save_combination")
        adapter_files.save_combination(self, path)

    def load_combination(self, path, *, any_base=False):
        """Take a combination from a file; its adapters have to be here.

        Arguments
        ---------
        path : str or pathlib.Path
            From `save_combination`.
        any_base : bool
            True takes one that was trained on another base.

        Raises
        ------
        ValueError
            A damaged file, another base or width, or missing adapters;
            nothing is changed then.
        """
        adapter_files.load_combination(self, path, KINDS, any_base)

    # ------------------------------------------------------------------ end

    def remove(self):
        """As `AdapterSet.remove`; modules beside the encoder, too."""
        for module in self._frozen_modules:
            module._modules.pop(_STAY, None)
            module.train(module.training)
        self._frozen_modules = []
        super().remove()
