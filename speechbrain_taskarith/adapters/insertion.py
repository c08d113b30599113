"""Putting adapters into an encoder by layer name.

The encoder's code does not change: forward hooks on its layers add the
adapters' output.
"""

import logging
import math
from collections.abc import Mapping
from pathlib import Path

import torch

from speechbrain_taskarith.adapters.bank import MODES
from speechbrain_taskarith.adapters.handle import AdapterHandle
from speechbrain_taskarith.adapters.placement import (
    NOT_ENCODER_LAYERS,
    USUAL_LAYERS,
    find_layers,
    make_banks,
    require_bare,
)
from speechbrain_taskarith.adapters.recipe import Watch
from speechbrain_taskarith.adapters.storage.loading import load_files
from speechbrain_taskarith.adapters.storage.sharing import put_into

logger = logging.getLogger(__name__)


def insert_adapters(
    encoder,
    names,
    *,
    layers=USUAL_LAYERS,
    d_model=None,
    bottleneck=256,
    combination=None,
    exclude=NOT_ENCODER_LAYERS,
    activation=torch.nn.SiLU,
    layer_norm=True,
    train=None,
    freeze=(),
    load=None,
    any_base=False,
    penalty=0.0,
    guide=0.0,
    tasks=None,
) -> "AdapterHandle":
    """Put a bank of adapters behind every layer of an encoder.

    The encoder is frozen, its running statistics too. It computes what it
    did before, bit for bit, until `train`, `handle.use(...)` or
    `handle.train_*`; compare it with a base that is frozen, too, since torch
    rounds some matrix products in another way where weights want gradients.
    If an error is raised, nothing has changed.

    In a recipe, by its YAML alone: `train`, `freeze`, `load`, `penalty` and
    `guide` do what would else be lines of its loop. What trains and what is
    frozen is logged, at once and when training begins.

    Arguments
    ---------
    encoder : torch.nn.Module
        In half precision it gets adapters in float32. SpeechBrain's
        (Conformer, Branchformer, Transformer, a whole
        `TransformerASR`, a wrapped HuggingFace model), `transformers`'
        (Whisper, wav2vec2, wav2vec2-conformer, HuBERT), or any other whose
        layers return [B, T, d], or a tuple that starts with it. Wrappers
        that can run under `no_grad` need `freeze: False`.
    names : sequence of str
        The tasks, at least one.
    layers : str or sequence of str
        Anchored shell patterns on module names. Where matches are nested,
        only the outermost is a layer. The default leaves out lists of
        modules without a LayerNorm that has weights (convolutions).
    d_model : int or None
        Width d of the layers' output; None reads it off the layers'
        normalisation.
    bottleneck : int
        Width of each adapter.
    combination : None, str, Combination or callable
        `"mean"`, `"weighted_mean"`, `"fusion"`; an instance, whose settings
        every layer takes; or a function that makes one from a bank (`!name:`
        in YAML).
    exclude : str or sequence of str
        Patterns of module names that are no layers.
    activation, layer_norm
        See `BottleneckAdapter`.
    train : None, str or sequence of str
        A name: `handle.train_extraction` of that adapter. `"ST-A"` or
        `"MT-A"`: `handle.train_composition`. Several names: each utterance
        trains and uses its own adapter, as `tasks` has it, until another
        choice by `handle.use` or `handle.train_*`; a `with` counts for its
        block. None: nothing trains.
    freeze : module, sequence or dict of modules
        See `handle.freeze`.
    load : None, str, pathlib.Path or dict
        `{name: path}`, one path for each adapter, `"combined"` for the
        combination; a file; or a folder, of which adapters that are not
        among `names` are left out, and a combination other than the one
        asked for. A path is a file of ours or, in a dict,
        a checkpoint of SpeechBrain with that adapter in it: a save folder
        (its newest), a `CKPT+*` folder or a `.ckpt` file. They are read at
        once and held against the base at the first forward pass, when a
        `Pretrainer` has loaded it. A checkpoint with adapters that is
        recovered later wins.
    any_base : bool
        True leaves out that check, see `handle.load_adapter`.
    penalty : float
        Weight >= 0 of the fusion's `||I - W_V||^2` in the training loss;
        published: 0.01. Its gradient is added in the backward pass.
    guide : float
        Weight >= 0 of `handle.attention_loss` in the training loss,
        likewise. Needs to know the utterances' tasks.
    tasks : None, str or dict
        Which task an utterance of the running Brain's batch is from. A
        dict: `{shell pattern on the utterance's id: task}`. A str: the key
        of the batch that has the names. None: the loop sets
        `handle.tasks` before each forward pass.

    Returns
    -------
    AdapterHandle
        To choose, train, save and remove the adapters.

    Raises
    ------
    ValueError
        A pattern without a match, a width other than the layers', bad names,
        an unknown combination, an encoder that has adapters already, an
        unknown task, a file that does not fit. At the first forward pass:
        a file that was trained on another base.

    Example
    -------
    >>> encoder = torch.nn.TransformerEncoder(
    ...     torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2
    ... )
    >>> adapters = insert_adapters(encoder, ["us", "german"], bottleneck=4)
    >>> adapters.layer_names
    ['layers.0', 'layers.1']
    >>> parameters = adapters.train_extraction("us")
    >>> sum(p.numel() for p in parameters)  # of 2 layers
    184
    >>> encoder(torch.randn(3, 5, 8)).shape
    torch.Size([3, 5, 8])
    """
    require_bare(encoder)
    found = find_layers(encoder, layers, exclude)
    settings = (bottleneck, activation, layer_norm)
    banks = make_banks(found, names, *settings, d_model=d_model)
    handle = AdapterHandle(encoder, found, banks, combination)
    try:
        handle.freeze(freeze)
        sources = [] if load is None else load_files(handle, load, any_base)
        watch = Watch(handle, sources)
        _configure(handle, watch, train, penalty, guide, tasks)
    except BaseException:
        handle.remove()
        raise
    handle._route.watch = watch
    logger.info(
        "%d adapter(s) of width %d behind each of %d layers: %s",
        len(banks[0].names),
        bottleneck,
        len(found),
        ", ".join(name for name, _ in found),
    )
    if train is not None:
        logger.info("adapters: %s", handle.training_summary())
    return handle


