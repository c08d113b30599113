"""What a YAML calls the base, as weights for the module it is loaded into.

One mechanism for `EditingCheckpointer` and `TaskVectorPretrainer`.
"""

import re
from functools import cached_property
from pathlib import Path

import torch
from speechbrain.utils.checkpoints import (
    hook_on_loading_state_dict_checkpoint,
)
from speechbrain.utils.logger import get_logger

from speechbrain_taskarith.utils.files import read_json
from speechbrain_taskarith.utils.hub.download import local_path
from speechbrain_taskarith.utils.messages import some
from speechbrain_taskarith.vectors.recipe_hooks.provenance import is_adapter
from speechbrain_taskarith.vectors.states.names import check_tied_values
from speechbrain_taskarith.vectors.states.pairing import (
    CONSTANTS,
    HOLDERS,
    UNTRAINED,
    module_names,
    pair_names,
)
from speechbrain_taskarith.vectors.states.readers import as_state, open_state
from speechbrain_taskarith.vectors.states.safetensors import TORCH_NAME
from speechbrain_taskarith.vectors.states.speechbrain_folder import (
    find_checkpoint_folder,
)
from speechbrain_taskarith.vectors.states.state import (
    LoadedTensor,
    State,
    is_extra,
    renamed,
)

logger = get_logger(__name__)

# Entries of config.json that change what equal shapes compute.
_CONFIG = re.compile(
    "model_type|.*heads|conv_(dim|stride|kernel)|.*_act|activation_function"
    "|do_stable_layer_norm|feat_extract_norm|.*_eps|scale_embedding"
    "|num_mel_bins|num_buckets|max_bucket_distance|position_embeddings_type"
)
# Of preprocessor_config.json: what the model was trained to hear.
_FEATURES = (
    "sampling_rate",
    "feature_size",
    "do_normalize",
    "n_fft",
    "hop_length",
)


def open_base(
    source, module, *, name, min_key=None, max_key=None, savedir=None
) -> State:
    """Open a base, in any form, as weights for a given module.

    Arguments
    ---------
    source : str or pathlib.Path
        A `CKPT+` or save folder of SpeechBrain (its newest checkpoint, or by
        `min_key`/`max_key`), a file of weights, a Hugging Face folder or hub
        name, or the `save_path` that a wrapper of SpeechBrain was downloaded
        to. A hub name is downloaded unless it is in the cache.
    module : torch.nn.Module
        What it is loaded into: names, shapes, dtypes and the set of keys of
        the result are the module's own.
    name : str
        The recoverable or loadable, for SpeechBrain's folders and messages.
    min_key, max_key : str or None
        Score that chooses among the checkpoints of a save folder.
    savedir : str, pathlib.Path or None
        Cache for a hub name; None: Hugging Face's own.

    Returns
    -------
    State
        Lazy. `.left_out` lists the module's names that no base has, those of
        inserted adapters; `.source` holds the weights under their own names.

    Raises
    ------
    FileNotFoundError
        Nothing stands there.
    ValueError
        It does not fit the module: with the names, shapes or settings.
    """
    stored = open_stored(source, name, min_key, max_key, savedir)
    return fit_to_module(stored, module, name)


def open_stored(source, name, min_key=None, max_key=None, savedir=None):
    """Open a base under its own names; the arguments are `open_base`'s."""
    if isinstance(source, State):
        return source
    path = local_path(source, savedir)
    if is_checkpoint(path):
        path = find_checkpoint_folder(path, min_key=min_key, max_key=max_key)
        return open_state(path, recoverable=name)
    return open_state(path)


def is_checkpoint(path):
    """Tell whether a path is a `CKPT+` folder, or a folder of some."""
    path = Path(path)
    return (path / "CKPT.yaml").exists() or any(path.glob("CKPT+*"))


