"""Writing one scale after another into a model, in place, and back."""

import torch

from speechbrain_taskarith.utils.patterns import matches
from speechbrain_taskarith.vectors.application import (
    check_tied_edits,
    edit_into,
)
from speechbrain_taskarith.vectors.states.readers import as_state


class Editing:
    """Writes `base + scale * tau` into a model, and puts back what was there.

    Holds one copy of the edited part of the base and of the vector on the
    model's device, and of the model's own weights where they are not the
    base's. A context: leaving it restores weights, buffers and modes.

    Arguments
    ---------
    model : torch.nn.Module
        Edited in place.
    base : path, torch.nn.Module, mapping or State
        A state of this model.
    tau : TaskVector
        The edit.
    patterns : dict
        `{group: [pattern, ...]}`, which fit every parameter of `tau`.
    """

    def __init__(self, model, base, tau, patterns):
        self._model = model
        base, live = as_state(base), as_state(model)
        base.verify()
        for state in (base, live):
            tau.check_fits(state)
        lacking = [name for name in live if name not in base]
        if lacking:
            raise ValueError(
                f"{base.label} lacks {len(lacking)} weights of the model "
                f"({', '.join(lacking[:5])}, ...); the base must be a state "
                "of this model"
            )
        parameters = {name for name, _ in model.named_parameters()}
        self._group = {name: group_of(name, patterns) for name in tau}
        check_tied_edits(tau, live, self._group)
        self._edited, self._buffers, outside, seen = {}, [], [], set()
        for name in live:
            origin, tensor = live.aliases.get(name, name), live[name]
            if origin in seen:
                continue
            if name in tau:
                seen.add(origin)
                self._edited[name] = (
                    tensor,
                    _copy(base[name], tensor),
                    tau[name].to(tensor.device),
                )
            elif not any(
                name in tau for name, o in live.aliases.items() if o == origin
            ):
                pair = (tensor, _copy(base[name], tensor))
                # An evaluation may change buffers, never parameters.
                (outside if name in parameters else self._buffers).append(pair)
        self._outside = [p for p in outside if not torch.equal(*p)]
        self._initial = [
            (tensor, tensor.clone())
            for tensor, *_ in (
                *self._outside,
                *self._buffers,
                *(e for e in self._edited.values() if not torch.equal(*e[:2])),
            )
        ]
        self._modes = [(m, m.training) for m in model.modules()]
        self._kept = False

    def __enter__(self):
        _write(self._outside)
        return self

    def __exit__(self, kind, *_):
        if kind is not None or not self._kept:
            _write((tensor, base) for tensor, base, _ in self._edited.values())
            _write(self._initial)
        for module, training in self._modes:
            module.training = training

    def wer(self, wer, setting):
        """Evaluate one setting.

        Arguments
        ---------
        wer : callable
            `wer(model)`.
        setting : dict
            `{group: scale}`.

        Returns
        -------
        object
            What `wer` returned.
        """
        self._edit(setting)
        return wer(self._model)

    def keep(self, setting):
        """Leave the model at a setting.

        Arguments
        ---------
        setting : dict
            `{group: scale}`.
        """
        self._edit(setting)
        self._kept = True

    def _edit(self, setting):
        _write(self._buffers)
        for name, (tensor, base, delta) in self._edited.items():
            edit_into(tensor, base, delta, setting[self._group[name]])


def _copy(source, like):
    return source.detach().to(like.device, like.dtype, copy=True)


@torch.no_grad()
def _write(pairs):
    for tensor, content in pairs:
        tensor.copy_(content)


def group_of(name, patterns):
    """Return the first group that a name belongs to.

    Arguments
    ---------
    name : str
        A parameter's name.
    patterns : dict
        `{group: [pattern, ...]}`.

    Returns
    -------
    str or None
        None where none fits.
    """
    for group, given in patterns.items():
        if any(matches(name, pattern) for pattern in given):
            return group
    return None
