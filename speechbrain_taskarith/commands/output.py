"""Writing what a verb has made: weights in any form, with their card."""

from pathlib import Path

from speechbrain_taskarith.commands.console import Result, counted, size


def numbers(state):
    """Count what a state holds.

    Arguments
    ---------
    state : State
        The weights.

    Returns
    -------
    dict
        `tensors`, `parameters` and `bytes`; a tied tensor counts once.
    """
    names = [n for n in state if state.aliases.get(n, n) == n]
    return {
        "tensors": len(names),
        "parameters": sum(state.info(name).numel for name in names),
        "bytes": sum(state.info(name).nbytes for name in names),
    }


def checkpoint_of(path):
    """Return the SpeechBrain checkpoint folder that a path means.

    Arguments
    ---------
    path : path or None
        What the user gave.

    Returns
    -------
    pathlib.Path or None
        None for every other form.
    """
    from speechbrain_taskarith.vectors.states.speechbrain_folder import (
        newest_checkpoint,
    )

    if path is None or not Path(path).is_dir():
        return None
    if (Path(path) / "CKPT.yaml").exists():
        return Path(path)
    return newest_checkpoint(path)


def write_weights(weights, output, card, *, like=None, recoverable=None):
    """Write edited weights and the card beside them.

    Arguments
    ---------
    weights : mapping
        `{name: tensor}`.
    output : pathlib.Path
        `CKPT+...`: a SpeechBrain checkpoint; else see `save_state`.
    card : ModelCard
        Its fingerprint is filled in.
    like : path or None
        The base: a checkpoint's other recoverables, or a Hugging Face
        folder's other files, are taken along.
    recoverable : str or None
        Name of the weights in the checkpoint; `model` by default.

    Returns
    -------
    Result
        What was written.
    """
    from speechbrain_taskarith.vectors import as_state, save_state

    state = as_state(weights)
    card.fingerprint = state.fingerprint
    if output.name.startswith("CKPT+"):
        from speechbrain_taskarith.vectors import save_checkpoint

        save_checkpoint(
            {recoverable or "model": state},
            output,
            like=checkpoint_of(like),
            metadata=card.provenance(),
            card=card,
        )
    else:
        folder = output.suffix == "" and like is not None
        files_of = Path(like) if folder and Path(like).is_dir() else None
        save_state(state, output, metadata=card.provenance(), like=files_of)
        card.save(output)
    return written(output, state, fingerprint=card.fingerprint)


def written(output, state, dry_run=False, **more):
    """Say what was written, or would be.

    Arguments
    ---------
    output : path
        Where.
    state : State
        What.
    dry_run : bool
        Whether it only would be.
    **more : object
        Further entries of the data.

    Returns
    -------
    Result
        One line, and the numbers.
    """
    found = numbers(state)
    verb = "would write" if dry_run else "wrote"
    line = (
        f"{verb} {output}: {counted(found['tensors'], 'tensor')}, "
        f"{counted(found['parameters'], 'parameter')}, {size(found['bytes'])}"
    )
    data = {"output": str(output), "dry_run": dry_run, **found, **more}
    return Result([line], data)