def fit_to_module(stored, module, name) -> State:
    """Return stored weights under a module's names, or raise ValueError."""
    own = as_state(module)
    # SpeechBrain's own table of names that have changed since.
    stored_names = hook_on_loading_state_dict_checkpoint({n: n for n in stored})
    # What is no tensor goes by the same names; it is no weight.
    stored_names |= {n: n for n in stored.extra if is_extra(n)}
    names = [*own, *filter(is_extra, own.extra)]
    pairs = pair_names(names, stored_names, own.aliases)
    _check_settings(stored, module, name)
    left_out = list(filter(is_adapter, pairs.missing))
    constants = [n for n in pairs.missing if n in CONSTANTS]
    kept = [n for n in pairs.missing if is_extra(n) and n not in left_out]
    untrained = [n for n in pairs.missing if n.split(".")[-1] == UNTRAINED]
    absent = {*left_out, *constants, *kept, *untrained}
    heads, unknown = (
        [n for n in found if not is_extra(n)]
        for found in (pairs.heads, pairs.unknown)
    )
    gone = [n for n in (*pairs.heads, *pairs.unknown) if is_extra(n)]
    if _described(module, "config") is None:
        heads, unknown = [], [*unknown, *heads]
    switched_off = [n for n in unknown if _is_switched_off(n, module)]
    sources = {n: stored_names[found] for n, found in pairs.names.items()}
    gone += [*heads, *switched_off]
    problems = [
        f"{n}: not in the file" for n in pairs.missing if n not in absent
    ]
    problems += [
        f"{n}: not in {name}" for n in unknown if n not in switched_off
    ]
    shapes = {
        n: (stored.info(found).shape, own.info(n).shape)
        for n, found in sources.items()
        if not is_extra(n)
    }
    unlike = {n: two for n, two in shapes.items() if two[0] != two[1]}
    problems += [
        f"{n}: {theirs} in the file, {ours} in {name}"
        for n, (theirs, ours) in unlike.items()
    ]
    if problems:
        raise _misfit(stored, name, problems, unlike)
    _check_ties(stored, own, sources)
    entries, extra = _taken(stored, own, sources, constants, untrained)
    for what, which in (
        ("in the module only, taken from it", [*constants, *kept]),
        ("not trained in the base, set to zero", untrained),
        ("left out, the module goes without", gone),
    ):
        if which:
            logger.info(f"{name} from {stored.label}: {what}: {some(which)}")
    # Not compared as dicts: an entry that is a tuple would be compared by value.
    same = list(entries) == list(stored)
    same = same and all(stored.entries[n] is e for n, e in entries.items())
    same = same and list(extra) == list(stored.extra)
    state = stored if same else renamed(stored, entries)
    # Not the counters beside the weights: the module would refuse them.
    state.extra = extra
    state.left_out = tuple(left_out)
    return state


def _check_ties(stored, own, sources):
    """Raise where the file holds two values for what the module ties."""
    entries = {n: stored.entries.get(found) for n, found in sources.items()}
    given = renamed(stored, {n: e for n, e in entries.items() if e})
    for name, origin in own.aliases.items():
        if name in given and origin in given:
            check_tied_values(own, given, name)


def _taken(stored, own, sources, constants, untrained):
    """Return a module's entries, and what is no tensor, out of a file."""
    entries, extra, used = {}, {}, {}
    for n in (*own, *own.extra):
        found, origin = sources.get(n), own.aliases.get(n, n)
        if found in stored.extra:
            extra[n] = stored.extra[found]
        elif origin in entries:
            entries[n] = entries[origin]
        elif found is not None:
            entries[n] = entry = stored.entries[found]
            # Also where one tensor becomes two, which are trained apart.
            apart = used.setdefault(entry.identity or id(entry), n) != n
            kind = own.info(n).dtype if not is_extra(n) else entry.info.dtype
            if apart or kind != entry.info.dtype:
                entries[n] = _Cast(entry, getattr(torch, TORCH_NAME[kind]))
        elif n in constants:
            entries[n] = LoadedTensor(own[n].clone())
        elif n in untrained:
            entries[n] = LoadedTensor(torch.zeros_like(own[n]))
    return entries, extra


