"""The adapters behind one layer, and which of them are in use."""

import logging

import torch

from speechbrain_taskarith.adapters.bank import COMBINED
from speechbrain_taskarith.adapters.insertion import RouteError

logger = logging.getLogger(__name__)


class Route:
    """Which adapters are in use, shared by all layers of an encoder.

    Arguments
    ---------
    bank : AdapterBank
        Knows the names.
    """

    def __init__(self, bank):
        self._bank = bank
        self.choice = None
        self.has_warned = False
        self._tensors = {}

    def choose(self, choice, has_combination):
        """Set what is in use from here on.

        Arguments
        ---------
        choice : None, str, sequence or torch.Tensor
            None, a name, `"combined"`, or one for each utterance: names
            (None for the base) or positions in the bank (-1 for the base).
        has_combination : bool
            Whether there is one.

        Raises
        ------
        ValueError
            An unknown name or position, or no combination.
        """
        if isinstance(choice, torch.Tensor):
            self._require_positions(choice)
            choice = choice.to(torch.long)
        elif choice == COMBINED:
            if not has_combination:
                raise ValueError(
                    "there is no combination: give one to insert_adapters "
                    "or handle.set_combination('fusion')"
                )
        elif isinstance(choice, str):
            self._bank.require(choice)
        elif choice is not None:
            choice = list(choice)
            self._bank.require(*(c for c in choice if c is not None))
            names = self._bank.names
            choice = torch.tensor(
                [-1 if c is None else names.index(c) for c in choice],
                dtype=torch.long,
            )
        self.choice = choice
        self._tensors = {}

    def _require_positions(self, choice):
        number = len(self._bank)
        whole = not (choice.is_floating_point() or choice.is_complex())
        if choice.dim() != 1 or not whole or choice.dtype == torch.bool:
            raise ValueError(
                f"utterances' adapters are a {choice.dtype} tensor of shape "
                f"{tuple(choice.shape)}; expected whole numbers [B]"
            )
        if (
            choice.numel()
            and not -1 <= int(choice.min()) <= int(choice.max()) < number
        ):
            raise ValueError(
                f"positions of adapters go from {int(choice.min())} to "
                f"{int(choice.max())}; expected -1 (the base) to {number - 1}"
            )

    def index(self, device):
        """Return the utterances' positions on a device, moved once.

        Arguments
        ---------
        device : torch.device
            Where to.

        Returns
        -------
        torch.Tensor
            [B]
        """
        if device not in self._tensors:
            self._tensors[device] = self.choice.to(device)
        return self._tensors[device]


class LayerAdapters(torch.nn.Module):
    """One layer's bank and combination.

    Arguments
    ---------
    bank : AdapterBank
        The adapters.
    combination : Combination or None
        What combines them.
    route : Route
        What is in use.
    """

    def __init__(self, bank, combination, route):
        super().__init__()
        self.bank, self.combination = bank, combination
        self._route = route

    @property
    def is_on(self):
        """Whether anything is in use."""
        return self._route.choice is not None

    def forward(self, x):
        """Return the layer's output with what is in use added.

        Arguments
        ---------
        x : torch.Tensor
            [B, T, d]

        Returns
        -------
        torch.Tensor
            [B, T, d]; x itself where nothing is in use.

        Raises
        ------
        RouteError
            Another number of utterances than names were given for.
        """
        choice = self._route.choice
        if choice is None:
            return x
        if self.training and not self._route.has_warned:
            self._warn_without_gradients()
        if isinstance(choice, torch.Tensor):
            return self._routed(x, choice)
        if choice == COMBINED:
            return self.combination(x).to(x.dtype)
        return (x + self.bank[choice](x)).to(x.dtype)

    def _warn_without_gradients(self):
        """Say once that a wrapper keeps the adapters from learning."""
        if torch.compiler.is_compiling() or torch.is_grad_enabled():
            return
        if any(p.requires_grad for p in self.parameters()):
            self._route.has_warned = True
            logger.warning(
                "the encoder runs under no_grad in training mode, so that "
                "the adapters learn nothing: give SpeechBrain's wrapper "
                "freeze: False (its weights are frozen anyway)"
            )

    def _routed(self, x, choice):
        if x.dim() != 3 or len(choice) != len(x):
            raise RouteError(
                f"{len(choice)} utterance(s) were named by use(...), but the "
                f"batch is {tuple(x.shape)}; call use(...) for every batch, "
                "with one name an utterance"
            )
        index = self._route.index(x.device)
        added = x + self.bank.routed(x, index.clamp(min=0))
        # Not x + 0: the base's rows stay as they are to the last bit.
        here = (index >= 0).view(-1, 1, 1)
        return torch.where(here, added.to(x.dtype), x)
