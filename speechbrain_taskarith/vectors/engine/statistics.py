"""Statistics that no arithmetic on weights may touch: BatchNorm, normalisers.

Variances must never be extrapolated: base plus two differences can make one
negative. They are estimated again from data, or pooled by their counts.
"""

import torch

from speechbrain_taskarith.utils.training import keep_modes
from speechbrain_taskarith.vectors.checks import all_finite

_BATCH_NORM = torch.nn.modules.batchnorm._BatchNorm


def reestimate_statistics(model, batches, forward=None):
    """Estimate BatchNorm's running statistics again, from data.

    After an edit, running means and variances are still the base's, while
    the activations are not. Each layer's mean and variance are taken over
    all frames of all batches together (not as a running average, so neither
    the order nor the size of the batches counts), with the unbiased
    variance that torch keeps. While this runs, BatchNorm layers normalise
    by the batch, as in training; everything else (dropout, normalisers) is
    in evaluation mode and no gradient is taken.

    Padded frames count as frames, as they do in training; sort by length or
    use batches of one to keep them few.

    Arguments
    ---------
    model : torch.nn.Module
        Changed in place: only the buffers of its BatchNorm layers.
    batches : iterable
        What the model is fed; a few hundred utterances are plenty. No
        labels are needed, so unlabelled target speech will do.
    forward : callable or None
        `forward(model, batch)`; None calls `model(batch)`.

    Returns
    -------
    int
        The number of BatchNorm layers that were re-estimated.

    Raises
    ------
    ValueError
        No batches, a layer that saw fewer than two frames, or values that
        are not finite; the statistics are then what they were.

    Example
    -------
    >>> norm = torch.nn.BatchNorm1d(1)
    >>> reestimate_statistics(norm, [torch.tensor([[1.0], [2.0], [6.0]])])
    1
    >>> norm.running_mean, norm.running_var
    (tensor([3.]), tensor([7.]))
    """
    layers = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, _BATCH_NORM) and layer.track_running_stats
    }
    if not layers:
        return 0
    sums = {name: _Moments() for name in layers}
    buffers = [b for layer in layers.values() for b in layer.buffers()]
    before = [(buffer, buffer.clone()) for buffer in buffers]
    hooks, count = [], 0
    try:
        with keep_modes(model), torch.no_grad():
            model.eval()
            for name, layer in layers.items():
                layer.train()
                hooks.append(layer.register_forward_pre_hook(sums[name].hook))
            for batch in batches:
                count += 1
                model(batch) if forward is None else forward(model, batch)
            found = {
                name: moments.result(name or type(model).__name__)
                for name, moments in sums.items()
            }
    except BaseException:
        with torch.no_grad():
            for buffer, old in before:
                buffer.copy_(old)
        raise
    finally:
        for hook in hooks:
            hook.remove()
    with torch.no_grad():
        for name, (mean, variance) in found.items():
            layers[name].running_mean.copy_(mean)
            layers[name].running_var.copy_(variance)
            layers[name].num_batches_tracked.fill_(count)
    return len(layers)


class _Moments:
    """Count, mean and summed squares of a layer's input, in float64."""

    def __init__(self):
        self.count, self.mean, self.squares = 0, 0.0, 0.0

    def hook(self, _, inputs):
        x = inputs[0].detach()
        x = x.double().transpose(0, 1).reshape(x.shape[1], -1)
        count = x.shape[1]
        if not count:
            return
        mean = x.mean(dim=1)
        squares = (x - mean[:, None]).square().sum(dim=1)
        # Chan et al.'s pairwise update: stable where sums of squares cancel.
        total = self.count + count
        shift = mean - self.mean
        self.squares = (
            self.squares + squares + shift**2 * (self.count * count / total)
        )
        self.mean = self.mean + shift * (count / total)
        self.count = total

    def result(self, name):
        if self.count < 2:
            raise ValueError(
                f"{name}: saw {self.count} frames, at least 2 are needed to "
                "estimate its statistics; give more data"
            )
        variance = self.squares / (self.count - 1)
        if not (all_finite(self.mean) and all_finite(variance)):
            raise ValueError(
                f"{name}: its input holds NaN or infinity; check the edited "
                "weights and the data"
            )
        return self.mean, variance


