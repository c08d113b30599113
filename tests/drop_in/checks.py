"""What must hold on disk, whichever recipe wrote it.

Read with torch alone and computed in float64 from the formulas: nothing here
uses the code that it checks.
"""

from pathlib import Path

import torch


def weights(path):
    """Return a file's tensors by name, and its counts as tensors."""
    found = torch.load(path, map_location="cpu", weights_only=True)
    return {key: torch.as_tensor(value) for key, value in found.items()}


def trimmed(vector, density):
    """Return a vector's largest entries, 0 elsewhere: TIES of one vector.

    Arguments
    ---------
    vector : dict of str to torch.Tensor
        Of all parameters; the threshold is one for all.
    density : float
        Share that stays.

    Returns
    -------
    dict of str to torch.Tensor

    Example
    -------
    >>> trimmed({"w": torch.tensor([1.0, -3.0, 2.0, 0.5])}, 0.5)["w"].tolist()
    [0.0, -3.0, 2.0, 0.0]
    """
    flat = torch.cat([value.flatten() for value in vector.values()])
    kept = round(density * len(flat))
    chosen = torch.zeros(len(flat), dtype=torch.bool)
    order = sorted(range(len(flat)), key=lambda i: -flat[i].abs().item())
    chosen[order[:kept]] = True
    parts = chosen.split([value.numel() for value in vector.values()])
    return {
        name: value * part.reshape(value.shape)
        for (name, value), part in zip(vector.items(), parts)
    }


def law(folder, base, name, scale, density=1.0):
    """Assert `<name>.ckpt == base + scale * rule(finetuned - base)`.

    Arguments
    ---------
    folder : pathlib.Path
        A checkpoint.
    base : dict of str to torch.Tensor
        What fine-tuning started from. What it lacks must be as fine-tuned.
    name : str
        The edited recoverable.
    scale : float
        Of the rule.
    density : float
        Of the rule; below 1 it is TIES, else task arithmetic.

    Returns
    -------
    dict of str to torch.Tensor
        The vector, for further checks; it is not zero.
    """
    kept = weights(Path(folder) / f"{name}.ckpt")
    tuned = weights(Path(folder) / f"{name}.finetuned.ckpt")
    assert kept.keys() == tuned.keys()
    assert base.keys() <= kept.keys(), sorted(base.keys() - kept.keys())[:5]
    vector = {
        key: tuned[key].double() - value.double()
        for key, value in base.items()
        if value.is_floating_point()
    }
    assert any(value.any() for value in vector.values()), "nothing was trained"
    edit = vector if density == 1.0 else trimmed(vector, density)
    for key, value in kept.items():
        if key not in base:
            expected = tuned[key]
        elif key in edit:
            expected = base[key].double() + scale * edit[key]
        else:
            expected = base[key]
        error = (value.double() - expected.double()).abs().max().item()
        size = max(1.0, expected.double().abs().max().item())
        assert error <= 1e-6 * size, f"{folder}: {name}.{key}: off by {error}"
    return vector


def share_kept(folder, base, name):
    """Return `|kept - base| / |finetuned - base|`, what an edit really kept."""
    norms = []
    for file in (f"{name}.ckpt", f"{name}.finetuned.ckpt"):
        state = weights(Path(folder) / file)
        norms.append(
            sum(
                (state[key].double() - value.double()).square().sum()
                for key, value in base.items()
                if value.is_floating_point()
            )
        )
    return float((norms[0] / norms[1]).sqrt())


def changed(before, after):
    """Return the names whose bytes differ, and those only one side has."""
    return {
        key
        for key in before.keys() | after.keys()
        if key not in before
        or key not in after
        or not torch.equal(before[key], after[key])
    }


def close(one, other, tolerance=1e-5):
    """Assert that two states are the same up to rounding."""
    assert one.keys() == other.keys()
    for key, value in one.items():
        error = (value.double() - other[key].double()).abs().max().item()
        size = max(1.0, value.abs().max().item())
        assert error <= tolerance * size, f"{key}: off by {error}"


def only(names, pattern):
    """Return those of some names that contain a text."""
    return {name for name in names if pattern in name}
