"""How long a training is, for schedules of the learning rate."""


def optimizer_steps(brain, train_loader, epochs):
    """Return how many steps the optimizer takes in `brain.fit`.

    A schedule that ends with the training needs to know. Under DDP each
    process has a part of the batches; with gradient accumulation several
    batches make a step, and those left at the end of an epoch make none.

    Arguments
    ---------
    brain : sb.Brain
        Its `grad_accumulation_factor` counts.
    train_loader : DataLoader
        What `fit` gets: of this process, as `brain.make_dataloader` or
        `shard_loader` makes it.
    epochs : int
        As many as `fit` trains for.

    Returns
    -------
    int

    Raises
    ------
    ValueError
        An epoch has fewer batches than make a step: nothing would be learned.

    Example
    -------
    >>> import speechbrain as sb, torch
    >>> brain = sb.Brain(run_opts={"grad_accumulation_factor": 2})
    >>> loader = torch.utils.data.DataLoader(range(9), batch_size=2)
    >>> optimizer_steps(brain, loader, epochs=3)
    6
    """
    batches, factor = len(train_loader), brain.grad_accumulation_factor
    if batches < factor:
        raise ValueError(
            f"grad_accumulation_factor: {factor}, but an epoch has {batches} "
            "batches in each process, so that the optimizer would never take "
            "a step. Lower it, or the batch size"
        )
    return batches // factor * epochs
