"""Low-rank adapters as task vectors: what a LoRA adds to the weights.

Hu et al. 2022, https://arxiv.org/abs/2106.09685: `W' = W + scaling * B A`.
"""

import itertools
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch

from speechbrain_taskarith.utils.files import read_json
from speechbrain_taskarith.vectors.checks import all_finite
from speechbrain_taskarith.vectors.states.pairing import (
    CONSTANTS,
    UNTRAINED,
    module_names,
    pair_names,
)
from speechbrain_taskarith.vectors.states.readers import as_state, open_state
from speechbrain_taskarith.vectors.states.state import is_extra

_PREFIX = "base_model.model."
# What changes the formula; refused, since the result would be plausible and
# wrong. Each is a key of PEFT's adapter_config.json.
_OTHER_METHODS = (
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "alora_invocation_tokens",
    "layer_replication",
    "trainable_token_indices",
    "target_parameters",
    "arrow_config",
    "corda_config",
)
# Initialisations that take a part out of the base's own weights.
_CHANGES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def lora_deltas(base, adapted, *, alpha=None):
    """Return what a low-rank adapter adds to each weight of its base.

    Linear layers and convolutions, with `scaling * B A` taken in float32;
    for a convolution `A` has the kernel and `B` is pointwise (eq. 3 of the
    paper, kernel position by kernel position). Weights that were trained
    beside the adapter (unfrozen layers, biases, PEFT's `modules_to_save`)
    enter as plain differences.

    Arguments
    ---------
    base : path, torch.nn.Module, or mapping of tensors
        The weights that the adapter was trained on; of SpeechBrain's
        wrappers also the Hugging Face folder that they were built from.
    adapted : torch.nn.Module, path, or mapping of tensors
        SpeechBrain's `AdaptedModel` with `LoRA`; or what such a model
        saves (then `alpha` is needed, since it is not stored); or a PEFT
        folder (`adapter_config.json`, `adapter_model.safetensors`).
    alpha : float or None
        SpeechBrain's `LoRA(alpha=...)`, for stored adapters only.

    Returns
    -------
    dict
        `{name: float32 tensor}`, by the base's names; weights that are as
        they were in the base are left out.

    Raises
    ------
    ValueError
        Another kind of adapter (DoRA, Houlsby, ...), shapes that do not fit
        (a grouped convolution), NaN or infinity in a factor, or frozen
        weights that are not the base's.
    KeyError
        The adapter changes a weight that the base lacks.

    Example
    -------
    >>> from speechbrain.nnet.adapters import AdaptedModel, LoRA
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    >>> base = {k: v.clone() for k, v in model.state_dict().items()}
    >>> adapted = AdaptedModel(
    ...     model, LoRA, all_linear=True, adapter_kwargs={"rank": 1}
    ... )
    >>> lora = model[0]
    >>> _ = torch.nn.init.ones_(lora.adapter_down_proj.weight)
    >>> _ = torch.nn.init.ones_(lora.adapter_up_proj.weight)
    >>> lora_deltas(base, adapted)
    {'0.weight': tensor([[1., 1.],
            [1., 1.]])}
    """
    base = as_state(base)
    if isinstance(adapted, (str, os.PathLike)):
        folder = Path(adapted)
        if (folder / "adapter_config.json").exists():
            return _from_peft(base, folder)
        return _from_saved(base, open_state(adapted), alpha, str(adapted))
    if isinstance(adapted, Mapping):
        return _from_saved(base, as_state(adapted), alpha, "the mapping")
    if isinstance(adapted, torch.nn.Module):
        return _from_speechbrain(base, adapted)
    raise TypeError(
        "adapted: expected an AdaptedModel, its stored weights, or a PEFT "
        f"folder, got {type(adapted).__name__}"
    )


