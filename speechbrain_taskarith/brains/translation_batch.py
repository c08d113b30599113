"""What the model of speech translation needs of a batch."""


def taken_rows(batch, x, lens, good=None):
    """Return what the model needs of a batch, of its good utterances only.

    Arguments
    ---------
    batch : PaddedBatch
        See `TranslationBrain`.
    x : torch.Tensor or None
        [batch, time, ...], features.
    lens : torch.Tensor or None
        [batch], their relative lengths.
    good : torch.Tensor, optional
        Positions of the good ones; None: all.

    Returns
    -------
    dict
        Tensors `x`, `lens`, `source`, `source_lens`, `target_bos`,
        `target_eos`, `target_lens`, and lists `ids`, `transcripts`,
        `translations`.
    """
    fields = {"x": x, "lens": lens} if x is not None else {}
    for name in ("source", "target_bos", "target_eos"):
        fields[name], relative = getattr(batch, name)
        if name != "target_bos":
            fields[f"{name.split('_')[0]}_lens"] = relative
    lists = {
        "ids": list(batch.id),
        "transcripts": list(batch.wrd),
        "translations": list(batch.translation),
    }
    if good is not None:
        fields = {n: f[good.to(f.device)] for n, f in fields.items()}
        lists = {n: [one[i] for i in good.tolist()] for n, one in lists.items()}
    return {**fields, **lists}
