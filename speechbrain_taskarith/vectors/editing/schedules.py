"""The scale of each edit of a sequence: fixed, listed, or by a schedule."""

from speechbrain_taskarith.vectors.checks import finite

ONE_OVER_T = "1/t"


def checked_scale(scale):
    """Return a scale, a number or `{pattern: number}`, as plain floats."""
    if isinstance(scale, dict):
        return {str(key): checked_scale(value) for key, value in scale.items()}
    return float(finite("scale", scale))


def plain_schedule(schedule):
    """Check a schedule and return it as the edit log stores it.

    Of a callable that is a text, from which it cannot be built again.
    """
    if isinstance(schedule, str) and schedule != ONE_OVER_T:
        raise ValueError(
            f"scale={schedule!r}: expected {ONE_OVER_T!r}, numbers, a "
            "list or a callable"
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
    """Return the scale of edit `number` (1, 2, ...) by a schedule.

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