def _from_speechbrain(base, adapted):
    from speechbrain.nnet.adapters import AdaptedModel, LoRA

    content = adapted.state_dict(keep_vars=True)
    modules = dict(adapted.named_modules())
    plain = module_names(adapted, [*content, *modules])
    # What holds an adapted model adds a part to its names too.
    held = {
        plain[f"{path}.adapted_model".removeprefix(".")]
        for path, module in modules.items()
        if isinstance(module, AdaptedModel)
    }
    plain = {path: _without_parts(name, held) for path, name in plain.items()}
    tensors = {plain[k]: v for k, v in content.items() if not is_extra(k)}
    products = {}
    for path, module in modules.items():
        name = plain[path]
        if not isinstance(module, LoRA):
            if hasattr(module, "adapter_down_proj"):
                raise ValueError(
                    f"{name}: a {type(module).__name__} has an activation "
                    "inside and is no difference of weights; only LoRA is"
                )
            continue
        prefix = f"{name}." if name else ""
        products[f"{prefix}weight"] = (
            module.adapter_up_proj.weight,
            module.adapter_down_proj.weight,
            module.scaling,
        )
        inner = f"{prefix}pretrained_module."
        for key in list(tensors):
            if key.startswith(inner):
                # Where the LoRA stands, the base has this module.
                tensors[prefix + key.removeprefix(inner)] = tensors.pop(key)
            elif key.startswith(f"{prefix}adapter_"):
                del tensors[key]
    if not products:
        raise ValueError("the adapted model holds no LoRA layer")
    trained, found = {}, pair_names(tensors, base, None, base.aliases).names
    for key, value in tensors.items():
        if key not in products and value.requires_grad:
            trained[found.get(key, key)] = value
            continue
        if key not in found and key.split(".")[-1] in {*CONSTANTS, UNTRAINED}:
            continue
        expected = _weight_of(base, found.get(key, key))
        if key.endswith(("running_mean", "running_var", "num_batches_tracked")):
            continue
        if not torch.equal(value.cpu(), expected.cpu()):
            raise ValueError(
                f"{key}: the adapter's frozen weights are not the base's "
                f"({base.label}); give the base that it was trained on"
            )
    products = {found.get(name, name): one for name, one in products.items()}
    return _deltas(base, trained, products, "the adapted model")


def _without_parts(name, paths):
    """Return a dotted name without its parts that end one of some paths."""
    parts = name.split(".")
    steps = itertools.accumulate(parts, "{}.{}".format)
    return ".".join(p for p, step in zip(parts, steps) if step not in paths)


def _from_saved(base, state, alpha, label):
    """Read what `AdaptedModel` saves: trained tensors only."""
    products, values = {}, {}
    down = ".adapter_down_proj.weight"
    for key in state:
        name = key.replace("adapted_model.", "")
        if key.endswith(down):
            stem = key.removesuffix(down)
            up = f"{stem}.adapter_up_proj.weight"
            if up not in state or f"{stem}.adapter_down_proj.bias" in state:
                raise ValueError(f"{label}: {key!r} belongs to no LoRA")
            if alpha is None:
                raise ValueError(
                    f"{label}: SpeechBrain does not store a LoRA's alpha; "
                    "give the one it was trained with (alpha=1.0 is LoRA's "
                    "own default)"
                )
            rank = state[key].shape[0]
            target = name.removesuffix(down) + ".weight"
            products[target] = (state[up], state[key], alpha / rank)
        elif "adapter_" not in name.rpartition(".")[0].rpartition(".")[2]:
            values[name.replace(".pretrained_module.", ".")] = state[key]
    if not products:
        raise ValueError(
            f"{label}: holds no LoRA (expected ...{down} and its partner, or "
            "a PEFT folder with adapter_config.json)"
        )
    return _deltas(base, values, products, label)


def _from_peft(base, folder):
    config = read_json(folder / "adapter_config.json")
    kind = str(config.get("peft_type", "")).upper()
    if kind != "LORA":
        raise ValueError(
            f"{folder}: is a {kind or 'nameless'} adapter, no LoRA"
        )
    for key in _OTHER_METHODS:
        if config.get(key):
            raise ValueError(
                f"{folder}: {key} is on; this is no plain LoRA (W + scaling "
                "B A) and cannot be read as one. Merge it with PEFT "
                "(merge_and_unload) and subtract: TaskVector.between"
            )
    start = str(config.get("init_lora_weights", ""))
    if start.startswith(_CHANGES_THE_BASE):
        raise ValueError(
            f"{folder}: init_lora_weights is {start!r}, which changes the "
            "base's weights before training; B A is then not the difference "
            "from the base. Convert it with PEFT (save_pretrained(path_"
            "initial_model_for_weight_conversion=...)), or merge and subtract"
        )
    state = _peft_state(folder)
    products, matched = _peft_products(state, config, folder)
    values = {}
    for key in state:
        if key in matched:
            continue
        name = key.removeprefix(_PREFIX)
        if "lora_" in name:
            raise ValueError(
                f"{folder}: {key!r} is no part of a plain LoRA (a LoRA bias "
                "or a magnitude?); merge with PEFT and subtract"
            )
        for part in (".modules_to_save", ".base_layer", ".default"):
            name = name.replace(part, "")
        values[name] = state[key]
    if not products and not values:
        raise ValueError(f"{folder}: the adapter is empty")
    return _deltas(base, values, products, state.label)


