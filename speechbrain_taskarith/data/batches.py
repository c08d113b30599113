"""A batch as tensors and texts by name: some of its rows, augmented ones."""

import torch

from speechbrain_taskarith.utils.lengths import absolute_lengths


def select_inputs(batch, x, lens, rows=None):
    """Return a batch's tensors and texts by name, of some rows only.

    `x` and `lens` may be None; `rows` are positions in the batch, None for all.
    """
    tensors = {"x": x, "lens": lens} if x is not None else {}
    for name in ("source", "target_bos", "target_eos"):
        tensors[name], relative = getattr(batch, name)
        if name != "target_bos":
            tensors[f"{name.split('_')[0]}_lens"] = relative
    lists = {
        "ids": list(batch.id),
        "transcripts": list(batch.wrd),
        "translations": list(batch.translation),
    }
    inputs = {**tensors, **lists}
    return inputs if rows is None else _rows_of(inputs, rows)


def _rows_of(inputs, rows):
    """Return rows, by position, of tensors and lists by name."""
    return {
        name: value[rows.to(value.device)]
        if torch.is_tensor(value)
        else [value[row] for row in rows.tolist()]
        for name, value in inputs.items()
    }


def augmented(inputs, augment):
    """Return `select_inputs` with features augmented, and what belongs to them.

    SpeechBrain's `Augmenter` may return an utterance several times, e.g. with
    `concat_original`; it tells which ones.
    """
    count = len(inputs["x"])
    x, lens = augment(inputs["x"], inputs["lens"])
    rows = torch.arange(count)
    if hasattr(augment, "replicate_labels"):
        rows = augment.replicate_labels(rows)
    if len(rows) != len(x):
        raise ValueError(
            f"fea_augment returned {len(x)} utterances for {count}: expected "
            "as many, or an Augmenter, whose replicate_labels tells which"
        )
    return {**_rows_of(inputs, rows), "x": x, "lens": lens}


def labelled_texts(texts, labels):
    """Return texts, empty where a text has no label, as a space has none."""
    counts = absolute_lengths(labels.lengths, labels.data.shape[1])
    return [text if n else "" for text, n in zip(texts, counts.tolist())]
