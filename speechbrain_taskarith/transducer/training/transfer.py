"""Transfer learning: an encoder's weights from another model's checkpoint."""

import re
from dataclasses import dataclass

from speechbrain_taskarith.transducer.training.checkpoint_reader import (
    read_checkpoint,
)
from speechbrain_taskarith.utils.messages import some
from speechbrain_taskarith.utils.patterns import select


@dataclass(frozen=True)
class TransferReport:
    """What was taken over, and what was not. Names are the encoder's.

    Arguments
    ---------
    checkpoint : str
        Where the weights came from.
    loaded : tuple of str
        Taken over.
    missing : tuple of str
        Asked for, and not in the checkpoint.
    unexpected : tuple of str
        In the checkpoint below the prefix, and not in the encoder.
    mismatched : tuple of str
        On both sides, in different shapes: `"name: (3, 4) there, (3, 5)
        here"`.
    left : tuple of str
        Not asked for: they keep their values.

    Example
    -------
    >>> report = TransferReport("a.ckpt", ("w",), ("b",), (), (), ())
    >>> print(report)
    a.ckpt: 1 loaded, 1 missing, 0 unexpected, 0 of another shape, 0 left
    """

    checkpoint: str
    loaded: tuple
    missing: tuple
    unexpected: tuple
    mismatched: tuple
    left: tuple

    def __str__(self):
        return (
            f"{self.checkpoint}: {len(self.loaded)} loaded, "
            f"{len(self.missing)} missing, {len(self.unexpected)} unexpected, "
            f"{len(self.mismatched)} of another shape, {len(self.left)} left"
        )


def transfer_encoder(
    checkpoint,
    encoder,
    *,
    prefix="",
    strict=True,
    layers=None,
    include=("*",),
    exclude=(),
    recoverable="model",
):
    """Load an encoder's weights out of a checkpoint, and nothing else.

    Stage two of transfer learning: the encoder of a multilingual model, with
    predictor, joint and vocabulary fresh. With `layers`, only some of its
    layers (and what does not belong to any layer stays as it is, too).

    Arguments
    ---------
    checkpoint : str or pathlib.Path or dict
        A `CKPT+...` folder of SpeechBrain, a save folder with several of them
        (the newest is taken), a file of `torch.save` or `.safetensors`; or a
        state dict.
    encoder : torch.nn.Module
        What to load into.
    prefix : str
        What the encoder's names begin with in the checkpoint, e.g. `"0."` or
        `"encoder."`.
    strict : bool
        True raises where anything asked for is missing, has another shape, or
        where the checkpoint's encoder has more than ours. False takes over
        what fits, and the report says what did not.
    layers : iterable of int or None
        Numbers of layers to take over, as in names like `layers.3.weight` or
        `layers.[3].weight`; None takes all, and what is outside of layers.
    include, exclude : str or sequence of str
        Anchored shell patterns on the encoder's own names.
    recoverable : str
        Whose weights, in a checkpoint folder.

    Returns
    -------
    TransferReport
        By name.

    Raises
    ------
    ValueError
        A strict fault (nothing has been loaded then), a pattern or layer that
        matches nothing, a damaged file.
    FileNotFoundError
        No such checkpoint.

    Example
    -------
    >>> from speechbrain_taskarith.transducer import Emformer
    >>> there, here = (Emformer(8, 2, 16, 2, 4, 1, 8) for _ in range(2))
    >>> state = {f"encoder.{k}": v for k, v in there.state_dict().items()}
    >>> report = transfer_encoder(state, here, prefix="encoder.", layers=[0])
    >>> sorted({name.split(".")[1] for name in report.left})
    ['1']
    """
    state, shown = read_checkpoint(checkpoint, recoverable)
    found = {
        name[len(prefix) :]: tensor
        for name, tensor in state.items()
        if name.startswith(prefix)
    }
    if not found:
        raise ValueError(
            f"{shown}: no name begins with {prefix!r}; there are "
            f"{some(state)}. Give the encoder's prefix"
        )
    own = encoder.state_dict()
    wanted = select(own, include, exclude)
    if layers is not None:
        wanted = _in_layers(wanted, layers)
    loaded, missing, mismatched = {}, [], []
    for name in wanted:
        if name not in found:
            missing.append(name)
        elif found[name].shape != own[name].shape:
            mismatched.append(
                f"{name}: {tuple(found[name].shape)} there, "
                f"{tuple(own[name].shape)} here"
            )
        else:
            loaded[name] = found[name]
    report = TransferReport(
        shown,
        tuple(loaded),
        tuple(missing),
        tuple(name for name in found if name not in own),
        tuple(mismatched),
        tuple(name for name in own if name not in set(wanted)),
    )
    if strict:
        _raise_faults(report, prefix)
    encoder.load_state_dict(loaded, strict=False)
    return report


def _in_layers(names, layers):
    """Keep names of some layers, found by the first number in a name."""
    layers = set(layers)
    numbers = {}
    for name in names:
        found = re.search(r"\.\[?(\d+)\]?\.", f".{name}")
        if found:
            numbers.setdefault(int(found[1]), []).append(name)
    if absent := layers - set(numbers):
        raise ValueError(
            f"layers {sorted(absent)}: the encoder has "
            f"{sorted(numbers) or 'none'}"
        )
    chosen = {name for number in layers for name in numbers[number]}
    return [name for name in names if name in chosen]


def _raise_faults(report, prefix):
    faults = [
        f"{what}: {some(names)}"
        for what, names in (
            ("missing there", report.missing),
            ("only there", report.unexpected),
            ("another shape", report.mismatched),
        )
        if names
    ]
    if faults:
        raise ValueError(
            f"{report.checkpoint} (prefix {prefix!r}) does not fit the "
            f"encoder; {'; '.join(faults)}. Nothing was loaded. Build both "
            "encoders alike, choose names by include, exclude or layers, or "
            "say strict=False to take over what fits"
        )