def _peft_products(state, config, folder):
    """Return `{base's name: (B, A, scaling)}` and the keys of the A and B."""
    products, matched = {}, set()
    for key in state:
        found = re.fullmatch(r"(.+)\.lora_(A\.weight|embedding_A)", key)
        if not found:
            continue
        stem, kind = found.groups()
        other = f"{stem}.lora_{kind.replace('A', 'B')}"
        if other not in state:
            raise ValueError(f"{folder}: {key!r} lacks its partner {other}")
        matched |= {key, other}
        module = stem.removeprefix(_PREFIX)
        down, up = state[key].float(), state[other].float()
        scaling = _peft_scaling(config, module, down.shape[0])
        # An embedding is W[token], and fan-in-fan-out layers keep W
        # transposed: both are the transpose of B A.
        if kind == "embedding_A" or config.get("fan_in_fan_out"):
            down, up = up.T, down.T
        products[f"{module}.weight"] = (up, down, scaling)
    return products, matched


def _peft_state(folder):
    for name in ("adapter_model.safetensors", "adapter_model.bin"):
        if (folder / name).exists():
            return _without_adapter_name(open_state(folder / name))
    raise FileNotFoundError(
        f"{folder}: has an adapter_config.json, but neither "
        "adapter_model.safetensors nor adapter_model.bin"
    )


def _without_adapter_name(state):
    """Return a state with the keys that PEFT stores.

    A model's own state dict names the adapter too: `lora_A.default.weight`.
    """
    found, names = {}, set()
    for key in state:
        match = re.fullmatch(r"(.+\.lora_\w+)\.([^.]+)(\.weight|)", key)
        if match and match[2] not in ("weight", "bias"):
            names.add(match[2])
            found[match[1] + match[3]] = state[key]
        else:
            found[key] = state[key]
    if len(names) > 1:
        raise ValueError(
            f"{state.label}: holds several adapters ({', '.join(sorted(names))}"
            "); save one alone: model.save_pretrained(folder, "
            "selected_adapters=[name])"
        )
    if not names:
        return state
    renamed = as_state(found)
    renamed.label = state.label
    return renamed


def _peft_scaling(config, module, rank):
    """Return alpha / r, or alpha / sqrt(r) for rank-stabilised LoRA."""
    alpha = config.get("lora_alpha", 8)
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        # As PEFT matches: a suffix at a dot, or a regular expression.
        if re.match(rf"(.*\.)?({pattern})$", module):
            alpha = value
            break
    # The rank is that of the tensors, so rank_pattern needs no reading.
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _deltas(base, values, products, label):
    """Return the deltas, under the base's names if wrappers differ."""
    names = [*values, *products]
    found = pair_names(names, base, None, base.aliases).names
    values, products = (
        {found.get(name, name): one for name, one in part.items()}
        for part in (values, products)
    )
    deltas = _differences(base, values, label)
    return _add_products(base, deltas, products, label)


def _weight_of(base, name, label="the adapter"):
    if name not in base:
        raise KeyError(
            f"{label}: {base.label} has no {name!r}, which the adapter changes; give "
            "the base that it was trained on"
        )
    return base[name]


def _differences(base, values, label):
    deltas = {}
    for name, value in values.items():
        before = _weight_of(base, name, label)
        _check_finite(value, label, name)
        if not torch.is_floating_point(before):
            continue
        if before.shape != value.shape:
            raise ValueError(
                f"{name!r} has shape {tuple(value.shape)} beside the adapter "
                f"and {tuple(before.shape)} in {base.label}"
            )
        delta = value.detach().to(before.device).float() - before.float()
        if delta.any():
            deltas[name] = delta
    return deltas


@torch.no_grad()
def _add_products(base, deltas, products, label):
    for name, (up, down, scaling) in products.items():
        before = _weight_of(base, name, label)
        _check_finite(up, label, f"factor B of {name}")
        _check_finite(down, label, f"factor A of {name}")
        up = up.detach().to(before.device).float()
        down = down.detach().to(before.device).float()
        one, other = (f.reshape(f.shape[0], -1) for f in (up, down))
        if one.shape[1] != len(other) or len(one) * other.shape[1] != (
            before.numel()
        ):
            raise ValueError(
                f"{label}: {name!r}: the factors {tuple(up.shape)} and "
                f"{tuple(down.shape)} do not make a weight of the shape "
                f"{tuple(before.shape)} that {base.label} has. Of a grouped "
                "convolution the product is another one: merge it with PEFT "
                "(merge_and_unload) and subtract (TaskVector.between)"
            )
        delta = (one @ other).reshape(before.shape) * scaling
        _check_finite(delta, label, f"the product for {name}")
        deltas[name] = deltas[name] + delta if name in deltas else delta
    return deltas


def _check_finite(tensor, label, what):
    if not all_finite(tensor.detach().float()):
        raise ValueError(
            f"{label}: {what} holds NaN or infinity: the training that made "
            "it diverged; use an earlier checkpoint of the adapter"
        )
