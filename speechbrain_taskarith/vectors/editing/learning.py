"""What one edit of a sequence adds, before anything is written."""

from speechbrain_taskarith.utils.patterns import as_tuple, fitting
from speechbrain_taskarith.vectors.editing.precision import origin_of
from speechbrain_taskarith.vectors.editing.schedules import (
    checked_scale,
    plain_schedule,
    scheduled_scale,
)
from speechbrain_taskarith.vectors.engine.inputs import check_edit
from speechbrain_taskarith.vectors.rules.base import check_rule
from speechbrain_taskarith.vectors.states.pairing import under_names_of
from speechbrain_taskarith.vectors.states.readers import as_model
from speechbrain_taskarith.vectors.task_vector import TaskVector


def check_edits(base, rule, schedule, include, exclude):
    """Raise now what every edit of a sequence would raise."""
    scales = plain_schedule(schedule)
    if isinstance(scales, str):
        scales = []  # numbers, as far as it is known
    scales = scales if isinstance(scales, list) else [scales]
    # A pattern may be meant for the fine-tuned model alone.
    exclude = [p for p in as_tuple(exclude) if fitting(base, p)]
    check_edit(base, check_rule(rule, vectors=1), scales, include, exclude)


def make_edit(
    before,
    finetuned,
    rule,
    *,
    number,
    types_for,
    given=(),
    schedule=None,
    scale=None,
    started_from=None,
    include=("*",),
    exclude=(),
):
    """Return an edit's vector, its scale, and the type it started from.

    `before` is the state as the editor keeps it, `number` the edit's (from
    1); for `types_for` and `given` see `origin_of`, for the others
    `SequentialEditor` and its `learn`.
    """
    finetuned = under_names_of(before, as_model(finetuned))
    origin, started_from = origin_of(
        before, finetuned, types_for, started_from, given
    )
    vector = TaskVector.between(
        origin, finetuned, include=include, exclude=exclude
    )
    vector = rule.combine([vector], base=before)
    vector.base_fingerprint = before.fingerprint
    if scale is None:
        scale = scheduled_scale(schedule, number, rule, vector)
    scale = checked_scale(scale)
    vector.scales(scale)  # a pattern that fits nothing: fail before work
    return vector, scale, started_from
