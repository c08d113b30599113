"""What of an encoder with adapters is trained, and what is frozen."""

import logging
from collections.abc import Mapping

import torch

from speechbrain_taskarith.adapters.bank import COMBINED, MODES
from speechbrain_taskarith.adapters.storage.sharing import SharedAdapters

logger = logging.getLogger(__name__)

#: The name of what keeps a frozen module's statistics still.
GUARD = "task_adapters_stay_frozen"


class StatisticsGuard(torch.nn.Module):
    """A child that keeps its parent's running statistics still.

    `parent.train()` reaches every child, this one last. It then puts what
    updates statistics in `forward` back into evaluation mode, so that the
    training loop need not remember. Dropout is left alone.
    """

    def __init__(self, parent):
        super().__init__()
        # Not by setattr, which would make the parent its child's child.
        self.__dict__["_parent"] = parent
        #: What would train without this guard.
        self._held = set()

    def release(self):
        """Put what would train without this guard into training mode."""
        for module in self._held:
            module.training = True

    def train(self, mode=True):
        """Take the mode, and put the parent's statistics to evaluation."""
        super().train(mode)
        if not mode:
            self._held.clear()
        for module in self._parent.modules():
            if isinstance(module, torch.nn.modules.batchnorm._NormBase):
                updates = module.track_running_stats
            else:
                # By what they have, since SpeechBrain takes seconds to import.
                updates = (
                    hasattr(module, "update_until_epoch")
                    or hasattr(module, "glob_mean")
                    or type(module).__name__
                    in ("_SpectralNorm", "SpectralNorm")
                )
            if updates and module.training:
                self._held.add(module)
                module.training = False
        return self

    def forward(self, x, *others, **named):
        """Return x: containers such as `Sequential` call all their children."""
        return x


