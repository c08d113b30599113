"""A training's last checkpoints, and their mean."""

import logging

from speechbrain.utils.checkpoints import average_checkpoints

from speechbrain_taskarith.vectors import as_state
from speechbrain_taskarith.vectors.recipe_hooks.provenance import mean_state

logger = logging.getLogger(__name__)


def _of_epoch(checkpoint):
    """Tell a checkpoint of a whole epoch from one within an epoch."""
    return checkpoint.meta.get("end-of-epoch", True)


def save_epoch(checkpointer, meta, count, best):
    """Save an epoch; keep the last `count` of them and the best.

    `best`: as `best_key` returns it. One within an epoch would be counted as
    one of the last, and nothing goes on from it now: it is deleted.
    """
    checkpointer.save_and_keep_only(
        meta=meta,
        num_to_keep=count,
        ckpt_predicate=_of_epoch,
        **{f"{which}s": [key] for which, key in best.items()},
    )
    checkpointer.delete_checkpoints(
        num_to_keep=0, ckpt_predicate=lambda one: not _of_epoch(one)
    )


def load_average(checkpointer, model, count, recoverable="model"):
    """Load the mean of the last `count` epochs' checkpoints into a model.

    By SpeechBrain's `average_checkpoints`; its own averager would give tied
    tensors wrong values, and counters fractions.
    """
    found = checkpointer.find_checkpoints(
        max_num_checkpoints=count, ckpt_predicate=_of_epoch
    )
    if len(found) < count:
        logger.warning(
            f"average_last: {count}, but there are {len(found)} checkpoints of "
            f"epochs in {checkpointer.checkpoints_dir}"
        )
    if not found:
        return
    mean = average_checkpoints(
        found,
        recoverable,
        averager=lambda states: mean_state([as_state(one) for one in states]),
    )
    model.load_state_dict(dict(mean))
    names = ", ".join(one.path.name for one in found)
    logger.info(f"The mean of {names} is tested")