def pool_normalizers(statistics, base=None):
    """Pool the statistics of SpeechBrain's `InputNormalization`, exactly.

    With counts `n_i`, means `m_i` and biased variances `v_i`::

        n = sum n_i    m = sum n_i m_i / n
        v = sum n_i (v_i + m_i^2) / n - m^2

    in float64, which is what one normaliser would hold that had seen all
    the data.

    Arguments
    ---------
    statistics : sequence of dict
        Contents of `normalizer.ckpt`: `count`, `glob_mean`, `glob_std`.
        Those with a count of 0 have seen nothing and do not count.
    base : dict or None
        Statistics that all the others went on from (fine-tuning resumes the
        base's count): the base's data are then counted once, not once each.

    Returns
    -------
    dict
        The same form; further entries are those of the base, or else of the
        first.

    Raises
    ------
    ValueError
        None has a count, sizes that differ, or statistics that cannot have
        gone on from the base.

    Example
    -------
    >>> a = {"count": 1, "glob_mean": torch.tensor([0.0]),
    ...      "glob_std": torch.tensor([0.0])}
    >>> b = {"count": 3, "glob_mean": torch.tensor([4.0]),
    ...      "glob_std": torch.tensor([0.0])}
    >>> pooled = pool_normalizers([a, b])
    >>> pooled["count"], pooled["glob_mean"], pooled["glob_std"]
    (4, tensor([3.]), tensor([1.7321]))
    """
    given = [*statistics] if base is None else [base, *statistics]
    if not given:
        raise ValueError("statistics: expected at least one normaliser")
    sums = [_sums(entry, number) for number, entry in enumerate(given)]
    shapes = {tuple(mean.shape) for count, mean, _ in sums if count}
    if not shapes:
        raise ValueError("no normaliser has seen any data (all counts are 0)")
    if len(shapes) > 1:
        raise ValueError(
            f"normalisers of different sizes {sorted(shapes)} cannot be pooled"
        )
    # Relative to the first mean, so that large means do not eat the digits
    # of small variances.
    origin = next(mean for count, mean, _ in sums if count)
    n, first, second = 0, 0.0, 0.0
    inherited = 0 if base is None else len(sums) - 2
    for number, (count, mean, variance) in enumerate(sums):
        if not count:
            continue
        # The base is inside each of the others: take it out but once.
        weight = count if base is None or number else -inherited * count
        shifted = mean - origin
        n = n + weight
        first = first + weight * shifted
        second = second + weight * (variance + shifted**2)
    if base is not None and len(sums) == 1:
        n, first, second = sums[0][0], 0.0 * origin, sums[0][0] * sums[0][2]
    if n <= 0:
        raise ValueError(
            "the normalisers have seen less data than the base, so they "
            "cannot have continued from it; pool them without base"
        )
    mean = first / n
    variance = second / n - mean**2
    if (variance < -1e-6 * (1 + second.abs() / n)).any():
        raise ValueError(
            "the normalisers cannot have continued from this base (a variance "
            "would be negative); pool them without base"
        )
    dtype = torch.as_tensor(given[0]["glob_mean"]).dtype
    std = variance.clamp(min=0).sqrt().to(dtype)
    pooled = {"count": n, "glob_mean": (origin + mean).to(dtype)}
    return {**given[0], **pooled, "glob_std": std}


def _sums(entry, number):
    missing = {"count", "glob_mean", "glob_std"} - set(entry)
    if missing:
        raise ValueError(
            f"statistics[{number}]: expected count, glob_mean and glob_std "
            f"of SpeechBrain's InputNormalization, {sorted(missing)} missing"
        )
    count = int(entry["count"])
    mean = torch.as_tensor(entry["glob_mean"]).double().cpu()
    std = torch.as_tensor(entry["glob_std"]).double().cpu()
    if count and not (all_finite(mean) and all_finite(std)):
        raise ValueError(f"statistics[{number}]: holds NaN or infinity")
    return count, mean, std**2
