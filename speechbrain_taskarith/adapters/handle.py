"""All adapters of an encoder: choose, train, fold and remove them."""

import logging
import sys

import torch

from speechbrain_taskarith.adapters.bank import (
    COMBINED,
    adapter_key,
    adapter_name,
)
from speechbrain_taskarith.adapters.checks import Fingerprints
from speechbrain_taskarith.adapters.combination import attention
from speechbrain_taskarith.adapters.hooks.layer_loop import LayerLoop
from speechbrain_taskarith.adapters.hooks.route import Route, Use
from speechbrain_taskarith.adapters.layer import (
    CHILD,
    LayerAdapters,
    make_combination,
    utterance_positions,
)
from speechbrain_taskarith.adapters.training import (
    GUARD,
    AdapterTraining,
    StatisticsGuard,
)

logger = logging.getLogger(__name__)


class AdapterHandle(AdapterTraining):
    """All adapters of an encoder, and which of them are in use.

    Made by `insert_adapters`. It is a child of the encoder, so an optimizer,
    DDP or a checkpoint of the encoder includes the adapters (a checkpoint
    without them loads, too). As a recoverable of its own it saves the
    adapters alone.

    Arguments
    ---------
    encoder, layers, banks, combination
        From `insert_adapters`: layers are `(name, module)`, with a bank each.

    Example
    -------
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
        super().__init__()
        made = [make_combination(combination, bank) for bank in banks]
        # From here on nothing fails, so that no half of it is left behind.
        # Not by setattr, which would make the encoder its child's child.
        self.__dict__["encoder"] = encoder
        self._route = Route()
        self._frozen = []  # (name, module), see `freeze`
        self._fingerprints = Fingerprints()
        self._flags = [(p, p.requires_grad) for p in encoder.parameters()]
        encoder.requires_grad_(False)
        loops = {
            owner: LayerLoop(owner, encoder.get_submodule(owner), self._route)
            for owner in dict.fromkeys(_owner(encoder, n) for n, _ in layers)
        }
        self._loops = list(loops.values())
        self.layers = torch.nn.ModuleList(
            LayerAdapters(name, layer, bank, new, loops[_owner(encoder, name)])
            for (name, layer), bank, new in zip(layers, banks, made)
        )
        self.add_module(GUARD, StatisticsGuard(encoder))
        encoder.add_module(CHILD, self)
        self._register_load_state_dict_pre_hook(
            _before_loading, with_module=True
        )
        self.requires_grad_(False)
        if "torch._dynamo" in sys.modules:
            # What was compiled before has no guard on hooks, and would go on
            # without the adapters.
            torch.compiler.reset()
        self.train(encoder.training)

    def forward(self, x, *others, **named):
        """As `StatisticsGuard.forward`: hooks do the work."""
        return x

    @property
    def layer_names(self):
        """The names of the layers that have adapters, in order."""
        return [layer.name for layer in self.layers]

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
        """Add a fresh adapter behind every layer, as `AdapterBank.add`.

        Other adapters do not change, nor does a combination, which keeps
        the adapters that it has.
        """
        for layer in self.layers:
            layer.bank.add(name, bottleneck).requires_grad_(False)

    def remove_adapter(self, name):
        """Remove one adapter from every layer.

        Arguments
        ---------
        name : str
            Not the last one, nor one that is combined: `ValueError`.
        """
        self.layers[0].bank.require(name)
        if name in (self.combined_names or ()):
            raise ValueError(
                f"the combination combines {name!r}; set_combination(kind, "
                "names=...) without it first"
            )
        for layer in self.layers:
            layer.bank.remove(name)
        # Positions have moved; those of a batch's tasks are made anew.
        chosen = self.in_use == name or isinstance(self.in_use, torch.Tensor)
        if chosen and not self._route.follows_tasks:
            self.use(None)

    def set_combination(self, combination, names=None):
        """Give the encoder another, freshly started combination.

        Arguments
        ---------
        combination : None, str, Combination or callable
            See `insert_adapters`.
        names : sequence of str or None
            Which adapters it combines; None for all. Leave one out to test
            a task that no adapter has seen.
        """
        made = [
            make_combination(combination, m.bank, names) for m in self.layers
        ]
        if self.in_use == COMBINED and made[0] is None:
            self.use(None)
        for layer, new in zip(self.layers, made):
            layer.combination = new

    def _combinations(self):
        """Return `{layer name: combination}`; without one, an error."""
        if self.layers[0].combination is None:
            raise ValueError(
                "there is no combination: give one to insert_adapters or "
                "handle.set_combination('fusion')"
            )
        return {layer.name: layer.combination for layer in self.layers}

    def use(self, choice):
        """Choose what the encoder's next batches go through.

        Arguments
        ---------
        choice : None, str, sequence or torch.Tensor
            None: the base, bit for bit. A name: that adapter.
            `"combined"`: the combination. One adapter for each utterance, in
            one pass: B names (None for the base), or positions [B] in
            `names` (-1 for the base).

        Returns
        -------
        context manager
            In a `with`, the choice holds for the block alone, and for this
            thread or asyncio task alone. Without it, it holds from now on,
            for all of them that are in no `with`.

        Raises
        ------
        ValueError
            An unknown name or position; the choice does not change.
        """
        bank = self.layers[0].bank
        if isinstance(choice, str) and choice == COMBINED:
            self._combinations()
        elif isinstance(choice, str):
            bank.require(choice)
        elif choice is not None:
            choice = utterance_positions(choice, bank)
        return Use(self._route, choice)

    @property
    def in_use(self):
        """What is chosen here: None, text, or a tensor of positions."""
        return self._route.choice

    def fold(self):
        """Multiply out the frozen combination of every layer, for inference.

        Later changes to the parameters have no effect until `unfold`, which
        training, moving and loading call themselves.
        """
        for combination in self._combinations().values():
            combination.fold()

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
            [B], relative lengths in (0, 1]; frames beyond them do not
            count. None takes the padding mask that the layers were given;
            where they were given none, or are compiled, all frames count.

        Returns
        -------
        torch.Tensor
            [layers, N] in the order of `combined_names`; rows sum to 1,
            except with free weights.

        Raises
        ------
        ValueError
            No combination, no batch yet, or lengths of another batch.
        """
        return attention.mean_weights(self._combinations(), lens)

    def attention_loss(self, tasks, lens=None):
        """Return how far attention is from the utterances' own adapters.

        `- mean_layers mean_t log s_task(t)` of the last batch, a scalar with
        a gradient. Add it to the training loss with a small weight; only
        training needs the tasks. Works with fusions made with `guided=True`.

        Arguments
        ---------
        tasks : sequence of str
            B names of combined adapters.
        lens
            See `attention`.

        Raises
        ------
        ValueError
            No combination, no batch yet, an adapter that is not combined,
            or not one task for each utterance.
        """
        return attention.guidance_loss(self._combinations(), tasks, lens)

    @property
    def tasks(self):
        """The tasks of the next batch's utterances, None where not said.

        B names, set before a forward pass where `insert_adapters` was given
        `guide`, or several names to train, and cannot know them; used up by
        that pass.
        """
        return self._route.tasks

    @tasks.setter
    def tasks(self, names):
        """See `tasks`."""
        self._route.tasks = None if names is None else list(names)

    def remove(self):
        """Restore the encoder as it was before `insert_adapters`.

        So are the modules given to `freeze`. Do not use the handle after
        this, although it still holds the adapters.
        """
        for part in (*self.layers, *self._loops):
            part.detach()
        self.encoder._modules.pop(CHILD, None)
        self._unfreeze()


