"""How much each adapter is attended to: numbers for the log, a heat map."""

import torch

from speechbrain_taskarith.utils.lengths import absolute_lengths, padding_mask


def mean_weights(combinations, lens):
    """Return [layers, N], as `AdapterHandle.attention` describes."""
    rows = []
    ran = any(c.last_weights is not None for c in combinations.values())
    for layer, combination in combinations.items():
        fixed = combination.weights()
        if fixed is not None:
            rows.append(fixed.detach().float())
            continue
        weights = combination.last_weights
        if weights is None and ran:  # the batch left this layer out
            rows.append(torch.full((len(combination.names),), torch.nan))
            continue
        if weights is None:
            raise ValueError(
                f"layer {layer!r} has combined no batch yet: run the encoder "
                "with handle.use('combined') first"
            )
        if lens is None:
            valid = _last_valid(combination, weights[..., 0])
        else:
            _require_batch(weights, lens, "lengths")
            valid = valid_frames(weights, lens)
        weights = weights.flatten(0, -2) if valid is None else weights[valid]
        rows.append(weights.float().mean(0))
    return torch.stack([row.to(rows[0].device) for row in rows])


def guidance_loss(combinations, tasks, lens):
    """Return a scalar, as `AdapterHandle.attention_loss` describes."""
    losses = []
    ran = any(c.live_weights is not None for c in combinations.values())
    for layer, combination in combinations.items():
        if ran and combination.live_weights is None:
            continue  # the batch left this layer out
        weights = kept_attention(layer, combination)
        valid = None
        if lens is None:
            valid = _last_valid(combination, weights[..., 0])
        losses.append(
            guidance_cost(weights, combination.names, tasks, lens, valid)
        )
    return torch.stack(losses).mean()


def _last_valid(combination, values):
    """Return which frames of the last batch are no padding, None: unknown."""
    valid = combination.last_valid
    fits = valid is not None and valid.shape == values.shape
    return valid.to(values.device) if fits else None


def kept_attention(layer, combination):
    """Return the last batch's weights [B, T, N] with their graph."""
    if combination.live_weights is None:
        raise ValueError(
            f"layer {layer!r} has kept no attention: combine with "
            "AudioAdapterFusion(guided=True), and run the encoder with "
            "handle.use('combined') first"
        )
    return combination.live_weights


def guidance_cost(weights, names, tasks, lens, valid=None):
    """Return one layer's `- mean_t log s_task(t)`, a scalar.

    Over the frames by `lens`, else by `valid` [B, T], else over all.
    """
    unknown = sorted(set(tasks) - set(names))
    if unknown:
        raise ValueError(
            f"tasks {', '.join(unknown)}: no such adapter is combined; there "
            f"are {', '.join(names)}"
        )
    _require_batch(weights, tasks, "tasks")
    # Nothing here makes the host wait for a GPU.
    index = torch.tensor([names.index(task) for task in tasks])
    index = index.to(weights.device, non_blocking=True)
    index = index.view(-1, 1, 1).expand(-1, weights.shape[1], 1)
    own = weights.gather(2, index)[..., 0]
    # Not log(0): a softmax may underflow in single precision.
    costs = -own.clamp_min(torch.finfo(own.dtype).tiny).log()
    if lens is not None:
        valid = valid_frames(costs, lens)
    if valid is None:
        return costs.mean()
    return costs.masked_fill(~valid, 0.0).sum() / valid.sum()


def _require_batch(weights, given, what):
    if weights.dim() != 3 or len(given) != len(weights):
        raise ValueError(
            f"{len(given)} {what} for a batch of {tuple(weights.shape)}; "
            "give the last batch's, one an utterance"
        )


def valid_frames(values, lens):
    """Return which of [B, T] are no padding, by relative lengths."""
    frames = values.shape[1]
    lens = lens.to(values.device, non_blocking=True)
    return ~padding_mask(absolute_lengths(lens, frames), frames)


def attention_stats(attention, names):
    """Return mean attention by adapter, for SpeechBrain's train logger.

    Arguments
    ---------
    attention : torch.Tensor
        [layers, N], from `handle.attention()`, or a mean of such.
    names : sequence of str
        N names, e.g. `handle.combined_names`; `ValueError` for fewer or more.

    Returns
    -------
    dict of str: float
        Mean over layers.

    Example
    -------
    >>> attention_stats(torch.tensor([[0.5, 0.5], [1.0, 0.0]]), ["a", "b"])
    {'attention a': 0.75, 'attention b': 0.25}
    """
    _require_shape(attention, names)
    means = attention.mean(0).tolist()
    return {f"attention {n}": mean for n, mean in zip(names, means)}


def plot_attention(
    attention, names, path, *, layers=None, title="Attention to adapters"
):
    """Draw attention as a heat map, adapter by layer.

    Arguments
    ---------
    attention, names
        As of `attention_stats`.
    path : str or pathlib.Path
        `.png`, `.pdf` or `.svg`.
    layers : sequence of str or None
        Names of the columns; None numbers them from 0.
    title : str
        Above the plot.

    Returns
    -------
    pathlib.Path
        The file.

    Example
    -------
    >>> path = getfixture("tmp_path") / "attention.png"
    >>> plot_attention(torch.full((3, 2), 0.5), ["us", "german"], path).name
    'attention.png'
    """
    from speechbrain_taskarith.metrics.plots import plot_heat_map

    attention = torch.as_tensor(attention)
    _require_shape(attention, names)
    if layers is None:
        layers = range(len(attention))
    return plot_heat_map(
        attention.t().tolist(),
        list(names),
        [str(layer) for layer in layers],
        path,
        title=title,
        xlabel="layer",
        ylabel="adapter",
        limits=(0.0, 1.0),
        form="{:.2f}",
        unit="mean weight",
    )


def _require_shape(attention, names):
    if attention.dim() != 2 or attention.shape[1] != len(names):
        raise ValueError(
            f"attention has the shape {tuple(attention.shape)}, expected "
            f"[layers, {len(names)}] for {', '.join(names)}"
        )