class AdapterTraining(SharedAdapters):
    """The part of `AdapterHandle` that says what is trained."""

    def freeze(self, *modules):
        """Freeze modules beside the encoder, running statistics as well.

        Adapter files name them by their fingerprints, so that an adapter
        is not put behind another front end, see `load_adapter`.

        Arguments
        ---------
        *modules : torch.nn.Module, sequence or dict of them, or None
            E.g. an `InputNormalization` in front, the output layer, or all
            of a recipe's `modules` with their names. The encoder, whole or
            inside one of them, is frozen anyway; its adapters are left as
            they are.

        Raises
        ------
        ValueError
            Something else than a module; nothing has changed then.
        """
        ours = {id(p) for p in self.parameters()}
        for name, module in list(_named(modules)):
            if module is self.encoder or module is self:
                continue
            for parameter in module.parameters():
                if id(parameter) not in ours:
                    self._flags.append((parameter, parameter.requires_grad))
                    parameter.requires_grad_(False)
            if not hasattr(module, GUARD):
                module.add_module(GUARD, StatisticsGuard(module))
            if not any(module is known for _, known in self._frozen):
                self._frozen.append((name, module))
            getattr(module, GUARD).train(module.training)

    def _unfreeze(self):
        """Restore modes and flags as they were before the handle."""
        for module in (self, *(module for _, module in self._frozen)):
            guard = module._modules.pop(GUARD, None)
            if guard is not None:
                guard.release()
        self._frozen = []
        for parameter, flag in reversed(self._flags):
            parameter.requires_grad_(flag)
        self._flags = []

    def train_extraction(self, name):
        """Train one adapter alone, and put it in use (first stage).

        Arguments
        ---------
        name : str or sequence of str
            With several names, all are trained and none is in use; call
            `use([...])` before each batch to route its utterances.

        Returns
        -------
        list of torch.nn.Parameter
            What is trained now; all else in encoder and handle is frozen.
        """
        names = [name] if isinstance(name, str) else list(name)
        self.layers[0].bank.require(*names)
        self._train_only(m.bank[n] for m in self.layers for n in names)
        self.use(name if isinstance(name, str) else None)
        return self.trained_parameters()

    def train_composition(self, mode="ST-A"):
        """Train the combination, and put it in use (second stage).

        Arguments
        ---------
        mode : str
            `"ST-A"` does not change a byte of the adapters; `"MT-A"` trains
            the combined ones as well.

        Returns
        -------
        list of torch.nn.Parameter
            What is trained now; empty for a mean without LN in `ST-A`.

        Raises
        ------
        ValueError
            No combination, or another mode.
        """
        if mode not in MODES:
            raise ValueError(f"mode is {mode!r}, expected 'ST-A' or 'MT-A'")
        self._train_combination(mode)
        self.warn_of_untrained()
        return self.trained_parameters()

    def _train_combination(self, mode):
        self.use(COMBINED)
        modules = [layer.combination for layer in self.layers]
        if mode == "MT-A":
            names = self.layers[0].combination.names
            modules += [m.bank[name] for m in self.layers for name in names]
        self._train_only(modules)

    def warn_of_untrained(self):
        """Warn where adapters are combined that never were trained."""
        untrained = [
            name
            for name in self.layers[0].combination.names
            if all(layer.bank[name].is_untrained() for layer in self.layers)
        ]
        if untrained:
            logger.warning(
                "combining adapters that were never trained: %s",
                ", ".join(untrained),
            )

    def train_nothing(self):
        """Freeze all of encoder and handle; what is in use does not change."""
        self._train_only(())

    def _train_only(self, modules):
        self.unfold()
        self.encoder.requires_grad_(False).zero_grad()
        halves = (torch.float16, torch.bfloat16)
        modules = list(modules)
        trained = [p for module in modules for p in module.parameters()]
        if any(p.dtype in halves for p in trained):
            logger.info("adapters in half precision: float32 to train")
            # All of them: what is trained reads what is not.
            for module in (*modules, *self.layers):
                module.float()
        for module in modules:
            module.requires_grad_(True)

    def trained_parameters(self):
        """Return the parameters that are trained now, see `train_extraction`."""
        return [p for p in self.parameters() if p.requires_grad]

    def count_parameters(self):
        """Count parameters, for the table of results.

        Returns
        -------
        dict
            `base`, `adapters`, `combination`, `trained` (numbers), and
            `share`, the trained ones in % of the base.
        """
        added = sum(p.numel() for p in self.parameters())
        banks = (layer.bank for layer in self.layers)
        adapters = sum(p.numel() for b in banks for p in b.parameters())
        base = sum(p.numel() for p in self.encoder.parameters()) - added
        trained = sum(p.numel() for p in self.trained_parameters())
        return {
            "base": base,
            "adapters": adapters,
            "combination": added - adapters,
            "trained": trained,
            "share": 100.0 * trained / max(base, 1),
        }

    def penalty(self):
        """Return what the combinations add to the training loss.

        Returns
        -------
        torch.Tensor or float
            `0.01 sum_layers ||I - W_V||^2` for the fusion, 0.0 for others.
        """
        made = (layer.combination for layer in self.layers)
        return sum(m.penalty() for m in made if m is not None)

    def training_summary(self):
        """Return one line for the log: what trains, what is frozen.

        Returns
        -------
        str
            E.g. `adapter us trains: 4,096 parameters, 1.2 % of the base;
            frozen: the encoder (Conformer), normalize`.
        """
        count = self.count_parameters()
        trained = [
            name
            for name in self.names
            if any(
                p.requires_grad
                for p in self.layers[0].bank[name].down.parameters()
            )
        ]
        made = self.layers[0].combination
        if made is not None and any(p.requires_grad for p in made.parameters()):
            trained.append(COMBINED)
        frozen = [f"the encoder ({type(self.encoder).__name__})"]
        frozen += [name for name, _ in self._frozen]
        return (
            f"{', '.join(trained) or 'no adapter'} trains: "
            f"{count['trained']:,} parameters, {count['share']:.2g} % of "
            f"the base's {count['base']:,}; frozen: {', '.join(frozen)}"
        )


def _named(modules):
    """Yield `(name, module)` of what `freeze` takes.

    Mere containers are taken apart: a Brain has their members, not them, and
    its `train()` would not reach a guard in the container.
    """
    for given in modules:
        if isinstance(given, Mapping) or type(given) is torch.nn.ModuleDict:
            for name, module in given.items():
                for inner, part in _named([_checked(module, repr(name))]):
                    whole = part is module
                    yield str(name) if whole else f"{name}.{inner}", part
        elif isinstance(given, (list, tuple)) or (
            type(given) is torch.nn.ModuleList
        ):
            yield from _named(given)
        elif given is not None:
            yield type(given).__name__, _checked(given, repr(given)[:60])


def _checked(module, what):
    if not isinstance(module, torch.nn.Module):
        raise ValueError(
            f"freeze: {what} is a {type(module).__name__}, expected a "
            "torch module, e.g. !ref <normalize> or !ref <modules>"
        )
    return module