def load_adapters(encoder, file_or_folder, *, freeze=(), any_base=False):
    """Put adapters that were saved into an encoder that has none.

    Where they go, how wide they are and how they are combined is read from
    the files. On an error the encoder has not changed.

    Arguments
    ---------
    encoder : torch.nn.Module
        With the weights that the adapters were trained on.
    file_or_folder : str or pathlib.Path
        What `handle.save_adapter` or `handle.save` wrote. For a name on the
        hub see `AdapterHandle.from_pretrained`.
    freeze : module, sequence or dict of modules
        See `AdapterHandle.freeze`.
    any_base : bool
        See `AdapterHandle.load_adapter`.

    Returns
    -------
    AdapterHandle
        Nothing is in use and nothing trains yet: `use`, or `train_*`.

    Raises
    ------
    FileNotFoundError
        No such file or folder, or no adapters there.
    ValueError
        An encoder that has adapters or other layers, another base, a damaged
        file.

    Example
    -------
    >>> def make_encoder():
    ...     torch.manual_seed(0)
    ...     layer = torch.nn.TransformerEncoderLayer(
    ...         8, 2, 16, batch_first=True
    ...     )
    ...     return torch.nn.TransformerEncoder(layer, 2)
    >>> file = getfixture("tmp_path") / "us.safetensors"
    >>> insert_adapters(make_encoder(), ["us"]).save_adapter("us", file)
    >>> load_adapters(make_encoder(), file).names
    ['us']
    """
    path = Path(file_or_folder)
    if not path.exists():
        raise FileNotFoundError(
            f"{path}: no such file or folder; adapters are written by "
            "handle.save_adapter(name, file) or handle.save(folder)"
        )
    return put_into(AdapterHandle, encoder, path, path, freeze, any_base)


def _configure(handle, watch, train, penalty, guide, tasks):
    """Set up what is trained, and what a `Watch` adds to the loss."""
    watch.penalty = _weight("penalty", penalty)
    watch.guide = _weight("guide", guide)
    watch.tasks = tasks = _checked_tasks(tasks, handle.names)
    made = [layer.combination for layer in handle.layers]
    if penalty and (made[0] is None or not made[0].penalty_gradient()):
        raise ValueError(
            f"penalty is {penalty}, but {_kind(made[0])} has none; only the "
            "fusion has one (combination: fusion)"
        )
    if guide:
        if not hasattr(made[0], "guided"):
            raise ValueError(
                f"guide is {guide}, but {_kind(made[0])} has no attention to "
                "guide; only the fusion has (combination: fusion)"
            )
        for combination in made:
            combination.guided = True
        if isinstance(tasks, dict):
            missing = set(tasks.values()) - set(made[0].names)
            if missing:
                raise ValueError(
                    f"tasks: {', '.join(sorted(map(repr, missing)))} are not "
                    f"among the combined {', '.join(made[0].names)}; guide "
                    "needs an adapter for every utterance"
                )
    if train is None:
        return
    if isinstance(train, str) and train in MODES:
        # A pretrainer has yet to load what is combined.
        handle._train_combination(train)
        watch.is_composition = True
    elif isinstance(train, (str, list, tuple)):
        handle.train_extraction(train)
        if not isinstance(train, str):
            handle._route.everywhere.follows_tasks = True
    else:
        raise ValueError(
            f"train is {train!r}, expected the name of a task, a list of "
            f"names, or one of {', '.join(MODES)}"
        )


def _kind(combination):
    if combination is None:
        return "combination None"
    return f"the combination {type(combination).__name__}"


def _weight(what, value):
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0.0 <= value < math.inf:
        raise ValueError(f"{what} is {value!r}, expected a number >= 0")
    return float(value)


def _checked_tasks(tasks, names):
    """Return `tasks` as `insert_adapters` takes it, its names checked."""
    if tasks is None or isinstance(tasks, str):
        return tasks
    if not isinstance(tasks, Mapping) or not tasks:
        raise ValueError(
            f"tasks is {tasks!r}, expected {{pattern on utterance ids: "
            "task}, or the key of the batch that has the names"
        )
    unknown = set(tasks.values()) - {None, *names}
    if unknown:
        raise ValueError(
            f"tasks: no adapter {', '.join(sorted(map(repr, unknown)))}; "
            f"there are {', '.join(map(repr, names))}"
        )
    return dict(tasks)