def load_base(module, state):
    """Load what `open_base` gave, or an edit of it.

    Adapters stay, and an extra state that the base lacks.
    """
    state, own = as_state(state), module_names(module, module.state_dict())
    # Under the names of what is wrapped; what is no tensor comes along.
    content = {
        name: state[plain] for name, plain in own.items() if plain in state
    }
    content |= {n: state.extra[p] for n, p in own.items() if p in state.extra}
    missing, unexpected = module.load_state_dict(content, strict=False)
    unexpected += [n for n in state if n not in own.values()]
    missing = [n for n in missing if not (is_adapter(n) or is_extra(n))]
    if missing or unexpected:
        raise ValueError(
            f"the module changed since the base was opened for it: lacks "
            f"{some(unexpected)}, has {some(missing)} more"
        )


class _Cast:
    """A stored tensor in the module's dtype, made when it is needed."""

    identity = None

    def __init__(self, entry, dtype):
        self._entry, self._dtype = entry, dtype
        self.info = LoadedTensor(
            torch.empty(entry.info.shape, dtype=dtype, device="meta")
        ).info

    @cached_property
    def _cast(self):
        return LoadedTensor(self._entry.tensor().to(self._dtype))

    def read_into(self, start, buffer):
        """See `StoredTensor.read_into`."""
        self._cast.read_into(start, buffer)

    def tensor(self):
        """Return it."""
        return self._cast.tensor()


def _is_switched_off(name, module):
    """Tell whether it is of the decoder that `encoder_only` Whisper drops."""
    inner = [part for part in name.split(".") if part not in HOLDERS]
    return inner[:1] == ["decoder"] and any(
        getattr(part, "decoder", part) is None for part in module.modules()
    )


def _check_settings(stored, module, name):
    """Raise where a Hugging Face folder was made for other inputs or layers."""
    if stored.path is None:
        return
    folder = Path(stored.path)
    folder = folder if folder.is_dir() else folder.parent
    differ = []
    for file, attribute, wanted in (
        ("config.json", "config", _CONFIG.fullmatch),
        (
            "preprocessor_config.json",
            "feature_extractor",
            _FEATURES.__contains__,
        ),
    ):
        live = _described(module, attribute)
        if live is None or not (folder / file).exists():
            continue
        content = read_json(folder / file)
        for key, value in content.items():
            same = key not in live or _plain(live[key]) == _plain(value)
            if wanted(key) and not same:
                differ.append(
                    f"{key} is {value} in {file}, {live[key]} in {name}"
                )
    if differ:
        raise ValueError(
            f"{stored.label} is no base of {name!r}; nothing was loaded: "
            f"{'; '.join(differ)}. Give the base that {name} was built for"
        )


def _described(module, attribute):
    """Return the settings that a Hugging Face model carries, or None."""
    for part in module.modules():
        if hasattr(found := getattr(part, attribute, None), "to_dict"):
            return found.to_dict()
    return None


def _plain(value):
    return list(value) if isinstance(value, tuple) else value


def _misfit(stored, name, problems, unlike):
    listed = "\n  ".join(problems[:20])
    more = f"\n  and {len(problems) - 20} more" * (len(problems) > 20)
    remedy = "Give the base that the model was built for"
    rows = [two for two in unlike.values() if two[0][1:] == two[1][1:]]
    if len(problems) == len(rows):
        remedy = (
            "The rows of another vocabulary? Align them by token first "
            "(align_vocabulary), or build the model with the base's vocabulary"
        )
    return ValueError(
        f"{stored.label} does not fit {name!r}; nothing was loaded:\n  "
        f"{listed}{more}\n{remedy}"
    )