def _owner(encoder, name):
    """Return the name of the module that calls a layer: "" is the encoder."""
    module, path = encoder, []
    for part in name.split("."):
        module = getattr(module, part)
        if isinstance(module, (torch.nn.ModuleList, torch.nn.ModuleDict)):
            return ".".join(path)
        path.append(part)
    return ""


def _before_loading(handle, state, prefix, *others):
    """Let a checkpoint of the base alone load into the encoder.

    One that holds adapters replaces those that came from files.
    """
    unexpected, errors = others[-2:]
    if any(key.startswith(f"{prefix}layers.") for key in state):
        bank = f"{prefix}layers.0.bank."
        theirs = {
            k[len(bank) :].split(".")[0] for k in state if k.startswith(bank)
        }
        ours = {adapter_key(name) for name in handle.names}
        if theirs != ours:
            shown = [
                ", ".join(sorted(map(adapter_name, keys)))
                for keys in (theirs, ours)
            ]
            # Not among the errors, which loading with strict=False raises.
            unexpected.append(
                f"the checkpoint has the adapters {shown[0]}, the encoder "
                f"{shown[1]}: insert_adapters(names=...) with those of the "
                "checkpoint, or handle.add_adapter / remove_adapter first"
            )
        if handle._route.watch is not None:
            handle._route.watch.replaced(state, prefix)
    elif prefix:
        logger.info("no adapters in this checkpoint: they stay as they are")
        state.update(handle.state_dict(prefix=prefix))
    elif state:
        errors.append(
            "no adapters in this file: expected 'layers.0.bank...', found "
            f"{next(iter(state))!r}. Give the file that a checkpoint has of "
            "the handle itself, or load the encoder"
        )
