"""The scale of each edit of a sequence: fixed, listed, or by a schedule."""

from speechbrain_taskarith.vectors.checks import finite

ONE_OVER_T = "1/t"


def checked_scale(scale):
    """Return a scale as plain floats.

    Arguments
    ---------
    scale : float or dict
        One number, or `{pattern: number}`.

    Returns
    -------
    float or dict
        Plain Python.

    Raises
    ------
    ValueError
        Something that is not a finite number.

    Example
    -------
    >>> checked_scale({"encoder.*": 1})
    {'encoder.*': 1.0}
    """
    if isinstance(scale, dict):
        return {str(key): checked_scale(value) for key, value in scale.items()}
    return float(finite("scale", scale))


def plain_schedule(schedule):
    """Return a schedule as the edit log keeps it.

    Arguments
    ---------
    schedule : None, float, dict, list, str or callable
        See `SequentialEditor`.

    Returns
    -------
    object
        Plain types; of a callable, a text that cannot be built from.

    Raises
    ------
    ValueError
        A name that is no schedule, a number that is not finite.
    """
    if isinstance(schedule, str) and schedule != ONE_OVER_T:
        raise ValueError(
            f"scale={schedule!r}: the only schedule with a name is "
            f"{ONE_OVER_T!r}; others are lists or callables"
        )
    if schedule is None or isinstance(schedule, str):
        return schedule
    if isinstance(schedule, (list, tuple)):
        return [checked_scale(entry) for entry in schedule]
    if callable(schedule):
        name = getattr(schedule, "__name__", type(schedule).__name__)
        return f"callable {name}"
    return checked_scale(schedule)


def scheduled_scale(schedule, number, rule, vector):
    """Return the scale of one edit.

    Arguments
    ---------
    schedule : None, float, dict, list, str or callable
        See `SequentialEditor`.
    number : int
        Of the edit, from 1.
    rule : object
        Whose scale is taken where there is no schedule.
    vector : TaskVector
        What is to be scaled.

    Returns
    -------
    float or dict
        Checked.

    Raises
    ------
    ValueError
        A list that is too short, a schedule that was only a text in the
        log, a number that is not finite.

    Example
    -------
    >>> [scheduled_scale("1/t", n, None, {}) for n in (1, 2, 3)]
    [0.5, 0.3333333333333333, 0.25]
    """
    if schedule is None:
        return checked_scale(rule.scale_for(vector))
    if schedule == ONE_OVER_T:
        # The base is the first of the domains.
        return 1.0 / (number + 1)
    if isinstance(schedule, str):
        raise ValueError(
            f"scale: the schedule {schedule!r} cannot be built from the "
            "log; give it again (resume(folder, scale=...)) or give each "
            "edit its scale (learn(..., scale=...))"
        )
    if isinstance(schedule, (list, tuple)):
        if number > len(schedule):
            raise ValueError(
                f"scale: the list has {len(schedule)} entries, this is edit "
                f"{number}"
            )
        return checked_scale(schedule[number - 1])
    return checked_scale(schedule(number) if callable(schedule) else schedule)
